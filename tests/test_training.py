"""What people do around a step, as with torch.optim: schedulers, averages, gradients, mixed precision."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from .optimizers import ROWS
from .reference import assert_same_bits, snapshot
from .scenarios import backward, same_as_torch, small_model, train

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

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
    """float32 parameters under autocast(float16), clipped after unscale_; overflow at the first step, later a NaN."""
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
            scaler.scale(loss * {0: 1e38, 3: torch.nan}.get(t, 1.0)).backward()
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
