"""The GPU backend through the library, without a GPU: the plan, its uploads, Triton's host path and the kernels' PTX.

The backend is told to serve CPU tensors, and the stand-in driver of tests/tools runs its launches. What only a device
can show is in test_gpu_hardware.py.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastopt
from bench.workloads import WORKLOADS

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

triton = pytest.importorskip("triton")

from fastopt.kernels import multi_tensor, passes  # noqa: E402

from fastopt import gpu as backend  # noqa: E402
from fastopt import gpu_bucket, gpu_memory  # noqa: E402

from .tools import driver  # noqa: E402

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
capturable_rows = pytest.mark.parametrize(
    "row", [row for row in ROWS if "capturable" in row.theirs([torch.zeros(1)]).defaults], ids=lambda row: row.name
)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32)]  # of param and grad, of state
LAUNCHERS = [multi_tensor.update_launcher, multi_tensor.prepare_launcher]
LAUNCHERS += [passes.norm_launcher, passes.finish_launcher, passes.pass_launcher]
CHUNK = multi_tensor.CHUNK
ROOT = Path(__file__).parent.parent
SIZES = [0, 1, 3, 4, 7, 16, 31, 33, 127, 129, 255, CHUNK + 1]


@contextlib.contextmanager
def triton_serves_cpu_tensors(arch=90, **options):
    """The stand-in driver as an sm_`arch`; nothing of it is left afterwards. `options` are the driver's."""
    for launchers in LAUNCHERS:
        launchers.cache_clear()  # of another architecture
    with driver.installed(arch, **options) as stand_in:
        fastopt._C.set_gpu_type("cpu")
        try:
            yield stand_in
        finally:
            fastopt._C.set_gpu_type("cuda")
            for launchers in LAUNCHERS:
                launchers.cache_clear()


@pytest.fixture
def gpu():
    with triton_serves_cpu_tensors() as stand_in:
        yield stand_in


@pytest.fixture
def idle_gpu():
    """A GPU that is sent everything and does nothing: for the host's part."""
    with triton_serves_cpu_tensors(execute=False) as stand_in:
        yield stand_in


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def buckets(optimizer):
    return list(optimizer._fastopt_gpu.buckets.values())


# ---- every optimizer, option and dtype: the bits of the C++ backend


def values(size, dtype, number, device):
    """Elements of unlike magnitudes; two tensors of five are not aligned to 16 bytes."""
    offset = max(0, number % 5 - 2)
    storage = torch.randn(size + offset) * torch.logspace(-3, 1, size + offset)
    return storage.to(device, dtype)[offset:]


def table_of_groups(row, dtype, constructor, device, as_group):
    """A param group for each combination of the row's options that has these options of the constructor."""
    groups, numbers = [], itertools.count()
    for options in row.combinations():
        if constructor == {name: options[name] for name in row.constructor_only if name in options}:
            sizes = [(number, SIZES[number % len(SIZES)]) for number in itertools.islice(numbers, 2)]
            params = [torch.nn.Parameter(values(size, dtype, number, device)) for number, size in sizes]
            groups.append({**as_group(options), "params": params})
    transposed = torch.randn(7, 9).to(device, dtype).t()
    groups[-1]["params"].append(torch.nn.Parameter(transposed.clone(memory_format=torch.preserve_format)))
    return groups


def constructor_options(row):
    """Each combination of those options that a param group can't have."""
    found = [{name: it[name] for name in row.constructor_only if name in it} for it in row.combinations()]
    return [options for number, options in enumerate(found) if options not in found[:number]]


def drive_table(row, dtype, state_dtype, constructor, device="cpu", watch=lambda optimizer: None, as_group=dict):
    """Four steps, in which parameters take turns to be left out: snapshots after each, and the launches they need."""
    torch.manual_seed(0)
    optimizer = row.ours(table_of_groups(row, dtype, constructor, device, as_group), **constructor)
    params = params_of(optimizer)
    watch(optimizer)
    snapshots, launches = [], 0
    for t in range(4):
        for number, param in enumerate(params):
            grad = values(param.numel(), dtype, number + t, device)
            param.grad = grad.as_strided(param.shape, param.stride(), grad.storage_offset())
            if (number + t) % 5 == 0:
                param.grad = None
        if t == 1:
            for state in optimizer.state.values():
                state.update({name: state[name].to(state_dtype) for name in row.slots if state.get(name) is not None})
        optimizer.step()
        snapshots.append(snapshot(optimizer))
        alike = set()  # the states in use and their dtypes
        for param in params:
            if param.grad is not None and param.numel():
                state = optimizer.state.get(param, {})
                alike.add(tuple((name, state[name].dtype) for name in row.slots if state.get(name) is not None))
        launches += len(alike)
    return snapshots, launches


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@every_row
def test_bits_of_the_cpp_backend(row, dtypes):
    """On sm_80 and sm_90, in one launch for each set of states in use, which touches nothing but the step's tensors."""

    def allow_only_its_tensors(optimizer):
        """When a kernel is launched."""

        def launch(*arguments):
            ranges = stand_in.options["ranges"] = [bucket.buffer for bucket in buckets(optimizer)]
            for param in params_of(optimizer):
                if param.grad is not None:
                    ranges += [param, param.grad]
                    ranges += [x for x in optimizer.state.get(param, {}).values() if isinstance(x, torch.Tensor)]
            driver.Driver.launch(stand_in, *arguments)

        stand_in.launch = launch

    for constructor in constructor_options(row):
        expected, launches = drive_table(row, *dtypes, constructor)
        for arch in (80, 90):
            with triton_serves_cpu_tensors(arch) as stand_in:
                actual, _ = drive_table(row, *dtypes, constructor, watch=allow_only_its_tensors)
            assert_same_bits(actual, expected, f"{row.name} sm_{arch} {constructor}")
            assert len(stand_in.launches) == launches


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, BF16), (F32, F16), (BF16, F32), (F16, BF16)], ids=str)
@every_row
def test_state_dtype_on_the_gpu(row, dtypes, capturable):
    """Made in it, in one launch, with the bits of the C++ backend."""
    dtype, state_dtype = dtypes
    how = {"capturable": True} if capturable else {}
    if capturable and "capturable" not in row.theirs([torch.zeros(1)]).defaults:
        pytest.skip("torch's has no such option")

    def steps(how):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in (5, CHUNK + 3, 64)]
        optimizer = row.ours(params, **row.plain, **how, state_dtype=state_dtype)
        found = []
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape).to(dtype)
            optimizer.step()
            found.append(snapshot(optimizer))
        assert {optimizer.state[param][name].dtype for param in params for name in row.slots} == {state_dtype}
        return found

    expected = steps({})
    with triton_serves_cpu_tensors() as stand_in:
        assert_same_bits(steps(how), expected)
    assert len(stand_in.launches) == (6 if capturable else 3)


@every_row
def test_plan_follows_changes(row, gpu):
    """Parameters added, replaced and removed, state loaded and in another dtype, groups reordered: as on the CPU."""

    def steps():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (5, CHUNK + 3, 64)]
        optimizer = row.ours([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], **row.plain)
        found = []

        def step():
            for param in params_of(optimizer):
                param.grad = torch.randn(param.shape, dtype=param.dtype)
            optimizer.step()
            found.append(snapshot(optimizer))

        step()
        step()
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(3 * CHUNK)) for _ in range(20)]})
        step()
        added = [torch.nn.Parameter(torch.randn(33)), torch.nn.Parameter(torch.randn(9).bfloat16())]
        optimizer.add_param_group({"params": added, "weight_decay": 0.2})
        step()
        replaced = optimizer.param_groups[0]["params"][0]
        optimizer.param_groups[0]["params"][0] = replacement = torch.nn.Parameter(torch.randn(5))
        optimizer.state[replacement] = optimizer.state.pop(replaced)
        step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups.reverse()
        step()
        del optimizer.param_groups[1]["params"][3:]
        step()
        last = optimizer.param_groups[0]["params"][1]  # the bfloat16 one
        optimizer.state[last].update({name: optimizer.state[last][name].float() for name in row.slots})
        step()
        return found

    actual = steps()
    fastopt._C.set_gpu_type("cuda")
    assert_same_bits(actual, steps(), row.name)
    assert gpu.launches


# ---- what a step sends to the GPU


def scaled_down(workload):
    return [[tuple(-(-size // 16) for size in shape) for shape in group] for group in workload.groups]


def of_workload(row, name):
    """An optimizer of a benchmark's shapes, each dimension a 16th, in two groups if the workload has one."""
    shapes = scaled_down(WORKLOADS[name])
    if len(shapes) == 1:  # with and without weight decay
        shapes = [[shape for shape in shapes[0] if len(shape) > 1], [shape for shape in shapes[0] if len(shape) < 2]]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(shape)) for shape in group]} for group in shapes]
    for number, group in enumerate(groups):
        group["weight_decay"] = 0.1 / (1 + number)
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    return row.ours(groups, **row.plain)


@pytest.mark.parametrize("workload, tensors, groups", [("gpt2", 148, 2), ("465 groups", 465, 465)])
@every_row
def test_one_launch_per_step(row, workload, tensors, groups, idle_gpu):
    optimizer = of_workload(row, workload)
    params = params_of(optimizer)
    assert len(params) == tensors and len(optimizer.param_groups) == groups
    for t in range(3):
        optimizer.step()
        assert len(idle_gpu.launches) == t + 1
    assert idle_gpu.launches[-1].grid == (sum(-(-param.numel() // CHUNK) for param in params), 1, 1)


@every_row
def test_one_program_for_each_chunk(row, idle_gpu):
    """Work has each chunk of each tensor once, the table the tensors' addresses, scalars a row for each group."""
    optimizer = of_workload(row, "465 groups")
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (5, 3 * CHUNK, 2 * CHUNK + 1)]
    optimizer.add_param_group({"params": params})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    (bucket,) = buckets(optimizer)
    module = importlib.import_module(f"fastopt.kernels.{row.module}")
    ((_, programs, table_at, scalars_at, *_),) = fastopt._C.step(optimizer).launches
    words = bucket.buffer.tolist()
    table = [words[at : at + 4 + len(module.SLOTS)] for at in range(table_at, scalars_at, 4 + len(module.SLOTS))]
    chunks = [(number, at) for number, p in enumerate(params_of(optimizer)) for at in range(-(-p.numel() // CHUNK))]
    assert sorted(words[:programs]) == [number << 32 | at for number, at in chunks]
    for number, (param, line) in enumerate(zip(params_of(optimizer), table, strict=True)):
        state = [optimizer.state[param][name].data_ptr() for name in module.SLOTS]
        assert line == [param.numel(), min(number, 465), param.data_ptr(), param.grad.data_ptr(), *state]


@every_row
def test_lr_changes_and_growing_steps_compile_nothing(row, idle_gpu, monkeypatch):
    """Triton is asked for a kernel, compiled or from its cache, in the first step only."""
    asked = []
    compiled = triton.JITFunction._do_compile  # the public jit_cache_hook of Triton 3.6 takes no function as a constant
    monkeypatch.setattr(triton.JITFunction, "_do_compile", lambda *args: asked.append(1) or compiled(*args))
    idle_gpu.get_current_device = lambda: 1000 + ROWS.index(row)  # for which no other test has asked
    optimizer = of_workload(row, "465 groups")
    optimizer.step()
    assert len(asked) == 1
    for t in range(100):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9 + 0.001 * t
        optimizer.step()
    assert len(asked) == 1


@pytest.mark.parametrize("groups", [1, 2])
@every_row
def test_only_changes_are_uploaded(row, groups, idle_gpu):
    """One row of scalars comes with the launch: a step with stable addresses uploads nothing at all."""
    optimizer = of_workload(row, "gpt2")
    if groups == 1:
        optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    params = params_of(optimizer)
    module = importlib.import_module(f"fastopt.kernels.{row.module}")
    columns = 4 + len(module.SLOTS)
    scalars = groups * len(module.SCALARS) * 4 // 8 if groups > 1 else 0

    def uploaded():
        before = bucket.uploads, bucket.uploaded_words
        optimizer.step()
        return bucket.uploads - before[0], bucket.uploaded_words - before[1]

    optimizer.step()
    (bucket,) = buckets(optimizer)
    programs = sum(-(-param.numel() // CHUNK) for param in params)
    assert (bucket.uploads, bucket.uploaded_words) == (1, programs + len(params) * columns + scalars)
    uploaded()  # without momentum's first step
    uploads, words = uploaded()
    counts_steps = row.name in ("Adam", "AdamW", "Adagrad")  # their scalars depend on the step
    assert uploads == (counts_steps and groups > 1) and words <= scalars
    assert (words > 0) == uploads
    params[-1].grad = params[-1].grad.clone()
    assert uploaded() <= (1, columns + scalars)
    params[-3].grad = params[-3].grad.clone()
    assert (1, 1) <= uploaded() <= (1, 3 * columns + scalars)
    assert {param.grad.data_ptr() for param in params} <= set(bucket.buffer.tolist())
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    uploads, words = uploaded()
    assert uploads == (groups > 1) and words <= scalars
    assert (words > 0) == uploads


@every_row
def test_one_row_of_scalars_becomes_two_and_one_again(row, gpu):
    """A group that is frozen, has a step count of its own, or another lr: with the bits of the CPU step."""

    def steps():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (5, CHUNK + 3)]
        optimizer = row.ours([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], **row.plain)
        found = []
        for frozen in ((0,), (0,), (), (1,), (), (0, 1), (), (0,)):
            for number, param in enumerate(params):
                param.grad = None if number in frozen else torch.randn(param.shape)
            optimizer.param_groups[1]["lr"] *= 0.9
            optimizer.step()
            found.append(snapshot(optimizer))
        return found

    actual = steps()
    assert {launch.parameters[2] == bytes(8) for launch in gpu.launches} == {True, False}
    fastopt._C.set_gpu_type("cuda")
    assert_same_bits(actual, steps(), row.name)


@every_row
def test_second_step_allocates_nothing(row, idle_gpu):
    """Neither in C++ nor on the device nor page-locked, with other gradients and learning rates either."""
    optimizer = of_workload(row, "gpt2")
    params = params_of(optimizer)
    optimizer.step()
    optimizer.step()
    (bucket,) = buckets(optimizer)
    counters, buffer, staging = fastopt._C.counters(), bucket.buffer, list(bucket.staging)
    for t in range(10):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.param_groups[t % 2]["lr"] *= 0.9
        optimizer.step()
    assert fastopt._C.counters() == counters
    assert bucket.buffer is buffer and list(bucket.staging) == staging and len(staging) == 1
    idle_gpu.launches.clear()
    before = sys.getallocatedblocks()
    for _ in range(200):
        optimizer.step()
        idle_gpu.launches.clear()
    assert sys.getallocatedblocks() - before < 50


def test_memory_that_a_copy_may_still_read_is_not_written(gpu, monkeypatch):
    """As long as a staging buffer is not free it keeps what it holds; another one is taken, and later used again."""
    reading = []
    monkeypatch.setattr(gpu_memory.Staging, "free", lambda staging: staging not in reading)

    def step():
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        before = [(staging, staging.memory.clone()) for staging in reading]
        optimizer.step()
        assert all(torch.equal(staging.memory, content) for staging, content in before)

    params = [torch.nn.Parameter(torch.ones(40)) for _ in range(2)]
    optimizer = fastopt.Adam([{"params": [param]} for param in params], lr=0.1)  # two rows of scalars
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    (bucket,) = buckets(optimizer)
    (first,) = bucket.staging
    reading.append(first)
    step()
    (_, second) = bucket.staging
    reading.append(second)
    step()
    assert len(bucket.staging) == 3
    reading.remove(first)
    content = first.memory.clone()
    step()
    assert len(bucket.staging) == 3 and not torch.equal(first.memory, content)
    param.grad = param.grad.clone()  # a larger upload, and the second buffer is still in use
    step()
    assert len(bucket.staging) == 4

    other = torch.nn.Parameter(torch.ones(40))
    on_cpu = fastopt.Adam([other], lr=0.1)
    other.grad = param.grad
    fastopt._C.set_gpu_type("cuda")
    for _ in range(5):
        on_cpu.step()
        on_cpu.param_groups[0]["lr"] *= 0.9
    assert_same_bits(param, other)


# ---- capturable=True: what may change is read on the device


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F64, F64)], ids=lambda dtypes: str(dtypes[0])[6:])
@capturable_rows
def test_capturable_has_the_bits_of_scalars_from_the_host(row, dtypes, gpu):
    """Over all options; but for the last bit of fp64, in which the powers of beta are not one function everywhere.

    A tensor counts as the number it holds, whereas on the host the arithmetic of its dtype is used, as torch does.
    """

    def with_numbers(options):
        def number(value):
            return tuple(map(number, value)) if isinstance(value, tuple) else getattr(value, "item", lambda: value)()

        return {name: number(value) for name, value in options.items()}

    for constructor in constructor_options(row):
        torch.manual_seed(0)
        expected, _ = drive_table(row, *dtypes, constructor, as_group=with_numbers)
        before = len(gpu.launches)
        actual, launches = drive_table(
            row, *dtypes, constructor, as_group=lambda options: {**options, "capturable": True}
        )
        assert launches < len(gpu.launches) - before <= 2 * launches + 4  # of prepare, for tensors without elements too
        assert fastopt.backend_info()["torch_steps"].get(f"{row.name}: capturable=True", 0) == 0
        if dtypes[0] != F64:
            assert_same_bits(actual, expected, row.name)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15, equal_nan=True)


@capturable_rows
def test_capturable_takes_tensors_and_steps_of_its_own(row, gpu):
    """lr as a tensor is read where it is, fp32 or fp64; step counts may differ, and be what a checkpoint left."""
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
        lr = [torch.tensor(0.1, dtype=dtype) if capturable else 0.1 for dtype in (F32, F64)]
        groups = [{"params": params[:2], "lr": lr[0]}, {"params": params[2:], "lr": lr[1]}]
        optimizer = row.ours(groups, capturable=capturable)
        for t in range(4):
            for number, param in enumerate(params):
                param.grad = torch.randn(5) if t or number % 2 else None
            if t == 2:
                optimizer.state[params[0]]["step"] = 7  # as in old files
                optimizer.state[params[1]]["step"] = torch.tensor(7.0, dtype=F64)
            optimizer.step()
            for group, dtype in zip(optimizer.param_groups, (F32, F64), strict=True):
                if capturable:
                    group["lr"].mul_(0.5)
                else:
                    group["lr"] = (torch.tensor(group["lr"], dtype=dtype) * 0.5).item()
        versions = [optimizer.state[param]["step"]._version for param in params]
        results.append([snapshot(optimizer), versions])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-7, atol=0)
    assert results[1][1] == results[0][1]


class Recorded(NamedTuple):
    function: Callable
    arguments: tuple
    run: Callable


class Graph:
    """What a CUDA graph does with copies and launches: none runs at the capture, all of them at each replay.

    Memory that is asked for meanwhile stays the graph's.
    """

    def __init__(self, monkeypatch):
        self.work, self.memory, self.monkeypatch = [], [], monkeypatch

    @contextlib.contextmanager
    def capture(self):
        def record(function):
            def add(*arguments, **options):
                work = functools.partial(function, *arguments, **options)
                self.work.append(Recorded(function, arguments, work))

            return add

        def keep(*arguments, make=torch.empty, **options):
            self.memory.append(make(*arguments, **options))
            return self.memory[-1]

        with self.monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(torch, "empty", keep)
            patch.setattr(torch.Tensor, "copy_", record(torch.Tensor.copy_))
            patch.setattr(multi_tensor.Launcher, "launch", record(multi_tensor.Launcher.launch))
            yield

    def replay(self):
        for recorded in self.work:
            recorded.run()


@capturable_rows
def test_graphs_replay_steps(row, gpu, monkeypatch):
    """Two graphs of unlike tensors, steps between their replays, one lr: as the same steps without graphs."""

    def run(use_graphs):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size)) for size in (3, 40, CHUNK + 5)]
        lr = torch.tensor(0.1)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
        optimizer = row.ours(groups, lr=lr, capturable=True)
        grads = [[torch.empty_like(param) for param in params] for _ in range(3)]

        def step_with(number):
            for param, grad in zip(params, grads[number], strict=True):
                param.grad = grad
            if number == 2:
                params[1].grad = None
            optimizer.step()

        def fill():
            for grad in itertools.chain(*grads):
                grad.normal_()
            lr.mul_(0.9)

        fill()
        step_with(0)
        ways = [lambda number=number: step_with(number) for number in range(3)]
        if use_graphs:
            monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            for number in (1, 2):
                graph = Graph(monkeypatch)
                before = snapshot(optimizer)
                with graph.capture():
                    step_with(number)
                assert_same_bits(snapshot(optimizer), before, row.name)
                assert [optimizer._fastopt_gpu._in_graph, bool(graph.work)] == [True, True]
                ways[number] = graph.replay
        for number in (1, 2, 0, 1, 0, 0, 2, 2, 0):
            fill()
            ways[number]()
        return snapshot(optimizer)

    assert_same_bits(run(True), run(False), row.name)


def captured_words(monkeypatch, optimizer):
    """Captures a step: how many words each replay uploads, and how many captures must be held for it that were not."""
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    before, graph = len(gpu_bucket.held_for_graphs), Graph(monkeypatch)
    with graph.capture():
        optimizer.step()
    copies = [work for work in graph.work if work.function is torch.Tensor.copy_]
    return sum(work.arguments[0].numel() for work in copies), len(gpu_bucket.held_for_graphs) - before


@capturable_rows
def test_a_graph_uploads_what_can_differ(row, idle_gpu, monkeypatch):
    """Not the list of work, unless it is another than that of the step before; and graphs that are alike share it."""
    params = [torch.nn.Parameter(torch.zeros(size)) for size in (40 * CHUNK, 7)]
    optimizer = row.ours(params, **row.plain, capturable=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    module = importlib.import_module(f"fastopt.kernels.{row.module}")
    a_row, numbers = 4 + len(module.SLOTS) + 1 + len(module.HYPERS), len(module.HYPERS)
    assert captured_words(monkeypatch, optimizer) == (2 * a_row + numbers, 1)
    assert captured_words(monkeypatch, optimizer) == (2 * a_row + numbers, 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert captured_words(monkeypatch, optimizer) == (2 * a_row + numbers, 0)
    params[0].grad = params[0].grad.clone()
    assert captured_words(monkeypatch, optimizer) == (2 * a_row + numbers, 1)
    params[1].grad = None
    assert captured_words(monkeypatch, optimizer) == (40 + a_row + numbers, 1)


@every_row
def test_a_plain_step_does_nothing_for_what_others_do_beside_it(row, idle_gpu, monkeypatch):
    """Clipping, scales and averages cost the host nothing where there are none."""
    optimizer, params = stepped(row)
    idle_gpu.launches.clear()
    for place, name in (("gpu.Sent", "__new__"), ("gpu.Gpu", "make_ready"), ("optimizer", "_step_with")):
        monkeypatch.setattr(f"fastopt.{place}.{name}", None)
    optimizer.step()
    assert len(idle_gpu.launches) == 1


@every_row
def test_a_buffer_is_kept_for_every_stream_that_uses_it(row, idle_gpu, monkeypatch):
    """Memory is handed out again when what its own stream was sent is done, unless it is told of another stream."""
    recorded, stream = [], 0
    idle_gpu.get_current_stream = lambda device: stream
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream)))
    optimizer, params = stepped(row)
    (bucket,) = buckets(optimizer)
    assert not recorded
    first = bucket.buffer
    for used in (7, 7, 0, 9, 7):
        stream = used
        optimizer.step()
    assert [(tensor is first, used) for tensor, used in recorded] == [(True, 7), (True, 9)]
    added = torch.nn.Parameter(torch.ones(CHUNK * 9))
    added.grad = torch.ones_like(added)
    optimizer.add_param_group({"params": [added]})
    optimizer.step()  # the buffer grows on stream 7
    assert bucket.buffer is not first and len(recorded) == 2
    stream = 9
    optimizer.step()
    assert len(recorded) == 3 and recorded[-1][0] is bucket.buffer and recorded[-1][1] == 9


def test_events_are_queried_and_memory_is_locked_whatever_another_thread_captures(gpu, monkeypatch):
    """Both would break a capture in the default mode; the mode of this thread is relaxed meanwhile, and only then."""
    modes, mode = [], 0

    def exchange(pointer):
        nonlocal mode
        pointer._obj.value, mode = mode, pointer._obj.value

    class Event:
        def query(self):
            modes.append(mode)
            return False

        def record(self):
            pass

    def empty(*args, make=torch.empty, **options):
        modes.append(mode) if "pin_memory" in options else None
        return make(*args, **options)

    monkeypatch.setattr(gpu_memory, "_exchange_capture_mode", lambda: exchange)
    monkeypatch.setattr(torch, "empty", empty)
    optimizer, params = stepped(next(row for row in ROWS if row.name == "Adam"))
    for _ in range(3):
        for staging in buckets(optimizer)[0].staging:
            staging.copied = Event()
        params[0].grad = params[0].grad.clone()
        optimizer.step()
    assert len(modes) == 1 + 3 + 3 and set(modes) == {gpu_memory.CAPTURE_MODE_RELAXED} and mode == 0


@capturable_rows
def test_capture_before_a_first_step_is_refused(row, gpu, monkeypatch):
    """State and buffers made in a graph would be made again at each replay."""
    optimizer, params = stepped(row, capturable=True)
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    new = torch.nn.Parameter(torch.ones(CHUNK * 9))
    new.grad = torch.ones_like(new)
    optimizer.add_param_group({"params": [new]})
    before = snapshot(optimizer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph before it ran outside"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before, row.name)
    assert new not in optimizer.state


@capturable_rows
def test_options_that_change_on_the_way_to_a_capture(row, gpu, monkeypatch):
    """What was stepped without capturable before has no part in a graph."""
    optimizer, params = stepped(row)
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    graph = Graph(monkeypatch)
    before = [param.detach().clone() for param in params]
    with graph.capture():
        optimizer.step()
    graph.replay()
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_number_on_the_gpu_does_not_decide_on_the_state(gpu):
    """Whether there is a momentum_buffer is the host's to know; such a step is torch's, which refuses this CPU here."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.RMSprop([param], momentum=torch.tensor(0.9), capturable=True)
    param.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize("part", ["upload", "launch"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_after_one_that_failed(part, capturable, gpu, monkeypatch):
    """It counts for nothing; what was not uploaded then is uploaded later."""
    param = torch.nn.Parameter(torch.ones(10))
    optimizer = fastopt.Adam([param], lr=0.1, capturable=capturable)

    def fail(*_):
        raise KeyboardInterrupt

    for t in range(2):  # at the first step, and at a later one
        param.grad = torch.randn(10)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_bucket.Bucket if part == "upload" else multi_tensor.Launcher, part, fail)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        before = param.detach().clone()
        assert optimizer.state[param]["step"] == t
        optimizer.step()
        assert not torch.equal(param.detach(), before) and optimizer.state[param]["step"] == t + 1
        (bucket,) = buckets(optimizer)
        assert {param.data_ptr(), param.grad.data_ptr()} <= set(bucket.buffer.tolist())


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode], ids=["device", "inference_mode"])
def test_modes_at_the_first_step(mode, gpu):
    """What is made there serves later steps outside, and is where it must be."""
    param = torch.nn.Parameter(torch.ones(10))
    optimizer = fastopt.Adagrad([param], lr=0.1)  # has its state already
    param.grad = torch.ones(10)
    with mode():
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert len(gpu.launches) == 2


@capturable_rows
def test_hot_capturable_step_uploads_and_allocates_nothing(row, idle_gpu):
    """Not the scalars either: a growing step is none of the host's."""
    optimizer, params = stepped(row, capturable=True)
    optimizer.step()
    (bucket,) = buckets(optimizer)
    allocations, uploads = fastopt._C.counters()["allocations"], bucket.uploads
    for _ in range(5):
        optimizer.step()
    assert (fastopt._C.counters()["allocations"], bucket.uploads) == (allocations, uploads)
    optimizer.param_groups[0]["lr"] *= 0.5
    before = bucket.uploaded_words
    optimizer.step()
    assert bucket.uploads == uploads + 1 and bucket.uploaded_words - before <= 8  # the numbers of the group


# ---- what is refused, and what is torch's


def stepped(row, count=3, **options):
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(count)]
    optimizer = row.ours(params, **row.plain, **options)
    for param in params:
        param.grad = torch.randn(4, 3)
    optimizer.step()
    return optimizer, params


@every_row
def test_state_elsewhere_is_refused(row, gpu):
    optimizer, params = stepped(row)
    slot = row.slots[0]
    kept, before, launches = optimizer.state[params[1]][slot], snapshot(optimizer), len(gpu.launches)
    optimizer.state[params[1]][slot] = kept.to("meta")
    with pytest.raises(RuntimeError, match=rf"state\['{slot}'\] of parameter 1 of param group 0 is on meta"):
        optimizer.step()
    optimizer.state[params[1]][slot] = kept
    assert_same_bits(snapshot(optimizer), before, row.name)
    assert len(gpu.launches) == launches


def other_strides(optimizer, params):
    params[1].grad = torch.randn(3, 4).t()


def shared_memory(optimizer, params):
    params[1].data = params[0].data
    params[1].grad = torch.randn(4, 3)


def complex_parameter(optimizer, params):
    added = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    added.grad = torch.randn(3, dtype=torch.complex64)
    optimizer.add_param_group({"params": [added]})


def states_of_unlike_dtypes(optimizer, params):
    for name, value in optimizer.state[params[1]].items():
        if name not in ("step", "exp_avg", "square_avg") and value is not None:
            optimizer.state[params[1]][name] = value.bfloat16()


@pytest.mark.parametrize(
    "change, reason",
    [
        (other_strides, "on a GPU, a parameter, its gradient and state differ in strides"),
        (shared_memory, "on a GPU, parameters share memory"),
        (complex_parameter, "a parameter is complex"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@every_row
def test_steps_left_to_torch_are_listed(row, change, reason, gpu):
    """They are torch's, and backend_info() says how many and why."""

    def step(make):
        torch.manual_seed(0)
        optimizer, params = stepped(row)
        kind = make(optimizer)
        change(kind, params)
        kind.step()
        return snapshot(kind)

    def torchs(optimizer):
        theirs = row.theirs(params_of(optimizer), **row.plain, foreach=None)
        theirs.load_state_dict(optimizer.state_dict())
        return theirs

    expected = step(torchs)
    launches, key = len(gpu.launches), f"{row.name}: {reason}"
    count = fastopt.backend_info()["torch_steps"].get(key, 0)
    actual = step(lambda optimizer: optimizer)
    assert fastopt.backend_info()["torch_steps"][key] == count + 1
    assert len(gpu.launches) == launches + 1  # before the change
    assert_same_bits(actual, expected, row.name)


def test_states_of_unlike_dtypes_are_torchs(gpu):
    row = next(row for row in ROWS if row.name == "Adam")
    optimizer, params = stepped(row)
    states_of_unlike_dtypes(optimizer, params)
    key = "Adam: on a GPU, the state tensors of a parameter differ in dtype"
    count = fastopt.backend_info()["torch_steps"].get(key, 0)
    with contextlib.suppress(RuntimeError):  # torch's lerp may refuse them
        optimizer.step()
    assert fastopt.backend_info()["torch_steps"].get(key, 0) == count + 1


@every_row
def test_capture_is_refused(row, gpu, monkeypatch):
    """A graph would replay this step's scalars for ever: torch's error, at a first step and later; nothing changed."""
    optimizer, params = stepped(row)
    why = f"capture of step.. for an instance of {row.name} but .* capturable is False"
    if "capturable" not in optimizer.defaults:
        why = f"{row.name} cannot be captured in a CUDA graph"
    before, launches = snapshot(optimizer), len(gpu.launches)
    new = torch.nn.Parameter(torch.ones(3))
    first = row.ours([new], **row.plain)
    entries = len(first.state)
    new.grad = torch.ones(3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(backend.Gpu, "_on_cuda", True, raising=False)
    monkeypatch.setattr(optimizer._fastopt_gpu, "_on_cuda", True)
    with pytest.raises(RuntimeError, match=why):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before, row.name)
    monkeypatch.setattr(fastopt._C, "gpu_type", lambda: "cuda")
    with pytest.raises(RuntimeError, match=why):
        first.step()
    assert torch.equal(new.detach(), torch.ones(3)) and len(first.state) == entries and first._fastopt_gpu is None
    assert len(gpu.launches) == launches


WITHOUT_TRITON = """
import sys, torch, fastopt
assert "triton" not in sys.modules, "import fastopt imports triton"
sys.modules["triton"] = None  # as if it were not installed; torch.optim's constructors try to import it
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = fastopt.Adam([param], lr=0.1)
optimizer.step()
assert not any(name.startswith(("fastopt.gpu", "fastopt.kernels")) for name in sys.modules)

fastopt._C.set_gpu_type("cpu")
before = param.detach().clone(), {name: value.clone() for name, value in optimizer.state[param].items()}
new = torch.nn.Parameter(torch.ones(3))
new.grad = torch.ones(3)
first = fastopt.Adam([new])
for kind in (optimizer, first, optimizer):
    try:
        kind.step()
    except ImportError as error:
        assert "package `triton` is not installed: pip install triton" in str(error), error
    else:
        raise AssertionError("stepped without triton")
assert torch.equal(param, before[0]) and torch.equal(new, torch.ones(3)) and not first.state
assert all(torch.equal(optimizer.state[param][name], value) for name, value in before[1].items())
fastopt._C.set_gpu_type("cuda")
optimizer.step()
assert optimizer.state[param]["step"] == 2
print("done")
"""


def python(*arguments, **environment):
    command, env = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_triton_is_wanted_for_gpu_tensors_only():
    """Without it a step of GPU tensors names the package and changes nothing; on the CPU it is never imported."""
    done = python("-c", WITHOUT_TRITON)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


ON_THE_STUB = """
import sys, torch, triton, fastopt
from tests.tools import stub_driver

def optimizer(dtypes):
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    for param in params:
        param.grad = torch.ones_like(param)
    return fastopt.Adam(params, lr=0.1)

def refused(kind):
    try:
        kind.step()
    except RuntimeError as error:
        return " ".join(str(error).split())
    raise AssertionError("stepped")

with stub_driver.installed() as stub:
    fastopt._C.set_gpu_type("cpu")
"""
FAILED_LAUNCH = """
    both = optimizer([torch.float32, torch.bfloat16])
    both.step()
    stub.fail_launches(719)  # CUDA_ERROR_LAUNCH_FAILED
    text = refused(both)
    assert "launch 1 of 2 of adam's kernel, on cpu:0: Triton Error [CUDA]: an error of the stub" in text, text
    assert [state["step"].item() for state in both.state.values()] == [1, 1]
    stub.fail_launches(0)
    both.step()
    assert [state["step"].item() for state in both.state.values()] == [2, 2]
"""
NO_KERNEL = """
    {prepare}
    first = optimizer([torch.float32])
    for _ in range(2):
        text = refused(first)
        assert "could not make fastopt's kernel of adam for cpu:0: {error}" in text, text
        assert not first.state
"""
on_the_stub = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which(os.environ.get("CC", "cc")) is None,
    reason="there is a GPU, or no C compiler to build the stub with",
)


def run_on_the_stub(body, **environment):
    done = python("-c", ON_THE_STUB + body + "print('done')", **environment)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@on_the_stub
def test_a_launch_that_fails_says_so():
    """And the step after it counts on from where the one before it was."""
    run_on_the_stub(FAILED_LAUNCH)


CAPTURE_MODE = """
    import ctypes
    from fastopt import gpu_memory

    def mode(new):
        found = ctypes.c_int(new)
        gpu_memory._exchange_capture_mode()(ctypes.byref(found))
        return found.value

    with gpu_memory.ThreadMayUseCuda():
        assert mode(gpu_memory.CAPTURE_MODE_RELAXED) == gpu_memory.CAPTURE_MODE_RELAXED
    assert mode(1) == 0
    with gpu_memory.ThreadMayUseCuda():
        pass
    assert mode(0) == 1
"""


@on_the_stub
def test_capture_mode_of_the_thread():
    """As the driver's function has it: 2 meanwhile, and then what it was."""
    run_on_the_stub(CAPTURE_MODE)


@on_the_stub
def test_kernels_that_triton_cannot_make(tmp_path):
    """A cache that cannot be written, no ptxas: what is missing is named, and nothing was changed."""
    cache = tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("in the way of a folder")
    in_the_cache = f"triton.knobs.cache.dir = {str(cache)!r}"
    run_on_the_stub(NO_KERNEL.format(prepare=in_the_cache, error="NotADirectoryError"))
    no_ptxas = "triton.knobs.NvidiaTool.from_path = staticmethod(lambda path: None)"
    new_cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    run_on_the_stub(NO_KERNEL.format(prepare=no_ptxas, error="RuntimeError: Cannot find ptxas"), **new_cache)


@on_the_stub
def test_two_processes_with_one_cache(tmp_path):
    """Two programs on a GPU, both new: each makes the kernels, in one folder, and steps."""
    body = "    [optimizer([torch.float32, torch.bfloat16, torch.float64]).step() for _ in range(2)]\n"
    command = [sys.executable, "-c", ON_THE_STUB + body + "print('done')"]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    running = [subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in running] == ["done\n"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_without_a_gpu_says_so(tmp_path):
    done = python("-m", "bench.gpu", "--json", str(tmp_path / "results.json"))
    assert done.returncode != 0 and "no CUDA or ROCm device" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@on_the_stub
def test_host_benchmark_runs(tmp_path):
    done = python("-m", "bench.gpu_host", "--quick", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["tensors"] for result in results] == [148, 291, 1000]
    assert all(result["ratio"]["fused"]["median"] > 1 for result in results)


@pytest.mark.slow
@on_the_stub
def test_uploads_of_a_large_model(tmp_path):
    done = python("-m", "bench.gpu_host", "--uploads", "--json", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["uploads"]
    uploaded = {(result["groups"], result["capturable"], result["what"]): result["bytes"] for result in found}
    assert all(result["tensors"] == 291 and result["copies"] <= 1 for result in found)
    assert uploaded[1, False, "nothing changes"] == uploaded[1, False, "lr changes"] == 0
    assert uploaded[2, False, "nothing changes"] == 2 * 12 * 4


# ---- a scaler


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("row", [ROWS[0], ROWS[-1]], ids=lambda row: row.name)
def test_grad_scaler(row, dtype, gpu):
    """Searched and unscaled by kernels: torch's scale, skipped steps and bits; one number is waited for."""
    from .test_grad_scaler import drive, same

    def run(cls, **own):
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(size, generator=generator).to(dtype) for size in ((), (5,), (CHUNK + 1,))]
        params = [torch.nn.Parameter(value) for value in start]
        optimizer = row.ours(params, **row.plain, **own)
        scaler = cls("cpu", init_scale=2.0**10, growth_factor=1.7, backoff_factor=0.6, growth_interval=2)

        def clip(scaler, optimizer, params):
            scaler.unscale_(optimizer)
            fastopt.clip_grad_norm_(params, 2.0)

        return drive(scaler, [optimizer], [params], 5, clip if not own else None), len(gpu.launches)

    before = len(gpu.launches)
    expected, between = run(torch.amp.GradScaler)
    folded, after = run(fastopt.GradScaler, max_grad_norm=2.0)
    same(folded, expected, "folded")
    assert before < between < after
