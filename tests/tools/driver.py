"""A stand-in for Triton's CUDA driver: kernels launched on CPU tensors run in the PTX interpreter.

    with driver.installed(arch=90, races=True) as gpu:
        kernel[grid](cpu_tensor, n, BLOCK=1024)
        gpu.launches[-1].machine.instructions

Everything on the host is Triton's own (specialisation, compilation, cache, hooks) up to the launcher, which packs the
arguments as the CUDA launcher does. Neither a C compiler nor libcuda is needed; stub_driver.py keeps the C launcher.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.tools import ptx

FORMATS = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class Launch(NamedTuple):
    """One launch: what was asked for, and the machine that ran it (None if launches are only recorded)."""

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    parameters: list[bytes]
    ptx: str
    machine: ptx.Machine | None


class _Function:
    """A loaded kernel. Triton keeps its handle, a number, wherever the CUfunction would be."""

    def __init__(self, name: str) -> None:
        self.name, self.text = name, ""
        self.kernel: Any = None


_functions: list[_Function] = []  # by handle; outlives a driver, as Triton's cache of compiled kernels does


class Driver(DriverBase):
    """The stand-in.

    arch: the target, 90 for sm_90
    execute: run the launches; otherwise they are only recorded
    options: what ptx.Machine takes (ranges, races, counts, ...); may be changed between launches
    launches: what was launched, the newest last
    """

    def __init__(self, arch: int = 90, execute: bool = True, **options: Any) -> None:
        super().__init__()
        self.arch, self.execute, self.options = arch, execute, options
        self.launches: list[Launch] = []
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches kernels by device: one device for each architecture

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no C code is made here")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing to measure here")

    def launch(self, function: _Function, grid: tuple[int, int, int], metadata: Any, parameters: list[bytes]) -> None:
        machine = None
        if self.execute:
            if function.kernel is None:
                function.kernel = ptx.parse(function.text)
            machine = ptx.Machine(function.kernel, **self.options)
        self.launches.append(Launch(function.name, grid, metadata.num_warps, parameters, function.text, machine))
        if machine is not None:
            machine.launch(grid, parameters, threads=32 * metadata.num_warps, shared=metadata.shared)


class _Utils:
    """What Triton asks of a driver when it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        _functions.append(_Function(name))
        handle = len(_functions) - 1
        return handle, handle, 0, 0, 1024  # module, function, registers, spills, most threads of a program

    def unload_module(self, module: int) -> None:
        pass


def _keep_ptx(module: int, function: int, name: str, files: dict[str, str], hash: str) -> None:
    """Triton loads the machine code only; this hook of its tells the files of the other stages."""
    (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
    _functions[function].text = Path(path).read_text()


class _Launcher:
    """`compiled.run`: made once for each compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature, self.metadata = tuple(src.signature.values()), metadata

    def __call__(self, *call: Any) -> None:
        # Into a list: CPython 3.11 keeps every tuple of 20 that it frees and takes none of them again.
        x, y, z, _, function, _, launch_metadata, enter_hook, exit_hook, *arguments = call
        parameters = list(_pack(self.signature, arguments))
        parameters += 2 * [bytes(8)]  # scratch memory for the kernel and for a profiler, unused
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if x * y * z > 0:
            triton.runtime.driver.active.launch(_functions[function], (x, y, z), self.metadata, parameters)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _pack(signature: Any, arguments: Any) -> Iterator[bytes]:
    for kind, value in zip(signature, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _pack(kind, value)
        elif kind.startswith("*"):
            yield struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else value or 0)
        elif kind != "constexpr":
            yield struct.pack("<" + FORMATS[kind], value)


@contextmanager
def installed(arch: int = 90, execute: bool = True, **options: Any) -> Iterator[Driver]:
    """Make a stand-in the active driver of Triton, for the duration."""
    stand_in = Driver(arch, execute, **options)
    previous = triton.runtime.driver._active
    knobs.runtime.kernel_load_end_hook.add(_keep_ptx)
    triton.runtime.driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        knobs.runtime.kernel_load_end_hook.remove(_keep_ptx)
        triton.runtime.driver.set_active(previous)
