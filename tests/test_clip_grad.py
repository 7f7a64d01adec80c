"""Clipping by name: the bits of torch's functions given the norm, the exact norm, the same everywhere."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import utils

import fastopt
from fastopt.backends import torch_steps

from .reference import assert_same_bits
from .test_numerics import instruction_set

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = ((), (0,), (1,), (31,), (3, 5), (4096,), (4097,), (3, 4095), (33, 1000))


def gradients(dtypes=(torch.float32,), scale=1.0, sizes=SIZES):
    return [(scale * torch.randn(size, dtype=torch.float64)).to(dtype) for dtype in dtypes for size in sizes]


def parameters(grads):
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone(memory_format=torch.preserve_format)
    return [torch.nn.Parameter(torch.zeros(2)), *params]  # one without gradient


def same_strides(tensor):
    """A copy whose memory is laid out as the tensor's, with gaps too."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def everywhere(function):
    """The results of a function on every instruction set, and on 1 and 3 threads; it says once which is the first."""
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for isa in fastopt._C.isas():
            with instruction_set(isa):
                results.append((f"{isa}, {threads} threads", function()))
    return results


def exact_norm(grads, order=2.0):
    """Rounded once to float32, or float64 where a gradient is that."""
    dtype = np.float64 if any(grad.dtype == torch.float64 for grad in grads) else np.float32
    numbers = [Fraction(x) for grad in grads for x in grad.double().reshape(-1).tolist()]
    if order == math.inf:
        return dtype(max(map(abs, numbers)))
    if order == 1:
        return dtype(sum(map(abs, numbers), Fraction()))
    squares = sum((x * x for x in numbers), Fraction())
    scale = 4**200  # of integers, whose roots are exact
    return dtype(Fraction(math.isqrt(int(squares * scale)), 2**200))


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_exact_and_the_same_everywhere(dtype, order):
    """To one unit in the last place, of float32 or float64; torch's own float32 sums are far from it."""
    grads = [g for g in gradients((dtype,)) if g.numel()]
    expected = exact_norm(grads, order)
    results = everywhere(lambda: fastopt.get_total_norm(grads, order))
    for where, norm in results:
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norm.shape == ()
        assert_same_bits(norm, results[0][1], where)
    ulps = 4 if dtype == torch.float64 else 1  # float64 has nothing wider to sum in
    assert abs(results[0][1].item() - float(expected)) <= ulps * np.spacing(expected)


@pytest.mark.parametrize("size", [1, 33, 4095, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_of_the_sum(dtype, size):
    """In docs/after-backward.md: tiles of 4096 elements, in each 32 lanes that are added in halves."""
    grad = torch.randn(size, dtype=dtype)
    total = 0.0
    for tile in grad.double().split(4096):
        lanes = torch.zeros(32, dtype=torch.float64)
        for part in tile.split(32):
            lanes[: len(part)] += part * part
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += lanes.item()
    for where, norm in everywhere(lambda: fastopt._C.norm([grad], 2.0)):
        assert norm == math.sqrt(total), where


@pytest.mark.parametrize("numbers", [[3e38, 1e-3], [1e-45, 1e-45], [1e-30] * 1000 + [1.0], [3e38] * 5000])
def test_norm_of_extreme_numbers(numbers):
    """Squares neither overflow nor vanish."""
    grads = [torch.tensor(numbers)]
    assert fastopt.get_total_norm(grads).item() == pytest.approx(float(exact_norm(grads)), rel=1e-7)


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES, DTYPES[2:]], ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9, math.inf, math.nan])
def test_clipped_gradients_are_torchs_given_the_norm(dtypes, max_norm):
    # Of a float64 norm and a gradient without dimensions, torch computes the product in float64: that is left to it.
    grads = gradients(dtypes, sizes=SIZES[1:] if len(dtypes) == 4 else SIZES)

    def clip():
        params = parameters(grads)
        norm = fastopt.clip_grad_norm_(params, max_norm)
        return [norm, *(param.grad for param in params[1:])]

    params = parameters(grads)
    norm = fastopt.get_total_norm(grads)
    utils.clip_grads_with_norm_(params, max_norm, norm)
    for where, clipped in everywhere(clip):
        assert_same_bits(clipped, [norm, *(param.grad for param in params[1:])], where)
    ours = parameters(grads)
    fastopt.clip_grads_with_norm_(ours, max_norm, norm)
    assert_same_bits([p.grad for p in ours[1:]], [p.grad for p in params[1:]], "with the norm")


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_that_is_not_finite(dtype, special):
    grads = gradients((dtype,))
    grads[4][1, 2] = special
    params, theirs = parameters(grads), parameters(grads)
    with pytest.raises(RuntimeError, match="order 2.0 for gradients from `parameters` is non-finite"):
        fastopt.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert_same_bits([p.grad for p in params[1:]], grads, "refused")
    utils.clip_grad_norm_(theirs, 1.0)
    norm = fastopt.clip_grad_norm_(params, 1.0)
    assert norm.isnan() if math.isnan(special) else norm.isinf()
    assert_same_bits([p.grad for p in params[1:]], [p.grad for p in theirs[1:]], "clipped")


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_value(dtype):
    grads = gradients((dtype,))
    grads[4][1, 2], grads[4][0, 0], grads[5][::2] = math.nan, math.inf, -0.0
    for limit in (0.1, 0.7001, 1e9, math.inf):
        theirs = parameters(grads)
        if limit == 1e9 and dtype == torch.float16:
            for of in (utils, fastopt):
                with pytest.raises(RuntimeError, match="cannot be converted"):
                    of.clip_grad_value_(theirs, limit)
            continue
        utils.clip_grad_value_(theirs, limit)

        def clip(limit=limit):
            params = parameters(grads)
            fastopt.clip_grad_value_(params, limit)
            return [param.grad for param in params[1:]]

        for where, clipped in everywhere(clip):
            assert_same_bits(clipped, [param.grad for param in theirs[1:]], f"{limit}, {where}")


def test_any_strides():
    grads = [torch.randn(40, 30).t(), torch.randn(8, 6, 5)[::2, 1:4], torch.randn(2, 3, 4, 5).transpose(1, 3)]
    grads.append(torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last))
    for name, arguments in (("clip_grads_with_norm_", (1.0, torch.tensor(7.0))), ("clip_grad_value_", (0.3,))):
        both = []
        for of in (utils, fastopt):
            params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
            for param, grad in zip(params, grads, strict=True):
                param.grad = same_strides(grad)
            getattr(of, name)(params, *arguments)
            both.append([param.grad for param in params])
        assert_same_bits(*both, name)
    together = torch.cat([grad.reshape(-1) for grad in grads])
    assert fastopt.get_total_norm(grads).item() == pytest.approx(together.double().norm().item())


def test_lists_and_what_is_none():
    param = parameters([torch.tensor([3.0, 4.0])])[1]
    assert fastopt.clip_grad_norm_(param, 10.0) == fastopt.clip_grad_norm_((param,), 10.0) == 5.0
    assert fastopt.clip_grad_norm_((p for p in [param]), 10.0) == fastopt.clip_grad_norm_({param}, 10) == 5.0
    linear = torch.nn.Linear(2, 2)
    assert_same_bits(fastopt.clip_grad_norm_(linear.parameters(), 1.0), torch.tensor(0.0), "no gradients")
    assert_same_bits(fastopt.get_total_norm([]), torch.tensor(0.0), "no tensors")
    fastopt.clip_grad_value_([], 1.0)
    for function in (utils.clip_grad_norm_, fastopt.clip_grad_norm_):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function((p for p in ()), 1.0)
        assert "empty generator" in str(caught[0].message) and caught[0].filename == __file__


def test_a_parameter_listed_twice_is_clipped_twice():
    both, grads = [], gradients()
    for of in (utils, fastopt):
        params = parameters(grads)
        of.clip_grads_with_norm_([*params, params[5], params[9]], 1.0, torch.tensor(7.0))
        both.append([param.grad for param in params[1:]])
    assert_same_bits(*both, "twice")


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "grads, order, reason",
    [
        ([torch.eye(3).to_sparse()], 2.0, "sparse"),
        ([torch.ones(3, dtype=torch.complex64)], 2.0, "another dtype"),
        ([torch.ones(3)], 3.0, "a norm other than"),
        ([torch.ones(1).expand(3)], 2.0, "shares memory with itself"),
    ],
)
def test_everything_else_is_torchs_own(grads, order, reason):
    both, before = [], dict(torch_steps)
    for of in (utils, fastopt):
        param = torch.nn.Parameter(torch.zeros(grads[0].shape, dtype=grads[0].dtype))
        param.grad = grads[0]
        try:
            both.append(of.clip_grad_norm_(param, 1e9, order).item())
        except RuntimeError as error:
            both.append(str(error))
    assert both[0] == both[1]
    (what,) = (name for name, number in torch_steps.items() if number != before.get(name, 0))
    assert what.startswith("clip_grad_norm_: ") and reason in what


def test_a_norm_that_is_torchs_to_use():
    before = dict(torch_steps)
    param = parameters([torch.tensor([3.0, 4.0])])[1]
    fastopt.clip_grads_with_norm_(param, 1.0, torch.tensor(5.0, dtype=torch.float64))
    assert param.grad.norm().item() == pytest.approx(1.0)
    (what,) = (name for name, number in torch_steps.items() if number != before.get(name, 0))
    assert what.startswith("clip_grads_with_norm_: the norm is float64")


def test_errors_are_torchs():
    param = parameters([torch.ones(3)])[1]
    for arguments in (("a",), (None,), (1.0, "b")):
        errors = []
        for of in (utils, fastopt):
            with pytest.raises((TypeError, ValueError)) as caught:
                of.clip_grad_norm_([param], *arguments)
            errors.append(caught.type)
        assert errors[0] is errors[1]
    assert fastopt.clip_grad_norm_([param], "10") == utils.clip_grad_norm_([param], "10")
    assert fastopt.clip_grad_norm_([param], torch.tensor(9.0), "inf") == 1.0


def test_second_call_allocates_nothing():
    params = parameters(gradients(DTYPES))
    averages = [param.detach().clone() for param in params]
    values = [param.detach() for param in params]
    average = fastopt.swa_utils.get_ema_multi_avg_fn(0.9)

    def calls():
        fastopt.clip_grad_norm_(params, 0.5)
        fastopt.clip_grad_value_(params, 0.5)
        average(averages, values, 1)

    calls()
    before = fastopt._C.counters()["allocations"]
    for _ in range(3):
        calls()
    assert fastopt._C.counters()["allocations"] == before


def test_lists_that_change_from_call_to_call():
    """Rows are kept; whatever of the tensors is other than at the call before shows in the result."""
    kinds = [torch.randn(40, 30), torch.randn(30, 40).t(), torch.randn(40, 60)[:, ::2], torch.randn(40, 30).bfloat16()]
    kinds += [torch.randn(7), torch.randn(0), torch.randn(40, 30).double(), torch.randn(3, 5)]
    shared, names = torch.randn(60), ("clip_grads_with_norm_", "clip_grad_value_", "get_ema_multi_avg_fn")
    random = np.random.default_rng(0)
    grads = [kinds[0].clone() for _ in range(6)]
    for round in range(300):
        match round % 4:  # every other call finds other tensors; some of them share memory, or are there twice
            case 0:
                grads[random.integers(len(grads))] = same_strides(kinds[random.integers(len(kinds))])
            case 1:
                grads = [same_strides(grad) for grad in grads]
            case 2:
                at = random.integers(len(shared) - 15)
                grads[random.integers(len(grads))] = shared[at : at + 15].view(3, 5)
            case _:
                grads = grads[1:] if len(grads) > 8 else [*grads, grads[0]]
        before = [grad.clone() for grad in grads]
        for name in names:
            both = []
            for of, averages in ((utils, torch.optim.swa_utils), (fastopt, fastopt.swa_utils)):
                for grad, value in zip(grads, before, strict=True):
                    grad.copy_(value)
                if name == names[2]:
                    averages.get_ema_multi_avg_fn(0.75)(grads, [value + 1 for value in before], 1)
                else:
                    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
                    for param, grad in zip(params, grads, strict=True):
                        param.grad = grad
                    getattr(of, name)(params, *((1.0, torch.tensor(7.0)) if name == names[0] else (0.3,)))
                both.append([grad.clone() for grad in grads])
            assert_same_bits(*both, f"{name} in round {round}")
        for grad, value in zip(grads, before, strict=True):
            grad.copy_(value)
        together = torch.cat([grad.reshape(-1).double() for grad in grads])
        assert fastopt.get_total_norm(grads).item() == pytest.approx(together.norm().item())


def test_gradients_tell_autograd_that_they_changed():
    param = parameters([torch.tensor([3.0, 4.0])])[1]
    version = param.grad._version
    fastopt.clip_grad_norm_(param, 1.0)
    assert param.grad._version == version + 1


def test_a_dispatch_mode_sees_torchs_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    param = parameters([torch.tensor([3.0, 4.0])])[1]
    with Mode():
        fastopt.clip_grad_norm_(param, 1.0)
    assert seen


def test_inside_a_compiled_function():
    """In one graph, but for torch 2.10, which breaks its own there."""
    params = parameters([torch.tensor([3.0, 4.0])])[1:]

    @torch.compile(backend="eager", fullgraph=torch.__version__ >= "2.11")
    def clip(params):
        return fastopt.clip_grad_norm_(params, 1.0)

    assert clip(params).item() == pytest.approx(5.0)
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    grad = torch.full((2**31 + 5,), 0.5, dtype=torch.bfloat16)  # 4.3 GB
    param = torch.nn.Parameter(torch.zeros(1, dtype=grad.dtype).expand(grad.shape))
    param.grad = grad
    torch.set_num_threads(2)
    assert fastopt.clip_grad_norm_(param, 1.0).item() == np.float32(0.5 * math.sqrt(2**31 + 5))
    assert grad[-1] == grad[0] != 0.5


def test_no_gradients_in_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert fastopt.get_total_norm([]).dtype == utils.get_total_norm([]).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
