"""Adam and AdamW: the classes and their state. The update is in csrc/optimizers.h and kernels/adam.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .optimizer import FusedStep, Group, same_dtype


class _AdamState(FusedStep):
    _update = "adam"

    def _slots(self, group: Group) -> dict[str, float]:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
        return dict.fromkeys(names, 0.0)

    def _refusal(self, group: Group, param: Tensor) -> Exception | None:
        if param.grad is not None and param.grad.is_sparse:
            return RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        return super()._refusal(group, param) or same_dtype(param)


class Adam(_AdamState, torch.optim.Adam):
    pass


class AdamW(_AdamState, torch.optim.AdamW):
    pass
