"""What a step after the first does not do: build, allocate, grow, or hold the GIL where that would matter."""

import contextlib
import itertools
import sys
import threading
import time

import pytest
import torch

import fastopt

from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@contextlib.contextmanager
def gpu(execute=False):
    """The GPU backend serves CPU tensors, and sends its launches nowhere unless they shall be executed."""
    pytest.importorskip("triton")
    from .test_gpu import triton_serves_cpu_tensors

    with triton_serves_cpu_tensors(execute=execute) as stand_in:
        yield stand_in


def has_capturable(row):
    return "capturable" in row.theirs([torch.zeros(1)]).defaults


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
    assert fastopt._C.counters()["allocations"] == before["allocations"]


def plain_optimizer(row, more=0, **options):
    """Two groups, three dtypes, an empty parameter and one without gradient; and `more` parameters before the last."""
    torch.manual_seed(0)
    values = [
        torch.randn(n, 3).to(dtype) for n in (0, 1, 8) for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    params = [torch.nn.Parameter(value) for value in values]
    many = [torch.nn.Parameter(torch.randn(i % 4)) for i in range(more)]
    optimizer = row.ours([*params[:5], *many[::2]], **{**row.plain, **options})
    last = [*many[1::2], *params[5:], torch.nn.Parameter(torch.zeros(3))]
    optimizer.add_param_group({"params": last, "maximize": True})
    give_gradients(params + many)
    return optimizer, params


def give_gradients(params):
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)


def cast_state(optimizer, dtypes):
    """State tensors of these dtypes become others."""
    change_state(optimizer, lambda value: value.to(dtypes.get(value.dtype, value.dtype)))


def lr_tensor(row, dtype=torch.float32):
    return torch.tensor(row.plain["lr"], dtype=dtype)


# Kinds of optimizers whose steps after the first are only compared: options, and what is done to the state.
KEPT = {
    "as torch makes them": (lambda row: {}, {}),
    "bf16 parameters, fp32 state": (lambda row: {}, {torch.bfloat16: torch.float32}),
    "fp32 parameters, bf16 state": (lambda row: {}, {torch.float32: torch.bfloat16}),
    "fp64 parameters, fp16 state": (lambda row: {}, {torch.float64: torch.float16}),
    "state_dtype": (lambda row: {"state_dtype": torch.bfloat16}, {}),
    "lr tensor": (lambda row: {"lr": lr_tensor(row)}, {}),
    "lr tensor of fp64, bf16 state": (
        lambda row: {"lr": lr_tensor(row, torch.float64)},
        {torch.float32: torch.bfloat16},
    ),
    "capturable": (lambda row: {"capturable": True}, {}),
    "capturable, fp32 state": (lambda row: {"capturable": True}, {torch.bfloat16: torch.float32}),
    "capturable, state_dtype": (lambda row: {"capturable": True, "state_dtype": torch.float32}, {}),
    "capturable, lr tensor": (lambda row: {"capturable": True, "lr": lr_tensor(row)}, {}),
}


def kept_combinations():
    """Each kind on the CPU, if it is not capturable, and on the GPU."""
    for row, kind, on_gpu in itertools.product(ROWS, KEPT, (False, True)):
        if on_gpu or "capturable" not in kind:
            if has_capturable(row) or "capturable" not in kind:
                yield pytest.param(row, kind, on_gpu, id=f"{row.name}-{kind}-{'GPU' if on_gpu else 'CPU'}")


@pytest.mark.parametrize("row, kind, on_gpu", [*kept_combinations()])
def test_step_like_the_one_before_is_only_compared(row, kind, on_gpu):
    """Whatever changes from one step of a usual training to the next, with 16-bit and fp32 state, on every backend."""
    options, dtypes = KEPT[kind]
    with gpu() if on_gpu else contextlib.nullcontext():
        optimizer, params = plain_optimizer(row, **options(row))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(3):  # the state is made, cast, and seen
            optimizer.step()
            scheduler.step()
            cast_state(optimizer, dtypes)
        optimizer.step()
        before = fastopt._C.counters()
        for _ in range(5):
            optimizer.zero_grad()
            give_gradients(params)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            scheduler.step()
        assert fastopt._C.counters() == before


def sharded_model(mesh):
    """As FSDP2 leaves it: parameters, gradients and state are DTensors."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), mesh=mesh)
    return list(model.parameters()), lambda: model(torch.randn(5, 3)).square().mean()


def tensor_parallel_model(mesh):
    """As operations on DTensors leave them. Gradients come from DTensor's own backward, placed as their parameters."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = Shard(0), Shard(1), Replicate()
    params = [torch.nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [it])) for it in placements]
    return params, lambda: sum(param.redistribute(mesh, [Replicate()]).square().sum() for param in params).full_tensor()


@pytest.fixture
def mesh():
    """Of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", [sharded_model, tensor_parallel_model], ids=lambda model: model.__name__)
@every_row
def test_step_of_dtensors_is_only_compared(row, model, state_dtype, mesh):
    params, loss = model(mesh)
    optimizer = row.ours(params, **row.plain, state_dtype=state_dtype)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    for _ in range(2):
        step()
    before, local = fastopt._C.counters(), [param.to_local().clone() for param in params]
    for _ in range(5):
        step()
    assert fastopt._C.counters() == before
    assert not any(torch.equal(param.to_local(), value) for param, value in zip(params, local, strict=True))
    for param in params:
        for name in row.slots:
            state = optimizer.state[param][name]
            assert state.placements == param.placements and state.dtype == state.to_local().dtype
            assert state.dtype == (state_dtype or torch.float32)


def change_state(optimizer, change):
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if key != "step" and value is not None:
                entry[key] = change(value)


def plain_again(optimizer, params):
    """So that what comes next is not stepped in turn, or by torch, for what came before."""
    give_gradients(params)
    for param in params:
        param.data = param.data.clone(memory_format=torch.contiguous_format)
    change_state(optimizer, lambda value: value.clone(memory_format=torch.contiguous_format))


# What a step must see, by what it is done to.
CHANGES = {
    "lr": lambda o, p: o.param_groups[0].update(lr=0.3),
    "lr as int": lambda o, p: o.param_groups[0].update(lr=1),
    "lr as tensor": lambda o, p: o.param_groups[0].update(lr=torch.tensor(0.3)),
    "lr tensor in place": lambda o, p: (
        o.param_groups[0]["lr"].mul_(0.5) if torch.is_tensor(o.param_groups[0]["lr"]) else None
    ),
    "lr as float again": lambda o, p: o.param_groups[0].update(lr=0.2),
    "weight decay": lambda o, p: o.param_groups[1].update(weight_decay=0.4),
    "maximize": lambda o, p: o.param_groups[1].update(maximize=False),
    "another option": lambda o, p: o.param_groups[1].update(initial_lr=3),
    "a group's dict": lambda o, p: o.param_groups.__setitem__(0, {**o.param_groups[0], "lr": 0.7}),
    "groups in another order": lambda o, p: o.param_groups.reverse(),
    "params in another order": lambda o, p: o.param_groups[0]["params"].reverse(),
    "params in another list": lambda o, p: o.param_groups[0].update(params=o.param_groups[0]["params"][::-1]),
    "a parameter less": lambda o, p: o.state.pop(o.param_groups[0]["params"].pop(), None),
    "no gradient": lambda o, p: setattr(p[4], "grad", None),
    "a gradient again": lambda o, p: give_gradients(p[4:5]),
    "gradients in place": lambda o, p: [x.grad.mul_(2) for x in p],
    "gradients elsewhere": lambda o, p: give_gradients(p),
    "a gradient of zero": lambda o, p: setattr(p[6], "grad", torch.zeros_like(p[6])),
    "a gradient of other strides": lambda o, p: setattr(p[6], "grad", torch.randn(3, 8).t()),
    "plain again": plain_again,
    "data elsewhere": lambda o, p: [setattr(x, "data", x.data.clone()) for x in p],
    "a slice as data": lambda o, p: setattr(p[6], "data", torch.zeros(8, 7)[:, 2:5]),
    "data that may not be written": lambda o, p: torch._C._set_throw_on_mutable_data_ptr(p[6]),
    "transposed data": lambda o, p: setattr(p[6], "data", torch.ones(3, 8).t()),
    "plain again after that": plain_again,
    "another dtype": lambda o, p: (
        setattr(p[6], "data", p[6].data.bfloat16()),
        setattr(p[6], "grad", None),
        give_gradients(p[6:7]),
    ),
    "parameters that share memory": lambda o, p: setattr(p[8], "data", p[5].data.expand(1, 3)[:1].repeat(8, 1)),
    "a parameter within another": lambda o, p: setattr(p[5], "data", p[8].data[2:3]),
    "a gradient within a parameter": lambda o, p: setattr(p[5], "grad", p[8].data[2:3]),
    "plain again and apart": plain_again,
    "state elsewhere": lambda o, p: change_state(o, torch.clone),
    "state in place": lambda o, p: change_state(o, lambda x: x.mul_(0.5)),
    "state's data": lambda o, p: change_state(o, lambda x: [setattr(x, "data", x.data * 0.5), x][1]),
    "state that is refused": lambda o, p: change_state(o, lambda x: torch.cat([x, x])),
    "state that is not": lambda o, p: change_state(o, lambda x: x[: len(x) // 2].clone()),
    "state in fp32": lambda o, p: change_state(o, lambda x: x.float() if x.dtype == torch.bfloat16 else x),
    "an entry less": lambda o, p: o.state.pop(p[7], None),
    "step counts": lambda o, p: [entry["step"].add_(5) for entry in o.state.values() if "step" in entry],
    "the step count of one": lambda o, p: [
        entry["step"].add_(1) for entry in [*o.state.values()][-1:] if "step" in entry
    ],
    "step counts at their end": lambda o, p: [e["step"].fill_(2.0**24) for e in o.state.values() if "step" in e],
    "step counts elsewhere": lambda o, p: [
        entry.update(step=entry["step"].double()) for entry in o.state.values() if "step" in entry
    ],
    "a loaded state": lambda o, p: o.load_state_dict(o.state_dict()),
    "a new group": lambda o, p: (
        p.append(torch.nn.Parameter(torch.ones(4))),
        give_gradients(p[-1:]),
        o.add_param_group({"params": p[-1:]}),
    ),
    "another tensor in its place": lambda o, p: (
        torch.utils.swap_tensors(p[1], torch.nn.Parameter(torch.ones(5))),
        setattr(p[1], "grad", torch.ones(5)),
        o.state.pop(p[1], None),
    ),
}


def step_or_reason(optimizer):
    try:
        optimizer.step()
    except (AssertionError, RuntimeError, TypeError) as error:
        return str(error)


WAYS = "one after the other", "each alone", "on three threads", "on the GPU", "capturable, on the GPU"


def ways():
    """On the GPU, where kernels are interpreted, of the rows with one kernel the first."""
    first = {row.module: row for row in reversed(ROWS)}
    for row, how in itertools.product(ROWS, WAYS):
        if has_capturable(row) or "capturable" not in how:
            if first[row.module] is row or "on the GPU" not in how:
                yield pytest.param(row, how, id=f"{row.name}-{how}")


@pytest.mark.parametrize("row, how", [*ways()])
def test_every_change_between_two_steps_is_seen(row, how):
    """To the effect that it has on a plan that knows nothing; that many parameters are shared among threads."""
    both, more, options = None, 0, {"capturable": True} if "capturable" in how else {}
    if how == "on three threads":
        torch.set_num_threads(3)
        more = 600
    on_gpu = "on the GPU" in how
    with gpu(execute=True) if on_gpu else contextlib.nullcontext() as stand_in:
        for name, change in CHANGES.items():
            if how == "each alone" or not both:
                both = [plain_optimizer(row, more, **options) for _ in range(2)]
                for optimizer, _ in 3 * both:
                    optimizer.step()
            for _ in range(2):
                for optimizer, params in both:
                    torch.manual_seed(1)
                    change(optimizer, params)
                both[1][0]._fastopt_plan = both[1][0]._fastopt_gpu = None
                ours, expected = (step_or_reason(optimizer) for optimizer, _ in both)
                assert ours == expected, name
                assert_same_bits(*(snapshot(optimizer) for optimizer, _ in both), name)
        assert not on_gpu or stand_in.launches


@every_row
def test_memory_shared_since_the_last_step_is_seen(row):
    """Such parameters are stepped in turn, which a comparison does not see to."""
    optimizer, params = plain_optimizer(row)
    for _ in range(2):
        optimizer.step()
    params[5].data = params[8].data[2:3]
    for _ in range(2):
        before = fastopt._C.counters()["checks"]
        optimizer.step()
        assert fastopt._C.counters()["checks"] == before + 1


@every_row
def test_lazy_clone_keeps_its_values(row):
    optimizer, params = plain_optimizer(row)
    for _ in range(2):
        optimizer.step()
    tensors = [param.detach() for param in params]
    tensors += [value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value)]
    clones, values = [torch._lazy_clone(tensor) for tensor in tensors], [tensor.clone() for tensor in tensors]
    optimizer.step()
    for tensor, clone, value in zip(tensors, clones, values, strict=True):
        assert torch.equal(clone, value) and not (tensor.numel() and torch.equal(tensor, value))


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
        assert fastopt._C.counters()["allocations"] == before["allocations"]
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
