"""torch.compile around a step: the uncompiled numbers, and no recompilation when hyper-parameters change.

The step itself is not traced: it is one call into C++ or one launch already, and runs between the compiled parts.
"""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastopt

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

every_row = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row.name == "Adam" else pytest.mark.slow, id=row.name) for row in ROWS]
)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def training(row, compile_with, steps, lr_of=lambda t: 0.1 / (t + 1)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = row.ours(model.parameters(), **row.plain)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    if compile_with is not None:
        step = torch.compile(step, backend=compile_with)
    snapshots = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr_of(t)
        step(torch.randn(4, 6))
        snapshots.append(snapshot(optimizer))
    return snapshots


@every_row
def test_same_numbers_and_no_recompilation(row):
    """The graphs run as they are (aot_eager), so the numbers are the same; 50 more values of lr compile nothing."""
    counter = CompileCounterWithBackend("aot_eager")
    graphs = []

    def lr_of(t):
        graphs.append(counter.frame_count)
        return 0.1 / (t + 1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
        compiled = training(row, counter, 52, lr_of)
    assert not [str(warning.message) for warning in caught]
    assert_same_bits(compiled, training(row, None, 52), row.name)
    assert graphs[1] > 0 and graphs[2] == graphs[-1] == counter.frame_count
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.slow
@every_row
def test_inductor(row):
    """The default backend, which needs a C++ compiler: its forward pass may round otherwise, the step does not."""
    torch._inductor.config.compile_threads = 1
    for compiled, eager in zip(training(row, "inductor", 5), training(row, None, 5), strict=True):
        for key, (shapes, expected) in eager.items():
            assert compiled[key][0] == shapes
            torch.testing.assert_close(compiled[key][1], expected, rtol=1e-4, atol=1e-5)


@every_row
def test_step_compiled_by_itself(row):
    """torch.compile(optimizer.step), as torch's own tutorial does it; with a closure too."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(5))
        optimizer = row.ours([param], **row.plain)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        found = []
        for t in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
            param.grad = torch.randn(5)
            step()
            found.append(snapshot(optimizer))

        def closure(param=param):
            param.grad = param.detach() * 2
            return param.detach().sum()

        found.append({**snapshot(optimizer), "loss": float(step(closure))})
        runs.append(found)
    assert_same_bits(*runs, row.name)


def load(optimizer, saved, extra):
    optimizer.load_state_dict(saved)


def save(optimizer, saved, extra):
    return optimizer.state_dict()


def add(optimizer, saved, extra):
    optimizer.add_param_group({"params": [extra], "lr": 0.5})


def zero(optimizer, saved, extra):
    optimizer.zero_grad()


def make(optimizer, saved, extra):
    return type(optimizer)([extra])


def step_with_hooks(optimizer, saved, extra):
    def hook(*_):
        extra.data.add_(1)

    optimizer.register_step_pre_hook(hook)
    optimizer.register_step_post_hook(hook)
    optimizer.step()


def step_of_a_subclass(optimizer, saved, extra):
    class Sub(type(optimizer)):
        def step(self, closure=None):
            extra.data.add_(1)
            return super().step(closure)

    sub = Sub([extra])
    extra.grad = torch.ones(3)
    sub.step()


@functools.cache
def torch_makes_subclasses():
    """Whether Dynamo constructs a subclass of torch's own optimizers: not in torch 2.10 and 2.11."""

    class Sub(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params)

    try:
        torch.compile(lambda: Sub([nn.Parameter(torch.ones(1))]), backend="eager")()
    except Exception:
        return False
    return True


METHODS = (load, save, add, zero, make, step_with_hooks, step_of_a_subclass)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_methods_inside_a_compiled_function(row, method):
    """Leave param groups, state and later steps as they do outside: torch shields them from Dynamo, and so do we."""
    if method in (make, step_of_a_subclass) and not torch_makes_subclasses():
        pytest.skip("this torch cannot construct a subclass of an optimizer in a compiled function")
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params, extra = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))], nn.Parameter(torch.randn(3))
        optimizer = row.ours([{"params": [param]} for param in params], **row.plain)

        def train(optimizer=optimizer):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.randn(param.shape)
            optimizer.step()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            return {**snapshot(optimizer), "groups": groups, "extra": extra.detach().clone()}  # noqa: B023

        found = [train()]
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.25
        found.append(train())

        def call(x, optimizer=optimizer, saved=saved, extra=extra):
            y = x * 2
            method(optimizer, saved, extra)
            return y + 1

        (torch.compile(call, backend="eager") if compiled else call)(torch.ones(2))
        runs.append([*found, train(), train()])
    assert_same_bits(*runs, row.name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_torch_shields_from_dynamo_is_shielded(row):
    """Whatever we override of that."""

    def is_shielded(function):
        # zero_grad enters the shield when Dynamo traces it: passing it costs more than the rest of the call
        if function is fastopt.optimizer.FusedStep.zero_grad:
            function = fastopt.optimizer._untraced_zero_grad
        return function.__code__.co_filename == torch._disable_dynamo.__code__.co_filename

    shielded = [
        name for name, value in vars(torch.optim.Optimizer).items() if hasattr(value, "__code__") and is_shielded(value)
    ]
    assert {"state_dict", "load_state_dict", "add_param_group"} <= {*shielded}
    assert all(is_shielded(getattr(row.ours, name)) for name in shielded)
    assert "load_state_dict" in vars(fastopt.optimizer.FusedStep)


@every_row
def test_zero_grad_breaks_the_graph_without_being_traced(row):
    """As torch's does: nothing of it is in a graph."""
    param = nn.Parameter(torch.ones(2))
    breaks = []
    for optimizer in (row.ours([param], **row.plain), row.theirs([param], **row.plain)):

        def call(x, optimizer=optimizer):
            y = x * 2
            optimizer.zero_grad()
            return y + 1

        torch._dynamo.reset()
        explained = torch._dynamo.explain(call)(torch.ones(2))
        breaks.append([explained.graph_count, explained.graph_break_count, explained.op_count])
    assert breaks[0] == breaks[1]


@every_row
def test_compiled_autograd(row):
    """Gradients that compiled autograd accumulates are stepped like others."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = row.ours(model.parameters(), **row.plain)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 6)).square().mean()
            if compiled:
                with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
                    loss.backward()
            else:
                loss.backward()
            optimizer.step()
            found.append(snapshot(optimizer))
        runs.append(found)
    assert_same_bits(*runs, row.name)
