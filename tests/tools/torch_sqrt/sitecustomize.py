"""Gives torch another square root on CPU, in every Python process that finds this file: `make test-sqrt`.

FASTOPT_TEST_SQRT=exact: correctly rounded, as on most processors. FASTOPT_TEST_SQRT=off: one unit in the last place too
low or too high for two inputs of five. No test may depend on which one this machine's torch has.
"""

import os

import numpy as np
import torch

KIND = os.environ.get("FASTOPT_TEST_SQRT")
INTEGERS = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}


def root_of(values):
    with np.errstate(invalid="ignore"):
        root = np.sqrt(values)
    if KIND == "off":
        fifth = (np.asarray(values).view(INTEGERS[root.dtype]) >> 3) % 5  # of which inputs: those with some last bits
        with np.errstate(over="ignore", under="ignore"):
            low, high = np.nextafter(root, np.zeros_like(root)), np.nextafter(root, np.full_like(root, np.inf))
        root = np.where((root > 0) & (fifth == 0), low, np.where((root > 0) & (fifth == 1), high, root))
    return torch.from_numpy(np.asarray(root))


def is_plain(x):
    """Not a subclass, of autograd or in a mode: there, torch's own has to do."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def patch(owner, name, in_place):
    original = getattr(owner, name)

    def sqrt(x, *args, **kwargs):
        if args or kwargs or not is_plain(x):
            return original(x, *args, **kwargs)
        with torch.no_grad():
            return (x if in_place else torch.empty_like(x)).copy_(root_of(x.detach().numpy()))

    setattr(owner, name, sqrt)


def patch_foreach(name, in_place):
    original = getattr(torch, name)

    def sqrt(tensors):
        if not all(map(is_plain, tensors)):
            return original(tensors)
        roots = [x.sqrt_() if in_place else x.sqrt() for x in tensors]
        return None if in_place else roots

    setattr(torch, name, sqrt)


if KIND:
    assert KIND in ("exact", "off"), KIND
    patch(torch.Tensor, "sqrt", in_place=False)
    patch(torch.Tensor, "sqrt_", in_place=True)
    patch(torch, "sqrt", in_place=False)
    patch_foreach("_foreach_sqrt", in_place=False)
    patch_foreach("_foreach_sqrt_", in_place=True)
