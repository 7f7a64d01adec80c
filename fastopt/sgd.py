"""SGD with momentum: the class and its state. The update is in csrc/optimizers.h and kernels/sgd.py."""

from __future__ import annotations

import torch

from .optimizer import FusedStep, Group


class SGD(FusedStep, torch.optim.SGD):
    _update = "sgd"
    _takes_sparse = True

    def _has_step(self) -> bool:
        return False

    def _slots(self, group: Group) -> dict[str, float]:
        return {"momentum_buffer": -0.0}  # the first step adds the gradient to it, with its sign of zero
