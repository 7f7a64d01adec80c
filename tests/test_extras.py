"""What a step does beside torch's: clipping, unscaling and averaging in it are as the functions around it."""

import copy
import gc
import inspect
import math
import pickle
import warnings
import weakref

import pytest
import torch

import fastopt
from fastopt.backends import torch_steps

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot
from .test_clip_grad import DTYPES, everywhere

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
SIZES = ((), (0,), (5,), (600, 3), (4097,), (20000,))


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        numbers = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
        param.grad = torch.empty_like(param).copy_(numbers)


def parameters(dtypes, strided=False):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator, dtype=torch.float64).to(d) for d in dtypes for size in SIZES]
    if strided:
        values += [torch.randn(40, 30, generator=generator).t(), torch.randn(8, 6, 5, generator=generator)[::2, 1:4]]
    return [torch.nn.Parameter(value) for value in values] + [torch.nn.Parameter(torch.zeros(2))]


def run(row, dtypes, folded, strided=False, max_norm=3.0):
    params = parameters(dtypes, strided)
    options = {"max_grad_norm": max_norm} if folded else {}
    optimizer = row.ours(params[::2], **row.plain, **options)
    optimizer.add_param_group({"params": params[1::2], "lr": 0.03, "maximize": True})
    results = []
    for step, scale in enumerate((1.0, 1e-4, 100.0, 1.0)):  # the second does not clip
        give_gradients(params[:-1], step, scale)
        before = [param.grad.clone() for param in params[:-1]]
        together = [param for group in optimizer.param_groups for param in group["params"]]
        norm = None if folded else fastopt.clip_grad_norm_(together, max_norm)
        optimizer.step()
        if folded:
            norm = optimizer.grad_norm
            assert_same_bits([param.grad for param in params[:-1]], before, "gradients stay")
        results += [norm, snapshot(optimizer)]
    return results


@every_row
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES[::2]], ids=str)
def test_as_clipping_and_a_step(row, dtypes):
    expected = run(row, dtypes, folded=False)
    for where, results in everywhere(lambda: run(row, dtypes, folded=True)):
        assert_same_bits(results, expected, where)


@every_row
def test_any_strides_and_states_of_another_dtype(row):
    assert_same_bits(run(row, DTYPES[:1], True, strided=True), run(row, DTYPES[:1], False, strided=True))
    both = []
    for folded in (False, True):
        params = parameters((torch.bfloat16,))[:-1]
        optimizer = row.ours(params, **row.plain, **({"max_grad_norm": 1.0} if folded else {}))
        for step in range(3):
            give_gradients(params, step)
            if not folded:
                fastopt.clip_grad_norm_(params, 1.0)
            optimizer.step()
            for entry in optimizer.state.values():
                entry.update({key: v.float() for key, v in entry.items() if key != "step" and torch.is_tensor(v)})
        both.append(snapshot(optimizer))
    assert_same_bits(*both, "state in float32")


@every_row
def test_hot_step_allocates_nothing_and_is_only_compared(row):
    params = parameters(DTYPES[::2])
    optimizer = row.ours(params, **row.plain, max_grad_norm=1.0, ema_decay=0.99)
    for step in range(2):
        give_gradients(params[:-1], step)
        optimizer.step()
    before = fastopt._C.counters()
    for step in range(4):
        give_gradients(params[:-1], step)
        optimizer.max_grad_norm *= 0.9
        optimizer.step()
    assert fastopt._C.counters() == before


@every_row
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_norm_that_is_not_finite(row, special):
    """As the function by name; or refused, and nothing is changed: not even made, at a first step."""
    both = []
    for folded in (False, True):
        params = parameters((torch.float32,))[:-1]
        optimizer = row.ours(params, **row.plain, **({"max_grad_norm": 1.0} if folded else {}))
        give_gradients(params, 1)
        params[3].grad[7, 1] = special
        if not folded:
            fastopt.clip_grad_norm_(params, 1.0)
        optimizer.step()
        both.append(snapshot(optimizer))
    assert_same_bits(*both, "stepped")
    for steps in (0, 1):
        params = parameters((torch.float32,))[:-1]
        optimizer = row.ours(params, **row.plain, max_grad_norm=1.0, error_if_nonfinite=True)
        for step in range(steps):
            give_gradients(params, step)
            optimizer.step()
        before, entries = copy.deepcopy(snapshot(optimizer)), len(optimizer.state)
        give_gradients(params, 1)
        params[3].grad[7, 1] = special
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before, "refused")
        assert len(optimizer.state) == entries


@every_row
def test_option_of_the_object(row):
    """No key of a group: checkpoints are torch's. Survives copies and pickles; a load does not change it."""
    params = parameters((torch.float32,))
    optimizer = row.ours(params, **row.plain, max_grad_norm=2.0)
    assert "max_grad_norm" not in optimizer.defaults and "max_grad_norm" not in optimizer.param_groups[0]
    assert optimizer.grad_norm is None
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), copy.copy(optimizer)):
        assert other.max_grad_norm == 2.0
        give_gradients([p for group in other.param_groups for p in group["params"]], 1, 100.0)
        other.step()
        assert other.grad_norm > 2.0
    plain = row.ours(params, **row.plain)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.max_grad_norm == 2.0 and not hasattr(plain, "max_grad_norm") and not hasattr(plain, "grad_norm")
    with pytest.raises(AttributeError, match="no attribute 'grad_norm'"):
        plain.grad_norm  # noqa: B018
    assert row.theirs(params, foreach=False, **row.plain).load_state_dict(optimizer.state_dict()) is None


@every_row
def test_changed_between_steps_and_off(row):
    params = parameters((torch.float32,))[:-1]
    optimizer = row.ours(params, **row.plain, max_grad_norm=2.0)
    plain = row.ours(copy.deepcopy(params), **row.plain)
    optimizer.max_grad_norm = None
    for it in (optimizer, plain):
        give_gradients([p for group in it.param_groups for p in group["params"]], 1, 100.0)
        it.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain), "off")
    before = copy.deepcopy(snapshot(optimizer))
    for value in (0, -1.0, math.nan, b"2", 10**400):
        optimizer.max_grad_norm = value
        with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
            optimizer.step()
        with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
            row.ours(params, **row.plain, max_grad_norm=value)
    assert_same_bits(snapshot(optimizer), before, "refused")


@every_row
def test_a_subclass_with_a_max_grad_norm_of_its_own_keeps_it(row):
    class Own(row.ours):
        def __init__(self, params, max_grad_norm):
            super().__init__(params, **row.plain)
            self.max_grad_norm, self.grad_norm = max_grad_norm, "mine"

    params = parameters((torch.float32,))[:-1]
    optimizer, plain = Own(params, 1e-3), row.ours(copy.deepcopy(params), **row.plain)
    for it in (optimizer, plain):
        give_gradients([p for group in it.param_groups for p in group["params"]], 1)
        it.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain), "not clipped")
    assert optimizer.grad_norm == "mine"


@every_row
def test_what_the_plan_does_not_take(row):
    """A complex parameter among others: torch's own step runs, with copies of the gradients that are clipped."""
    params = [torch.nn.Parameter(torch.ones(4, 2, dtype=torch.complex64)), torch.nn.Parameter(torch.ones(3))]
    plain = copy.deepcopy(params)
    optimizer = row.ours(params, **row.plain, max_grad_norm=1.0)
    other = row.ours(plain, **row.plain)
    before = sum(torch_steps.values())
    for step in range(2):
        for it in (params, plain):
            give_gradients(it, step, 10.0)
        grads = [param.grad.clone() for param in params]
        norm = fastopt.clip_grad_norm_(plain, 1.0)
        optimizer.step()
        other.step()
        assert_same_bits([p.detach() for p in params], [p.detach() for p in plain], "stepped")
        assert_same_bits([param.grad for param in params], grads, "gradients stay")
        assert optimizer.grad_norm == norm
    assert sum(torch_steps.values()) > before


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_have_the_norm_that_torch_gives_them(name):
    """Or its error: torch 2.15 has a norm of sparse tensors, 2.13 has none."""

    def one():
        param = torch.nn.Parameter(torch.ones(4, 2))
        param.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2) * 3, (4, 2), check_invariants=True)
        return param

    param, theirs = one(), one()
    grad = param.grad
    optimizer = getattr(fastopt, name)([param], lr=0.1, max_grad_norm=1.0)
    try:
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            optimizer.step()
        assert not optimizer.state[param].get("step")
    else:
        optimizer.step()
        getattr(torch.optim, name)([theirs], lr=0.1).step()
        assert norm == 6 and torch.equal(optimizer.grad_norm, norm) and not torch.equal(theirs, torch.ones(4, 2))
    assert torch.equal(param, theirs) and param.grad is grad
    assert torch.equal(grad.to_dense()[:, 0], torch.tensor([0.0, 3.0, 0.0, 3.0]))


@every_row
def test_own_options_are_keywords(row):
    with pytest.raises(TypeError):
        row.ours(
            parameters((torch.float32,)),
            *[p.default for p in list(inspect.signature(row.theirs).parameters.values())[1:]],
            1.0,
        )


# ---- running averages


def average_beside(row, dtypes, decay, steps=6, **options):
    """Parameters, steps without the option and an AveragedModel in float32 or float64: its averages, then ours."""
    theirs, ours = (Params(dtypes) for _ in range(2))
    plain = row.ours(theirs.parameters(), **row.plain, **options)
    optimizer = row.ours(ours.parameters(), **row.plain, **options, ema_decay=decay)
    wide = copy.deepcopy(theirs)
    wide = wide.float() if dtypes[0].itemsize < 4 else wide
    averaged = torch.optim.swa_utils.AveragedModel(wide, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    for step in range(steps):
        for params in (theirs.list, ours.list):
            give_gradients(params, step)
            for at, param in enumerate(params):  # some have no gradient at first, in between, or ever
                if at == 1 or (at == 2 and step < 2) or (at == 3 and step in (2, 3)):
                    param.grad = None
        plain.step()
        optimizer.step()
        for param, source in zip(wide.list, theirs.list, strict=True):
            param.data.copy_(source)
        averaged.update_parameters(wide)
    assert_same_bits([p.detach() for p in ours.list], [p.detach() for p in theirs.list], "parameters")
    expected = list(averaged.module.list)
    actual = [optimizer.state[p]["ema"] if "ema" in optimizer.state[p] else p.detach() for p in ours.list]
    return optimizer, actual, [p.detach().to(a.dtype) for p, a in zip(expected, actual, strict=True)]


class Params(torch.nn.Module):
    def __init__(self, dtypes):
        super().__init__()
        self.list = torch.nn.ParameterList(parameters(dtypes, strided=True)[:-1])


@every_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.9, 0.3, 0.999])
def test_averages_are_those_of_averaged_model(row, dtype, decay):
    for where, (_, actual, expected) in everywhere(lambda: average_beside(row, (dtype,), decay)):
        assert_same_bits(actual, expected, where)


@every_row
def test_averages_are_kept_by_checkpoints(row):
    """In float32 for 16-bit parameters too; a torch.optim loads them, and what it saves goes on."""
    optimizer, actual, _ = average_beside(row, (torch.bfloat16,), 0.9)
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.ours(Params((torch.bfloat16,)).parameters(), **row.plain, ema_decay=0.9)
    other.load_state_dict(saved)
    again = [entry["ema"] for entry in other.state.values() if "ema" in entry]
    assert_same_bits(again, [entry["ema"] for entry in optimizer.state.values() if "ema" in entry])
    assert all(ema.dtype == torch.float32 for ema in again)
    theirs = row.theirs(Params((torch.bfloat16,)).parameters(), **row.plain)
    theirs.load_state_dict(saved)
    give_gradients([p for group in theirs.param_groups for p in group["params"]], 1)
    theirs.step()
    other.load_state_dict(theirs.state_dict())
    give_gradients([p for group in other.param_groups for p in group["params"]], 1)
    other.step()


@every_row
def test_averages_for_evaluation_and_for_another_model(row):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.idle = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
            self.narrow = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    model = Model()
    optimizer = row.ours(model.parameters(), **row.plain, ema_decay=0.9)
    for function in (
        fastopt.swa_utils.averaged_copy,
        lambda _, it: fastopt.swa_utils.averaged_parameters(it).__enter__(),
    ):
        with pytest.raises(ValueError, match="no optimizer has running averages"):
            function(model, optimizer)
    for step in range(3):
        give_gradients([model.weight, model.narrow], step)
        optimizer.step()
    ema, half = (optimizer.state[p]["ema"].clone() for p in (model.weight, model.narrow))
    assert half.dtype == torch.float32 and not torch.equal(ema, model.weight)
    own = [param.detach().clone() for param in model.parameters()]
    with fastopt.swa_utils.averaged_parameters(optimizer):
        assert torch.equal(model.weight, ema) and torch.equal(model.narrow, half.bfloat16())
        assert torch.equal(model.idle, own[1])
    assert_same_bits([param.detach() for param in model.parameters()], own)
    with pytest.raises(KeyError), fastopt.swa_utils.averaged_parameters(optimizer):
        raise KeyError
    assert_same_bits([param.detach() for param in model.parameters()], own)
    smooth = fastopt.swa_utils.averaged_copy(model, optimizer)
    assert torch.equal(smooth.weight, ema) and smooth.weight is not model.weight
    assert_same_bits([param.detach() for param in model.parameters()], own)


@every_row
def test_averaging_may_pause(row):
    """None leaves the averages as they are; another value is taken at the next step; a bad one is refused."""
    params = parameters((torch.float32,))[:-1]
    optimizer = row.ours(params, **row.plain, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    before = copy.deepcopy(snapshot(optimizer))
    optimizer.ema_decay = 1.5
    with pytest.raises(ValueError, match="Invalid ema_decay value: 1.5"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    for value, changes in ((None, False), (0.0, True)):
        ema = [optimizer.state[param]["ema"].clone() for param in params]
        optimizer.ema_decay = value
        optimizer.step()
        now = [optimizer.state[param]["ema"] for param in params]
        assert all(torch.equal(a, b) for a, b in zip(ema, now, strict=True)) != changes
    assert_same_bits(now, [param.detach() for param in params])


@every_row
def test_averages_begin_late_without_a_first_step_anew(row):
    """State that lacks nothing but an average is no new state: dampening, step counts and momentum go on."""
    params, plain = (parameters((torch.float32,))[:-1] for _ in range(2))
    optimizer, other = row.ours(params, **row.plain, ema_decay=0.9), row.ours(plain, **row.plain)
    optimizer.ema_decay = None
    for step in range(4):
        for its in (params, plain):
            give_gradients(its, step)
        if step == 2:
            optimizer.ema_decay = 0.9
        optimizer.step()
        other.step()
        assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])
        assert fastopt.averages.open_ones(optimizer) or ("ema" in optimizer.state[params[0]]) == (step >= 2)
        if step == 2:
            assert_same_bits([optimizer.state[p]["ema"] for p in params], [p.detach() for p in params], "the first")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_averages_where_torch_steps(momentum):
    """Of parameters without other state too."""
    params, plain = ([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)) for _ in range(2)] for _ in range(2))
    optimizer = fastopt.SGD(params, lr=0.1, momentum=momentum, ema_decay=0.9)
    other = torch.optim.SGD(plain, lr=0.1, momentum=momentum, foreach=False)
    expected = None
    for step in range(3):
        for its in (params[:1], plain[:1]):
            give_gradients(its, step)
        optimizer.step()
        other.step()
        value = plain[0].detach()
        expected = value.clone() if expected is None else torch.lerp(expected, value, 1 - 0.9)
        assert torch.equal(optimizer.state[params[0]]["ema"], expected)
    assert "ema" not in optimizer.state.get(params[1], {})


# ---- what a tester found


def test_a_step_refused_for_an_average_that_it_alone_updates_changes_nothing():
    """A parameter was frozen, and then replaced by one of another shape."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fastopt.AdamW(params, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    params[1].grad, params[1].data = None, torch.ones(5)
    before = copy.deepcopy(optimizer.state[params[0]]), params[0].detach().clone()
    with pytest.raises(
        RuntimeError, match=r"state\['ema'\] of parameter 1 of param group 0 has shape \[3\], the parameter \[5\]"
    ):
        optimizer.step()
    assert_same_bits(params[0].detach(), before[1])
    assert_same_bits(list(optimizer.state[params[0]].values()), list(before[0].values()))
    with (
        pytest.raises(ValueError, match="a running average has shape"),
        fastopt.swa_utils.averaged_parameters(optimizer),
    ):
        pass
    optimizer.state[params[1]]["ema"] = 7
    with pytest.raises(TypeError, match="must be a tensor, not int"):
        optimizer.step()
    assert_same_bits(params[0].detach(), before[1])


def test_averages_leave_no_momentum_buffer_that_nobody_asked_for():
    param, plain = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, other = fastopt.SGD([param], lr=0.1, ema_decay=0.9), torch.optim.SGD([plain], lr=0.1)
    for it in (param, plain):
        it.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    other.step()
    assert optimizer.state[param].keys() == {"ema"}
    for it in (optimizer, other):
        it.param_groups[0].update(momentum=0.9, dampening=0.5)
        it.step()
    assert torch.equal(param, plain)


def test_clipping_beside_a_differentiable_step_keeps_the_graph():
    grads = []
    for options in ({}, {"max_grad_norm": 100.0}):
        scale = torch.tensor(2.0, requires_grad=True)
        param = torch.ones(3).requires_grad_().clone()
        optimizer = fastopt.SGD([param], lr=0.1, differentiable=True, **options)
        param.grad = torch.ones(3) * scale
        optimizer.step()
        grads += torch.autograd.grad(param.sum(), scale)
    assert torch.equal(*grads)


def test_a_shallow_copy_has_options_of_its_own():
    optimizer = fastopt.SGD([torch.nn.Parameter(torch.ones(2))], max_grad_norm=0.5)
    copied = copy.copy(optimizer)
    copied.grad_scale = torch.tensor(8.0)
    assert not hasattr(optimizer, "grad_scale") and copied.max_grad_norm == 0.5


def test_numbers_without_dimensions_beside_float64_are_clipped_as_by_the_function():
    both = []
    for folded in (False, True):
        params = [torch.nn.Parameter(torch.tensor(0.0)), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
        optimizer = fastopt.SGD(params, lr=1.0, **({"max_grad_norm": 1.0} if folded else {}))
        give_gradients(params, 3)
        if not folded:
            fastopt.clip_grad_norm_(params, 1.0)
        optimizer.step()
        both.append([param.detach() for param in params])
    assert_same_bits(*both)


def test_grad_norm_is_of_the_last_step():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fastopt.SGD([param], max_grad_norm=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.grad_norm > 1
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("value", ["abc", "1.0", [1], 1j, torch.ones(2)], ids=str)
@pytest.mark.parametrize("option", ["max_grad_norm", "ema_decay"])
def test_what_is_no_number_is_named(option, value):
    with pytest.raises(ValueError, match=f"Invalid {option} value: "):
        fastopt.SGD([torch.nn.Parameter(torch.ones(2))], **{option: value})


def test_options_that_would_do_nothing():
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="error_if_nonfinite=True needs max_grad_norm"):
        fastopt.SGD(params, error_if_nonfinite=True)
    optimizer = fastopt.SGD(params, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="no parameter of this model has a running average"):
        fastopt.swa_utils.averaged_copy(torch.nn.Linear(1, 1), optimizer)


@every_row
def test_parameters_in_one_memory_have_averages_of_what_they_are_after_the_step(row):
    base = torch.ones(6)
    params = [torch.nn.Parameter(base[:4]), torch.nn.Parameter(base[2:])]
    optimizer = row.ours(params, **row.plain, ema_decay=0.5)
    expected = None
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
        values = [param.detach().clone() for param in params]
        expected = (
            values if expected is None else [torch.lerp(e, v, 0.5) for e, v in zip(expected, values, strict=True)]
        )
        assert_same_bits([optimizer.state[param]["ema"] for param in params], expected)


def test_a_loaded_average_of_another_shape_is_refused():
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = fastopt.SGD(params, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["ema"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"loaded 'ema' of parameter 0 has shape \[7\], the parameter \[2\]"):
        optimizer.load_state_dict(saved)


def test_a_first_average_is_a_copy_also_after_an_interrupt(monkeypatch):
    from fastopt import optimizer as module

    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = fastopt.SGD(params, lr=0.1, ema_decay=0.9)
    give_gradients(params, 0)
    step = module._C.step

    class Interrupted:
        def __getattr__(self, name):
            return getattr(fastopt._C, name)

        def step(self, optimizer, fresh=None, extras=None):
            answer = step(optimizer, fresh, extras)
            if fresh is not None:
                raise KeyboardInterrupt
            return answer

    monkeypatch.setattr(module, "_C", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert_same_bits(optimizer.state[params[0]]["ema"], params[0].detach())


def test_an_average_of_none_is_none_with_and_without_a_gradient():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fastopt.SGD(params, lr=0.1, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    for param in params:
        optimizer.state[param]["ema"] = None
    params[1].grad, own = None, params[1].detach().clone()
    with pytest.raises(ValueError, match="no optimizer has running averages"):
        fastopt.swa_utils.averaged_copy(torch.nn.Linear(1, 1), optimizer)
    optimizer.step()
    assert_same_bits(optimizer.state[params[0]]["ema"], params[0].detach())  # the first of all, again
    assert optimizer.state[params[1]]["ema"] is None  # it is its own average
    with fastopt.swa_utils.averaged_parameters(optimizer):
        assert torch.equal(params[1], own)


@pytest.mark.parametrize(
    "broken, message",
    [
        (torch.zeros(3, dtype=torch.int64), "has dtype"),
        (torch.zeros(3, device="meta"), "is on meta"),
        (torch.zeros(4), "has shape"),
        (torch.zeros(1).expand(3), "single memory location"),
        ("text", "must be a tensor"),
    ],
    ids=["dtype", "device", "shape", "overlap", "no tensor"],
)
@pytest.mark.parametrize("has_gradient", [True, False])
def test_an_average_that_cannot_be_updated_is_refused(has_gradient, broken, message):
    """Before anything is written: also that of a parameter which is not stepped."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fastopt.Adam(params, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    if not has_gradient:
        params[1].grad = None
    optimizer.state[params[1]]["ema"] = broken
    before = copy.deepcopy([params[0].detach(), *optimizer.state[params[0]].values()])
    with pytest.raises((RuntimeError, TypeError), match=message):
        optimizer.step()
    assert_same_bits([params[0].detach(), *optimizer.state[params[0]].values()], before)


def test_a_parameter_without_gradient_is_averaged_once_however_often_it_is_listed():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = fastopt.SGD([*params, params[1]], lr=0.1, ema_decay=0.5)
    give_gradients(params, 0)
    optimizer.step()
    before, params[1].grad = optimizer.state[params[1]]["ema"].clone(), None
    params[1].data.fill_(3)
    optimizer.step()
    assert_same_bits(optimizer.state[params[1]]["ema"], torch.lerp(before, params[1].detach(), 0.5))


def test_an_option_that_is_deleted_is_off():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fastopt.SGD([param], lr=0.1, max_grad_norm=1.0, ema_decay=0.9)
    give_gradients([param], 0)
    optimizer.step()
    del optimizer.max_grad_norm, optimizer.ema_decay
    optimizer = copy.deepcopy(optimizer)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_averages_hold_nothing_from_step_to_step():
    """A parameter that knows its optimizer is freed with it, also where it is averaged without a gradient."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fastopt.SGD(params, lr=0.1, ema_decay=0.9)
    give_gradients(params, 0)
    optimizer.step()
    params[1].grad, params[1].owner = None, optimizer
    optimizer.step()
    alive = weakref.ref(optimizer)
    del params, optimizer
    gc.collect()
    assert alive() is None
