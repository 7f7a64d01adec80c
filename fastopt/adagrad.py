"""Adagrad: the class and its state. The update is in csrc/optimizers.h and kernels/adagrad.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .optimizer import FusedStep, Group


class Adagrad(FusedStep, torch.optim.Adagrad):
    _update = "adagrad"
    _takes_sparse = True

    def _slots(self, group: Group) -> dict[str, float]:
        return {"sum": self.defaults["initial_accumulator_value"]}

    def _refusal(self, group: Group, param: Tensor) -> Exception | None:
        if param.grad is not None and param.grad.is_sparse and group["weight_decay"] != 0:
            return RuntimeError("weight_decay option is not compatible with sparse gradients")
        return super()._refusal(group, param)
