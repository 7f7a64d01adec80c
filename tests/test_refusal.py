"""A step that is refused changes nothing: parameters, states, step counters and the set of entries stay as they were.

What torch.optim refuses is refused, with its type of error; what it accepts does as the reference does.
"""

import copy
import itertools
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


# What is done to the second of three parameters before a step whose first parameter has nothing wrong.


def grad_of_another_shape(optimizer, param):
    original = param.data
    param.grad = None
    param.data = torch.zeros(2, 2)
    param.grad = torch.ones(2, 2)
    param.data = original


def grad_that_would_broadcast(optimizer, param):
    original = param.data
    param.grad = None
    param.data = torch.zeros(1)
    param.grad = torch.ones(1)
    param.data = original


def grad_of_another_dtype(optimizer, param):
    original = param.data
    param.grad = None
    param.data = original.double()
    param.grad = torch.ones(7, dtype=torch.float64)
    param.data = original


def param_of_another_shape(optimizer, param):
    param.grad = None
    param.data = torch.ones(9)
    param.grad = torch.ones(9)


def expanded_parameter(optimizer, param):
    param.grad = None
    param.data = torch.ones(1).expand(7)
    param.grad = torch.ones(7)


def sparse_gradient(optimizer, param):
    param.grad = torch.ones(7).to_sparse()


def parameter_made_in_inference_mode(optimizer, param):
    with torch.inference_mode():
        other = torch.ones(7)
    other.grad = torch.ones(7)
    optimizer.param_groups[0]["params"][1] = other
    if param in optimizer.state:
        optimizer.state[other] = optimizer.state.pop(param)


def gradient_made_in_inference_mode(optimizer, param):
    with torch.inference_mode():
        grad = torch.ones(7)
    param.grad = grad


def integer_parameter(optimizer, param):
    other = torch.ones(7, dtype=torch.int64)
    other.grad = torch.ones(7, dtype=torch.int64)
    optimizer.param_groups[0]["params"][1] = other


def slots_of(optimizer, param):
    return [name for name, value in optimizer.state[param].items() if name != "step" and value is not None]


def state_of_another_shape(optimizer, param):
    for name in slots_of(optimizer, param)[-1:]:
        optimizer.state[param][name] = torch.ones(2, 2)


def state_on_another_device(optimizer, param):
    for name in slots_of(optimizer, param)[:1]:
        optimizer.state[param][name] = torch.ones(7, device="meta")


def state_wider_than_the_arithmetic(optimizer, param):
    for name in slots_of(optimizer, param)[:1]:
        optimizer.state[param][name] = optimizer.state[param][name].double()


def expanded_state(optimizer, param):
    for name in slots_of(optimizer, param)[:1]:
        optimizer.state[param][name] = torch.ones(1).expand(7)


def state_that_is_no_tensor(optimizer, param):
    for name in slots_of(optimizer, param)[:1]:
        optimizer.state[param][name] = "exp_avg"


def state_missing(optimizer, param):
    for name in slots_of(optimizer, param)[-1:]:
        del optimizer.state[param][name]


def step_missing(optimizer, param):
    optimizer.state[param].pop("step", None)


def step_that_is_no_number(optimizer, param):
    """Found out when state has been made for the first parameter, which has none any more."""
    if "step" in optimizer.state[param]:
        optimizer.state[param]["step"] = "three"
        del optimizer.state[optimizer.param_groups[0]["params"][0]]


def state_that_is_no_dict(optimizer, param):
    optimizer.state[param] = torch.ones(7)


def hyper_parameter_that_is_no_number(optimizer, param):
    optimizer.param_groups[0]["lr"] = "fast"


def hyper_parameter_missing(optimizer, param):
    del optimizer.param_groups[0]["lr"]


def tensor_lr_of_two_elements(optimizer, param):
    optimizer.param_groups[0]["lr"] = torch.ones(2)


def second_group_without_lr(optimizer, param):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    (added,) = optimizer.param_groups[1]["params"]
    added.grad = torch.ones(3)
    del optimizer.param_groups[1]["lr"]


def param_that_is_no_tensor(optimizer, param):
    optimizer.param_groups[0]["params"][1] = 3.0


EVERYONE = {row.name for row in ROWS}
COUNTING = EVERYONE - {"SGD"}  # SGD starts anew where there is no buffer, and has no step
PARAMETER, GROUP = "parameter 1 of param group 0", "param group 0"

# What is spoiled, which optimizers refuse it, with what type of error, and what the message names.
CASES = (
    (grad_of_another_shape, EVERYONE, RuntimeError, PARAMETER),
    (grad_that_would_broadcast, EVERYONE, RuntimeError, PARAMETER),  # torch broadcasts it
    (grad_of_another_dtype, {"RMSprop", "Adam", "AdamW"}, RuntimeError, PARAMETER),  # those with a lerp
    (param_of_another_shape, EVERYONE, RuntimeError, PARAMETER),
    (expanded_parameter, EVERYONE, RuntimeError, PARAMETER),
    (sparse_gradient, EVERYONE, RuntimeError, None),
    (parameter_made_in_inference_mode, EVERYONE, RuntimeError, PARAMETER),
    (gradient_made_in_inference_mode, set(), None, None),
    (integer_parameter, EVERYONE, RuntimeError, PARAMETER),
    (state_of_another_shape, EVERYONE, RuntimeError, PARAMETER),
    (state_on_another_device, EVERYONE, RuntimeError, PARAMETER),
    (state_wider_than_the_arithmetic, EVERYONE, RuntimeError, PARAMETER),
    (expanded_state, EVERYONE, RuntimeError, PARAMETER),
    (state_that_is_no_tensor, EVERYONE, TypeError, PARAMETER),
    (state_that_is_no_dict, EVERYONE, TypeError, PARAMETER),
    (state_missing, COUNTING, KeyError, PARAMETER),
    (step_missing, COUNTING, KeyError, PARAMETER),
    (step_that_is_no_number, COUNTING, TypeError, PARAMETER),
    (param_that_is_no_tensor, EVERYONE, TypeError, PARAMETER),
    (hyper_parameter_that_is_no_number, EVERYONE, TypeError, GROUP),
    (hyper_parameter_missing, EVERYONE, KeyError, GROUP),
    (tensor_lr_of_two_elements, EVERYONE, ValueError, GROUP),
    (second_group_without_lr, EVERYONE, KeyError, "param group 1"),
)


def started(make_optimizer, step):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(7)) for _ in range(3)]
    optimizer = make_optimizer(params)
    for param in params:
        param.grad = torch.randn(7)
    step(optimizer)
    step(optimizer)
    return optimizer, params


def everything(optimizer):
    """All tensors of an optimizer with their values and versions, and where they are."""
    found = []
    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = list(enumerate(params))
    for index, entry in enumerate(optimizer.state.values()):
        entries = entry if isinstance(entry, dict) else {"no dict": entry}
        places += [((index, name), value) for name, value in entries.items()]
    for place, tensor in places:
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            version = None if tensor.is_inference() else tensor._version
            found.append((place, id(tensor), version, tensor.detach().clone()))
    return found, list(map(id, optimizer.state))


def complex_parameter(optimizer):
    """Then the step is torch's, which would go as far as it gets."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer.add_param_group({"params": [param]})
    optimizer.param_groups.reverse()


@pytest.mark.parametrize("by_torch", [False, True], ids=["", "torchs"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
@every_row
def test_a_refused_step_changes_nothing(row, case, by_torch):
    spoil, refused_by, error, named = case

    def step(optimizer):
        with reference.correctly_rounded_sqrt():  # for what torch's own step does
            optimizer.step()

    optimizer, params = started(row.make_ours(row.plain), step)
    spoil(optimizer, params[1])
    if by_torch:
        complex_parameter(optimizer)
        named = named and named.replace("group 0", "group 1")
        if row.name not in refused_by:
            return
    if row.name in refused_by:
        tensors, keys = everything(optimizer)
        with pytest.raises(error, match=named):
            optimizer.step()
        tensors_after, keys_after = everything(optimizer)
        assert keys_after == keys
        assert [t[:3] for t in tensors_after] == [t[:3] for t in tensors]
        for (place, *_, after), (*_, before) in zip(tensors_after, tensors, strict=True):
            assert_same_bits(after, before, f"{row.name} {place}")
    else:
        step(optimizer)
        other, params = started(row.make_reference(row.plain), reference.step)
        spoil(other, params[1])
        reference.step(other)
        assert_same_bits(snapshot(optimizer), snapshot(other), row.name)


@every_row
def test_a_refused_first_step_leaves_no_state(row):
    """The state that was made for the other parameters is taken away again."""
    params = [torch.nn.Parameter(torch.ones(7)) for _ in range(2)]
    optimizer = row.ours(params, **row.plain)
    entries = {param: dict(optimizer.state[param]) for param in list(optimizer.state)}
    params[0].grad = torch.ones(7)
    grad_of_another_shape(optimizer, params[1])
    with pytest.raises(RuntimeError, match=PARAMETER):
        optimizer.step()
    assert {param: dict(optimizer.state[param]) for param in list(optimizer.state)} == entries
    params[1].grad = torch.ones(7)
    optimizer.step()
    assert all(optimizer.state[param].keys() == optimizer.state[params[0]].keys() for param in params)
    assert torch.equal(params[0].detach(), params[1].detach()) and not torch.equal(params[0].detach(), torch.ones(7))


@every_row
def test_an_error_in_making_state_is_not_hidden(row, monkeypatch):
    """Out of memory, or Ctrl-C: half of the state is taken away again, and the error goes on."""
    params = [torch.nn.Parameter(torch.ones(7)) for _ in range(3)]
    optimizer = row.ours(params, **row.plain)
    if len(optimizer.state):
        return  # Adagrad's is made by the constructor
    for param in params:
        param.grad = torch.ones(7)
    made, full_like = [], torch.full_like

    def fails_later(*args, **options):
        made.append(args)
        if len(made) > 1:
            raise KeyboardInterrupt
        return full_like(*args, **options)

    monkeypatch.setattr(torch, "full_like", fails_later)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert made and not optimizer.state
    optimizer.step()
    assert len(optimizer.state) == 3


@every_row
def test_a_step_that_was_done_keeps_its_state(row, monkeypatch):
    """Ctrl-C can come between the writing and what Python does next."""
    from fastopt import optimizer as module

    param = torch.nn.Parameter(torch.ones(7))
    param.grad = torch.ones(7)
    optimizer = row.ours([param], **row.plain)

    def step(*args):
        answer = fastopt._C.step(*args)
        if answer is fastopt._C.DONE:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(module, "_C", SimpleNamespace(**{**vars(fastopt._C), "step": step}))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not torch.equal(param.detach(), torch.ones(7))
    assert all(optimizer.state[param].get(name) is not None for name in row.slots[:1])


def stepped_once(row):
    param = torch.nn.Parameter(torch.ones(7))
    param.grad = torch.ones(7)
    optimizer = row.ours([param], **row.plain)
    optimizer.step()
    return optimizer, param


@pytest.mark.parametrize("value", [torch.float64, torch.int16, torch.complex64, "bfloat16", 16, True])
@every_row
def test_state_dtype_that_state_cannot_be(row, value):
    with pytest.raises(ValueError, match=f"state_dtype: {value!r};"):
        row.ours([torch.nn.Parameter(torch.ones(3))], **row.plain, state_dtype=value)


@every_row
@pytest.mark.parametrize("option", ["state_dtype", "master_weights", "stochastic_rounding"])
def test_state_dtype_without_extension(row, option, monkeypatch):
    """Not ignored: every step would be torch's, which has none of them."""
    monkeypatch.setattr("fastopt.extras._C", None)
    with pytest.raises(RuntimeError, match=f"{option}.* need fastopt's C"):
        row.ours([torch.nn.Parameter(torch.ones(3))], **row.plain, **{option: torch.bfloat16})


@every_row
def test_torchs_own_step_of_state_with_another_dtype(row):
    """Where torch would stop half-way, before anything is changed; else torch's step takes it."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = row.ours(params, **row.plain, state_dtype=torch.bfloat16)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0]["differentiable"] = True
    slot = {"adam": "exp_avg", "rmsprop": "grad_avg"}.get(row.module)
    with torch.no_grad():
        if slot is None:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match=f"'{slot}' but got dtype torch.bfloat16 .parameter 0"):
                optimizer.step()
            assert_same_bits(snapshot(optimizer), before)


@every_row
def test_factors_that_are_not_finite_are_refused(row):
    """Where torch divides by zero; a step count that no counter has is nothing else."""
    optimizer, param = stepped_once(row)
    before, group = snapshot(optimizer), optimizer.param_groups[0]
    if "betas" in group:
        group["betas"] = (1.0, 0.99)
    elif "lr_decay" in group:
        group["lr_decay"] = -1.0
    else:
        group["lr"] = 1e300
    with pytest.raises(ZeroDivisionError, match="param group 0 give an infinite or undefined factor at step 2"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before, row.name)
    if "betas" in group:
        group["betas"] = (0.9, 0.99)
        optimizer.state[param]["step"] = torch.tensor(-2.0)
        with pytest.raises(ZeroDivisionError, match="factor at step -1"):
            optimizer.step()


@every_row
def test_hyper_parameters_of_another_kind(row):
    """Numbers are not taken from lists, pairs are pairs, and the truth of a switch is what Python says."""
    optimizer, _ = stepped_once(row)
    before, group = snapshot(optimizer), optimizer.param_groups[0]
    kept = dict(group)
    for key, value, error, message in (
        ("lr", [0.1, 0.9], TypeError, "lr of param group 0 must be a number, not list"),
        ("betas", 0.9, TypeError, "betas of param group 0 must be two numbers, not 0.9"),
        ("betas", (0.9, 0.9, 0.9), ValueError, r"must be two numbers, not \(0.9, 0.9, 0.9\)"),
        ("betas", [0.9], ValueError, r"must be two numbers, not \[0.9\]"),
        ("betas", itertools.count(), ValueError, r"must be two numbers, not count\(3\)"),
        ("betas", "ab", TypeError, "betas of param group 0 must be a number, not str"),
    ):
        if key in group:
            group[key] = value
            with pytest.raises(error, match=message):
                optimizer.step()
            assert_same_bits(snapshot(optimizer), before, row.name)
            group.update(kept)
    for key in ("amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay"):
        results = []
        for make_value in (bool, lambda on: "yes" if on else None):
            twin = torch.nn.Parameter(torch.ones(7))
            other = row.ours([twin], **row.plain)
            if key in other.param_groups[0]:
                other.param_groups[0][key] = make_value(other.param_groups[0][key])
            for _ in range(2):
                twin.grad = torch.ones(7)
                other.step()
            results.append(twin.detach())
        assert torch.equal(*results)


@every_row
def test_a_refused_load_changes_nothing(row):
    """State that is there but incomplete or of another shape; torch loads it and fails, or computes, later."""

    def without(name):
        return lambda entry: entry.pop(name)

    def misshapen(name):
        return lambda entry: entry.update({name: torch.ones(2, 2)})

    spoilers = [misshapen(name) for name in row.slots]
    if row.name in COUNTING:
        spoilers += [without(name) for name in ("step", *row.slots)]
    for spoil in spoilers:
        optimizer, _ = started(row.make_ours(row.plain), lambda optimizer: optimizer.step())
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 77.0
        spoil(saved["state"][1])
        tensors, keys = everything(optimizer)
        with pytest.raises(ValueError, match="parameter 1"):
            optimizer.load_state_dict(saved)
        tensors_after, keys_after = everything(optimizer)
        assert keys_after == keys and optimizer.param_groups[0]["lr"] != 77.0
        assert [t[:3] for t in tensors_after] == [t[:3] for t in tensors]


@every_row
def test_constructors_refuse_what_torchs_refuse(row):
    """With the same error, for all that torch's own tests list, and every option negative, NaN, large or no number."""
    calls = [(params or [torch.nn.Parameter(torch.ones(2))], options) for params, options in row.refused_by_torch()]
    for option in row.defaults():
        for value in (-1.0, -1e-30, float("nan"), 1.0, 2.0, True, "fast", None, (0.9, 1.0), (-0.1, 0.9), torch.ones(2)):
            calls.append(([torch.nn.Parameter(torch.ones(2))], {option: value}))
    calls += [([], {}), (torch.ones(2), {}), ([torch.ones(2, requires_grad=True) * 2], {}), ([3.0], {}), (None, {})]
    refused = 0
    for params, options in calls:
        outcomes = []
        for make in (row.ours, row.theirs):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    make(params, **options)
                outcomes.append(None)
            except Exception as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1], f"{row.name}({params}, {options})"
        refused += outcomes[0] is not None
    assert refused > 20


def import_with(isa):
    """`import fastopt` in another process with FASTOPT_ISA set to `isa`."""
    command = "import fastopt; print(fastopt.backend_info()['cpu'])"
    environment = {**os.environ, "FASTOPT_ISA": isa}
    return subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)


def test_isa_from_the_environment():
    assert import_with("baseline").stdout.strip() == "baseline"
    unknown = import_with("avx1024")
    assert unknown.returncode != 0 and unknown.stdout == ""
    assert "ValueError: FASTOPT_ISA: " in unknown.stderr
    assert "avx1024" in unknown.stderr and fastopt._C.isas()[-1] in unknown.stderr


def test_isa_that_is_not_there():
    before = fastopt._C.set_isa(fastopt._C.isas()[0])
    try:
        for name in ("avx1024", "", "AVX2"):
            with pytest.raises(ValueError, match=f"'{name}'"):
                fastopt._C.set_isa(name)
        assert fastopt._C.set_isa(before) == fastopt._C.isas()[0]  # as before the failures
    finally:
        fastopt._C.set_isa(before)
