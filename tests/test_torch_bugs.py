"""Where torch.optim's fused CPU kernels are wrong: fastopt is right, and torch 2.13 is shown to be what the test says.

Newer versions of torch may have repaired theirs; then only fastopt is tested.
"""

import pytest
import torch

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, run, snapshot

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
fused_rows = pytest.mark.parametrize("row", [row for row in ROWS if row.has_fused], ids=lambda row: row.name)


def farthest(a, b):
    """The largest difference between the parameters of two snapshots."""
    return max(float((a[key][1].double() - b[key][1].double()).abs().max()) for key in b if key[0] == "param")


@fused_rows
def test_param_and_grad_of_different_strides(row):
    """A channels_last parameter with a contiguous gradient: torch fused updates permuted elements."""
    params = [torch.randn(8, 6, 4, 5).to(memory_format=torch.channels_last)]
    grads_per_step = [[torch.randn(8, 6, 4, 5)] for _ in range(3)]
    expected = run(row.make_reference(row.plain), params, grads_per_step, reference.step)
    assert_same_bits(run(row.make_ours(row.plain), params, grads_per_step), expected, row.name)
    torchs = run(lambda p: row.theirs(p, fused=True, **row.plain), params, grads_per_step)
    if TORCH == (2, 13):
        assert farthest(torchs[0], expected[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sgd_of_16_bit_parameters(dtype):
    """torch fused leaves every full SIMD block of elements as it was (pytorch#191763, repaired in 2.14)."""
    (row,) = (row for row in ROWS if row.name == "SGD")
    params = [torch.randn(64).to(dtype)]
    grads_per_step = [[torch.randn(64).to(dtype)] for _ in range(3)]
    for options in ({"lr": 0.5}, {"lr": 0.5, "momentum": 0.9}):
        expected = run(row.make_reference(options), params, grads_per_step, reference.step)
        assert_same_bits(run(row.make_ours(options), params, grads_per_step), expected, f"{options}")
        torchs = run(lambda p, options=options: row.theirs(p, fused=True, **options), params, grads_per_step)
        if TORCH == (2, 13):
            assert torch.equal(torchs[-1]["param", dtype][1], params[0])


@fused_rows
def test_overflow_at_the_first_step_under_grad_scaler(row):
    """The scaler skips the step; torch's fused SGD has made its momentum buffer by then, of uninitialised memory."""
    values, grads = [torch.randn(1000)], [torch.randn(1000) for _ in range(3)]
    for options in (row.plain, {**row.plain, "fused": True}):
        (param,) = fresh(values)
        optimizer = row.ours([param], **options)
        before = snapshot(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (torch.full((1000,), torch.inf), *grads):
            optimizer.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if factor.isinf().all():
                assert_same_bits(snapshot(optimizer), before, row.name)
        expected = drive(row.make_reference(row.plain)(fresh(values)), [[g] for g in grads], reference.step)
        assert_same_bits(snapshot(optimizer), expected[-1], f"{row.name} {options}")


def test_torch_makes_a_momentum_buffer_for_a_skipped_first_step():
    """The cause of the above, shown on the kernel: the buffer is there after a step that found an infinity."""
    param = torch.nn.Parameter(torch.ones(16))
    param.grad = torch.ones(16)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param.detach(), torch.ones(16))
    if TORCH == (2, 13):
        assert optimizer.state[param]["momentum_buffer"] is not None
