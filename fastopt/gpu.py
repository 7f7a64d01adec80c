"""The GPU backend between plan and kernels: uploads what changed of the plan's arrays, and launches.

The plan (csrc/bind.cpp) has checked everything and laid out, for each bucket of rows that one launch serves, the
arrays that kernels/multi_tensor.py describes. Imported, and Triton with it, when a GPU tensor is stepped for the first
time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from typing import Any

import torch

from .backends import _C

try:
    from .kernels import multi_tensor
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ImportError(
        "fastopt steps GPU tensors with Triton, and the package `triton` is not installed: pip install triton "
        "(torch's CUDA builds bring it along)"
    ) from error

Want = tuple[int, int, int, int, int, int]
Launch = tuple[int, int, int, int, int, int, int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of DType in csrc/core.h


class Staging:
    """Page-locked memory that the device copies from, and how to know whether it still does."""

    def __init__(self, words: int, device: torch.device):
        on_gpu = device.type != "cpu"
        self.words = words
        self.memory = torch.empty(words, dtype=torch.int64, pin_memory=on_gpu)
        self.address = self.memory.data_ptr()
        self.copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._first = self.memory

    def free(self) -> bool:
        return self.copied is None or bool(self.copied.query())

    def first(self, words: int) -> torch.Tensor:
        if self._first.numel() != words:
            self._first = self.memory[:words]
        return self._first


class Bucket:
    """The device buffer and the compiled kernel of rows that one launch serves."""

    def __init__(self, algorithm: str, device: torch.device, used: int, param: int, state: int):
        self.device = device
        self.launcher = multi_tensor.update_launcher(algorithm, used, DTYPES[param], DTYPES[state], device.index or 0)
        self.buffer = torch.empty(0, dtype=torch.int64, device=device)
        self.staging: deque[Staging] = deque()  # in the order of use, which is that in which copies end
        self.uploads = 0
        self.uploaded_words = 0
        self._targets: dict[tuple[int, int], torch.Tensor] = {}  # parts of the buffer; slicing takes as long as copying

    def grow(self, words: int) -> None:
        self.buffer = torch.empty(words, dtype=torch.int64, device=self.device)
        self._targets = {}

    def upload(self, image: int, start: int, stop: int) -> None:
        """Words [start, stop) of the plan's image, on the current stream, through memory no copy reads any more."""
        words = stop - start
        staging = self.staging.popleft() if self.staging and self.staging[0].free() else None
        if staging is None or staging.words < words:
            staging = Staging(1 << (words - 1).bit_length(), self.device)
        self.staging.append(staging)
        ctypes.memmove(staging.address, image + 8 * start, 8 * words)
        target = self._targets.get((start, stop))
        if target is None:
            if len(self._targets) > 64:
                self._targets.clear()
            target = self._targets[start, stop] = self.buffer[start:stop]
        target.copy_(staging.first(words), non_blocking=True)
        if staging.copied is not None:
            staging.copied.record()
        self.uploads += 1
        self.uploaded_words += words


class Gpu:
    """What an optimizer keeps for its GPU parameters."""

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.buckets: dict[int, Bucket] = {}
        self.launches = 0
        self._on_cuda = _C.gpu_type() == "cuda"

    def refuse_capture(self, optimizer: Any) -> None:
        """torch's error for a step under graph capture: the scalars come from the host, which a replay does not ask."""
        if (
            self._on_cuda
            and torch.cuda.is_current_stream_capturing()
            and not all(group.get("capturable") for group in optimizer.param_groups)  # else the step is torch's
        ):
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(optimizer).__name__} "
                "but param_groups' capturable is False."
            )

    def prepare(self, optimizer: Any, wants: tuple[Want, ...]) -> None:
        """Compiles kernels and makes buffers, before anything is written."""
        for number, index, used, param, state, words in wants:
            device = torch.device(_C.gpu_type(), index)
            with _current(device):
                bucket = self.buckets.get(number)
                if bucket is None:
                    bucket = self.buckets[number] = Bucket(self.algorithm, device, used, param, state)
                if bucket.buffer.numel() < words:
                    bucket.grow(words * 2 if bucket.buffer.numel() else words)
            _C.set_capacity(optimizer, number, bucket.buffer.numel())

    def run(self, launches: tuple[Launch, ...]) -> None:
        for number, programs, table_at, scalars_at, start, stop, image in launches:
            bucket = self.buckets[number]
            with _current(bucket.device):
                if start < stop:
                    bucket.upload(image, start, stop)
                base = bucket.buffer.data_ptr()
                stream = multi_tensor.driver.active.get_current_stream(bucket.device.index or 0)
                bucket.launcher.launch(programs, stream, base, base + 8 * table_at, base + 8 * scalars_at)
            self.launches += 1


_no_switch = contextlib.nullcontext()


def _current(device: torch.device) -> Any:
    """Makes `device` the current one, which launches and allocations are for; free where it already is."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _no_switch
    return torch.cuda.device(device)
