"""What programs that nobody here wrote do to an optimizer and its class, done with torch.optim's too: the same results.

They patch `step`, write subclasses, give options from a config, keep state in mappings of their own.
"""

import collections
import contextlib
import copy
import fractions
import functools
import json
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def of_both(row, scenario):
    """`scenario(cls)` for fastopt's class and for torch's, with a correctly rounded square root: the same results."""
    results = []
    for cls in (row.ours, row.theirs):
        torch.manual_seed(0)
        with reference.correctly_rounded_sqrt():
            results.append(scenario(cls))
    assert_same_bits(*([result] for result in results), row.name)
    return results[0]


def two_params():
    return [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]


def train(optimizer, steps=3):
    snapshots = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape)
        optimizer.step()
        snapshots.append(snapshot(optimizer))
    return snapshots


def torch_steps(cls):
    """How many steps of a class torch's own code did so far, by reason."""
    counted = fastopt.backend_info()["torch_steps"].items()
    return {key.split(": ")[1]: count for key, count in counted if key.split(": ")[0] == cls.__name__}


# ---- steps that are patched, and hooks


def logging(calls, step):
    def logged(*args, **kwargs):
        calls.append("before")
        try:
            return step(*args, **kwargs)
        finally:
            calls.append("after")

    return logged


def noting(calls, what):
    return lambda *_: calls.append(what)


def wrapping(calls, step):
    return functools.wraps(step)(logging(calls, step))


def as_it_is(patch, cls, calls, params):
    return [cls(params())]


def patched_class(patch, cls, calls, params, wrapper=logging):
    patch.setattr(cls, "step", wrapper(calls, cls.step))
    return [cls(params())]


def patched_class_with_wraps(patch, cls, calls, params):
    return patched_class(patch, cls, calls, params, wrapping)


def class_patched_later(patch, cls, calls, params, wrapper=logging):
    optimizer = cls(params())
    patch.setattr(cls, "step", wrapper(calls, cls.step))
    return [optimizer, cls(params())]


def class_patched_later_with_wraps(patch, cls, calls, params):
    return class_patched_later(patch, cls, calls, params, wrapping)


def subclass_with_a_wrapped_step(patch, cls, calls, params, wrapper=wrapping):
    return [type("Sub", (cls,), {"step": wrapper(calls, cls.step)})(params())]


def subclass_with_a_step(patch, cls, calls, params):
    return subclass_with_a_wrapped_step(patch, cls, calls, params, logging)


def subclass_that_calls_super(patch, cls, calls, params):
    class Sub(cls):
        def step(self, closure=None):
            calls.append("sub")
            return super().step(closure)

    class SubSub(Sub):
        def step(self, closure=None):
            calls.append("subsub")
            return super().step(closure=closure)

    return [SubSub(params()), Sub(params()), SubSub(params())]


def patched_object(patch, cls, calls, params):
    optimizer = cls(params())
    optimizer.step = logging(calls, optimizer.step)
    return [optimizer]


def rebound_object(patch, cls, calls, params):
    optimizer = cls(params())
    optimizer.step = types.MethodType(logging(calls, cls.step), optimizer)
    return [optimizer]


PATCHES = (
    as_it_is, patched_class, patched_class_with_wraps, class_patched_later, class_patched_later_with_wraps,
    subclass_with_a_wrapped_step, subclass_with_a_step, subclass_that_calls_super, patched_object, rebound_object,
)  # fmt: skip


def forget_objects(patch, cls):
    """The class as before its first object, when torch has not put its wrapper around the step yet."""
    for base in cls.__mro__[::-1]:
        if "step" in vars(base) and getattr(base.step, "hooked", False):
            patch.setattr(base, "step", base.step.__wrapped__)


@pytest.mark.parametrize("history", ["first of its class", "not the first"])
@pytest.mark.parametrize("how", PATCHES, ids=lambda how: how.__name__)
@every_row
def test_hooks_of_a_patched_step(row, how, history, monkeypatch):
    """Hooks run as often as with torch's class, and in its order; the profiler has as many ranges."""

    def scenario(cls):
        calls = []
        with monkeypatch.context() as patch:
            forget_objects(patch, cls)
            if history == "not the first":
                cls(two_params())
            for number, optimizer in enumerate(how(patch, cls, calls, two_params)):
                calls.append(number)
                optimizer.register_step_pre_hook(noting(calls, "pre"))
                optimizer.register_step_post_hook(noting(calls, "post"))
                globals_ = [
                    register_optimizer_step_pre_hook(noting(calls, "global pre")),
                    register_optimizer_step_post_hook(noting(calls, "global post")),
                ]
                try:
                    with torch.profiler.profile() as profile:
                        train(optimizer, 2)
                finally:
                    for handle in globals_:
                        handle.remove()
                ranges = {event.key: event.count for event in profile.key_averages() if "Optimizer.step" in event.key}
                calls += [ranges, hasattr(optimizer.step, "__wrapped__")]
                train(optimizer, 1)
        return {"calls": calls}

    of_both(row, scenario)


@every_row
def test_range_under_an_execution_trace_observer(row, tmp_path):
    """Which no flag in Python tells of."""

    def scenario(cls):
        optimizer = cls(two_params(), **row.plain)
        train(optimizer)
        file = tmp_path / "trace.json"
        observer = torch.profiler.ExecutionTraceObserver().register_callback(str(file))
        observer.start()
        optimizer.step()
        observer.stop()
        observer.unregister_callback()
        optimizer.step()
        return {"ranges": [n["name"] for n in json.loads(file.read_text())["nodes"] if "Optimizer" in n["name"]]}

    assert of_both(row, scenario) == {"ranges": [f"Optimizer.step#{row.name}.step"]}


# ---- subclasses

NAMES_IN_USE_ONCE = (
    "_update", "_slots", "_has_step", "_new_state", "_finish", "_make_state", "_gpu", "_plan", "_refusal", "_step",
    "_torch_step", "_takes_sparse", "_check_loaded", "_unmake_state", "_prepare_gpu", "update", "slots", "algorithm",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["method", "attribute", "attribute of the object"])
@every_row
def test_every_name_is_free(row, kind):
    """But for torch's own, and those that begin with _fastopt.

    `grad_norm` is one that anything of the same name hides (test_extras.py), and without the option it is not there.
    """

    def fail(*args, **kwargs):
        raise AssertionError("a method of the subclass was called")

    def scenario(cls):
        members = dict.fromkeys(NAMES_IN_USE_ONCE, fail if kind == "method" else 7)
        Sub = type("Sub", (cls,), {} if kind == "attribute of the object" else members)
        optimizer = Sub(two_params(), **row.plain)
        if kind == "attribute of the object":
            optimizer.__dict__.update(members)
        snapshots = train(optimizer)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["params"][0].grad = torch.ones(5).to_sparse() if cls.__name__ == "SGD" else None
        return [*snapshots, *train(optimizer)]

    of_both(row, scenario)
    optimizer = row.ours(two_params(), **row.plain)
    train(optimizer)
    torchs = row.theirs(two_params(), **row.plain)
    train(torchs)
    added = {*dir(row.ours), *vars(optimizer)} - {*dir(row.theirs), *vars(torchs)} - {"_step_supports_amp_scaling"}
    of_scalers = {"grad_scale", "found_inf"}  # torch's names, which its fused optimizers know
    assert not any(hasattr(optimizer, name) for name in ("grad_norm", *of_scalers))
    added -= {"grad_norm", *of_scalers}
    assert added and all(name.startswith("_fastopt") for name in added), added


def projecting(cls):
    """As optimizers that project gradients, GaLore and its kind, do."""

    class Projecting(cls):
        def _init_group(self, group, params, grads, *lists):
            found = super()._init_group(group, params, grads, *lists)
            grads[:] = [grad - grad.mean() for grad in grads]
            return found

    return Projecting, lambda optimizer: None


def freezing(cls):
    class Freezing(cls):
        def _init_group(self, group, *lists):
            return super()._init_group({**group, "params": group["params"][1:]}, *lists)

    return Freezing, lambda optimizer: None


def patched_on_the_object(cls):
    def patch(optimizer):
        own = optimizer._init_group
        optimizer._init_group = lambda group, *lists: own({**group, "params": group["params"][:1]}, *lists)

    return cls, patch


def checking_for_captures(cls):
    """Of a method that SGD's and Adagrad's step do not call."""
    asked = []

    class Checking(cls):
        def _accelerator_graph_capture_health_check(self):
            asked.append(self)
            super()._accelerator_graph_capture_health_check()

    return Checking, lambda optimizer: None


PARTS = (projecting, freezing, patched_on_the_object, checking_for_captures)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
@every_row
def test_a_part_of_torchs_step_is_replaced(row, part):
    """Then torch's own step runs, and is counted."""

    def scenario(cls):
        Sub, patch = part(cls)
        before = sum(torch_steps(Sub).values())
        optimizer = Sub(two_params(), foreach=False, **row.plain)
        patch(optimizer)
        snapshots = train(optimizer)
        assert sum(torch_steps(Sub).values()) - before == (3 if cls is row.ours else 0)
        return snapshots

    if part is checking_for_captures and not hasattr(row.theirs, "_accelerator_graph_capture_health_check"):
        pytest.skip("it has another name in this torch")
    of_both(row, scenario)


@every_row
def test_a_part_is_replaced_between_two_steps(row, monkeypatch):
    """And put back."""

    def scenario(cls):
        class Sub(cls):
            pass

        optimizer = Sub(two_params(), foreach=False, **row.plain)
        snapshots = train(optimizer)
        for base in (Sub, cls):
            before = sum(torch_steps(Sub).values())
            with monkeypatch.context() as patch:
                own = base._init_group
                patch.setattr(
                    base,
                    "_init_group",
                    lambda self, group, *lists, own=own: own(self, {**group, "params": group["params"][:1]}, *lists),
                )
                snapshots += train(optimizer)
            assert sum(torch_steps(Sub).values()) - before == (3 if cls is row.ours else 0)
            snapshots += train(optimizer)
            assert sum(torch_steps(Sub).values()) - before == (3 if cls is row.ours else 0)
        return snapshots

    of_both(row, scenario)


def test_adamw_is_an_adam():
    assert issubclass(fastopt.AdamW, fastopt.Adam)
    for row in ROWS:
        for other in ROWS:
            assert issubclass(row.ours, other.ours) == issubclass(row.theirs, other.theirs)
            assert issubclass(row.ours, other.theirs) == issubclass(row.theirs, other.theirs)


@every_row
def test_subclass_that_calls_optimizers_constructor(row):
    """With defaults of its own; and the same for __setstate__."""

    def scenario(cls):
        skipped = next(base for base in cls.__mro__ if base.__name__ == row.name.removesuffix("W"))  # AdamW is an Adam

        class Sub(cls):
            def __init__(self, params, **options):
                defaults = {**cls(two_params(), foreach=False, **row.plain).defaults, "extra": 3, **options}
                super(skipped, self).__init__(params, defaults)

            def __setstate__(self, state):
                super(skipped, self).__setstate__(state)
                for group in self.param_groups:
                    group.setdefault("set", 1)

        optimizer = Sub([{"params": two_params()}, {"params": two_params(), "lr": 0.5}], extra=4)
        snapshots = train(optimizer)
        for group in optimizer.param_groups:
            del group["maximize"]
        optimizer.__setstate__(optimizer.__getstate__())
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return [*snapshots, {"groups": groups}]

    of_both(row, scenario)


@every_row
def test_constructors_of_subclasses(row):
    """Positional arguments through super(), a base beside ours, an abstract base class."""
    import abc

    class Mixin(abc.ABC):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = 1

        @abc.abstractmethod
        def describe(self): ...

    def scenario(cls):
        class Sub(Mixin, cls):
            def __init__(self, params, lr, **options):
                super().__init__(params, lr, **options)

            def describe(self):
                return f"{self.extra} {[base.__name__ for base in type(self).__mro__ if 'Adam' in base.__name__][-1:]}"

        optimizer = Sub(two_params(), 0.05, foreach=False, **{k: v for k, v in row.plain.items() if k != "lr"})
        return [*train(optimizer), {"described": optimizer.describe()}]

    of_both(row, scenario)


@pytest.mark.parametrize("said", ["by the class", "before the constructor", "after it", "after a step"])
@pytest.mark.parametrize("step", ["its own", "torch's fused"])
@every_row
def test_step_that_supports_amp_scaling(row, step, said):
    """A subclass that says so gets scaled gradients, with the scale; so does torch's step, where it is left to that."""
    if step == "torch's fused" and not row.has_fused:
        pytest.skip("torch has none")

    def scenario(cls):
        class Sub(cls):
            def __init__(self, *args, **kwargs):
                if said == "before the constructor":
                    self._step_supports_amp_scaling = True
                super().__init__(*args, **kwargs)
                if said == "after it":
                    self._step_supports_amp_scaling = True

            def step(self, closure=None):
                if step == "its own" and hasattr(self, "grad_scale"):
                    seen.append((float(self.grad_scale), float(self.found_inf)))
                    if self.found_inf:
                        return
                    for group in self.param_groups:
                        for param in group["params"]:
                            param.grad /= self.grad_scale
                    self.grad_scale = self.found_inf = None
                super().step(closure)

        if said == "by the class":
            Sub._step_supports_amp_scaling = True
        seen = []
        options = {"fused": True} if step == "torch's fused" else {"foreach": False}
        optimizer = Sub(two_params(), **options, **row.plain)
        if said == "after a step":
            train(optimizer, 1)
            optimizer._step_supports_amp_scaling = True
        snapshots = []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, torch.inf, 2.0):
            optimizer.zero_grad()
            scaler.scale(sum((p * torch.randn(p.shape)).sum() for p in optimizer.param_groups[0]["params"])).backward()
            optimizer.param_groups[0]["params"][0].grad *= factor
            scaler.step(optimizer)
            scaler.update()
            snapshots.append(snapshot(optimizer))
        return [*snapshots, {"seen": seen}]

    found = of_both(row, scenario)
    assert len(found[-1]["seen"]) == (3 if step == "its own" else 0)


# ---- options from a config


class ListConfig(collections.abc.Sequence):
    """As omegaconf's: no list and no tuple."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, at):
        return self.values[at]

    def __len__(self):
        return len(self.values)


PAIRS = {
    "list": list,
    "ListConfig": ListConfig,
    "array": np.array,
    "float32 array": lambda pair: np.array(pair, np.float32),
    "tensor": torch.tensor,
    "tensors of one element": lambda pair: [torch.tensor([number]) for number in pair],
    "keys of a dict": lambda pair: dict.fromkeys(pair),
    "deque": collections.deque,
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("row", [row for row in ROWS if "betas" in row.axes], ids=lambda row: row.name)
def test_betas_of_any_kind(row, kind):
    """In a group given to the constructor, set later, added, loaded; of numbers that float32 holds."""

    def scenario(cls):
        make = PAIRS[kind]
        optimizer = cls([{"params": two_params(), "betas": make((0.5, 0.75))}], foreach=False, **row.plain)
        snapshots = train(optimizer)
        optimizer.add_param_group({"params": two_params(), "betas": make((0.75, 0.25))})
        snapshots += train(optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.param_groups[1]["betas"] = make((0.25, 0.5))
        snapshots += train(optimizer)
        optimizer.load_state_dict(saved)
        return snapshots + train(optimizer)

    if kind == "float32 array":  # torch computes 1 - beta**t in float32 then, which holds it for a while
        assert np.float32(1) - np.float32(0.75) ** 4 == 1 - 0.75**4
    before = torch_steps(row.ours)
    of_both(row, scenario)
    assert torch_steps(row.ours) == before


NUMBERS = {
    "int": lambda number: int(number * 64) or 1,
    "bool": bool,
    "numpy's double": np.float64,
    "array": np.array,
    "array of one element": lambda number: np.array([number]),
    "int array": lambda number: np.array(1),
    "tensor": torch.tensor,
    "float64 tensor": lambda number: torch.tensor(number, dtype=torch.float64),
    "Fraction": fractions.Fraction,
    "str": str,
    "None": lambda number: None,
}


@pytest.mark.parametrize("kind", NUMBERS)
@every_row
def test_numbers_of_any_kind(row, kind):
    """Whatever torch's step takes for a hyper-parameter, with its result; strings and None are refused."""
    options = {"lr": 0.125, "momentum": 0.5, "dampening": 0.25, "alpha": 0.75, "eps": 0.5, "lr_decay": 0.25}
    options |= {"weight_decay": 0.25}
    names = [name for name in options if name in row.defaults()]
    assert len(names) >= 3
    taken = []
    for name in names:

        def scenario(cls, name=name):
            optimizer = cls(two_params(), foreach=False, **row.plain)
            snapshots = train(optimizer, 1)
            optimizer.param_groups[0][name] = NUMBERS[kind](options[name])
            return snapshots + train(optimizer)

        try:
            torch.manual_seed(0)
            scenario(row.theirs)
        except (TypeError, ValueError, RuntimeError):
            if kind in ("str", "None"):
                with pytest.raises(TypeError, match=f"{name} of param group 0 must be a number"):
                    scenario(row.ours)
            continue
        of_both(row, scenario)
        taken.append(name)
    assert taken or kind in ("array of one element", "Fraction", "str", "None")


class Meddling:
    """A pair or a number that does something when it is read."""

    def __init__(self, optimizer, meddle):
        self.optimizer, self.meddle = optimizer, meddle

    def __iter__(self):
        self.meddle(self.optimizer)
        return iter((0.5, 0.75))

    def __float__(self):
        return next(iter(self))

    def __bool__(self):
        return next(iter(self)) > 1


def drop_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


def replace_gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full(param.shape, 2.0)


def step_within(optimizer):
    key = next(key for key, value in optimizer.param_groups[-1].items() if isinstance(value, Meddling))
    meddling = optimizer.param_groups[-1][key]
    optimizer.param_groups[-1][key] = {"betas": (0.5, 0.75), "maximize": False}.get(key, 0.5)
    optimizer.step()
    optimizer.param_groups[-1][key] = meddling


def give_gradients_to_others(optimizer):
    for param in optimizer.param_groups[0]["params"]:
        param.grad = None if param.grad is not None else torch.ones(param.shape)


def forget_the_plan(optimizer):
    optimizer._step_supports_amp_scaling = False


def clear_groups(optimizer):
    optimizer.param_groups.clear()


MEDDLERS = (
    drop_gradients, replace_gradients, step_within, give_gradients_to_others, forget_the_plan,
    lambda optimizer: optimizer.state.clear(),
    lambda optimizer: optimizer.param_groups[-1].pop("lr"),
    lambda optimizer: optimizer.param_groups[-1].clear(),
    lambda optimizer: optimizer.param_groups[0]["params"].clear(),
    lambda optimizer: optimizer.param_groups[0].update(params=two_params()),
    clear_groups,
    lambda optimizer: optimizer.param_groups.append({**optimizer.param_groups[0], "params": two_params()}),
)  # fmt: skip


@pytest.mark.parametrize("number", range(len(MEDDLERS)))
@every_row
def test_a_value_that_changes_the_optimizer_when_it_is_read(row, number):
    """Nothing that was looked at is used after it is gone: the step is done with what was read, or refused."""
    for key in ("betas", "lr", "maximize", "weight_decay"):
        if key not in row.defaults():
            continue
        for steps in (0, 1):
            optimizer = row.ours([{"params": two_params()} for _ in range(3)], **row.plain)
            train(optimizer, steps)
            replace_gradients(optimizer)
            if MEDDLERS[number] is give_gradients_to_others:
                drop_gradients(optimizer)
                optimizer.param_groups[-1]["params"][0].grad = torch.ones(5)
            optimizer.param_groups[-1][key] = Meddling(optimizer, MEDDLERS[number])
            with contextlib.suppress(RuntimeError, KeyError):
                optimizer.step()


# ---- state in mappings of its own


class Loud(dict):
    """A dict that is read by a method of its own."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        return value * 2 if key != "step" else value


@pytest.mark.parametrize("kind", [collections.UserDict, collections.OrderedDict, Loud], ids=lambda kind: kind.__name__)
@every_row
def test_state_entry_that_is_a_mapping(row, kind):
    """With state in it, and empty at the first step."""

    def scenario(cls):
        optimizer = cls(two_params(), foreach=False, **row.plain)
        snapshots = train(optimizer, 1)
        for empty in (False, True):
            for param in optimizer.param_groups[0]["params"][:1]:
                optimizer.state[param] = kind({} if empty else optimizer.state[param])
            if not (empty and row.name == "Adagrad"):  # whose state is made by its constructor
                snapshots += train(optimizer)
        return snapshots

    of_both(row, scenario)


# ---- patterns of public programs


def small_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(optimizer, model, steps=3):
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        values.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return values


def clipping_class_made_at_run_time(cls, options):
    """detectron2's, with its super(type(self), self)."""

    def step(self, closure=None):
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        super(type(self), self).step(closure)

    model = small_model()
    return fit(type(cls.__name__ + "WithGradientClip", (cls,), {"step": step})(model.parameters(), **options), model)


def trust_ratios(cls, options):
    """apex's LARC: takes the weight decay out of the groups for its step and puts it back."""
    model = small_model()
    optimizer = cls(model.parameters(), **options)

    class Larc:
        zero_grad = optimizer.zero_grad

        def step(self):
            (group,) = optimizer.param_groups
            decay, group["weight_decay"] = group["weight_decay"], 0
            for param in group["params"]:
                ratio = 0.02 * param.detach().norm() / (param.grad.norm() + param.detach().norm() * decay + 1e-8)
                param.grad.data += decay * param.data
                param.grad.data *= min(ratio / group["lr"], 1)
            optimizer.step()
            group["weight_decay"] = decay

    return fit(Larc(), model)


def actor_and_critic(cls, options):
    """CleanRL's SAC: three optimizers, gradients of one loss in another's parameters, a target network."""
    critic, actor, log_alpha = small_model(), small_model(), torch.zeros(1, requires_grad=True)
    target = copy.deepcopy(critic)
    optimizers = [cls(params, **options) for params in (critic.parameters(), actor.parameters(), [log_alpha])]
    values = []
    for _ in range(4):
        x = torch.randn(8, 6)
        losses = (
            lambda x: (critic(x) - target(x).detach() + 1).square().mean(),
            lambda x: (log_alpha.exp().item() * actor(x) - critic(x)).mean(),
            lambda x: (-log_alpha.exp() * (actor(x).detach() + 0.3)).mean(),
        )
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        for param, slow in zip(critic.parameters(), target.parameters(), strict=True):
            slow.data.copy_(0.1 * param.data + 0.9 * slow.data)
        values += [nn.utils.parameters_to_vector(net.parameters()).detach() for net in (critic, actor)]
    return [*values, log_alpha.detach()]


def layer_that_grows(cls, options):
    """Its state is padded and moved to the new parameter; other groups are deleted and added."""
    model = small_model()
    optimizer = cls([{"params": [param]} for param in model.parameters()], **options)
    values = fit(optimizer, model)

    def grown(tensor, dim):
        shape = list(tensor.shape)
        shape[dim] = 2
        return torch.cat([tensor.detach(), torch.zeros(shape)], dim)

    old, model[0].weight = model[0].weight, nn.Parameter(grown(model[0].weight, 0))
    state = optimizer.state.pop(old)
    optimizer.state[model[0].weight] = {k: v if v is None or not v.dim() else grown(v, 0) for k, v in state.items()}
    optimizer.param_groups[0]["params"] = [model[0].weight]
    model[0].bias, model[2].weight = (nn.Parameter(grown(p, -1)) for p in (model[0].bias, model[2].weight))
    del optimizer.param_groups[1:3]
    optimizer.add_param_group({"params": [model[0].bias, model[2].weight], "lr": 0.01})
    return values + fit(optimizer, model)


def one_for_each_parameter(cls, options):
    """torch.distributed.optim's, which steps inside backward."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = small_model()
    _apply_optimizer_in_backward(cls, model.parameters(), options)
    values = []
    for _ in range(3):
        model(torch.randn(4, 6)).square().mean().backward()
        values.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return values


PROGRAMS = (
    clipping_class_made_at_run_time, trust_ratios, actor_and_critic, layer_that_grows, one_for_each_parameter,
)  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@every_row
def test_pattern_of_public_programs(row, program):
    before = torch_steps(row.ours)
    of_both(row, lambda cls: [*program(cls, {**row.plain, "foreach": False})])
    assert torch_steps(row.ours) == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "Adagrad"], ids=lambda row: row.name)
def test_functional_map_of_torch_distributed(row, monkeypatch):
    """Which looks the exact class up: with the registration of docs/faq.md."""
    from torch.distributed.optim import utils

    monkeypatch.setattr(utils, "functional_optim_map", dict(utils.functional_optim_map))
    with pytest.raises(ValueError, match="does not have a functional counterpart"):
        utils.as_functional_optim(row.ours, lr=0.1)
    utils.register_functional_optim(row.ours, utils.functional_optim_map[row.theirs])

    def scenario(cls):
        functional = utils.as_functional_optim(cls, lr=0.1)
        params = two_params()
        functional.param_group = {"params": params}
        for _ in range(3):
            functional.step([torch.randn(param.shape) for param in params])
        return [param.detach() for param in params]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        of_both(row, scenario)
