"""The optimizer as an object, made, copied, saved, hooked and looked at: as torch.optim's.

Numbers, state, refusals and the hot step have files of their own.
"""

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from . import reference
from .optimizers import OWN_OPTIONS, ROWS
from .reference import assert_same_bits, snapshot
from .scenarios import backward, same_as_torch, small_model, train

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


FORMS = {
    "generator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "groups": lambda model: [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [model[2].weight, model[2].bias], "maximize": True},
    ],
    "group_of_one": lambda model: [{"params": model[0].weight}, {"params": [model[2].weight]}],
    "names": lambda model: model.named_parameters(),
    "groups_of_names": lambda model: [
        {"params": model[0].named_parameters(), "lr": 0.5},
        {"params": list(model[2].named_parameters())},
    ],
    "values_of_a_dict": lambda model: dict(model.named_parameters()).values(),
}


@pytest.mark.parametrize("form", FORMS)
@every_row
def test_forms_of_params(row, form):
    def scenario(make):
        model = small_model()
        optimizer = make(FORMS[form](model))
        snapshots = train(optimizer, model)
        described = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.state_dict()["param_groups"]
        ]
        return [*snapshots, {"groups": [{**group, "foreach": None} for group in described]}]

    same_as_torch(row, scenario)


@every_row
def test_added_groups_with_names(row):
    """add_param_group keeps names, and refuses parameters without one and parameters that are there already."""

    def scenario(make):
        model, more = small_model(), nn.Linear(6, 3)
        optimizer = make(model.named_parameters())
        before = train(optimizer, model, 2)
        errors = []
        for group in (
            {"params": more.parameters()},
            {"params": list(model.named_parameters())[:1]},
            {"params": ["weight"]},
        ):
            with pytest.raises((TypeError, ValueError)) as caught:
                optimizer.add_param_group(group)
            errors.append(str(caught.value))
        optimizer.add_param_group({"params": more.named_parameters(), "lr": 0.3})
        backward(more)
        return [*before, *train(optimizer, model, 2), {"errors": errors}]

    same_as_torch(row, scenario)


@every_row
def test_parameter_listed_twice_warns(row):

    def scenario(make):
        param, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))
        optimizer = make([param, param, empty, empty])
        snapshots = []
        for t in range(3):
            param.grad, empty.grad = torch.ones(3), torch.ones(0)
            optimizer.step()
            snapshots.append(snapshot(optimizer))
            for state in optimizer.state.values():
                if t == 1 and "step" in state:
                    state["step"].fill_(2.0**24 - 1)  # the last that float32 counts
        return snapshots

    same_as_torch(row, scenario)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        row.ours([nn.Parameter(torch.ones(1))] * 2, **row.plain)


@every_row
def test_gradient_in_the_memory_of_a_parameter(row):
    """Parameters are stepped one after the other then, whichever thread works on them."""

    def scenario(make):
        first, second = nn.Parameter(torch.randn(100_000)), nn.Parameter(torch.randn(100_000))
        optimizer = make([first, second])
        for _ in range(3):
            first.grad, second.grad = torch.randn(100_000), first.detach()
            optimizer.step()
        return snapshot(optimizer)

    same_as_torch(row, scenario)


class Dynamic(dict):
    def __getitem__(self, key):
        return 0.5 if key == "lr" else super().__getitem__(key)


class OwnGrad(nn.Parameter):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def grad(self):
        return torch.full((3,), 2.0)

    @grad.setter
    def grad(self, value):
        pass


@every_row
def test_what_python_would_look_up_otherwise(row):
    """Groups with a __getitem__ of their own, and parameters with a grad of their own, are torch's to read."""

    def dynamic_lr(make):
        param = nn.Parameter(torch.ones(3))
        optimizer = make([param])
        optimizer.param_groups[0] = Dynamic(optimizer.param_groups[0])
        param.grad = torch.ones(3)
        optimizer.step()
        return snapshot(optimizer)

    def own_grad(make):
        optimizer = make([OwnGrad(torch.ones(3))])
        optimizer.step()
        return snapshot(optimizer)

    same_as_torch(row, dynamic_lr)
    same_as_torch(row, own_grad)


@every_row
def test_state_of_the_python_object_is_copied(row):
    """By a __getstate__ that takes __dict__ as it is."""

    class Mine(row.ours):
        def __getstate__(self):
            return self.__dict__.copy()

    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = Mine([param], **row.plain)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    (twin,) = again.param_groups[0]["params"]
    for kind in (optimizer, again):
        twin.grad = torch.ones(3)
        kind.step()
    assert torch.equal(param.detach(), twin.detach())
    assert pickle.loads(pickle.dumps(optimizer._fastopt_plan)) is None


@every_row
def test_step_inside_a_torch_func_transform(row):
    """Is refused by torch: the transform would not see it."""

    def scenario(make):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = make([param])
        with pytest.raises(RuntimeError):
            torch.func.grad(lambda x: (optimizer.step(), (x**2).sum())[1])(torch.ones(3))
        return [param.detach().clone()]

    same_as_torch(row, scenario)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_row
def test_zero_grad(row, set_to_none):
    """A zeroed gradient is a gradient: momentum and weight decay go on; without one the parameter stands still."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        snapshots = []
        for _ in range(3):
            backward(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == set_to_none for p in model.parameters())
            optimizer.step()
            snapshots.append(snapshot(optimizer))
        return snapshots

    same_as_torch(row, scenario)


@every_row
def test_repr(row):
    for options in (row.plain, {}):
        ours, theirs = (cls(FORMS["groups"](small_model()), **options) for cls in (row.ours, row.theirs))
        assert repr(ours) == repr(theirs) and "maximize: True" in repr(ours)


@every_row
def test_signature_and_help(row):
    """Arguments, order and defaults are torch's, then come ours; the help is of the class, not of the mixin."""
    ours, theirs = (inspect.signature(cls).parameters.values() for cls in (row.ours, row.theirs))
    own = [(name, default, inspect.Parameter.KEYWORD_ONLY) for name, default in OWN_OPTIONS.items()]
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs] + own
    described = inspect.getdoc(row.ours)
    assert "Args:" in described and ">>>" in described and "Mixin" not in described
    assert all(name in described for name in inspect.signature(row.ours).parameters)


@every_row
def test_hooks_may_change_the_arguments_of_step(row):
    """A pre hook's return value replaces args and kwargs, as in torch."""
    calls = []

    def scenario(make):
        param = nn.Parameter(torch.ones(3))
        optimizer = make([param])

        def closure():
            param.grad = torch.full((3,), 0.5)
            calls.append("closure")
            return 7

        def other_closure():
            param.grad = torch.full((3,), -2.0)
            return 8

        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, other_closure), {}))
        losses = [optimizer.step(closure), optimizer.step(closure=closure)]
        handle.remove()
        losses.append(optimizer.step(closure))
        optimizer.register_step_pre_hook(lambda o, args, kwargs: "no pair")
        with pytest.raises(RuntimeError) as caught:
            optimizer.step(closure)
        return {**snapshot(optimizer), "losses": losses, "error": str(caught.value).split("must")[1]}

    same_as_torch(row, scenario)
    assert calls == ["closure"] * 2


@every_row
def test_state_dict_hooks(row):
    """Every register_state_dict_* and register_load_state_dict_* hook, in order, with what they may change."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        calls = []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre save"))
        optimizer.register_state_dict_post_hook(lambda o, saved: calls.append("post save") or {**saved, "note": 1})
        optimizer.register_state_dict_post_hook(lambda o, saved: calls.append("first"), prepend=True)

        def before_load(o, loaded):
            calls.append(f"pre load {loaded['note']}")
            loaded["param_groups"][0]["lr"] = 0.25
            return loaded

        def after_load(o):
            calls.append(f"post load {len(o.state)} {o.param_groups[0]['lr']}")

        optimizer.register_load_state_dict_pre_hook(before_load)
        optimizer.register_load_state_dict_post_hook(after_load)
        first = train(optimizer, model)
        saved = copy.deepcopy(optimizer.state_dict())
        train(optimizer, model)
        optimizer.load_state_dict(saved)
        counts = [len(getattr(optimizer, name)) for name in vars(optimizer) if name.endswith("_hooks")]
        return [*first, *train(optimizer, model), {"calls": calls, "counts": counts}]

    found = same_as_torch(row, scenario)
    assert len(found[-1]["calls"]) == 5


@every_row
def test_a_hook_may_repair_a_file(row):
    """What a pre-load hook made of the file is what is checked and loaded."""
    model = small_model()
    optimizer = row.ours(model.parameters(), **row.plain)
    train(optimizer, model)
    saved = copy.deepcopy(optimizer.state_dict())
    lost = {name: saved["state"][0].pop(name) for name in row.slots}
    optimizer.register_load_state_dict_pre_hook(lambda o, loaded: loaded["state"][0].update(lost))
    before = snapshot(optimizer)
    optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)


@every_row
def test_whole_optimizer_through_a_file(row):
    """torch.save of the object, as old training scripts do, with hooks attached; deepcopy and pickle."""

    def through_a_file(value):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    for duplicate in (through_a_file, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):

        def scenario(make, duplicate=duplicate):
            model = small_model()
            optimizer = make(model.parameters())
            optimizer.register_step_post_hook(lambda *_: None)
            first = train(optimizer, model)
            twin, twin_optimizer = duplicate((model, optimizer))
            assert twin_optimizer.param_groups[0]["params"][0] is twin[0].weight
            scheduler = lr_scheduler.StepLR(twin_optimizer, 1)
            scheduler.step()
            state = torch.get_rng_state()
            second = train(twin_optimizer, twin)
            torch.set_rng_state(state)
            return [*first, *second, *train(optimizer, model)]

        same_as_torch(row, scenario)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_row
def test_state_dtype_belongs_to_the_object(row, dtype):
    """Not to its groups, defaults or checkpoints; copies have it, and make the state of later parameters with it."""
    state_dtype = torch.float16
    model = small_model().to(dtype)
    optimizer = row.ours(model.parameters(), **row.plain, state_dtype=state_dtype)
    plain = row.ours(small_model().parameters(), **row.plain)
    assert optimizer.defaults.keys() == plain.defaults.keys() and repr(optimizer) == repr(plain)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    for duplicate in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        twin = duplicate(optimizer)
        added = [nn.Parameter(torch.ones(5, dtype=kind)) for kind in (dtype, torch.float64)]
        twin.add_param_group({"params": added})
        for param in [param for group in twin.param_groups for param in group["params"]]:
            param.grad = torch.ones_like(param)
        twin.step()
        twin.param_groups.pop()  # which a copy shares
        states = [twin.state.pop(param) for param in added]
        wide = states.pop()
        assert {wide[name].dtype for name in row.slots} == {torch.float64}
        for state in (*states, *(twin.state[param] for param in twin.param_groups[0]["params"])):
            assert {state[name].dtype for name in row.slots} == {state_dtype}


ADDED_OPTIONS = (
    "foreach", "maximize", "capturable", "differentiable", "fused", "amsgrad", "nesterov", "decoupled_weight_decay",
)  # fmt: skip


@every_row
def test_pickles_of_old_versions(row):
    """`__setstate__` gives options that later versions of torch added, and makes tensors of integer step counts."""

    def scenario(make):
        snapshots = []
        for count in (lambda step: int(step), lambda step: float(step), lambda step: step):
            model = small_model()
            optimizer = make(model.parameters())
            train(optimizer, model, 2)
            state = copy.deepcopy(optimizer.__getstate__())
            for group in state["param_groups"]:
                for key in ADDED_OPTIONS:
                    group.pop(key, None)
            for entry in state["state"].values():
                if "step" in entry:
                    entry["step"] = count(entry["step"])
            old = object.__new__(type(optimizer))
            old.__setstate__(state)
            for group in old.param_groups:
                group.update(foreach=False)
            for _ in range(2):
                for param in old.param_groups[0]["params"]:
                    param.grad = torch.randn(param.shape)
                old.step()
                snapshots.append(snapshot(old))
        return snapshots

    same_as_torch(row, scenario)


def test_fork_before_the_first_parallel_step():
    """Parent and child both open their first parallel region after the fork (torch's own would hang after one)."""
    script = """
import os, torch, fastopt
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.randn(1_000_000))
optimizer = fastopt.Adam([param])
small = fastopt.Adam([torch.nn.Parameter(torch.ones(3))])
small.param_groups[0]["params"][0].grad = torch.ones(3)
small.step()
grad = torch.linspace(-1, 1, 1_000_000)
torch.set_num_threads(2)
read, write = os.pipe()
child = os.fork()
param.grad = grad
for _ in range(3):
    optimizer.step()
total = param.detach().view(torch.int32).numpy().sum(dtype="int64")
if child == 0:
    os.write(write, str(total).encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert int(os.read(read, 100)) == total
print("same")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "same", done.stderr


@every_row
def test_subclass_with_its_own_step(row):
    """As Lookahead-like wrappers do: `super().step`, and its range of the profiler."""

    class Halved(row.ours):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for param in group["params"]:
                        param.mul_(0.5)
            return loss

    param = nn.Parameter(torch.ones(5))
    plain = nn.Parameter(torch.ones(5))
    optimizer, other = Halved([param], **row.plain), row.theirs([plain], foreach=False, **row.plain)
    assert isinstance(optimizer, row.theirs) and isinstance(optimizer, torch.optim.Optimizer)
    schedulers = [
        lr_scheduler.OneCycleLR(it, max_lr=1.0, total_steps=9, cycle_momentum=False) for it in (optimizer, other)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            param.grad = torch.ones(5)
            plain.grad = torch.ones(5)
            optimizer.step()
            reference.step(other)
            with torch.no_grad():
                plain.mul_(0.5)
            assert_same_bits(param.detach(), plain.detach())
            for scheduler in schedulers:
                scheduler.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    ranges = [event.key for event in profile.key_averages() if event.key.startswith("Optimizer.step#")]
    assert ranges == ["Optimizer.step#Halved.step"]


@every_row
def test_profiler_ranges(row):
    """step and zero_grad have torch's ranges under the autograd profiler too, once for each call."""
    model = small_model()
    optimizer = row.ours(model.parameters(), **row.plain)
    backward(model)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
    counted = {event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.")}
    assert counted == {f"Optimizer.step#{row.name}.step": 2, f"Optimizer.zero_grad#{row.name}.zero_grad": 1}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_row
def test_default_device(row, device):
    """torch.set_default_device says where new tensors are made, not where a parameter's state belongs."""
    param = nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    expected = nn.Parameter(torch.ones(5))
    optimizer, other = row.ours([param], **row.plain), row.theirs([expected], foreach=False, **row.plain)
    expected.grad = torch.ones(5)
    with torch.device(device):
        for _ in range(2):
            optimizer.step()
    for _ in range(2):
        reference.step(other)
    assert_same_bits(snapshot(optimizer), snapshot(other))
