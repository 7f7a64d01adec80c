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


def roof_step(optimizer: torch.optim.Optimizer, row: Row) -> Callable[[], None]:
    """A function that moves the bytes of one step of this optimizer (which has stepped before) and changes no value."""
    addresses, ends, total, kinds = [], [], 0, set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            operands = [param, param.grad, *(optimizer.state[param][slot] for slot in row.slots)]
            kinds.add(tuple(operand.itemsize for operand in operands))
            total += param.numel()
            addresses.append([operand.data_ptr() for operand in operands])
            ends.append(total)
    if len(kinds) > 1:
        raise ValueError(f"roof: parameters differ in the sizes of their elements: {kinds}")
    itemsizes = torch.tensor(*kinds)
    written = torch.tensor([operand != 1 for operand in range(len(itemsizes))]).long()
    table, bounds = torch.tensor(addresses), torch.tensor(ends)
    arrays, function = (table, bounds, itemsizes, written), kernel(isa())

    def step() -> None:
        rows, ends_at, sizes, writes = (array.data_ptr() for array in arrays)
        function(rows, ends_at, len(bounds), sizes, writes, len(itemsizes), torch.get_num_threads(), 0)

    return step
