"""What a step after the first does not do: build, allocate, grow, or hold the GIL where that would matter."""

import sys
import threading
import time

import pytest
import torch

import fastopt

from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def busy_optimizer(row):
    """Three groups, four dtypes, strides that differ, a parameter without gradient."""
    values = [torch.randn(n, 3).to(dtype) for n in (1, 8, 1000) for dtype in (torch.float32, torch.bfloat16)]
    values += [torch.randn(40, 30).t(), torch.randn(7, dtype=torch.float64)]
    params = [torch.nn.Parameter(value) for value in values]
    optimizer = row.ours(params[:4], **row.plain)
    optimizer.add_param_group({"params": params[4:7], "lr": 0.2, "maximize": True})
    optimizer.add_param_group({"params": [*params[7:], torch.nn.Parameter(torch.zeros(3))], "weight_decay": 0.0})
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype)
    return optimizer, params


@every_row
def test_second_step_allocates_nothing(row):
    """Counted in C++; new gradients, other hyper-parameters and skipped parameters are no reason either."""
    optimizer, params = busy_optimizer(row)
    optimizer.step()
    first = fastopt._C.counters()
    optimizer.step()
    before = fastopt._C.counters()
    assert first["allocations"] > 0
    for t in range(20):
        for param in params:
            param.grad = torch.randn(param.shape, dtype=param.dtype)
        params[t % len(params)].grad = None
        optimizer.param_groups[t % 3]["lr"] *= 0.9
        optimizer.step()
    assert fastopt._C.counters() == before


@every_row
def test_order_of_state_does_not_matter(row):
    """Entries and their keys are read in the order in which torch makes them, or else looked up: to the same effect."""
    results = []
    for shuffled in (False, True):
        torch.manual_seed(0)
        optimizer, params = busy_optimizer(row)
        optimizer.step()
        if shuffled:
            for param, entry in reversed([*optimizer.state.items()]):
                del optimizer.state[param]
                optimizer.state[param] = {"mine": 1, **{"".join(list(key)): entry[key] for key in reversed(entry)}}
        optimizer.step()
        before = fastopt._C.counters()
        optimizer.step()
        assert fastopt._C.counters() == before
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_row
def test_subclass_with_another_hash_keeps_its_state(row):
    class Named(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl

        def __hash__(self):
            return 17

        def __eq__(self, other):
            return self is other

    param, plain = Named(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    for value in (param, plain):
        value.grad = torch.full((5,), 0.5)
    ours, same = row.ours([param], **row.plain), row.ours([plain], **row.plain)
    for _ in range(3):
        ours.step()
        same.step()
    assert len(ours.state) <= 1 and torch.equal(param.detach().view(-1), plain.detach())


@every_row
def test_no_torch_operation_and_no_tensor_in_a_step(row):
    """The profiler sees the step's own range and nothing of torch in it: no operation, no memory."""
    optimizer, _ = busy_optimizer(row)
    optimizer.step()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    names = {event.name for event in profile.events()}
    assert names - {"[memory]"} == {f"Optimizer.step#{row.name}.step"}
    assert not any(event.cpu_memory_usage for event in profile.events())


@every_row
def test_memory_does_not_grow(row):
    optimizer, _ = busy_optimizer(row)
    for _ in range(10):
        optimizer.step()
    before = sys.getallocatedblocks()
    for _ in range(500):
        optimizer.step()
    assert sys.getallocatedblocks() - before < 50


@every_row
def test_gil_is_released_in_a_large_step(row):
    """Another Python thread goes on in the middle of a step; the baseline instruction set makes it long."""
    param = torch.nn.Parameter(torch.ones(1_000_000))
    param.grad = torch.full_like(param, 0.5)
    optimizer = row.ours([param], **row.plain)
    optimizer.step()
    stamps, done = [], threading.Event()

    def tick():
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    previous = fastopt._C.set_isa("baseline")
    try:
        thread.start()
        inside = 0
        for _ in range(20):
            begin = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            middle = (end - begin) / 4
            inside += sum(begin + middle < stamp < end - middle for stamp in stamps)
    finally:
        done.set()
        thread.join()
        fastopt._C.set_isa(previous)
    assert inside > 5


@every_row
def test_optimizers_in_several_threads(row):
    """Each thread steps its own optimizer, large enough to release the GIL; all are as if alone."""
    values = [torch.randn(300_000), torch.randn(11)]
    grads_per_step = [[torch.randn(v.shape) for v in values] for _ in range(6)]
    alone = row.ours(fresh(values), **row.plain)
    expected = drive(alone, grads_per_step)[-1]
    optimizers = [row.ours(fresh(values), **row.plain) for _ in range(4)]
    threads = [threading.Thread(target=drive, args=(optimizer, grads_per_step)) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for optimizer in optimizers:
        assert_same_bits(snapshot(optimizer), expected, row.name)
