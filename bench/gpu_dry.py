"""Runs a GPU benchmark where there is no GPU, to see that it runs: the kernels in the PTX interpreter of tests/tools.

    python -m bench.gpu_dry bench.gpu --quick --workloads "two scalars" --json FILE

Bits are what they would be. Times are the host's and of no meaning; the device's name in the results says so.
"""

import contextlib
import runpy
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

NAME = "no GPU: a dry run on the PTX interpreter, whose times mean nothing"


class Event:
    def __init__(self, **options: Any) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * max(end.seconds - self.seconds, 1e-9)


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """CPU tensors are the GPU's, and torch.cuda is there as far as the benchmarks ask it."""
    import fastopt
    from tests.tools import driver

    nothing = mock.Mock()
    stream = SimpleNamespace(wait_stream=nothing)
    fakes = {
        "is_available": lambda: True,
        "synchronize": nothing,
        "_sleep": nothing,
        "Event": Event,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: SimpleNamespace(L2_cache_size=1 << 10),
        "Stream": lambda: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": nothing,
        "graph": lambda graph: contextlib.nullcontext(),
    }
    torch.cuda.is_available()  # what asks for CUDA at its import has done so
    with driver.installed(90), contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        fastopt._C.set_gpu_type("cpu")
        try:
            yield
        finally:
            fastopt._C.set_gpu_type("cuda")


if __name__ == "__main__":
    module, *sys.argv[1:] = sys.argv[1:]
    with dry_run():
        runpy.run_module(module, run_name="__main__", alter_sys=True)
