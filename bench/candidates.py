"""What is benchmarked: the optimizers, who implements them, and the check that an implementation is right.

Every candidate of an optimizer starts from the same values, has the same fixed gradients, and is compared with torch's
for-loop after a few steps. One that is wrong is refused: it gets no timing.
"""

import copy
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from .workloads import Workload

LR = 1e-3
CHECK_STEPS = 3


@dataclass(frozen=True)
class Row:
    """An optimizer and its options; slots are its states of the parameter's shape, as torch names them."""

    name: str
    slots: tuple[str, ...]
    options: dict[str, Any]

    def bytes_per_element(self, itemsize: int, state_itemsize: int | None = None) -> int:
        """What one pass must move: param, grad and slots read, param and slots written."""
        return 3 * itemsize + 2 * len(self.slots) * (state_itemsize or itemsize)


OPTIMIZERS = {
    "SGD": Row("SGD", ("momentum_buffer",), {"momentum": 0.9}),
    "Adagrad": Row("Adagrad", ("sum",), {}),
    "RMSprop": Row("RMSprop", ("square_avg",), {}),
    "Adam": Row("Adam", ("exp_avg", "exp_avg_sq"), {}),
    "AdamW": Row("AdamW", ("exp_avg", "exp_avg_sq"), {}),
    "Adam amsgrad": Row("Adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {"amsgrad": True}),
}


class Unavailable(Exception):
    """This candidate does not exist here; the text says why."""


class Problem:
    """The starting values and gradients of a workload. Candidates that never write gradients share them.

    Parameters have the scale of an initialised network and steps are a visible part of that even in bf16, so that an
    element left out of an update shows in the check.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.workload, self.dtype = workload, dtype
        self.start = [(0.02 * torch.randn(shape, generator=generator)).to(dtype) for shape in workload.shapes]
        self.grads = [torch.randn(shape, generator=generator).to(dtype) for shape in workload.shapes]

    def to(self, device: torch.device) -> "Problem":
        """The same values on a device."""
        moved = copy.copy(self)
        moved.start = [tensor.to(device) for tensor in self.start]
        moved.grads = [tensor.to(device) for tensor in self.grads]
        return moved

    def groups(self, dtype: torch.dtype, copy_grads: bool = False) -> list[dict[str, Any]]:
        """Fresh parameters with their gradients; each group has a learning rate of its own."""
        tensors = zip(self.start, self.grads, strict=True)
        groups = []
        for i, shapes in enumerate(self.workload.groups):
            params = []
            for _ in shapes:
                start, grad = next(tensors)
                param = torch.nn.Parameter(start.to(dtype, copy=True))
                param.grad = grad.to(dtype, copy=copy_grads)
                params.append(param)
            groups.append({"params": params, "lr": LR * (1 + i / 1000)})
        return groups


# ---- the candidates: each takes a row, param groups and the parameters' dtype


@cache
def module_or_none(name: str) -> ModuleType | None:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def make_fastopt(row: Row, groups: list, dtype: torch.dtype) -> Optimizer:
    fastopt = module_or_none("fastopt")
    if fastopt is None:
        raise Unavailable("fastopt is not installed")
    if fastopt.backend_info()["cpu"] == "torch":
        raise Unavailable("fastopt was installed without its extension: its step is torch's")
    return getattr(fastopt, row.name)(groups, **row.options)


def make_torch(**implementation: bool) -> Callable[[Row, list, torch.dtype], Optimizer]:
    def make(row: Row, groups: list, dtype: torch.dtype) -> Optimizer:
        optimizer = getattr(torch.optim, row.name)
        for option in implementation:
            if option not in inspect.signature(optimizer).parameters:
                raise Unavailable(f"torch.optim.{row.name} has no {option}")
        return optimizer(groups, **row.options, **implementation)

    return make


def make_deepspeed(row: Row, groups: list, dtype: torch.dtype) -> Optimizer:
    if row.name not in ("Adam", "AdamW", "Adagrad") or row.options:
        raise Unavailable(f"DeepSpeed has no {row.name} with {row.options} for CPU")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not module_or_none("deepspeed"):
        raise Unavailable("DeepSpeed is not installed")
    states = {"fp32_optimizer_states": dtype == torch.float32}  # as torch: states have the parameter's dtype
    if row.name == "Adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad(groups, eps=1e-10, **states)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    decoupled = row.name == "AdamW"
    return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, weight_decay=0.01 if decoupled else 0, **states)


CANDIDATES: dict[str, Callable[[Row, list, torch.dtype], Optimizer]] = {
    "fastopt": make_fastopt,
    "default": make_torch(),
    "foreach": make_torch(foreach=True),
    "fused": make_torch(fused=True),
    "deepspeed": make_deepspeed,
}

# DeepSpeedCPUAdagrad leaves the update in .grad of the last few elements of a tensor.
WRITES_GRADS = {"deepspeed"}


def make(candidate: str, row: Row, problem: Problem) -> Optimizer:
    groups = problem.groups(problem.dtype, copy_grads=candidate in WRITES_GRADS)
    return CANDIDATES[candidate](row, groups, problem.dtype)


# ---- the check


def tolerance(candidate: str, dtype: torch.dtype) -> tuple[float, float]:
    """What a value may be off by: so many units in the last place of the value, and so much of what the steps changed.

    bf16: fastopt, fused and DeepSpeed round once a step, as the reference does, but a value next to the middle between
    two bf16 numbers may go either way; torch's default and foreach round after every operation. DeepSpeed computes
    1 - beta ** step in fp32, which is good to 1e-4 in the first steps.
    """
    if dtype == torch.float32:
        return 4.0, 1e-3 if candidate == "deepspeed" else 1e-6
    return (4.0, 0.02) if candidate in ("default", "foreach") else (2.0, 1e-3)


def reference(row: Row, problem: Problem) -> Optimizer:
    """torch's for-loop in fp32 after the check's steps; param and states rounded to the dtype once a step."""
    optimizer = getattr(torch.optim, row.name)(problem.groups(torch.float32), foreach=False, **row.options)
    for _ in range(CHECK_STEPS):
        optimizer.step()
        if problem.dtype != torch.float32:
            for _, value, _ in values(optimizer, row, problem):
                value.copy_(value.to(problem.dtype))
    return optimizer


def values(optimizer: Optimizer, row: Row, problem: Problem) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, tensor and starting value of each parameter and state."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    for i, (param, start) in enumerate(zip(params, problem.start, strict=True)):
        yield f"param {i}", param.detach(), start
        states = optimizer.state[param]
        for slot in row.slots:
            # DeepSpeedCPUAdagrad calls torch's `sum` by Adam's name.
            yield f"{slot} {i}", states[slot] if slot in states else states["exp_avg_sq"], torch.zeros(())


def check(
    candidate: str,
    optimizer: Optimizer,
    expected: Optimizer,
    row: Row,
    problem: Problem,
    state_dtype: torch.dtype | None = None,
) -> str:
    """Takes the check's steps and compares every element of every param and state: "", or what is wrong.

    With states of a dtype of their own, what a value may be off by is that of this dtype.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(CHECK_STEPS):
        for param, grad in zip(params, problem.grads, strict=True):
            if param.grad is not grad:
                param.grad.copy_(grad)
        optimizer.step()
    if candidate == "fastopt" and (reasons := importlib.import_module("fastopt").backend_info()["torch_steps"]):
        return f"torch's own step ran: {reasons}"
    dtype = state_dtype or problem.dtype
    ulps, share = tolerance(candidate, dtype)
    unit = ulps * torch.finfo(dtype).eps
    for (name, value, start), (_, right, _) in zip(
        values(optimizer, row, problem), values(expected, row, problem), strict=True
    ):
        value = value.float()
        if torch.equal(value, right):
            continue
        start = start.float()
        off = (value - right).abs_()
        allowed = (right - start).abs_().mul_(share).add_(right.abs() + start.abs(), alpha=unit)
        wrong = ~(off <= allowed)  # a NaN is wrong too
        if count := int(wrong.sum()):
            return f"{name}: {count} of {wrong.numel()} elements wrong, by up to {off[wrong].max():.2g}"
    return ""
