"""What people do with a torch optimizer beside stepping it, done with fastopt and with torch.optim: the same comes out.

Numbers, state, refusals and the hot step have files of their own. Here a *scenario* is a function of `make`, which
makes an optimizer; it runs with fastopt's class and with torch's for-loop, and returns what must be equal.
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
from torch.optim import lr_scheduler, swa_utils

import fastopt

from . import reference
from .optimizers import ROWS
from .reference import assert_same_bits, drive, fresh, snapshot

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def same_as_torch(row, scenario, ours=None, theirs=None):
    """`ours` and `theirs` are the options, by default the row's plain ones. Warnings count as results."""
    results = []
    for make in (row.make_ours(ours or row.plain), row.make_reference(theirs or row.plain)):
        torch.manual_seed(0)
        with reference.correctly_rounded_sqrt(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            snapshots = scenario(make)
        results.append((snapshots, [(warning.category, str(warning.message)) for warning in caught]))
    assert_same_bits(results[0][0], results[1][0], row.name)
    assert results[0][1] == results[1][1]
    return results[0][0]


def small_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def backward(model, factor=1.0):
    loss = model(torch.randn(4, 6)).square().mean() * factor
    loss.backward()
    return loss


def train(optimizer, model, steps=3):
    snapshots = []
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        snapshots.append(snapshot(optimizer))
    return snapshots


def steps_of_torch():
    """How many steps torch's own code did so far, by reason."""
    return dict(fastopt.backend_info()["torch_steps"])


# ---- the optimizer as an object

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
    """Arguments, order and defaults are torch's; the help is of the class, not of the mixin."""
    ours, theirs = (inspect.signature(cls).parameters.values() for cls in (row.ours, row.theirs))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]
    described = inspect.getdoc(row.ours)
    assert "Args:" in described and ">>>" in described and "Mixin" not in described
    assert all(parameter.name in described for parameter in ours)


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


# ---- schedulers and averaging

TOTAL = 12
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=cycles(o)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=TOTAL + 1, cycle_momentum=cycles(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.01, 4),
}


def cycles(optimizer):
    """Whether there is a momentum, or a first beta, to cycle."""
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def test_every_scheduler_is_in_the_table():
    base = {"LRScheduler", "SWALR"}
    assert {*SCHEDULERS} | base == {*lr_scheduler.__all__} | base


@pytest.mark.parametrize("name", SCHEDULERS)
@every_row
def test_schedulers(row, name):
    """Equal lr, betas and momentum, equal parameters; with a scheduler loaded from its state_dict half-way."""

    def scenario(make):
        model = small_model()
        optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}])
        scheduler = SCHEDULERS[name](optimizer)
        snapshots = []
        for t in range(TOTAL):
            snapshots += train(optimizer, model, 1)
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
            keys = ("lr", "momentum", "betas", "initial_lr", "max_lr", "max_momentum")
            snapshots.append(
                {"hyper": [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]}
            )
            if t == TOTAL // 2:
                saved, saved_optimizer = copy.deepcopy(scheduler.state_dict()), copy.deepcopy(optimizer.state_dict())
                train(optimizer, model, 1)
                optimizer.load_state_dict(saved_optimizer)
                scheduler.load_state_dict(saved)
        return snapshots

    found = same_as_torch(row, scenario)
    hyper = [str(f["hyper"]) for f in found if "hyper" in f]
    assert len(set(hyper)) > 1
    if name in ("OneCycleLR", "CyclicLR"):
        for key in {"momentum", "betas"} & row.defaults():
            assert len({str(f["hyper"][0][key]) for f in found if "hyper" in f}) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_row
def test_scheduler_of_a_tensor_lr(row, dtype):
    """A scheduler fills a tensor lr in place."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        lr = optimizer.param_groups[0]["lr"]
        snapshots = []
        for _ in range(4):
            snapshots += train(optimizer, model, 1)
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr and 0 < float(lr) < 0.1
        return snapshots

    options = {**row.plain, "lr": torch.tensor(0.1, dtype=dtype)}
    same_as_torch(row, lambda make: scenario(make), options, copy.deepcopy(options))


@pytest.mark.parametrize("average", ["swa", "ema"])
@every_row
def test_averaged_model(row, average):
    """AveragedModel of a model that is being stepped, used in a forward pass and swapped in."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        averaged = swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9) if average == "ema" else None
        )
        scheduler = swa_utils.SWALR(optimizer, 0.01, 2)
        snapshots = []
        for _ in range(5):
            snapshots += train(optimizer, model, 1)
            averaged.update_parameters(model)
            scheduler.step()
        values = torch.cat([p.detach().reshape(-1) for p in averaged.parameters()])
        model.load_state_dict(averaged.module.state_dict())
        return [*snapshots, {("averaged", values.dtype): ([(0, values.shape)], values)}, *train(optimizer, model, 2)]

    same_as_torch(row, scenario)


# ---- gradients


def clip_norm(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def clip_norm_foreach(model, optimizer):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"), foreach=True)


def clip_value(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def freeze_and_thaw(model, optimizer):
    for param in model[0].parameters():
        param.requires_grad_(not param.requires_grad)
        param.grad = None


def replace(model, optimizer):
    for param in model.parameters():
        param.grad = param.grad * 2 + 1


def accumulate(model, optimizer):
    backward(model)


def permute_memory(model, optimizer):
    model[0].weight.grad = model[0].weight.grad.t().contiguous().t()


def gradient_is_a_view(model, optimizer):
    """As DDP's gradient_as_bucket_view: gradients are slices of one buffer, at odd offsets."""
    params = list(model.parameters())
    flat, offset = torch.zeros(sum(p.numel() for p in params) + 1), 1
    for param in params:
        grad = flat[offset : offset + param.numel()].view(param.shape)
        grad.copy_(param.grad)
        param.grad = grad
        offset += param.numel()


def vector_of_parameters(model, optimizer):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, model.parameters())


TREATMENTS = (
    clip_norm, clip_norm_foreach, clip_value, freeze_and_thaw, replace, accumulate, permute_memory, gradient_is_a_view,
    vector_of_parameters,
)  # fmt: skip


@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda treat: treat.__name__)
@every_row
def test_gradients_treated_before_the_step(row, treat):
    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        snapshots = []
        for _ in range(4):
            optimizer.zero_grad()
            backward(model)
            treat(model, optimizer)
            optimizer.step()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            values = torch.cat([g.reshape(-1) for g in grads])
            snapshots += [snapshot(optimizer), {("grad", values.dtype): ([(0, values.shape)], values)}]
        return snapshots

    same_as_torch(row, scenario)


@every_row
def test_step_inside_backward(row):
    """register_post_accumulate_grad_hook with an optimizer for each parameter: stepped and freed during backward."""

    def scenario(make):
        model = small_model()
        optimizers = {param: make([param]) for param in model.parameters()}

        def step_now(param):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step_now)
        snapshots = []
        for _ in range(3):
            backward(model)
            snapshots += [snapshot(optimizer) for optimizer in optimizers.values()]
        assert all(param.grad is None for param in model.parameters())
        return snapshots

    same_as_torch(row, scenario)


@every_row
def test_gradients_of_torch_func(row):
    """Gradients from torch.func, given to `.grad` by hand; and a model whose forward pass uses functional_call."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        x = torch.randn(4, 6)

        def loss(params):
            return torch.func.functional_call(model, params, (x,)).square().mean()

        snapshots = []
        for _ in range(3):
            params = {name: param.detach() for name, param in model.named_parameters()}
            for name, grad in torch.func.grad(loss)(params).items():
                model.get_parameter(name).grad = grad
            optimizer.step()
            snapshots.append(snapshot(optimizer))
        return snapshots

    same_as_torch(row, scenario)


@every_row
def test_closures_that_call_many_times(row):
    """The closure computes with gradients under no_grad, and the step sees the last ones."""

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())

        def closure():
            optimizer.zero_grad()
            return backward(model)

        with torch.no_grad():
            losses = [float(optimizer.step(closure)) for _ in range(3)]
        return {**snapshot(optimizer), "losses": losses}

    same_as_torch(row, scenario)


# ---- mixed precision


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}], ids=str)
@every_row
def test_grad_scaler_under_autocast(row, how):
    """float32 parameters under autocast(float16), clipped after unscale_; overflow at the first and at a later step."""
    if "fused" in how and not row.has_fused:
        pytest.skip("torch has no fused RMSprop")

    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        snapshots = []
        for t in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(torch.randn(4, 6)).float().square().mean()
            before = snapshot(optimizer)
            scaler.scale(loss * (1e38 if t in (0, 3) else 1.0)).backward()
            if t % 2:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if t in (0, 3):
                assert_same_bits(snapshot(optimizer), before, "skipped")
            snapshots += [snapshot(optimizer), {"scale": scaler.get_scale()}]
        return snapshots

    found = same_as_torch(row, scenario, {**row.plain, **how}, row.plain)
    assert len({f["scale"] for f in found if "scale" in f}) > 2


@every_row
def test_autocast_bfloat16(row):
    def scenario(make):
        model = small_model()
        optimizer = make(model.parameters())
        snapshots = []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.randn(4, 6)).float().square().mean().backward()
                optimizer.step()  # inside, as some do
            snapshots.append(snapshot(optimizer))
        return snapshots

    same_as_torch(row, scenario)


# ---- what is outside the fused path: torch's own step, and backend_info() says so


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


def test_grad_dtype_none_takes_any():
    """Parameter of bfloat16 with float32 gradients, as mixed-precision training with full gradients does it."""
    for row in ROWS:
        param = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        param.grad_dtype = None
        param.grad = torch.ones(5)
        other = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        other.grad_dtype = None
        other.grad = torch.ones(5)
        outcomes = []
        for optimizer in (row.ours([param], **row.plain), row.theirs([other], foreach=False, **row.plain)):
            try:
                optimizer.step()
                outcomes.append(None)
            except RuntimeError as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1], row.name
        if outcomes[0] is None:
            assert_same_bits(param.detach(), other.detach(), row.name)
        else:
            assert_same_bits(param.detach(), torch.ones(5, dtype=torch.bfloat16), row.name)


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
    for _ in range(3):
        param.grad = torch.ones(5)
        plain.grad = torch.ones(5)
        optimizer.step()
        reference.step(other)
        with torch.no_grad():
            plain.mul_(0.5)
        assert_same_bits(param.detach(), plain.detach())
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
