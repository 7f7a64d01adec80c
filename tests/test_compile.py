"""torch.compile around a step: the uncompiled numbers, and no recompilation when hyper-parameters change.

The step itself is not traced: it is one call into C++ or one launch already, and runs between the compiled parts.
"""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

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
