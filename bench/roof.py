"""The limit a step is measured against: bench/roof.cpp, the same traffic on the same tensors, without arithmetic."""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .candidates import Row, module_or_none

FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"],
}
# The limit of a step with fewer elements is not memory: there is no roof for it.
LEAST_ELEMENTS = 32768


def isa() -> str:
    """The instruction set fastopt uses, else the one torch uses."""
    fastopt = module_or_none("fastopt")
    if fastopt:
        found = fastopt.backend_info()["cpu"]
        if found in FLAGS:
            return found
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")


@cache
def kernel(name: str) -> Callable[..., None]:
    """roof() of roof.cpp for an instruction set, compiled once into torch's extension cache."""
    from torch.utils.cpp_extension import get_default_build_root, load

    cache_dir = os.path.join(os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()), f"fastopt_roof_{name}")
    os.makedirs(cache_dir, exist_ok=True)
    load(
        f"fastopt_roof_{name}",
        [str(Path(__file__).with_name("roof.cpp"))],
        extra_cflags=["-O3", "-fopenmp", *FLAGS[name]],
        extra_ldflags=["-fopenmp"],
        build_directory=cache_dir,
        is_python_module=False,
    )
    function = ctypes.CDLL(os.path.join(cache_dir, f"fastopt_roof_{name}.so")).roof
    function.argtypes, function.restype = [ctypes.c_int64] * 8, None
    return function


def moves(tensors: list[list[torch.Tensor]], written: list[bool]) -> Callable[[], None]:
    """A function that reads rows of tensors and writes those of each row that are `written`; no value changes."""
    kinds = {tuple(tensor.itemsize for tensor in row) for row in tensors}
    if len(kinds) > 1:
        raise ValueError(f"roof: parameters differ in the sizes of their elements: {kinds}")
    addresses = torch.tensor([[tensor.data_ptr() for tensor in row] for row in tensors])
    bounds = torch.tensor([row[0].numel() for row in tensors]).cumsum(0)
    arrays, function = (addresses, bounds, torch.tensor(*kinds), torch.tensor(written).long()), kernel(isa())

    def move() -> None:
        rows, ends, sizes, writes = (array.data_ptr() for array in arrays)
        function(rows, ends, len(bounds), sizes, writes, len(written), torch.get_num_threads(), 0)

    return move


def roof_step(optimizer: torch.optim.Optimizer, row: Row, clips: bool = False) -> Callable[[], None]:
    """A function that moves the bytes of one step of this optimizer (which has stepped before) and changes no value.

    A step that clips reads all gradients first.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    operands = [[param, param.grad, *(optimizer.state[param][slot] for slot in row.slots)] for param in params]
    step = moves(operands, [True, False, *[True] * len(row.slots)])
    if not clips:
        return step
    read = moves([[param.grad] for param in params], [False])
    return lambda: (read(), step())[1]
