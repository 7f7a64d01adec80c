"""Drop-in replacements for torch.optim's SGD, Adagrad, RMSprop, Adam and AdamW with a fused step.

>>> import torch, fastopt
>>> model = torch.nn.Linear(4, 2)
>>> optimizer = fastopt.Adam(model.parameters(), lr=1e-3)
>>> model(torch.ones(4)).sum().backward()
>>> optimizer.step()
"""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .backends import _C as _C  # the extension that fits this torch, or None
from .backends import backend_info
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop", "backend_info"]
