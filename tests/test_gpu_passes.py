"""Norms, clipping and averages of GPU tensors, without a GPU: as test_gpu.py, on the PTX interpreter.

Norms are the CPU's; given the norm, what is written has the bits of the CPU's.
"""

import math
import re
import sys
import threading

import numpy as np
import pytest
import torch
from torch.nn import utils

import fastopt
from fastopt import swa_utils
from fastopt.backends import torch_steps

from .reference import assert_same_bits
from .test_clip_grad import DTYPES, exact_norm, parameters

triton = pytest.importorskip("triton")

from fastopt.kernels import passes  # noqa: E402

from fastopt import gpu_passes  # noqa: E402

from .test_gpu import CHUNK, triton_serves_cpu_tensors  # noqa: E402
from .test_kernels import ROCM, compiled_for  # noqa: E402

F32, F64, BF16, F16 = DTYPES[0], DTYPES[1], DTYPES[2], DTYPES[3]
SIZES = [0, 1, 3, 4, 7, 16, 31, 129, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9]
ORDERS = [2.0, 1.0, math.inf]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[90, 80], ids=["sm_90", "sm_80"])
def gpu(request):
    """As which CPU tensors are served, with a look for races."""
    with triton_serves_cpu_tensors(request.param, races=True) as stand_in:
        yield stand_in


@pytest.fixture
def idle_gpu():
    """A GPU that is sent everything and does nothing."""
    with triton_serves_cpu_tensors(execute=False) as stand_in:
        yield stand_in


class on_cpu:
    """In which CPU tensors are no GPU's."""

    def __enter__(self):
        fastopt._C.set_gpu_type("cuda")

    def __exit__(self, *_):
        fastopt._C.set_gpu_type("cpu")


def tensor(values, dtype, offset=0):
    """With some elements between an address that 16 divides and its own."""
    storage = torch.zeros(values.numel() + offset + 16, dtype=dtype)
    start = -storage.data_ptr() % 16 // dtype.itemsize + offset
    return storage[start : start + values.numel()].copy_(values).view(values.shape)


def gradients(*dtypes, sizes=SIZES, scale=1.0):
    return [tensor(scale * torch.randn(n), dtype, i % 3) for dtype in dtypes for i, n in enumerate(sizes)]


def allow_only(gpu, *tensors):
    """Accesses to these and to the arrays of the passes."""
    arrays = [x for buffer in gpu_passes._buffers.of.values() for x in (buffer.buffer, buffer.numbers)]
    gpu.options["ranges"] = [*tensors, *arrays]


# ---- norms


@every_dtype
@pytest.mark.parametrize("order", ORDERS)
def test_norm_is_the_cpus(gpu, order, dtype):
    grads = [grad for grad in gradients(dtype) if grad.numel() or order != math.inf]
    norm = fastopt.get_total_norm(grads, order)
    with on_cpu():
        expected = fastopt.get_total_norm(grads, order)
    assert norm.dtype == expected.dtype and norm.shape == ()
    if dtype == F64 and order != math.inf:  # there is nothing wider to sum in
        exact = exact_norm(grads, order)
        assert abs(norm.item() - float(exact)) <= 4 * np.spacing(exact)
    else:
        assert_same_bits(norm, expected, "norm")
    assert [launch.name for launch in gpu.launches] == ["partial_norms", "finish_norm"]


@pytest.mark.parametrize("order", ORDERS)
def test_norm_of_several_dtypes(gpu, order):
    grads = [grad for grad in gradients(BF16, F32, F16, sizes=SIZES[1:6]) if grad.numel()]
    norm = fastopt.get_total_norm(grads, order)
    with on_cpu():
        assert_same_bits(norm, fastopt.get_total_norm(grads, order), "norm")
    assert [launch.name for launch in gpu.launches] == 3 * ["partial_norms"] + ["finish_norm"]


EXTREME = {
    "huge and small": [3e38, 1e-3],
    "least": [1e-45, 1e-45],
    "tiny and one": [1e-30] * 1000 + [1.0],
    "more than there is": [3e38] * 5000,
    "huge": [1e37 + 1e30 * i for i in range(500)],
    "squares overflow in one lane": [2e19, 3e19, 1e-10] * 400,
    "squares are subnormal": [1.1e-20 + 1e-26 * i for i in range(CHUNK)],
    "squares vanish": [1.1e-30 + 1e-36 * i for i in range(CHUNK)],
    "squares lose bits": [1.1e-17 + 1e-23 * i for i in range(CHUNK + 7)],
    "zeros": [0.0] * (CHUNK + 3),
    "infinite": [1.0] * CHUNK + [-math.inf, 2.0],
    "NaN": [1.0] * CHUNK + [math.nan, 3.0],
    "NaN and infinite": [math.inf] * 9 + [math.nan] + [math.inf] * 9,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("numbers", EXTREME.values(), ids=EXTREME)
def test_norm_of_extreme_numbers(gpu, numbers, order):
    """Squares neither overflow nor vanish nor lose bits; NaN wins. In one tensor, and with those of usual size."""
    for grads in ([torch.tensor(numbers)], [torch.ones(5), torch.tensor(numbers)]):
        norm = fastopt.get_total_norm(grads, order)
        with on_cpu():
            assert_same_bits(norm, fastopt.get_total_norm(grads, order), "norm")


@pytest.mark.parametrize("scale", [1.0, 2.0**-50, 2.0**-70, 2.0**-110, 2.0**55, 2.0**110])
def test_fp32_sums_are_as_exact_as_fp64(gpu, scale):
    """What a chunk leaves, from numbers of unlike magnitude, is closer to the exact sum than fp32 could say."""
    grad = scale * torch.randn(CHUNK) * torch.logspace(-6, 3, CHUNK)[torch.randperm(CHUNK)]
    for order, exact in ((2.0, grad.double().square()), (1.0, grad.double().abs())):
        fastopt.get_total_norm([grad], order)
        (buffer,) = (b for b in gpu_passes._buffers.of.values() if b.uploads)
        assert buffer.numbers[2].item() == pytest.approx(math.fsum(exact.tolist()), rel=2.0**-44, abs=0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_order_of_sums_does_not_depend_on_addresses(gpu, dtype):
    values = torch.randn(CHUNK + 1001, dtype=F64)
    norms = [fastopt.get_total_norm([tensor(values, dtype, offset)]) for offset in range(4)]
    assert len({norm.item() for norm in norms}) == 1


@pytest.mark.parametrize("chunks", [1, passes.PARTIALS, passes.PARTIALS + 1, 2 * passes.PARTIALS + 5])
def test_partial_norms_are_joined(gpu, chunks):
    """One number of each chunk, however many."""
    grads = [torch.full((1,), float(i % 13)) for i in range(chunks)]
    for order in ORDERS:
        norm = fastopt.get_total_norm(grads, order)
        with on_cpu():
            assert_same_bits(norm, fastopt.get_total_norm(grads, order), "norm")


@pytest.mark.parametrize("chunk", [2**21, 2**31 + 3, 2**32 - 2])
@every_dtype
def test_more_elements_than_int32_counts(gpu, dtype, chunk):
    """The last elements of a tensor of 2^33 to 2^44."""
    grad, value = gradients(dtype, dtype, sizes=[CHUNK + 7])
    before = grad.clone()
    numel = CHUNK * chunk
    table = torch.tensor([[numel + len(grad), *(x.data_ptr() - numel * x.element_size() for x in (grad, value))]])
    work, partials = torch.tensor([chunk, chunk + 1]), torch.full((2,), math.nan, dtype=F64)
    gpu.options["ranges"] = [grad, value, table, work, partials]
    arrays = work.data_ptr(), table.data_ptr()
    passes.norm_launcher(1, dtype, device=90).launch(2, 0, *arrays, partials.data_ptr(), 0)
    assert partials.sum().item() == pytest.approx(value.double().square().sum().item())
    half = np.float64(0.5).view(np.int64).item()
    passes.pass_launcher("average", dtype, device=90).launch(2, 0, *arrays, half)
    assert_same_bits(grad, before.lerp_(value, 0.5), "average")


# ---- what is written


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES, (BF16, F32)], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9, math.inf, math.nan])
def test_clipped_gradients_are_torchs_given_the_norm(gpu, dtypes, max_norm):
    grads = gradients(*dtypes)
    ours, given, theirs = parameters(grads), parameters(grads), parameters(grads)
    norm = fastopt.clip_grad_norm_(ours, max_norm)
    fastopt.clip_grads_with_norm_(given, max_norm, norm)
    utils.clip_grads_with_norm_(theirs, max_norm, norm)
    for params in (ours, given):
        assert_same_bits([p.grad for p in params[1:]], [p.grad for p in theirs[1:]], str(max_norm))
    scaled = [launch.name for launch in gpu.launches].count("multi_tensor_pass")
    assert scaled == 2 * len(dtypes)


@every_dtype
def test_nothing_else_is_touched(gpu, dtype):
    grads, values = gradients(dtype), gradients(dtype)
    params = parameters(grads)
    own = [param.grad for param in params[1:]]
    average = swa_utils.get_ema_multi_avg_fn(0.9)
    fastopt.clip_grad_norm_(params, 1.0)  # makes the arrays
    average(own, values, 1)
    results = []
    torch_empty = torch.empty

    def empty(*args, **options):
        results.append(torch_empty(*args, **options))
        allow_only(gpu, *own, *values, *results)
        return results[-1]

    allow_only(gpu, *own, *values)
    gpu_passes.torch.empty, before = empty, [value.clone() for value in values]
    try:
        fastopt.clip_grad_norm_(params, 0.5)
    finally:
        gpu_passes.torch.empty = torch_empty
    fastopt.clip_grad_value_(params, 0.01)
    average(own, values, 1)
    assert_same_bits(values, before, "values")
    assert results and len(results) == 1


def test_nothing_is_written_where_nothing_changes(gpu):
    gpu.options["counts"] = True
    params = parameters(gradients(F32))
    fastopt.clip_grad_norm_(params, 1e9)
    scaled = gpu.launches[-1]
    assert scaled.name == "multi_tensor_pass"
    assert scaled.machine.memory["store bytes"] == 0
    chunks = sum(-(-size // CHUNK) for size in SIZES)
    assert scaled.machine.memory["load bytes"] == chunks * 128 * 4 * 8  # each lane: work, numel, address, coefficient
    fastopt.clip_grad_norm_(params, 0.1)
    assert gpu.launches[-1].machine.memory["store bytes"] == 4 * sum(SIZES)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@every_dtype
def test_norm_that_is_not_finite(gpu, dtype, special):
    grads = gradients(dtype, sizes=[5, 130])
    grads[1][7] = special
    params, theirs = parameters(grads), parameters(grads)
    for order in ORDERS:
        for function in (
            lambda order=order: fastopt.clip_grad_norm_(params, 1.0, order, True),
            lambda order=order: fastopt.get_total_norm(grads, order, True),
        ):
            with pytest.raises(RuntimeError) as refused:
                function()
            with on_cpu(), pytest.raises(RuntimeError) as expected:
                function()
            assert str(refused.value) == str(expected.value)
    assert_same_bits([p.grad for p in params[1:]], grads, "refused")
    with on_cpu():
        utils.clip_grad_norm_(theirs, 1.0)
    norm = fastopt.clip_grad_norm_(params, 1.0)
    assert norm.isnan() if math.isnan(special) else norm.isinf()
    assert_same_bits([p.grad for p in params[1:]], [p.grad for p in theirs[1:]], "clipped")


@every_dtype
def test_clip_value(gpu, dtype):
    grads = gradients(dtype)
    grads[7][1], grads[7][2], grads[9][::2] = math.nan, math.inf, -0.0
    for limit in (0.1, 0.7001, 0.0, math.inf):
        ours, theirs = parameters(grads), parameters(grads)
        fastopt.clip_grad_value_(ours, limit)
        utils.clip_grad_value_(theirs, limit)
        assert_same_bits([p.grad for p in ours[1:]], [p.grad for p in theirs[1:]], str(limit))
    assert {launch.name for launch in gpu.launches} == {"multi_tensor_pass"}


@every_dtype
def test_averages(gpu, dtype):
    """Weights from either end of a lerp, and those of the mean."""
    updates = [swa_utils.get_ema_multi_avg_fn(decay) for decay in (0.9, 0.3, 0.0, 1.0)]
    updates.append(swa_utils.get_swa_multi_avg_fn())
    for update in updates:
        ours, values = gradients(dtype), gradients(dtype)
        theirs = [average.clone() for average in ours]
        for count in range(3):
            update(ours, values, torch.tensor(count))
            with on_cpu():
                update(theirs, values, torch.tensor(count))
            assert_same_bits(ours, theirs, str(count))
    assert len(gpu.launches) == 15


@pytest.mark.parametrize("use_buffers", [False, True])
@every_dtype
def test_averaged_model(gpu, dtype, use_buffers):
    """Which averages on a GPU by weights, as torch's does there, if it is told nothing."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 33), torch.nn.Linear(33, 130)).to(dtype)
    model.register_buffer("scale", torch.ones(3, dtype=dtype))
    ours = swa_utils.AveragedModel(model, use_buffers=use_buffers)
    weights = torch.optim.swa_utils.get_swa_multi_avg_fn()
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=weights, use_buffers=use_buffers)
    for _ in range(5):
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape))
        ours.update_parameters(model)
        theirs.update_parameters(model)
        assert_same_bits(list(ours.state_dict().values()), list(theirs.state_dict().values()), "averages")
    assert len(gpu.launches) == 4  # the first time it copies


# ---- what the host does


def sent():
    """What all images uploaded: times, words."""
    buffers = gpu_passes._buffers.of.values()
    return sum(b.uploads for b in buffers), sum(b.uploaded_words for b in buffers)


def test_second_call_allocates_compiles_and_uploads_nothing(idle_gpu, monkeypatch):
    params = parameters(gradients(*DTYPES))
    averages, values = ([param.detach().clone() for param in params] for _ in range(2))
    average = swa_utils.get_ema_multi_avg_fn(0.9)

    def calls(number):
        fastopt.clip_grad_norm_(params, number)
        fastopt.clip_grad_value_(params, number)
        average(averages, values, 1)

    calls(0.5)
    compilations, made = [], []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", lambda *args: compilations.append(args))
    empty = torch.empty
    monkeypatch.setattr(gpu_passes.torch, "empty", lambda *a, **options: made.append(a) or empty(*a, **options))
    before, counters = sent(), fastopt._C.counters()
    for number in (0.1, 0.2, 0.3):
        calls(number)  # numbers are no part of what is uploaded
    assert sent() == before and fastopt._C.counters() == counters and not compilations
    assert made == 3 * [((),)]  # the norms
    monkeypatch.undo()
    blocks = []
    for _ in range(3):
        for _ in range(50):
            calls(0.5)
        idle_gpu.launches.clear()
        blocks.append(sys.getallocatedblocks())
    assert blocks[2] - blocks[1] < 20


def test_only_changes_are_uploaded(idle_gpu):
    params = parameters(gradients(F32, sizes=[5] * 9))
    fastopt.clip_grad_norm_(params, 1.0)
    uploads, words = sent()
    params[4].grad = params[4].grad.clone()
    fastopt.clip_grad_norm_(params, 1.0)
    assert sent() == (uploads + 1, words + 2)  # what is read and what is written
    params[7].grad = None
    fastopt.clip_grad_norm_(params, 1.0)
    assert sent() == (uploads + 2, words + 2 + 8 + 3 * 8)


def test_lists_that_take_turns(gpu):
    """Of other sizes, dtypes and orders: each call is right."""
    lists = [gradients(F32, sizes=sizes) for sizes in ([5, 9], [9, 5], [5, 9, 5000], [1], [9, 5])]
    lists += [gradients(BF16, F32, sizes=[9]), gradients(F32, BF16, sizes=[9])]
    for grads in [*lists, *reversed(lists), *lists]:
        norm = fastopt.get_total_norm(grads)
        with on_cpu():
            assert_same_bits(norm, fastopt.get_total_norm(grads), "norm")


def test_threads_have_buffers_of_their_own(gpu):
    gpu.options["races"] = False
    results = {}

    def work(number):
        grads = [torch.full((number + 1,), 3.0), torch.full((CHUNK,), float(number))]
        for _ in range(10):
            results.setdefault(number, set()).add(fastopt.get_total_norm(grads, 1.0).item())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: {3.0 * (n + 1) + CHUNK * n} for n in range(4)}


def test_an_upload_that_failed_is_made_again(gpu, monkeypatch):
    """Also one that was never tried."""
    fastopt.get_total_norm(gradients(F32, sizes=[7, 8]))
    for name in ("upload", "_uploaded"):
        grads = gradients(F32, sizes=[7, 8])
        with monkeypatch.context() as patched:
            of = gpu_passes.Buffer if name == "upload" else gpu_passes.Launches
            patched.setattr(of, name, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fastopt.get_total_norm(grads)
        norm = fastopt.get_total_norm(grads)
        with on_cpu():
            assert_same_bits(norm, fastopt.get_total_norm(grads), "norm")


def test_a_kernel_that_does_not_compile_changes_nothing(gpu, monkeypatch):
    grads, launcher = gradients(F32, BF16, sizes=[9]), passes.pass_launcher
    params = parameters(grads)

    def pass_launcher(name, dtype, device):
        return 1 / 0 if dtype == BF16 else launcher(name, dtype, device)

    monkeypatch.setattr(passes, "pass_launcher", pass_launcher)
    with pytest.raises(RuntimeError, match="Triton could not make fastopt's kernel of pass scale for cpu.*Nothing was"):
        fastopt.clip_grad_norm_(params, 0.1)
    assert_same_bits([param.grad for param in params[1:]], grads, "refused")


def test_empty_tensors(gpu):
    assert_same_bits(fastopt.get_total_norm([torch.zeros(0), torch.zeros(3, 0)]), torch.tensor(0.0), "empty")
    assert fastopt.get_total_norm([torch.zeros(0, dtype=F64), torch.ones(1)]).dtype == F64
    params = parameters([torch.zeros(0)])
    assert_same_bits(fastopt.clip_grad_norm_(params, 1.0), torch.tensor(0.0), "empty")
    fastopt.clip_grad_value_(params, 1.0)


def test_what_is_left_to_torch(idle_gpu, monkeypatch):
    """Nothing is launched; the result is torch's, and it is counted."""
    gaps, dense = torch.randn(6, 8)[:, ::2], torch.randn(6, 4)
    ema = swa_utils.get_ema_multi_avg_fn(0.9)
    twice = parameters([torch.ones(4)])[1:] * 2
    params, half = parameters([torch.ones(3)])[1:], torch.ones((), dtype=F16)
    for name, reason, function in (
        ("get_total_norm", "gaps", lambda: fastopt.get_total_norm([gaps])),
        ("update", "strides of its own", lambda: ema([dense], [torch.randn(4, 6).t()], 1)),
        ("clip_grad_norm_", "share memory", lambda: fastopt.clip_grad_norm_(twice, 1.0)),
        ("clip_grad_norm_", "a norm other", lambda: fastopt.clip_grad_norm_(params, 1.0, 3.0)),
        ("clip_grads_with_norm_", "no number", lambda: fastopt.clip_grads_with_norm_(params, 1.0, half)),
        ("clip_grad_norm_", "CUDA graph is being captured", lambda: fastopt.clip_grad_norm_(params, 1.0)),
        ("clip_grad_norm_", "without the package `triton`", lambda: fastopt.clip_grad_norm_(params, 1.0)),
    ):
        with monkeypatch.context() as patched:
            if "captured" in reason:
                patched.setattr(gpu_passes, "is_capturing", lambda device: True)
            if "triton" in reason:
                patched.setitem(sys.modules, "fastopt.gpu_passes", None)
            before = dict(torch_steps)
            function()
        (counted,) = (what for what, number in torch_steps.items() if number != before.get(what, 0))
        assert name in counted and reason in counted
    assert not idle_gpu.launches
    with on_cpu():
        assert_same_bits(fastopt.get_total_norm([gaps]), torch.tensor(gaps.double().norm().item()), "gaps")


def test_gradients_tell_autograd_that_they_changed(idle_gpu):
    param = parameters([torch.tensor([3.0, 4.0])])[1]
    version = param.grad._version
    fastopt.clip_grad_norm_(param, 1.0)
    assert param.grad._version == version + 1


# ---- what the machine code says


@every_dtype
def test_accesses_are_wide(idle_gpu, dtype):
    """16 bytes at a time, for tensors at addresses that these divide."""
    load, store = (f"{op}.global.{'v2.b64' if dtype == F64 else 'v4.b32'}" for op in ("ld", "st"))
    for kind in range(3):
        assert load in passes.norm_launcher(kind, dtype, device=90).compiled.asm["ptx"]
    for name in passes.PASSES:
        text = passes.pass_launcher(name, dtype, device=90).compiled.asm["ptx"]
        assert load in text and store in text


@pytest.mark.parametrize("target", ROCM, ids=lambda target: target.arch)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_compiles_for_rocm(dtype, target):
    kernels = [passes.norm_kernel(kind, dtype, target.warp_size) for kind in range(3)]
    kernels += [passes.pass_kernel(name, dtype, target.warp_size) for name in passes.PASSES]
    kernels += [passes.finish_kernel(kind, F64 if dtype == F64 else F32, target.warp_size) for kind in range(4)]
    for kernel, pointers, constants, warps in kernels:
        asm = compiled_for(target, kernel, pointers, constants, warps).asm
        assert set(re.findall(r"[sv]gpr_spill_count: +(\d+)", asm["amdgcn"])) == {"0"}
        operations = re.findall(r"= (f(?:add|sub|mul|div)\b.*|.*call .*@llvm\.(?:fma|sqrt)\..*)", asm["llir"])
        inexact = r"\b(fast|contract|reassoc|arcp|afn|nnan|ninf|nsz)\b|!fpmath"
        assert not re.search(inexact, "\n".join(operations))
