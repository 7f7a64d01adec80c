"""The containers torch's users reach into: whatever is replaced, moved, reloaded or added is right at the next step.

Each scenario runs on torch.optim, stepped by the reference, and on fastopt; both have the same bits after every step.
"""

import copy
import gc
import io
import pickle
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


class Session:
    """An optimizer under way with parameters of several sizes; `step` gives new gradients and keeps what came out."""

    def __init__(self, make_optimizer, step):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40,), (3, 5), (1,), (), (2, 3, 4, 5))]
        self.optimizer = make_optimizer(self.params[:4])
        self.step_once = step
        self.snapshots = []

    def step(self, times=1, skip=()):
        """`skip` holds parameters without a gradient this time."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        for _ in range(times):
            grads = [None if any(p is s for s in skip) else torch.randn(p.shape).to(p.dtype) for p in params]
            self.snapshots += drive(self.optimizer, [grads], self.step_once)

    def state(self, index):
        return self.optimizer.state[self.params[index]]

    def tensors(self, index):
        """The slots of one parameter's state by name."""
        return {name: t for name, t in self.state(index).items() if name != "step" and isinstance(t, torch.Tensor)}


def same_in_torch(row, scenario, options=None):
    options = row.plain if options is None else options
    runs = []
    for make, step in ((row.make_ours(options), lambda o: o.step()), (row.make_reference(options), reference.step)):
        session = Session(make, step)
        session.extra = scenario(session)
        runs.append(session)
    ours, theirs = runs
    assert len(ours.snapshots) >= 2
    assert_same_bits(ours.snapshots, theirs.snapshots, f"{row.name} step")
    assert ours.extra == theirs.extra


def grow(session):
    """As Gaussian splatting densifies: another Parameter in the same place, its state moved over with grown tensors."""
    session.step(2)
    params = session.optimizer.param_groups[0]["params"]
    for rows in (60, 25):
        old, new = params[0], torch.nn.Parameter(torch.cat([params[0].detach(), torch.randn(rows)]))
        state = session.optimizer.state.pop(old, None)
        released = [weakref.ref(old)]
        if state:
            for name in [name for name in state if name != "step"]:
                released.append(weakref.ref(state[name]))
                state[name] = torch.cat([state[name], torch.zeros(rows)])
            session.optimizer.state[new] = state
        params[0] = session.params[0] = new
        del old
        assert not any(reference() for reference in released), "replaced tensors are still alive"
        session.step(2)


def load_in_between(session):
    session.step(2)
    saved = copy.deepcopy(session.optimizer.state_dict())
    session.step(2)
    session.optimizer.load_state_dict(saved)
    session.step(2)
    session.optimizer.load_state_dict({**saved, "state": {}})  # all of the state is gone
    session.step(2)


def load_part_of_the_state(session):
    session.step(2)
    saved = copy.deepcopy(session.optimizer.state_dict())
    saved["state"] = dict(reversed(saved["state"].items()))
    saved["state"].pop(1, None)
    session.optimizer.load_state_dict(saved)
    session.step(2)


def load_old_checkpoint(session):
    """Step counts as numbers, and none of the keys that came to param groups later."""
    session.step(2)
    saved = copy.deepcopy(session.optimizer.state_dict())
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = entry["step"].item()
    for key in ("foreach", "fused", "capturable", "differentiable", "maximize", "nesterov", "amsgrad", "centered"):
        saved["param_groups"][0].pop(key, None)
    session.optimizer.load_state_dict(saved)
    session.optimizer.param_groups[0]["foreach"] = False  # the reference is torch's for-loop
    session.step(2)


def data_of_another_dtype(session):
    """As `module.double()` and `.to(dtype)` do it: new memory behind the same Parameter, the state as it was."""
    session.step(2)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        for param in session.params:
            param.grad = None
            param.data = param.data.to(dtype)
        session.step(2)


def module_to_by_swapping(session):
    module = torch.nn.ParameterList(session.params)
    session.step(2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float64, torch.float32):
            session.optimizer.zero_grad()
            module.to(dtype)
            assert session.params[0].dtype == dtype
            session.step(2)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def swapped_tensors(session):
    session.step(2)
    for param in session.params[:2]:
        param.grad = None
        torch.utils.swap_tensors(param, torch.nn.Parameter(torch.randn(param.shape)))
    session.step(2)


def other_memory(session):
    session.step(2)
    for param in session.params:
        param.data = param.data.clone()
    session.step()
    session.params[1].data = torch.randn(5, 3).t()  # other strides
    session.step()
    session.params[0].data = torch.randn(7)  # another size, with the state to match
    session.params[0].grad = None
    for name, tensor in session.tensors(0).items():
        session.state(0)[name] = tensor[:7].clone()
    session.step(2)
    for index in range(4):
        for tensor in session.tensors(index).values():
            tensor.data = tensor.data.clone()
    session.step()


def changed_behind_the_object(session):
    """`set_` and `resize_` keep the Python object and change everything behind it."""
    session.step(2)
    param = session.params[0]
    param.grad = None
    with torch.no_grad():
        param.set_(torch.randn(9))
    for tensor in session.tensors(0).values():
        tensor.resize_(9)
    session.step(2)


def state_replaced_or_cleared(session):
    state = session.optimizer.state
    session.step(2)
    for index in range(4):
        for name, tensor in session.tensors(index).items():
            session.state(index)[name] = tensor.clone()
    session.step()
    if session.params[0] in state:
        state[session.params[0]], state[session.params[1]] = {**state[session.params[0]]}, {}
    session.step()
    state.pop(session.params[2], None)
    session.step()
    state.clear()
    session.step()
    session.optimizer.state = copy.copy(state)
    session.step()


def state_in_another_order(session):
    session.step(1, skip=session.params[:2])
    session.step(2)
    state = session.optimizer.state
    items = [*reversed(state.items())]
    state.clear()
    for param, entry in items:
        state[param] = dict(reversed(entry.items()))
    session.step(2)


def states_exchanged(session):
    """Two parameters of one size exchange their states, then all tensors of one move into other dicts."""
    session.step()
    session.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(40))]})
    other = session.optimizer.param_groups[1]["params"][0]
    session.step()
    state = session.optimizer.state
    if other in state:
        state[other], state[session.params[0]] = state[session.params[0]], state[other]
    session.step()
    for param in list(state):
        state[param] = dict(state[param])
    session.step()


def foreign_entries(session):
    """Keys that are no tensors, values that are no dicts, and more in a parameter's state than the optimizer's own."""
    state = session.optimizer.state
    state["note"], state[3] = "by hand", {"ema": torch.zeros(2)}
    session.step(2)
    session.state(0)["ema"], session.state(1)["name"], session.state(2)["nothing"] = torch.ones(3), "weight", None
    session.step()
    state[None] = 1.5
    del state["note"]
    session.step()
    return list(state.values())[-1] == 1.5


def group_added(session):
    session.step(2)
    session.optimizer.add_param_group({"params": session.params[4:], "lr": 0.5, "weight_decay": 0.0})
    session.step(2)
    session.optimizer.add_param_group({"params": []})
    session.step()


def groups_rearranged(session):
    session.step(2)
    groups = session.optimizer.param_groups
    groups[0]["params"].reverse()
    session.step()
    groups[0]["params"] = groups[0]["params"][:3]
    session.step()
    halves = session.params[:2], session.params[2:4]
    session.optimizer.param_groups = [{**groups[0], "params": half, "lr": 0.1 * len(half)} for half in halves]
    session.step()
    del session.optimizer.param_groups[0]
    session.step()
    session.optimizer.param_groups[0]["params"].clear()
    session.step()


def hyper_parameters_changed(session):
    (group,) = session.optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.ExponentialLR(session.optimizer, 0.5)
    changes = (
        ("weight_decay", 0.3), ("maximize", True), ("eps", 1e-3), ("betas", (0.5, 0.6)), ("alpha", 0.4),
        ("lr_decay", 0.2), ("dampening", 0.7), ("lr", torch.tensor(0.05)), ("lr", 0.1), ("weight_decay", 0),
    )  # fmt: skip
    for key, value in changes:
        if key in group:
            group[key] = value
        session.step()
        if isinstance(group["lr"], float):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it wants to see optimizer.step called; the reference does not
                scheduler.step()


def buffers_toggled(session):
    """Options that need a buffer, off and on again; SGD's may start off."""
    (group,) = session.optimizer.param_groups
    on = {key: group[key] for key in ("momentum", "centered", "amsgrad", "nesterov") if key in group}
    if "nesterov" in on:
        group["momentum"] = 0.0
        session.step()
    for values in (on, dict.fromkeys(on, 0), on, {**on, **({"nesterov": True} if "nesterov" in on else {})}):
        group.update(values)
        session.step(2, skip=session.params[3:4])


def momentum_buffer_missing(session):
    """SGD makes a buffer where there is none, or None as in torch's older checkpoints."""
    session.step(2)
    if type(session.optimizer).__name__ == "SGD":
        session.state(0).pop("momentum_buffer", None)
        session.state(1)["momentum_buffer"] = None
    session.step(2)


def steps_apart(session):
    session.step(2)
    for index in range(4):
        if "step" in session.state(index):
            session.state(index)["step"] += 100 * index
    session.step()
    for index in range(4):
        if "step" in session.state(index):
            dtype = torch.float64 if index % 2 else torch.float32
            session.state(index)["step"] = torch.tensor(7.0 + index, dtype=dtype)
    session.step(2)


def no_gradients_at_all(session):
    session.step(1, skip=session.params)
    session.step()
    session.step(2, skip=session.params)
    session.step()
    return len(session.optimizer.state)


def copied_and_pickled(session):
    session.step(2)
    for duplicate in (copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))):
        session.optimizer = duplicate(session.optimizer)
        session.params = session.optimizer.param_groups[0]["params"]
        session.step(2)


def parameters_without_requires_grad(session):
    session.step()
    session.params[1].requires_grad_(False)
    session.step()


def default_dtype_float64(session):
    torch.set_default_dtype(torch.float64)
    try:
        session.step(2)
        session.optimizer.add_param_group({"params": session.params[4:]})
        session.step(2)
    finally:
        torch.set_default_dtype(torch.float32)


SCENARIOS = (
    grow, load_in_between, load_part_of_the_state, load_old_checkpoint, data_of_another_dtype, module_to_by_swapping,
    swapped_tensors, other_memory, changed_behind_the_object, state_replaced_or_cleared, state_in_another_order,
    states_exchanged, foreign_entries, group_added, groups_rearranged, hyper_parameters_changed, buffers_toggled,
    momentum_buffer_missing, steps_apart, no_gradients_at_all, copied_and_pickled, parameters_without_requires_grad,
    default_dtype_float64,
)  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@every_row
def test_scenario(row, scenario):
    same_in_torch(row, scenario)
    buffers = {"momentum", "dampening", "centered", "amsgrad"}
    same_in_torch(row, scenario, {key: value for key, value in row.plain.items() if key not in buffers})


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def options_of_state(row):
    """A few combinations that differ in which state there is, and everything torch's own tests list."""
    flags = [{}, *({key: value} for key, value in row.plain.items() if key in ("momentum", "centered", "amsgrad"))]
    lists = [row.plain, *flags, *row.listed_by_torch()]
    return [dict(options) for options in lists]


@every_row
def test_state_dict_to_and_from_torch(row):
    """Saved by one library, loaded by the other, both go on with the same bits; the dicts have the same entries."""
    for options in options_of_state(row):
        torch.manual_seed(1)
        values = [torch.randn(n) for n in (33, 7, 1)]
        grads = [[torch.randn(v.shape) if t != i else None for i, v in enumerate(values)] for t in range(6)]
        ours, theirs = row.make_ours(options), row.make_reference(options)

        def start(make, step, values=values, grads=grads):
            optimizer = make(fresh(values))
            drive(optimizer, grads[:3], step)
            return optimizer

        def go_on(make, step, saved, grads=grads):
            params = [torch.nn.Parameter(value.clone()) for value in saved["params"]]
            optimizer = make(params)
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it keeps the tensors it is given
            return drive(optimizer, grads[3:], step)

        saved = []
        for make, step in ((ours, None), (theirs, reference.step)):
            optimizer = start(make, step)
            params = [p.detach() for p in optimizer.param_groups[0]["params"]]
            saved.append(through_a_file({"params": params, "optimizer": optimizer.state_dict()}))
        what = f"{row.name} {options}"
        mine, torchs = (s["optimizer"] for s in saved)
        assert_same_bits(mine["state"], torchs["state"], what)
        assert list(mine["state"]) == list(torchs["state"])
        assert [list(entry) for entry in mine["state"].values()] == [list(entry) for entry in torchs["state"].values()]
        assert [group.keys() for group in mine["param_groups"]] == [group.keys() for group in torchs["param_groups"]]

        expected = go_on(theirs, reference.step, saved[1])
        assert_same_bits(go_on(ours, None, saved[1]), expected, f"{what}: from torch, step")
        assert_same_bits(go_on(theirs, reference.step, saved[0]), expected, f"{what}: to torch, step")
        assert_same_bits(go_on(ours, None, saved[0]), expected, f"{what}: from fastopt, step")


@every_row
def test_dtype_of_the_state_survives_loading(row):
    """The one deviation from torch.optim in `load_state_dict`, which casts the state to the parameter's dtype."""
    param = torch.nn.Parameter(torch.randn(9).bfloat16())
    optimizer = row.ours([param], **row.plain)
    param.grad = torch.ones_like(param)
    optimizer.step()
    for name in row.slots:
        optimizer.state[param][name] = optimizer.state[param][name].float() + 2**-20
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.ours([torch.nn.Parameter(param.detach().clone())], **row.plain)
    other.load_state_dict(through_a_file(saved))
    assert_same_bits(other.state_dict()["state"], saved["state"], row.name)
    (target,) = other.param_groups[0]["params"]
    target.grad = param.grad
    for _ in range(2):
        optimizer.step()
        other.step()
    assert_same_bits(snapshot(other), snapshot(optimizer), row.name)


@every_row
def test_how_it_runs_is_not_taken_from_the_file(row):
    """`foreach`, `fused`, `capturable` and `differentiable` keep this optimizer's values."""
    optimizer = row.ours([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    (group,) = optimizer.param_groups
    how = {key: group[key] for key in ("foreach", "fused", "capturable", "differentiable") if key in group}
    saved = optimizer.state_dict()
    saved["param_groups"][0].update({key: True for key in how}, lr=0.5)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in how} == how
    assert group["lr"] == 0.5


@every_row
def test_step_counts_of_old_checkpoints(row):
    """A Python number, another dtype, one element: the step count goes on, and is torch's kind of tensor afterwards."""
    if row.name == "SGD":
        return  # does not count
    for count in (3, 3.0, np.float64(3), torch.tensor(3), torch.tensor(3, dtype=torch.float64), torch.tensor([3.0])):
        torch.manual_seed(0)
        results = []
        for make, step, value in (
            (row.make_ours(row.plain), None, count),
            (row.make_reference(row.plain), reference.step, torch.tensor(3.0)),
        ):
            param = torch.nn.Parameter(torch.linspace(-1, 1, 11))
            optimizer = make([param])
            drive(optimizer, [[torch.ones(11)]], step)
            optimizer.state[param]["step"] = copy.deepcopy(value)
            drive(optimizer, [[torch.ones(11)]] * 2, step)
            counted = optimizer.state[param]["step"]
            assert isinstance(counted, torch.Tensor) and counted.is_floating_point() and float(counted) == 5
            results.append({key: found for key, found in snapshot(optimizer).items() if key[0] != "step"})
        assert_same_bits(*results, f"{row.name} from {count!r}")


@every_row
def test_version_counters_go_up(row):
    """As with torch.optim, autograd notices that what it saved for backward was changed; skipped parameters stay."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 1, 300)]
    optimizer = row.ours(params, **row.plain)
    drive(optimizer, [[torch.randn(p.shape) for p in params]])

    def versions(index):
        return [t._version for t in (params[index], *optimizer.state[params[index]].values())]

    for _ in range(2):
        before = [versions(index) for index in range(3)]
        product = (params[0] * params[0]).sum()
        drive(optimizer, [[torch.randn(5), None, torch.randn(300)]])
        assert all(new > old for index in (0, 2) for new, old in zip(versions(index), before[index], strict=True))
        assert versions(1) == before[1]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@every_row
def test_nothing_is_kept_alive(row):
    """model.opt = optimizer leaks nothing, and gradients are freed as soon as their owner lets go."""
    model = torch.nn.Linear(30, 20)
    model.opt = row.ours(model.parameters(), **row.plain)
    for _ in range(3):
        model(torch.randn(4, 30)).sum().backward()
        model.opt.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        model.opt.zero_grad()
        assert not any(ref() for ref in grads)
    optimizer = model.opt
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    tensors = [t for param in model.parameters() for t in (param, *optimizer.state[param].values())]
    references = [sys.getrefcount(t) for t in tensors]
    for _ in range(100):
        optimizer.step()
    assert [sys.getrefcount(t) for t in tensors] == references
    kept = [weakref.ref(t) for t in (*tensors, model, optimizer)]
    del model, optimizer, param, tensors
    gc.collect()
    assert not any(ref() for ref in kept)


@every_row
def test_hooks_and_closure(row):
    """What torch wraps around a step works, in torch's order."""
    param = torch.nn.Parameter(torch.randn(4))
    param.grad = torch.ones(4)
    optimizer = row.ours([param], **row.plain)
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global post")),
    ]

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        return 5.0

    try:
        with torch.no_grad():
            assert optimizer.step(closure) == 5.0
            assert optimizer.step(closure=closure) == 5.0
        assert optimizer.step() is None
    finally:
        for handle in handles:
            handle.remove()
    around = ["global pre", "pre", "post", "global post"]
    assert calls == 2 * [*around[:2], "closure", *around[2:]] + around
    calls.clear()
    assert optimizer.step(closure) == 5.0
    assert calls == ["closure"]
