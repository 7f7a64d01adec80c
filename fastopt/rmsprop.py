"""RMSprop: the class and its state. The update is in csrc/optimizers.h and kernels/rmsprop.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .optimizer import FusedStep, Group, same_dtype


class RMSprop(FusedStep, torch.optim.RMSprop):
    _update = "rmsprop"

    def _slots(self, group: Group) -> dict[str, float]:
        names = ["square_avg"] + ["momentum_buffer"] * (group["momentum"] > 0) + ["grad_avg"] * bool(group["centered"])
        return dict.fromkeys(names, 0.0)

    def _refusal(self, group: Group, param: Tensor) -> Exception | None:
        return super()._refusal(group, param) or (same_dtype(param) if group["centered"] else None)
