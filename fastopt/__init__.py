"""Drop-in replacements for torch.optim's SGD, Adagrad, RMSprop, Adam and AdamW with a fused step.

>>> import torch, fastopt
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = fastopt.Adam(model.parameters(), lr=1e-3)
>>> model(torch.ones(4)).sum().backward()
>>> optimizer.step()
"""

import sys
from typing import Any

from torch import optim
from torch.optim import lr_scheduler

from . import backends as backends  # first: what it warns of is at the line that imports fastopt
from . import swa_utils
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .backends import _C as _C  # the extension that fits this torch, or None
from .backends import backend_info
from .clip_grad import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .grad_scaler import GradScaler
from .masters import fp32_copy, master_weights
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "GradScaler",
    "RMSprop",
    "backend_info",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "fp32_copy",
    "get_total_norm",
    "lr_scheduler",
    "master_weights",
    "swa_utils",
]

sys.modules[f"{__name__}.lr_scheduler"] = lr_scheduler  # for `from fastopt.lr_scheduler import ...`


def __getattr__(name: str) -> Any:
    """What torch.optim has and fastopt does not is torch's own: ``import fastopt as optim`` is enough."""
    return getattr(optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(optim)})
