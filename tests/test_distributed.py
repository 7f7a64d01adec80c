"""torch.distributed's wrappers around fastopt on two gloo processes: the bits of torch.optim under the same wrapper.

A scenario runs in every process, with `make` for the optimizer of a list of parameters, once with fastopt's class and
once with torch's for-loop; it returns what must be equal. The reference's square root works on DTensors here.
"""

import contextlib
import copy
import itertools
import os
import statistics
import sys
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits

pytestmark = pytest.mark.slow


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def correctly_rounded_sqrt():
    with reference.correctly_rounded_sqrt():
        plain, plain_in_place = torch.Tensor.sqrt, torch.Tensor.sqrt_

        def sqrt(x):
            if not isinstance(x, DTensor):
                return plain(x)
            return DTensor.from_local(
                plain(x.to_local()), x.device_mesh, x.placements, shape=x.shape, stride=x.stride()
            )

        def sqrt_in_place(x):
            plain_in_place(local(x))
            return x

        torch.Tensor.sqrt, torch.Tensor.sqrt_ = sqrt, sqrt_in_place
        yield


@torch.no_grad()
def values_of(optimizer):
    """Copies of this process's part of all parameters and state."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            for _, tensor in (("", param), *sorted(optimizer.state.get(param, {}).items())):
                if isinstance(tensor, torch.Tensor):
                    found.append(local(tensor).clone())
    return found


def model_of_odd_sizes():
    """5 rows are not shared evenly by two processes, and of 1 row the second one gets nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1))


def train(model, optimizer, steps=4, before_step=lambda: None):
    torch.manual_seed(100 + dist.get_rank())
    found = []
    for t in range(steps):
        optimizer.zero_grad(set_to_none=t % 2 == 0)
        model(torch.randn(3, 6)).square().mean().backward()
        before_step()
        with correctly_rounded_sqrt():
            optimizer.step()
        found += values_of(optimizer)
    return found


def ddp(make):
    model = nn.parallel.DistributedDataParallel(model_of_odd_sizes(), gradient_as_bucket_view=True)
    return train(model, make(model.parameters()))


def sharded(model, **options):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(make):
    model = sharded(model_of_odd_sizes())
    assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizer = make(model.parameters())
    found = train(model, optimizer, before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    state = optimizer.state[next(model.parameters())]
    assert all(isinstance(value, DTensor) for name, value in state.items() if name != "step")
    return found


def fsdp2_mixed_precision(make):
    model = sharded(model_of_odd_sizes(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return train(model, make(model.parameters()))


def fsdp2_beside_plain_parameters(make):
    model, head = sharded(model_of_odd_sizes()), nn.Linear(6, 2)
    optimizer = make([{"params": model.parameters()}, {"params": head.parameters(), "lr": 0.5}])
    return train(model, optimizer) + train(lambda x: head(x) * model(x), optimizer)


def replicated_and_sharded_dtensors(make):
    """As tensor parallelism leaves them, with a strided local part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    params = [
        nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [placement]))
        for placement in (Shard(0), Shard(1), Replicate())
    ]
    return train(lambda x: sum((p * p).sum() for p in params).full_tensor() * x.new_ones(()), make(params))


def fsdp1(make):
    found = []
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(
            model_of_odd_sizes(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        found += train(model, make(model.parameters()))
    return found


def zero_redundancy(make):
    found = []
    for bucket_view in (False, True):
        model = nn.parallel.DistributedDataParallel(model_of_odd_sizes())
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), make.optimizer_class, parameters_as_bucket_view=bucket_view, **make.options
        )
        found += train(model, optimizer)
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            saved = optimizer.state_dict()
            found += [
                value for key in sorted(saved["state"]) for value in saved["state"][key].values() if value is not None
            ]
    return found


class Make:
    def __init__(self, optimizer_class, **options):
        self.optimizer_class, self.options = optimizer_class, options

    def __call__(self, params):
        return self.optimizer_class(params, **self.options)


def same_under_the_wrapper(scenario):
    for row in ROWS:
        options = copy.deepcopy(row.plain)
        before = fastopt.backend_info()["torch_steps"]
        results = []
        for make in (Make(row.ours, **options), Make(row.theirs, foreach=False, **options)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the wrappers
                results.append(scenario(make))
        assert len(results[0]) > 10
        assert_same_bits(*results, f"{scenario.__name__} {row.name}")
        assert fastopt.backend_info()["torch_steps"] == before, "torch's own step ran"


def host_time_of_dtensors(_):
    """Prints milliseconds of a step on 100 DTensor parameters, median of 30."""
    mesh = init_device_mesh("cpu", (1,))
    taken = {}
    for name, cls, how in (
        ("torch default", torch.optim.AdamW, {"foreach": False}),
        ("torch foreach", torch.optim.AdamW, {"foreach": True}),
        ("torch fused", torch.optim.AdamW, {"fused": True}),
        ("fastopt", fastopt.AdamW, {}),
    ):
        params = [nn.Parameter(distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)])) for _ in range(100)]
        for param in params:
            param.grad = distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)])
        optimizer = cls(params, **how)
        times = []
        for _ in range(33):
            begin = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - begin)
        taken[name] = 1e3 * statistics.median(times[3:])
    print("a step on 100 DTensor parameters:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in taken.items()))
    assert taken["fastopt"] < min(ms for name, ms in taken.items() if name != "fastopt")


def clip_dtensors(_):
    """The norm is that of the whole tensors, a DTensor as torch's, the same in all processes; then torch's bits."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    planes = [init_device_mesh("cpu", shape) for shape in ((1, size), (size, 1))]
    both = [
        (line, ((Shard(0),), (Shard(1),), (Replicate(),))),
        (line, ((Replicate(),),)),
        *((plane, ((Shard(0), Shard(1)), (Replicate(), Shard(0)), (Shard(1), Replicate()))) for plane in planes),
    ]
    for mesh, placements in both:
        for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float64,)):
            torch.manual_seed(0)
            # 3 rows are not shared evenly, and of 1 row the second process gets nothing
            whole = [
                (torch.randn(rows, 50), place, dtype) for dtype in dtypes for place in placements for rows in (3, 1)
            ]

            def parameters(whole=whole, mesh=mesh):
                params = []
                for value, place, dtype in whole:
                    params.append(nn.Parameter(distribute_tensor(torch.zeros(value.shape, dtype=dtype), mesh, place)))
                    params[-1].grad = distribute_tensor(value.to(dtype, copy=True), mesh, place)
                return [nn.Parameter(torch.zeros(1)), *params]  # one without gradient

            for order in (2.0, 1.0, float("inf")):
                before = fastopt.backend_info()["torch_steps"]
                params = parameters()
                norm = fastopt.clip_grad_norm_(params, 0.5, order)
                assert fastopt.backend_info()["torch_steps"] == before, "torch's own function ran"
                assert type(norm) is DTensor and norm.device_mesh == mesh and norm.shape == ()
                assert norm.placements == (Replicate(),) * mesh.ndim
                exact = fastopt.get_total_norm([value.to(dtype).double() for value, _, dtype in whole], order).item()
                eps = torch.finfo(norm.dtype).eps
                assert abs(norm.to_local().item() - exact) <= (4 if norm.dtype == torch.float64 else 1) * eps * exact
                everywhere = [torch.zeros((), dtype=norm.dtype) for _ in range(size)]
                dist.all_gather(everywhere, norm.to_local())
                assert_same_bits(everywhere, [norm.to_local()] * size, "of all processes")
                theirs, given = parameters(), parameters()
                nn.utils.clip_grads_with_norm_(theirs, 0.5, norm)
                fastopt.clip_grads_with_norm_(given, 0.5, norm)
                expected = [param.grad.to_local() for param in theirs[1:]]
                assert_same_bits([param.grad.to_local() for param in params[1:]], expected, "clipped")
                assert_same_bits([param.grad.to_local() for param in given[1:]], expected, "with the norm")
                if order != float("inf"):  # where torch's hangs: the process with an empty part raises
                    torchs = nn.utils.clip_grad_norm_(parameters(), 0.5, order)
                    assert type(torchs) is DTensor and torchs.placements == norm.placements
                    rtol = 1e-2 if torch.bfloat16 in dtypes else 1e-5
                    torch.testing.assert_close(norm.to_local().to(torchs.dtype), torchs.to_local(), rtol=rtol, atol=0)

    bad = [distribute_tensor(torch.tensor([1.0, float("nan")]), line, [Shard(0)])]
    with pytest.raises(RuntimeError, match="order 2.0 for gradients from `parameters` is non-finite"):
        fastopt.get_total_norm(bad, error_if_nonfinite=True)
    assert fastopt.get_total_norm(bad, float("inf")).to_local().isnan()

    partial = nn.Parameter(distribute_tensor(torch.zeros(4), line, [Replicate()]))
    partial.grad = DTensor.from_local(torch.ones(4), line, [Partial()])
    norm = fastopt.clip_grad_norm_(partial, 1e9)
    assert norm.full_tensor().item() == pytest.approx(2 * size)
    assert any("clip_grad_norm_" in reason for reason in fastopt.backend_info()["torch_steps"])


def clip_mixed_dtensors(_):
    """Of several meshes or beside plain tensors: torch's result or error, whatever `foreach` is, and torch's bits."""
    size = dist.get_world_size()
    line, plane = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (1, size))
    named = init_device_mesh("cpu", (size,), mesh_dim_names=("x",))
    on_line, plain = (line, (Shard(0),)), (None, ())
    mixtures = [
        (on_line, plain), (plain, (line, (Replicate(),))), (on_line, (named, (Shard(0),))),
        (on_line, (plane, (Replicate(), Shard(0)))),
    ]  # fmt: skip
    calls = (
        lambda of, params, foreach: of.clip_grad_norm_(params, 0.5, foreach=foreach),
        lambda of, params, foreach: of.get_total_norm([param.grad for param in params], foreach=foreach),
        lambda of, params, foreach: of.clip_grads_with_norm_(params, 0.5, torch.tensor(5.0), foreach=foreach),
        lambda of, params, foreach: of.clip_grad_value_(params, 0.3, foreach=foreach),
    )
    results = 0
    for mixture, call, foreach in itertools.product(mixtures, calls, (None, False)):
        both = []
        for of in (nn.utils, fastopt):
            torch.manual_seed(0)
            params = []
            for mesh, placements in mixture:
                params.append(nn.Parameter(torch.zeros(4, 6)))
                grad = torch.randn(4, 6)
                if mesh is not None:
                    params[-1] = nn.Parameter(distribute_tensor(params[-1].data, mesh, placements))
                    grad = distribute_tensor(grad, mesh, placements)
                params[-1].grad = grad
            try:
                answer = call(of, params, foreach)
                results += 1
            except RuntimeError as error:
                answer = str(error)
            tensors = [local(param.grad) for param in params]
            if isinstance(answer, torch.Tensor):
                tensors.append(local(answer))
            both.append((type(answer), answer if isinstance(answer, str) else None, tensors))
        assert both[0][:2] == both[1][:2]
        assert_same_bits(both[0][2], both[1][2], f"{mixture}, foreach={foreach}")
    assert results, "torch takes none of them: nothing was compared"


def clip_in_fsdp2(_):
    """As in a training script; the same norm of the whole model as in one process."""
    for clip in (fastopt.clip_grad_norm_, nn.utils.clip_grad_norm_):
        model, whole = sharded(model_of_odd_sizes()), model_of_odd_sizes()
        x = torch.randn(3, 6)
        dist.broadcast(x, 0)
        for each in (model, whole):
            each(x).square().mean().backward()
        norm = clip(model.parameters(), 0.1)
        expected = fastopt.clip_grad_norm_(whole.parameters(), 0.1)
        assert norm.full_tensor().item() == pytest.approx(expected.item(), rel=1e-5)
        for a, b in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-6)


def save(path):
    """Every optimizer trains two steps under fully_shard, and is saved from all processes."""
    for row in ROWS:
        model = sharded(model_of_odd_sizes())
        optimizer = row.ours(model.parameters(), **row.plain)
        train(model, optimizer, 2)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=f"{path}/{row.name}")
        whole = [tensor.full_tensor() for tensor in model.state_dict().values()]
        if dist.get_rank() == 0:
            torch.save(whole, f"{path}/{row.name}.pt")


def resume(path):
    """By fastopt and by torch.optim, in another number of processes: the same parameters, state, and next steps."""
    for row in ROWS:
        results = []
        for make in (Make(row.ours, **row.plain), Make(row.theirs, foreach=False, **row.plain)):
            model = sharded(model_of_odd_sizes())
            optimizer = make(model.parameters())
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            checkpoint.load(state, checkpoint_id=f"{path}/{row.name}")
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            for tensor, saved in zip(model.state_dict().values(), torch.load(f"{path}/{row.name}.pt"), strict=True):
                assert_same_bits(tensor.full_tensor(), saved, row.name)
            found = values_of(optimizer)
            if row.name != "SGD":
                counts = [float(entry["step"]) for entry in optimizer.state.values()]
                assert counts == [2.0] * len(counts) and counts
            results.append(found + train(model, optimizer, 2))
        assert_same_bits(*results, row.name)


def worker(rank, world_size, store, function, argument):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(argument)
    finally:
        dist.destroy_process_group()
    # torch's caches keep meshes, and these gloo's threads. One that lets go of the tensors of the last reduction while
    # Python is finalized asks for the GIL, is ended by that, and std::terminate is called: so Python is not finalized.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_processes(world_size, tmp_path, function, argument):
    """Runs `function(argument)` in each of `world_size` processes; an error in one of them is raised here."""
    store = tmp_path / f"store-{function.__name__}-{world_size}"
    torch.multiprocessing.spawn(worker, (world_size, str(store), function, argument), nprocs=world_size)


SCENARIOS = (
    ddp, fsdp2, fsdp2_mixed_precision, fsdp2_beside_plain_parameters, replicated_and_sharded_dtensors, fsdp1,
    zero_redundancy,
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_wrapper(scenario, tmp_path):
    in_processes(2, tmp_path, same_under_the_wrapper, scenario)


def test_checkpoint_in_another_world_size(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    in_processes(2, tmp_path, save, str(path))
    in_processes(1, tmp_path, resume, str(path))


def test_checkpoints_of_options(tmp_path):
    in_processes(2, tmp_path, checkpoints_of_options, str(tmp_path))


def test_host_time_of_dtensors(tmp_path):
    in_processes(1, tmp_path, host_time_of_dtensors, None)


CLIPPING = (clip_dtensors, clip_mixed_dtensors, clip_in_fsdp2)


@pytest.mark.parametrize("scenario", CLIPPING, ids=lambda scenario: scenario.__name__)
def test_clipping(scenario, tmp_path):
    in_processes(2, tmp_path, scenario, None)


# ---- clipping and averaging in the step


def gradients(params, step):
    """The same whole gradients in all processes."""
    torch.manual_seed(step)
    for param in params:
        whole = torch.randn(param.shape, dtype=torch.float64).to(param.dtype)
        placed = isinstance(param, DTensor)
        grad = distribute_tensor(whole, param.device_mesh, param.placements) if placed else whole
        if param.grad is None:
            param.grad = grad
        else:  # as FSDP2, whose gradients have one spec
            local(param.grad).copy_(local(grad))


def placed_parameters(dtypes, *places):
    """On a mesh with placements, or plain at None; 3 rows are not shared evenly, and of 1 row one has nothing."""
    params = []
    for dtype in dtypes:
        for place in places:
            for rows in (3, 1):
                value = torch.linspace(-1, 1, rows * 50, dtype=dtype).view(rows, 50)
                params.append(nn.Parameter(value if place is None else distribute_tensor(value, *place)))
    return params


def clip_in_the_step(_):
    """One norm, of the whole tensors, with the same bits everywhere; then what clipping by it and a step give."""
    size = dist.get_world_size()
    line, wide, high = (init_device_mesh("cpu", shape) for shape in ((size,), (1, size), (size, 1)))
    first = (line, (Shard(0),)), (line, (Shard(1),)), (line, (Replicate(),))
    second = (wide, (Shard(0), Shard(1))), (wide, (Replicate(), Shard(0))), (wide, (Shard(1), Replicate()))
    cases = [
        (True, first),
        (True, second),
        (True, first[2:]),
        (False, (None, *first)),
        (False, (*second, None)),
        (False, (None, first[2])),
        (False, (*first, (high, (Shard(0), Replicate())))),
    ]
    for row in ROWS:
        for one_mesh, places in cases:
            for dtypes in ((torch.float32,), (torch.bfloat16, torch.float32), (torch.float64,)):
                ours, theirs = placed_parameters(dtypes, *places), placed_parameters(dtypes, *places)
                optimizer = row.ours(ours, **row.plain, max_grad_norm=0.5)
                plain = row.ours(theirs, **row.plain)
                torch_steps, checks = fastopt.backend_info()["torch_steps"], []
                for step in range(3):
                    gradients(ours, step)
                    gradients(theirs, step)
                    before = fastopt._C.counters()["checks"]
                    optimizer.step()
                    checks.append(fastopt._C.counters()["checks"] - before)
                    assert fastopt.backend_info()["torch_steps"] == torch_steps, "torch's own step ran"
                    norm = optimizer.grad_norm
                    everywhere = [torch.zeros((), dtype=norm.dtype) for _ in range(size)]
                    dist.all_gather(everywhere, norm)
                    assert_same_bits(everywhere, [norm] * size, "of all processes")
                    whole = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in theirs]
                    exact = fastopt.get_total_norm([grad.double() for grad in whole]).item()
                    eps = torch.finfo(norm.dtype).eps
                    assert abs(norm.item() - exact) <= (4 if norm.dtype == torch.float64 else 1) * eps * exact
                    assert_same_bits([local(p.grad) for p in ours], [local(p.grad) for p in theirs], "gradients stay")
                    if one_mesh:
                        assert_same_bits(fastopt.clip_grad_norm_(theirs, 0.5).to_local(), norm, "by the function")
                    else:
                        parts = [nn.Parameter(local(p.detach())) for p in theirs]
                        for part, param in zip(parts, theirs, strict=True):
                            part.grad = local(param.grad)
                        nn.utils.clip_grads_with_norm_(parts, 0.5, norm)
                    plain.step()
                    assert_same_bits(values_of(optimizer), values_of(plain), f"{row.name} {places} {dtypes}")
                assert checks[2] == 0, "a step like the one before is only compared with it"
    assert all(not isinstance(p, DTensor) or p._version > 0 for p in ours)


def clip_where_a_process_has_no_gradient(_):
    """All take part in the reduction, whatever they have; a norm that is not finite is refused by all alike."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    for row in ROWS:
        params = placed_parameters((torch.float32,), (line, (Shard(0),)), None)
        optimizer = row.ours(params, **row.plain, max_grad_norm=1.0, error_if_nonfinite=True)
        gradients(params, 0)
        expected = params[0].grad.to_local().double().square().sum() + params[1].grad.to_local().double().square().sum()
        expected += params[2].grad.double().square().sum() + params[3].grad.double().square().sum()
        if rank == 1:
            for param in params:
                param.grad = None
        dist.broadcast(expected, 0)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(expected.sqrt().item(), rel=1e-6)
        for bad in (float("nan"), float("inf")):
            gradients(params, 1)
            if rank == 1:
                params[0].grad.to_local()[0, 3] = bad
            before = values_of(optimizer)
            with pytest.raises(RuntimeError, match="order 2.0 for gradients from `parameters` is non-finite"):
                optimizer.step()
            assert_same_bits(values_of(optimizer), before, "refused")
            assert not optimizer.grad_norm.isnan()
        gradients(params, 2)
        optimizer.step()  # goes on
        assert_same_bits(optimizer.grad_norm, fastopt.get_total_norm([full(p.grad) for p in params]), "then")

    alone = DeviceMesh("cpu", [0])
    params = [nn.Parameter(distribute_tensor(torch.ones(4), line, [Shard(0)]))]
    params += [nn.Parameter(distribute_tensor(torch.ones(4), alone, [Replicate()]))]
    optimizer = fastopt.AdamW(params, max_grad_norm=1.0)
    gradients(params, 0)
    with contextlib.nullcontext() if rank == 0 else pytest.raises(RuntimeError, match="a device mesh without this"):
        optimizer.step()
    assert (optimizer.grad_norm is not None) == (rank == 0) == bool(optimizer.state)


def clip_in_two_threads(_):
    """Processes would not agree whose norm comes first: refused; without clipping each step is done."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))

    class SteppedBy:
        """An option that another thread steps with, while the first one reads it."""

        def __init__(self, optimizer):
            self.optimizer, self.error, self.is_read = optimizer, None, False

        def step(self):
            try:
                self.optimizer.step()
            except RuntimeError as error:
                self.error = error

        def __bool__(self):
            if not self.is_read:
                self.is_read = True
                thread = threading.Thread(target=self.step)
                thread.start()
                thread.join()
            return False

    for row, clips in itertools.product(ROWS, (True, False)):
        both = []
        for threads in (1, 2):
            params = placed_parameters((torch.float32,), (line, (Shard(0),)), None)
            optimizer = row.ours(params, **row.plain, **({"max_grad_norm": 0.5} if clips else {}))
            for step in range(2):
                gradients(params, step)
                optimizer.step()
            if threads == 2:
                option = SteppedBy(optimizer)
                optimizer.param_groups[0]["maximize"] = option
            elif not clips:
                optimizer.step()
            optimizer.step()
            both.append(values_of(optimizer))
        assert option.is_read and (option.error is not None) == clips
        assert not clips or "max_grad_norm: the parameters are DTensors, and another thread" in str(option.error)
        assert_same_bits(*both, f"{row.name}, clipping {clips}")


def clip_after_unscaling(_):
    """The norm is that of the unscaled gradients, as they are stored."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for row in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            both = []
            for folded in (True, False):
                params = placed_parameters((dtype,), (line, (Shard(0),)), (line, (Replicate(),)))
                optimizer = row.ours(params, **row.plain, **({"max_grad_norm": 0.5} if folded else {}))
                for step in range(2):
                    gradients(params, step)
                    if folded:
                        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
                    else:
                        for param in params:
                            local(param.grad).mul_(torch.tensor(3.0).double().reciprocal().float())
                        norm = fastopt.clip_grad_norm_(params, 0.5).to_local()
                    optimizer.step()
                both.append([optimizer.grad_norm if folded else norm, *values_of(optimizer)])
            assert_same_bits(*both, f"{row.name} {dtype}")


def clip_on_a_gpu(_):
    """The CPU as a GPU, on the PTX interpreter: the norm, which stays there, and the bits of the step on the CPU."""
    pytest.importorskip("triton")
    from .test_gpu import triton_serves_cpu_tensors
    from .test_gpu_passes import on_cpu

    size, rank = dist.get_world_size(), dist.get_rank()
    line, wide = (init_device_mesh("cpu", shape) for shape in ((size,), (1, size)))
    places = (line, (Shard(0),)), (line, (Replicate(),)), (wide, (Replicate(), Shard(1))), None
    dtypes = (torch.float32, torch.bfloat16)
    for row in ROWS[:: len(ROWS) - 1]:
        for capturable in [False] + [True] * ("capturable" in row.theirs([torch.zeros(1)]).defaults):
            options = row.plain | {"ema_decay": 0.9}
            with triton_serves_cpu_tensors() as driver:
                params = placed_parameters(dtypes, *places)
                more = {"capturable": True} if capturable else {}
                optimizer = row.ours(params, **options, max_grad_norm=0.5, error_if_nonfinite=True, **more)
                expected = row.ours(placed_parameters(dtypes, *places), **options, max_grad_norm=0.5)
                theirs = expected.param_groups[0]["params"]
                torch_steps = fastopt.backend_info()["torch_steps"]
                for step in range(5):
                    gradients(params, step)
                    gradients(theirs, step)
                    lacking = [p for p in range(len(params)) if step == 3 and rank == 1]  # takes part all the same
                    for at in lacking:
                        params[at].grad = theirs[at].grad = None
                    optimizer.grad_scale = torch.tensor(4.0)
                    if step == 2:  # at other addresses
                        for param in params:
                            grad = getattr(param.grad, "_local_tensor", param.grad)
                            old, grad.data = grad.data, grad.clone()
                            old.zero_()
                    before = fastopt._C.counters()["checks"]
                    launches = len(driver.launches)
                    optimizer.step()
                    assert fastopt.backend_info()["torch_steps"] == torch_steps, "torch's own step ran"
                    assert step != 2 or fastopt._C.counters()["checks"] == before, "compared"
                    assert bool(lacking) == (len(driver.launches) == launches)
                    norm = optimizer.grad_norm
                    everywhere = [torch.zeros(()) for _ in range(size)]
                    dist.all_gather(everywhere, norm)
                    assert_same_bits(everywhere, [norm] * size, "of all processes")
                    with on_cpu():
                        expected.grad_scale = torch.tensor(4.0)
                        expected.step()
                        assert_same_bits(norm, expected.grad_norm, "norm")
                    assert_same_bits(values_of(optimizer), values_of(expected), f"{row.name} {step}")
                gradients(params, 5)
                if rank == 1:
                    local(params[0].grad)[0, 3] = float("nan")
                before = values_of(optimizer)
                with pytest.raises(RuntimeError, match="order 2.0 for gradients from `parameters` is non-finite"):
                    optimizer.step()
                assert_same_bits(values_of(optimizer), before, "refused")


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_what_the_plan_does_not_take(_):
    """Beside the step, by the same norm: a complex parameter, also where torch's function refuses a mixed list."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for shard, odd in ((Shard(0), True), (Replicate(), True), (Shard(0), False)):
        params = placed_parameters((torch.float32,), (line, (shard,)))
        params.append(nn.Parameter(torch.ones(3, dtype=torch.complex64 if odd else torch.float32)))
        optimizer = fastopt.AdamW(params, max_grad_norm=0.5)
        gradients(params, 3)
        expected = torch.stack([torch.linalg.vector_norm(full(p.grad)) for p in params]).norm()
        optimizer.step()
        assert type(optimizer.grad_norm) is torch.Tensor
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="got mixed torch.Tensor and DTensor"):
        nn.utils.clip_grad_norm_(params, 0.5)
    partial = nn.Parameter(distribute_tensor(torch.zeros(4), line, [Replicate()]))
    optimizer = fastopt.SGD([partial], lr=1.0, max_grad_norm=1.0)
    partial.grad = DTensor.from_local(torch.ones(4), line, [Partial()])
    optimizer.step()
    size = dist.get_world_size()
    assert optimizer.grad_norm.item() == pytest.approx(2 * size)
    torch.testing.assert_close(partial.full_tensor(), torch.full((4,), -0.5))


def model_of_even_sizes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def clip_in_the_step_of_models(_):
    """A model under each wrapper, the loss of the whole batch: one norm and one model, as in one process."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    other = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))

    def tensor_parallel(model, mesh):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return parallelize_module(model, mesh["tp"], plan)

    wrap = {
        "fsdp2": sharded,
        "ddp": nn.parallel.DistributedDataParallel,
        "ddp, bucket views": lambda model: nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True),
        "tensor parallel": lambda model: tensor_parallel(model, mesh),
        "tensor parallel and fsdp2": lambda model: sharded(tensor_parallel(model, mesh), mesh=mesh["dp"]),
        "fsdp2 and tensor parallel": lambda model: sharded(tensor_parallel(model, other), mesh=other["dp"]),
    }
    for name, wrapped in wrap.items():
        models = [model_of_even_sizes() if "parallel" in name else model_of_odd_sizes() for _ in range(3)]
        models = [wrapped(models[0]), wrapped(models[1]), models[2]]
        optimizers = [
            fastopt.AdamW(models[0].parameters(), max_grad_norm=0.1),
            torch.optim.AdamW(models[1].parameters()),
            fastopt.AdamW(models[2].parameters(), max_grad_norm=0.1),
        ]
        for step in range(4):
            torch.manual_seed(step)
            x = torch.randn(3, 6)
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
            before = fastopt.backend_info()["torch_steps"]
            optimizers[0].step()
            assert fastopt.backend_info()["torch_steps"] == before, name
            if "parallel" not in name:  # parameters that are not in its plan are plain: torch refuses the mixture
                theirs = nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
                torch.testing.assert_close(optimizers[0].grad_norm, full(theirs), rtol=1e-5, atol=0)
            optimizers[1].step()
            optimizers[2].step()
            torch.testing.assert_close(optimizers[0].grad_norm, optimizers[2].grad_norm, rtol=1e-5, atol=0)
        for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True):
            torch.testing.assert_close(full(a.detach()), b.detach(), rtol=1e-4, atol=1e-6)


def norm_of_a_part(_):
    """What hands an optimizer a part of the parameters is refused, and right where there is one process."""
    several = dist.get_world_size() > 1

    def refused(what):
        if several:
            return pytest.raises(RuntimeError, match=f"max_grad_norm: .*{what}")
        return contextlib.nullcontext()

    for row in ROWS:
        model = nn.parallel.DistributedDataParallel(model_of_odd_sizes())
        with refused("call fastopt.clip_grad_norm_ with the parameters of the model before the step"):
            optimizer = ZeroRedundancyOptimizer(model.parameters(), row.ours, **row.plain, max_grad_norm=1e-3)
            train(model, optimizer, 1)
            assert optimizer.optim.grad_norm > 0
        fastopt.AdamW(model.parameters(), max_grad_norm=1.0)
        for use_orig_params in (True, False):
            model = FullyShardedDataParallel(
                model_of_odd_sizes(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
            )
            optimizer = row.ours(model.parameters(), **row.plain, max_grad_norm=1e-3)
            model(torch.ones(3, 6)).square().mean().backward()
            before, states = values_of(optimizer), len(optimizer.state)
            for _ in range(2):
                with refused("call the model's clip_grad_norm_"):
                    optimizer.step()
            if several:
                assert_same_bits(values_of(optimizer), before, "refused")
                assert len(optimizer.state) == states
            else:
                assert optimizer.grad_norm > 0
            optimizer.max_grad_norm = None
            optimizer.step()  # without clipping it is as always


def averages(_):
    """The running average of the part here, beside a wrapper that knows nothing of it; its checkpoints have it."""
    wrap = {
        "ddp": nn.parallel.DistributedDataParallel,
        "fsdp2": sharded,
        "fsdp2 in bfloat16": lambda model: sharded(model.bfloat16()),
        "fsdp1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    }
    decay = 0.75
    for row in ROWS:
        for name, wrapped in wrap.items():
            model = wrapped(model_of_odd_sizes())
            optimizer = row.ours(model.parameters(), **row.plain, ema_decay=decay)
            expected = None
            for t in range(3):
                dtype = next(model.parameters()).dtype
                optimizer.zero_grad()
                torch.manual_seed(t)
                model(torch.randn(3, 6, dtype=dtype)).square().mean().backward()
                optimizer.step()
                params = [p for p in model.parameters() if p.grad is not None]  # FSDP1 leaves some to others
                values = [local(p.detach()).clone().float() for p in params]
                if t == 0:
                    expected = values
                else:
                    torch._foreach_lerp_(expected, values, 1 - decay)
            kept = [optimizer.state[p]["ema"] for p in params]
            assert_same_bits([local(ema) for ema in kept], expected, f"{name} {row.name}")
            for param, ema in zip(params, kept, strict=True):
                assert type(ema) is (DTensor if isinstance(param, DTensor) else torch.Tensor)
                assert not isinstance(ema, DTensor) or ema.placements == param.placements
            saved = get_optimizer_state_dict(model, optimizer)
            again = wrapped(model_of_odd_sizes())
            other = row.ours(again.parameters(), **row.plain, ema_decay=decay)
            set_optimizer_state_dict(again, other, saved)
            loaded = [local(other.state[p]["ema"]) for p in again.parameters() if p.numel()]
            kept = [local(ema) for ema in kept if local(ema).numel()]
            assert_same_bits([ema for ema in loaded if ema.numel()], kept, f"{name} {row.name}, loaded")
        model = nn.parallel.DistributedDataParallel(model_of_odd_sizes())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), row.ours, **row.plain, ema_decay=decay)
        train(model, optimizer, 1)
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            state = optimizer.state_dict()["state"]
            values = [p.detach() for p in model.parameters()]
            assert_same_bits([state[at]["ema"] for at in range(len(values))], values, f"ZeRO {row.name}")


def master_weights(_):
    """Of shards: those of the local tensors, in DTensors placed as the parameters; in checkpoints too."""
    options = {"master_weights": True, "state_dtype": torch.float32}
    for row in ROWS:
        model = sharded(model_of_odd_sizes().bfloat16())
        optimizer = row.ours(model.parameters(), **row.plain, **options)
        params = list(model.parameters())
        wide = [nn.Parameter(local(p.detach()).float()) for p in params]
        plain = row.ours(wide, **row.plain)
        for t in range(3):
            optimizer.zero_grad()
            torch.manual_seed(t)
            model(torch.randn(3, 6, dtype=torch.bfloat16)).square().mean().backward()
            for param, own in zip(params, wide, strict=True):
                own.grad = local(param.grad).float()
            optimizer.step()
            plain.step()
        masters = fastopt.master_weights(optimizer)
        assert_same_bits([local(masters[p]) for p in params], [p.detach() for p in wide], row.name)
        for param in params:
            remainder = optimizer.state[param]["remainder"]
            assert remainder.placements == masters[param].placements == param.placements
        again = sharded(model_of_odd_sizes().bfloat16())
        again.load_state_dict(model.state_dict())
        other = row.ours(again.parameters(), **row.plain, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            set_optimizer_state_dict(again, other, get_optimizer_state_dict(model, optimizer))
        for param, own in zip(params, again.parameters(), strict=True):
            loaded = local(other.state[own]["remainder"])
            assert_same_bits(loaded, local(optimizer.state[param]["remainder"]), f"{row.name}, loaded")


def checkpoints_of_options(path):
    """All that options keep, of shards: resumed from ours with the same bits, and begun where torch's has nothing."""

    def narrow():
        return sharded(model_of_odd_sizes().bfloat16())

    def steps(model, optimizer, which):
        for t in which:
            optimizer.zero_grad()
            torch.manual_seed(t)
            model(torch.randn(3, 6, dtype=torch.bfloat16)).square().mean().backward()
            optimizer.step()
        model.zero_grad()  # beside gradients DCP makes no state

    def through(name, model, optimizer, again, other, how, partial=False):
        saved = get_optimizer_state_dict(model, optimizer, options=how)
        if how.full_state_dict:  # no DCP: a file of one process, say
            return set_optimizer_state_dict(again, other, copy.deepcopy(saved), options=how)
        checkpoint.save({"optimizer": saved}, checkpoint_id=f"{path}/{name}")
        state = {"optimizer": get_optimizer_state_dict(again, other, options=how)}
        planner = checkpoint.DefaultLoadPlanner(allow_partial_load=partial)
        checkpoint.load(state, checkpoint_id=f"{path}/{name}", planner=planner)
        set_optimizer_state_dict(again, other, state["optimizer"], options=how)

    ways = {
        "nested": StateDictOptions(),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
        "full": StateDictOptions(full_state_dict=True),
    }
    both = (
        {"ema_decay": 0.9, "master_weights": True, "state_dtype": torch.float32, "max_grad_norm": 0.1},
        {"ema_decay": 0.9, "stochastic_rounding": True, "max_grad_norm": 0.1},
    )
    for row, (way, how), (at, options) in itertools.product(ROWS, ways.items(), enumerate(both)):
        if way == "full" and "master_weights" in options:
            continue  # no backend of torch gathers int16
        model, again = narrow(), narrow()
        optimizer = row.ours(model.parameters(), **row.plain, **options)
        steps(model, optimizer, range(3))
        other = row.ours(again.parameters(), **row.plain, **options)
        again.load_state_dict(model.state_dict())
        through(f"{row.name} {way} {at}", model, optimizer, again, other, how)
        for it in ((model, optimizer), (again, other)):
            steps(*it, range(3, 5))
        assert_same_bits(values_of(other), values_of(optimizer), f"{row.name} {way} {options}, resumed")

        theirs = row.theirs(model.parameters(), foreach=False, **row.plain)
        steps(model, theirs, range(3))
        again.load_state_dict(model.state_dict())
        found = [row.ours(it.parameters(), **row.plain, **options) for it in (model, again)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[0].load_state_dict(copy.deepcopy(theirs.state_dict()))
            through(f"{row.name} {way} {at}, torch's", model, theirs, again, found[1], how, partial=True)
        if row.name == "SGD":  # torch's has no count, and DCP lets an optimizer step once to make state
            for entry in found[1].state.values():
                entry.pop("step", None)
        for it in zip((model, again), found, strict=True):
            steps(*it, range(3, 5))
        assert_same_bits(values_of(found[1]), values_of(found[0]), f"{row.name} {way} {options}, torch's")


def stochastic_rounding(_):
    """Replicas are rounded alike, and shards by bits of their own."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    params = [
        nn.Parameter(distribute_tensor(torch.zeros(64 * world_size, dtype=torch.bfloat16), mesh, [placement]))
        for placement in (Replicate(), Shard(0))
    ]
    optimizer = fastopt.SGD(params, lr=1.0, stochastic_rounding=True)
    for param in params:
        param.grad = torch.full_like(param, 1.0)
        param.data.fill_(256.0)  # whose neighbours below are a whole apart
        param.grad.fill_(0.5)
    optimizer.step()
    for param, alike in zip(params, (True, False), strict=True):
        found = [torch.empty_like(local(param)) for _ in range(world_size)]
        dist.all_gather(found, local(param.detach()))
        assert {255.0, 256.0} == set(found[0].float().tolist())
        assert torch.equal(found[0], found[1]) == alike


IN_THE_STEP = (
    clip_in_the_step, clip_where_a_process_has_no_gradient, clip_in_two_threads, clip_after_unscaling,
    clip_what_the_plan_does_not_take, clip_on_a_gpu, clip_in_the_step_of_models, averages, master_weights,
    stochastic_rounding,
)  # fmt: skip


@pytest.mark.parametrize("scenario", IN_THE_STEP, ids=lambda scenario: scenario.__name__)
def test_in_the_step(scenario, tmp_path):
    in_processes(2, tmp_path, scenario, None)


@pytest.mark.parametrize("processes", [1, 2])
def test_norm_of_a_part(processes, tmp_path):
    in_processes(processes, tmp_path, norm_of_a_part, None)
