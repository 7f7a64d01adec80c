"""fastopt.GradScaler, and the attributes `grad_scale` and `found_inf`: as torch's scaler around the step."""

import copy
import math
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

import fastopt
from fastopt.backends import torch_steps

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot
from .test_clip_grad import everywhere

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
WIDE = (torch.float32, torch.float64, torch.bfloat16)  # of gradients that a scaler unscales
SIZES = ((), (5,), (600, 3), (4097,), (20000,))


def make_params(dtypes):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator, dtype=torch.float64).to(d) for d in dtypes for size in SIZES]
    return [torch.nn.Parameter(value) for value in values]


def give_gradients(params, step, scale, infinite=None):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        numbers = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = torch.empty_like(param).copy_(numbers)
    if infinite is not None:
        params[step % len(params)].grad.view(-1)[-1] = infinite


def drive(scaler, optimizers, params, steps, clip=None, unscale=False):
    """Steps with planted overflows; what can be seen after each."""
    seen = []
    for step in range(steps):
        scale = float(scaler.scale(torch.ones(())))
        for at, (optimizer, its) in enumerate(zip(optimizers, params, strict=True)):
            infinite = (math.inf, math.nan)[step % 2] if step % 7 == 2 + at or step == 0 else None
            give_gradients(its, step, scale, infinite)
            if unscale:
                scaler.unscale_(optimizer)
            if clip:
                clip(scaler, optimizer, its)
            scaler.step(optimizer)
        scaler.update()
        seen += [[scaler.get_scale()], *(snapshot(optimizer) for optimizer in optimizers)]
    return seen


OPTIONS = {"init_scale": 2.0**10, "growth_factor": 1.7, "backoff_factor": 0.6, "growth_interval": 3}  # no powers of two


def run(row, dtypes, cls, steps, groups=2, own=None, clip=None, **options):
    params = [make_params(dtypes) for _ in range(groups)]
    optimizers = [row.ours(its, **row.plain, **(own or {})) for its in params]
    return drive(cls("cpu", **OPTIONS), optimizers, params, steps, clip, **options)


def same(actual, expected, where):
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, list):
            assert a == e, where
        else:
            assert_same_bits(a, e, where)


@every_row
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_as_torchs_scaler(row, dtype):
    expected = run(row, (dtype,), torch.amp.GradScaler, 12)
    before = dict(torch_steps)
    for where, results in everywhere(lambda: run(row, (dtype,), fastopt.GradScaler, 12)):
        same(results, expected, where)
    assert dict(torch_steps) == before


def test_200_steps(row=ROWS[-1]):
    expected = run(row, (torch.float32,), torch.amp.GradScaler, 200)
    same(run(row, (torch.float32,), fastopt.GradScaler, 200), expected, "200 steps")
    assert len({scale for (scale,) in expected[::3]}) > 20


@every_row
@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_clipping_in_the_step_is_of_unscaled_gradients(row, dtype):
    """torch's sequence unscale_, clipping, step; rounded after each factor, as torch stores it."""

    def clip(scaler, optimizer, params):
        scaler.unscale_(optimizer)
        fastopt.clip_grad_norm_(params, 2.0)

    expected = run(row, (dtype,), torch.amp.GradScaler, 8, clip=clip)
    for where, results in everywhere(lambda: run(row, (dtype,), fastopt.GradScaler, 8, own={"max_grad_norm": 2.0})):
        same(results, expected, where)
    same(run(row, (dtype,), torch.amp.GradScaler, 8, own={"max_grad_norm": 2.0}), expected, "torch's scaler")


@every_row
def test_what_is_seen_of_gradients(row):
    """They stay scaled where nobody looks; for hooks, after `unscale_` and in a user's step they are as in torch."""
    calls = []

    class Own(row.ours):
        def step(self, closure=None):
            calls.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    def hooked(params):
        optimizer = row.ours(params, **row.plain)
        optimizer.register_step_pre_hook(lambda self, *_: calls.append([p.grad.clone() for p in params]))
        return optimizer

    for make in (lambda params: Own(params, **row.plain), hooked):
        seen = []
        for cls in (torch.amp.GradScaler, fastopt.GradScaler):
            calls.clear()
            params = make_params((torch.float32,))
            drive(cls("cpu", **OPTIONS), [make(params)], [params], 4)
            seen.append(list(calls))
        assert len(seen[0]) == 2
        assert_same_bits(*seen)
    params = make_params((torch.float32,))
    optimizer, scaler = row.ours(params, **row.plain), fastopt.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    give_gradients(params, 1, 8.0)
    scaled = [param.grad.clone() for param in params]
    scaler.step(optimizer)
    assert_same_bits([param.grad for param in params], scaled)
    scaler.update()
    scaler.unscale_(optimizer)
    assert_same_bits([param.grad for param in params], [grad / 8 for grad in scaled])


@every_row
def test_under_a_scheduler_and_with_unscale(row):
    """A scheduler's wrapper of the step is not the user's; it does not count a step that was skipped."""
    for options in ({}, {"unscale": True}):
        results = []
        for cls in (torch.amp.GradScaler, fastopt.GradScaler):
            params = make_params((torch.float32,))
            optimizer = row.ours(params, **row.plain)
            scheduler = lr_scheduler.ConstantLR(optimizer)
            calls = fastopt._C.counters()["checks"]
            results.append(drive(cls("cpu", **OPTIONS), [optimizer], [params], 1, **options))
            assert not getattr(optimizer, "_opt_called", False)  # the first step overflows
            results[-1] += drive(cls("cpu", **OPTIONS), [optimizer], [params], 5, **options)
            assert optimizer._opt_called and fastopt._C.counters()["checks"] > calls and scheduler
        same(*results, options)


@every_row
def test_overflow_changes_nothing(row):
    params = make_params((torch.float32,))
    optimizer = row.ours(params, **row.plain, max_grad_norm=1.0, ema_decay=0.9)
    scaler = fastopt.GradScaler("cpu", **OPTIONS)
    scaler.scale(torch.ones(()))
    give_gradients(params, 1, 1.0, math.inf)
    before = copy.deepcopy(snapshot(optimizer))
    scaler.step(optimizer)
    assert_same_bits(snapshot(optimizer), before)
    assert math.isinf(optimizer.grad_norm)
    scaler.update()
    assert scaler.get_scale() < OPTIONS["init_scale"]


def test_errors_are_torchs():
    for cls in (torch.amp.GradScaler, fastopt.GradScaler):
        for grad, options, error, message in (
            (None, {}, AssertionError, "No inf checks were recorded"),
            (torch.ones(3, dtype=torch.float16), {}, ValueError, "Attempting to unscale FP16 gradients"),
            (None, {"closure": lambda: 1.0}, RuntimeError, "Closure use is not currently supported"),
        ):
            param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
            param.grad = grad
            scaler = cls("cpu")
            scaler.scale(torch.ones(()))
            with pytest.raises(error, match=message):
                scaler.step(fastopt.Adam([param]), **options)


def test_an_fp64_gradient_whose_square_overflows_and_one_that_unscaling_makes_infinite_are_finite():
    for dtype, value, scale in ((torch.float64, 1e200, 4.0), (torch.float32, 3e38, 0.25)):
        results = []
        for cls in (torch.amp.GradScaler, fastopt.GradScaler):
            param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
            optimizer, scaler = fastopt.SGD([param], lr=1e-3), cls("cpu", init_scale=scale)
            scaler.scale(torch.ones(()))
            param.grad = torch.full((3,), value, dtype=dtype)
            scaler.step(optimizer)
            scaler.update()
            results.append([param.detach(), torch.tensor(scaler.get_scale())])
        assert_same_bits(*results)
        assert not torch.equal(results[0][0], torch.ones(3, dtype=dtype))


def test_states_go_both_ways_and_a_disabled_scaler_steps():
    ours, theirs = (cls("cpu", **OPTIONS) for cls in (fastopt.GradScaler, torch.amp.GradScaler))
    for scaler in (ours, theirs):
        scaler.scale(torch.ones(()))
    assert ours.state_dict() == theirs.state_dict()
    theirs.load_state_dict({**ours.state_dict(), "scale": 3.0})
    ours.load_state_dict(theirs.state_dict())
    assert ours.get_scale() == 3.0 and pickle.loads(pickle.dumps(ours)).get_scale() == 3.0
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    fastopt.GradScaler("cpu", enabled=False).step(fastopt.SGD([param], lr=1.0))
    assert torch.equal(param, torch.zeros(3))


@every_row
def test_any_optimizer(row):
    results = []
    for cls in (torch.amp.GradScaler, fastopt.GradScaler):
        params = make_params((torch.float32,))
        results.append(drive(cls("cpu", **OPTIONS), [row.theirs(params, foreach=False, **row.plain)], [params], 4))
    same(*results, "torch's optimizer")


# ---- the attributes


@every_row
def test_attributes_of_torchs_fused_optimizers(row):
    """Unscaled by the reciprocal, as `unscale_` does; skipped where found_inf is not 0."""
    params, plain = make_params((torch.float32,)), make_params((torch.float32,))
    optimizer, other = row.ours(params, **row.plain), row.ours(plain, **row.plain)
    for step in range(5):
        give_gradients(params, step, 3.0)
        give_gradients(plain, step, 3.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        inverse = torch.tensor(3.0).double().reciprocal().float()
        for param in plain:
            param.grad *= inverse
        optimizer.step()
        other.step()
        assert_same_bits(snapshot(optimizer), snapshot(other))
        before = copy.deepcopy(snapshot(optimizer))
        for found_inf in (torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.0]), 1.0):
            optimizer.found_inf = found_inf
            optimizer.step()
            assert_same_bits(snapshot(optimizer), before, str(found_inf))
        assert hasattr(optimizer, "grad_scale") and hasattr(optimizer, "found_inf")
        del optimizer.grad_scale, optimizer.found_inf
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        with pytest.raises(AttributeError):
            del optimizer.found_inf
        optimizer.grad_scale = None  # as torch's scaler sets it after `unscale_`
        assert optimizer.grad_scale is None
        del optimizer.grad_scale


def test_found_inf_2_leaves_nan_in_torchs_fused_kernels():
    """They test for 1, and a sum over devices or ranks may be more."""
    results = []
    for cls, options in ((torch.optim.Adam, {"fused": True}), (fastopt.Adam, {})):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.full((3,), math.inf)
        optimizer = cls([param], **options)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(2.0)
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[1], torch.ones(3))
    assert results[0].isnan().all() or torch.equal(results[0], torch.ones(3))  # a torch that was mended


def test_a_step_that_is_left_out_has_no_norm_of_the_one_before():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = fastopt.SGD([param], lr=0.1, max_grad_norm=1.0), fastopt.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))

    def step(value, by_hand=False):
        param.grad = torch.full((3,), value)
        if by_hand:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return optimizer.grad_norm

    assert step(4.0).item() == pytest.approx(math.sqrt(3))
    assert step(math.inf, by_hand=True) is None
    assert step(2.0, by_hand=True) is not None
    assert step(math.inf).item() == math.inf
    assert step(2.0) is not None
    param.grad, optimizer.found_inf = torch.ones(3), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.found_inf = None
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(3))
