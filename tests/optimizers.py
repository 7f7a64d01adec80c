"""The table of optimizers: a row for each class with its state slots and every combination of options the tests try.

A new optimizer is a new row; nothing else in the tests names one, except where it tests what only that one does.
"""

import itertools
from dataclasses import dataclass

import torch

import fastopt

# The keywords that our constructors have beside torch's, and their defaults.
OWN_OPTIONS = {
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "ema_decay": None,
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "rounding_seed": 0,
}

# 1 - 0.50000001 is below one half, but not any more once rounded to float32: lerp takes its other branch there.
BARELY_HALF = 0.50000001


def lr_values(value):
    """A learning rate as every type torch takes: float, 0-dim float32 and float64, one element."""
    return (value, torch.tensor(value), torch.tensor(value, dtype=torch.float64), torch.tensor([value]))


@dataclass(frozen=True)
class Row:
    name: str  # of the class, in fastopt as in torch.optim
    slots: tuple[str, ...]  # the state tensors of the parameter's shape, in the order of the update function's bits
    module: str  # the file in kernels/ that has the update function
    has_fused: bool  # whether torch has a fused kernel of it
    plain: dict  # options for the tests that are about something else; every slot is in use
    axes: dict[str, tuple]  # the values of each option; tests go through the full product
    tensors: dict[str, tuple]  # another product, of options that may be tensors, with the last value of all others
    constructor_only: tuple[str, ...] = ()  # options that say nothing in a param group

    @property
    def ours(self):
        return getattr(fastopt, self.name)

    @property
    def theirs(self):
        return getattr(torch.optim, self.name)

    def make_ours(self, options):
        return lambda params: self.ours(params, **options)

    def make_reference(self, options, state_dtype=None):
        """torch's for-loop; to be stepped by `reference.step`, with the same state_dtype."""

        def make(params):
            optimizer = self.theirs(params, foreach=False, **options)
            if state_dtype is not None:  # of state that its constructor makes, too
                for param, state in optimizer.state.items():
                    if "sum" in state and param.dtype != torch.float64:
                        initial = optimizer.defaults["initial_accumulator_value"]
                        state["sum"] = torch.full_like(param, initial, dtype=state_dtype, requires_grad=False)
            return optimizer

        return make

    def combinations(self):
        """The full products, without what the constructor refuses."""
        for axes in (self.axes, {**{name: values[-1:] for name, values in self.axes.items()}, **self.tensors}):
            for values in itertools.product(*axes.values()):
                options = dict(zip(axes, values, strict=True))
                if not options.get("nesterov") or (options["momentum"] and not options["dampening"]):
                    yield options

    def defaults(self):
        """The options of a param group, without those that say how it runs."""
        how = {"foreach", "fused", "capturable", "differentiable"}
        return self.theirs([torch.nn.Parameter(torch.zeros(1))]).defaults.keys() - how

    def listed_by_torch(self):
        """The combinations torch's own tests go through on CPU."""
        from torch.testing._internal.common_optimizers import optim_db  # seconds to import

        (info,) = (info for info in optim_db if info.optim_cls is self.theirs)
        return [entry.kwargs for entry in info.optim_inputs_func(device="cpu")]

    def refused_by_torch(self):
        """Parameters and options of the constructor calls that torch's own tests expect to fail on CPU."""
        from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

        (info,) = (info for info in optim_db if info.optim_cls is self.theirs)
        return [
            (entry.optimizer_error_input.params, entry.optimizer_error_input.kwargs)
            for entry in info.optim_error_inputs_func("cpu", torch.float32)
            if entry.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        ]


WEIGHT_DECAYS = (0.0, 0.1, torch.tensor(0.1))
FLAG = (False, True)

ADAM_AXES = {
    "betas": ((0.9, 0.999), (0.0, 0.0), (0.4, 0.999), (BARELY_HALF, 0.9)),
    "eps": (1e-8, 0.0),
    "weight_decay": (0.0, 0.1),
    "amsgrad": FLAG,
    "maximize": FLAG,
}
ADAM_TENSORS = {
    "lr": lr_values(1e-2),
    "betas": ((0.9, 0.99), (torch.tensor(0.9), torch.tensor(0.99)), (torch.tensor([0.3]), torch.tensor([0.99]))),
    "weight_decay": WEIGHT_DECAYS,
}

ROWS = (
    Row(
        "SGD",
        slots=("momentum_buffer",),
        module="sgd",
        has_fused=True,
        plain={"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
        axes={
            "lr": (0.0, 1e-2),
            "momentum": (0.0, 0.9),
            "dampening": (0.0, 0.5),
            "weight_decay": (0.0, 0.1),
            "nesterov": FLAG,
            "maximize": FLAG,
        },
        tensors={"lr": lr_values(1e-2), "weight_decay": WEIGHT_DECAYS, "nesterov": FLAG, "dampening": (0.0, 0.5)},
    ),
    Row(
        "Adagrad",
        slots=("sum",),
        module="adagrad",
        has_fused=True,
        plain={"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01},
        axes={
            "lr_decay": (0.0, 0.5),
            "weight_decay": (0.0, 0.1),
            "initial_accumulator_value": (0.0, 0.1),
            "eps": (1e-10, 0.0),
            "maximize": FLAG,
        },
        tensors={"lr": lr_values(1e-2), "lr_decay": (0.0, 0.5), "weight_decay": WEIGHT_DECAYS},
        constructor_only=("initial_accumulator_value",),
    ),
    Row(
        "RMSprop",
        slots=("square_avg", "momentum_buffer", "grad_avg"),
        module="rmsprop",
        has_fused=False,
        plain={"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.01},
        axes={
            "alpha": (0.99, 0.0, BARELY_HALF, 1.5),
            "eps": (1e-8, 0.0),
            "weight_decay": (0.0, 0.1),
            "momentum": (0.0, 0.9),
            "centered": FLAG,
            "maximize": FLAG,
        },
        tensors={"lr": lr_values(1e-2), "weight_decay": WEIGHT_DECAYS, "momentum": (0.0, 0.9)},
    ),
    Row(
        "Adam",
        slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        module="adam",
        has_fused=True,
        plain={"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
        axes={**ADAM_AXES, "decoupled_weight_decay": FLAG},
        tensors={**ADAM_TENSORS, "decoupled_weight_decay": FLAG},
    ),
    Row(
        "AdamW",
        slots=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        module="adam",
        has_fused=True,
        plain={"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
        axes=ADAM_AXES,
        tensors=ADAM_TENSORS,
    ),
)
