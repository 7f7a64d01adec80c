"""Triton's real CUDA driver, its C launcher included, on a stub libcuda: for measuring the host side of a launch.

    with stub_driver.installed(arch=90):
        kernel[grid](cpu_tensor, n, BLOCK=1024)  # everything but the GPU

Nothing is executed (driver.py does that). Needs a C compiler, and a process of its own: whatever else looks for CUDA in
it finds the stub, and Triton, which caches kernels by device, goes on using the first target's.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver

from tests.tools import ptx
from tests.tools.driver import Launch

# LaunchCallback of stub_libcuda.c
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_size_t, *4 * [ctypes.c_uint], ctypes.POINTER(ctypes.c_void_p))


@functools.cache
def _load_stub() -> ctypes.CDLL:
    """Build the stub against the cuda.h in Triton, and make it this process's libcuda.so.1."""
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a CUDA driver of its own")
    directory = Path(tempfile.mkdtemp(prefix="stub-libcuda-"))
    library, include = directory / "libcuda.so.1", Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(Path(__file__).with_name("stub_libcuda.c")), "-o", str(library)], check=True)
    knobs.nvidia.libcuda_path = str(directory)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Driver(CudaDriver):
    """CudaDriver for one device that torch does not know of; with `record`, launches are kept in `launches`."""

    def __init__(self, arch: int, record: bool) -> None:
        stub = _load_stub()
        super().__init__()
        self.launches: list[Launch] = []
        self.kernels: dict[int, tuple[str, ptx.Kernel]] = {}
        self.get_device_capability = lambda device=0: divmod(arch, 10)
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=0: 0
        self._callback = _Callback(self._record) if record else _Callback()
        stub.stub_configure(arch, self._callback)
        self.fail_launches = stub.stub_fail_launches  # with a CUresult; 0 is success

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def keep_ptx(self, module: int, function: int, name: str, files: dict[str, str], hash: str) -> None:
        """Triton's hook, called when it has loaded a kernel."""
        (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
        text = Path(path).read_text()
        self.kernels[function] = text, ptx.parse(text)

    def _record(self, function: int, x: int, y: int, z: int, threads: int, pointers: Any) -> None:
        text, kernel = self.kernels[function]
        parameters = [ctypes.string_at(pointers[i], size) for i, size in enumerate(kernel.parameters.values())]
        self.launches.append(Launch(kernel.name, (x, y, z), threads // 32, parameters, text, None))


@contextmanager
def installed(arch: int = 90, record: bool = False) -> Iterator[Driver]:
    """Make it the active driver of Triton, for the duration."""
    stub = Driver(arch, record)
    previous = triton.runtime.driver._active
    knobs.runtime.kernel_load_end_hook.add(stub.keep_ptx)
    triton.runtime.driver.set_active(stub)
    try:
        yield stub
    finally:
        knobs.runtime.kernel_load_end_hook.remove(stub.keep_ptx)
        triton.runtime.driver.set_active(previous)
