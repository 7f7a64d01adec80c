"""What is outside the fused path: torch's own step, with its results, and backend_info() says so."""

import copy

import pytest
import torch
from torch import nn

from fastopt.backends import torch_steps

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh
from .scenarios import same_as_torch, small_model, steps_of_torch

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


class Tagged(torch.Tensor):
    """A subclass without a dispatch of its own."""


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def subclass(make):
    params = [nn.Parameter(torch.randn(5).as_subclass(Tagged)), nn.Parameter(torch.randn(3))]
    assert isinstance(params[0], Tagged)
    optimizer = make(params)
    return drive(optimizer, [[torch.randn(5), torch.randn(3)] for _ in range(3)])


def dispatch_mode(make):
    optimizer = make([nn.Parameter(torch.randn(5))])
    with Counting() as mode:
        snapshots = drive(optimizer, [[torch.randn(5)] for _ in range(3)])
    assert any("sgd" in str(f) or "add" in str(f) or "addcdiv" in str(f) for f in mode.seen)
    return [*snapshots, *drive(optimizer, [[torch.randn(5)]])]


def complex_parameters(make):
    optimizer = make([nn.Parameter(torch.randn(5, dtype=torch.complex64)), nn.Parameter(torch.randn(2))])
    return drive(optimizer, [[torch.randn(5, dtype=torch.complex64), torch.randn(2)] for _ in range(3)])


def complex_parameter_added(make):
    optimizer = make([nn.Parameter(torch.randn(5))])
    snapshots = drive(optimizer, [[torch.randn(5)]])
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(2, dtype=torch.complex64))]})
    return snapshots + drive(optimizer, [[torch.randn(5), torch.randn(2, dtype=torch.complex64)] for _ in range(3)])


def parameter_with_grad_dtype(make):
    """A parameter with another `grad_dtype` has gradients of that dtype."""
    param = nn.Parameter(torch.randn(5))
    param.grad_dtype = torch.float64
    optimizer = make([param])
    return drive(optimizer, [[torch.randn(5, dtype=torch.float64)] for _ in range(3)])


def a_state_of_two_parameters(make):
    """Each parameter finds in it what the one before left."""
    params = [nn.Parameter(torch.randn(5)) for _ in range(2)]
    optimizer = make(params)
    for param in params:
        param.grad = torch.randn(5)
    if not optimizer.state:
        optimizer.step()
    optimizer.state[params[1]] = optimizer.state[params[0]]
    return drive(optimizer, [[torch.randn(5) for _ in params] for _ in range(3)])


def differentiable(make):
    param = torch.randn(5)
    optimizer = make([param])
    optimizer.param_groups[0]["differentiable"] = True
    return drive(optimizer, [[torch.randn(5)] for _ in range(2)])


OUTSIDE = {
    subclass: "subclass",
    dispatch_mode: "dispatch mode",
    complex_parameters: "complex",
    complex_parameter_added: "complex",
    a_state_of_two_parameters: "share one state",
    differentiable: "differentiable",
}


@pytest.mark.parametrize("scenario", OUTSIDE, ids=lambda scenario: scenario.__name__)
@every_row
def test_outside_the_fused_path(row, scenario):
    before = steps_of_torch()
    same_as_torch(row, scenario)
    new = [reason for reason, count in steps_of_torch().items() if count > before.get(reason, 0)]
    assert new and all(reason.startswith(f"{row.name}: ") and OUTSIDE[scenario] in reason for reason in new), new


@every_row
def test_grad_dtype_other_than_the_parameters(row):
    """Where torch takes it, as torch; where its for-loop fails, the same type of error."""

    def scenario(make):
        try:
            return parameter_with_grad_dtype(make)
        except RuntimeError as error:
            return {"error": type(error).__name__}

    before = sum(steps_of_torch().values())
    found = same_as_torch(row, scenario)
    assert "error" in found or sum(steps_of_torch().values()) > before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_row
def test_grad_dtype_none_takes_float32(row, dtype):
    """16-bit parameters with float32 gradients, as mixed-precision training with full gradients has them.

    On the fused path: the formulas in float32, rounded once. A first step of torch's own, where it takes them, rounds
    more often, and is close.
    """
    values, grads = torch.randn(77).to(dtype), [torch.randn(77) for _ in range(3)]

    def drive(cls, step, count):
        param = nn.Parameter(values.clone())
        param.grad_dtype = None
        optimizer = cls([param], **row.plain)
        snapshots = []
        for grad in grads[:count]:
            param.grad = grad.clone()
            step(optimizer)
            snapshots.append(reference.snapshot(optimizer))
        return snapshots, param.detach()

    before = sum(torch_steps.values())
    ours, _ = drive(row.ours, lambda optimizer: optimizer.step(), 3)
    assert sum(torch_steps.values()) == before
    assert_same_bits(ours, drive(row.theirs, reference.step, 3)[0], row.name)
    try:
        _, theirs = drive(row.theirs, lambda optimizer: optimizer.step(), 1)
    except RuntimeError:
        return
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps * row.plain["lr"]}
    torch.testing.assert_close(drive(row.ours, lambda optimizer: optimizer.step(), 1)[1], theirs, **near)


@pytest.mark.parametrize("kind", ["meta", "fake"])
@every_row
def test_memory_planning_without_memory(row, kind):
    """On meta and Fake tensors a step makes the state that a real one would, and computes nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = steps_of_torch()
    planned = []
    for cls in (row.ours, row.theirs):
        with FakeTensorMode() if kind == "fake" else torch.device("meta"):
            model = small_model()
            optimizer = cls(model.parameters(), **row.plain)
            for _ in range(2):
                for param in model.parameters():
                    param.grad = torch.empty_like(param)
                try:
                    optimizer.step()
                except (RuntimeError, torch._subclasses.fake_tensor.DataDependentOutputException) as error:
                    planned.append(type(error))
        planned.append([
            [(name, value.shape, value.dtype) for name, value in optimizer.state[param].items() if name != "step"]
            for param in optimizer.param_groups[0]["params"]
        ])  # fmt: skip
    half = len(planned) // 2
    assert planned[:half] == planned[half:]
    if planned[0] and isinstance(planned[0], list):
        assert steps_of_torch() != before


@every_row
def test_one_step_of_everything_torch_lists(row):
    """OptimizerInfo's inputs with each of foreach, fused and differentiable: the bits are the for-loop's."""
    from torch.testing._internal.common_optimizers import _get_optim_inputs_including_global_cliquey_kwargs as inputs_of
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = (info for info in optim_db if info.optim_cls is row.theirs)
    values = [torch.randn(shape) for shape in ((), (1,), (7, 3), (2, 1, 5))]
    inputs = inputs_of("cpu", torch.float32, info)
    for entry in inputs:
        options = dict(entry.kwargs)
        plain = {key: value for key, value in options.items() if key not in ("foreach", "fused")}
        grads_per_step = [[torch.randn(v.shape) for v in values] for _ in range(3)]
        trainable = (lambda: [v.clone() for v in values]) if options.get("differentiable") else values
        with reference.correctly_rounded_sqrt():
            ours = drive(row.make_ours(copy.deepcopy(options))(fresh(trainable)), grads_per_step)
            theirs = drive(row.make_reference(copy.deepcopy(plain))(fresh(trainable)), grads_per_step)
        assert_same_bits(ours, theirs, f"{row.name} {entry.desc} {options}")
    assert len(inputs) > 10


class Doubling(torch.Tensor):
    """Adds twice what it is to be added."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function.__name__ == "add_":
                args = (args[0], args[1] * 2, *args[2:])
            return function(*args, **(kwargs or {}))


@every_row
@pytest.mark.parametrize("what", ["gradient", "gradient of a later step", "state", "lr"])
def test_subclass_with_a_say(row, what):
    """Of a plain parameter's gradient, state or learning rate: torch's own step asks it."""

    def run(cls):
        param = nn.Parameter(torch.ones(3))
        optimizer = cls([param], foreach=False, **row.plain)
        for step in range(4):
            param.grad = torch.full((3,), 0.5)
            if what == "gradient" or (what == "gradient of a later step" and step > 1):
                param.grad = param.grad.as_subclass(Doubling)
            if what == "state":
                for entry in optimizer.state.values():
                    entry.update({k: v.as_subclass(Doubling) for k, v in entry.items() if torch.is_tensor(v)})
            if what == "lr":
                optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Doubling)
            with reference.correctly_rounded_sqrt():
                optimizer.step()
        return torch.Tensor.as_subclass(param.detach(), torch.Tensor)

    before = sum(torch_steps.values())
    assert_same_bits(run(row.ours), run(row.theirs))
    stateless = what == "state" and not row.slots
    assert stateless or sum(torch_steps.values()) > before
