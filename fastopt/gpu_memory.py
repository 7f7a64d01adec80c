"""Memory of the GPU backend: buffers on the device, what fills them without waiting, and numbers that kernels read.

Whoever uses a GPU imports this first, and Triton with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections import deque
from typing import Any

import torch
from torch import Tensor

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

assert multi_tensor.CHUNK == _C.gpu_chunk


class Staging:
    """Page-locked memory that the device copies from, and how to know whether it still does."""

    def __init__(self, words: int, device: torch.device):
        on_gpu = device.type != "cpu"
        self.words = words
        with ThreadMayUseCuda(), torch.inference_mode(False):  # it will be used outside of that too
            self.memory = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.address = self.memory.data_ptr()
        self.copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._first = self.memory

    def free(self) -> bool:
        if self.copied is None:
            return True
        with ThreadMayUseCuda():
            return bool(self.copied.query())

    def first(self, words: int) -> torch.Tensor:
        if self._first.numel() != words:
            self._first = self.memory[:words]
        return self._first


class Uploads:
    """A buffer on the device, and the page-locked memory through which it is filled."""

    buffer: torch.Tensor

    def __init__(self, device: torch.device):
        self.device = device
        self.staging: deque[Staging] = deque()  # in the order of use, which is that in which copies end
        self._targets: dict[tuple[int, int], torch.Tensor] = {}  # parts of the buffer; slicing takes as long as copying
        self.uploads = 0
        self.uploaded_words = 0

    def upload(self, image: int, start: int, stop: int) -> None:
        """Words [start, stop) of the plan's image, on the current stream, through memory no copy reads any more."""
        words = stop - start
        staging = self.staging.popleft() if self.staging and self.staging[0].free() else None
        if staging is None or staging.words < words:
            staging = Staging(1 << (words - 1).bit_length(), self.device)
        self.staging.append(staging)
        self._copy(staging, image, start, stop)
        if staging.copied is not None:
            staging.copied.record()

    def _copy(self, staging: Staging, image: int, start: int, stop: int) -> None:
        words = stop - start
        ctypes.memmove(staging.address, image + 8 * start, 8 * words)
        target = self._targets.get((start, stop))
        if target is None:
            if len(self._targets) > 64:
                self._targets.clear()
            target = self._targets[start, stop] = self.buffer[start:stop]
        target.copy_(staging.first(words), non_blocking=True)
        self.uploads += 1
        self.uploaded_words += words


# ---- numbers


def number_on(device: torch.device, value: float | Tensor) -> Tensor:
    """A number that kernels read on this device, in float32 or float64; nothing is waited for."""
    with current(device):
        if not isinstance(value, Tensor):
            return torch.full((), value, dtype=torch.float64, device=device)
        return value.detach().to(device, torch.promote_types(value.dtype, torch.float32), non_blocking=True)


def address_of(number: Tensor) -> int:
    """As kernels/multi_tensor.py wants that of a number."""
    return number.data_ptr() + (number.dtype == torch.float32)


def joined_on_first(numbers: list[Tensor], if_alone: Tensor) -> Tensor:
    """The numbers of several devices, each with two others before them, behind those of the first."""
    if len(numbers) == 1:
        return if_alone
    first, *others = numbers
    return torch.cat([first, *(other[2:].to(first.device) for other in others)])


def bits_of(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


# ---- the driver

_no_switch = contextlib.nullcontext()
_CPUS = torch.device("cpu"), torch.device("cpu", 0)  # to ask a device for its type takes ten times as long


def current_stream(device: torch.device) -> int:
    """The handle of the stream on which the device is sent work."""
    return multi_tensor.driver.active.get_current_stream(device.index or 0)  # type: ignore[no-any-return]


def current(device: torch.device) -> Any:
    """Makes `device` the current one, which launches and allocations are for; free where it already is."""
    if device in _CPUS or device.index == torch.cuda.current_device():
        return _no_switch
    return torch.cuda.device(device)


class ThreadMayUseCuda:
    """Lets this thread query its events and lock memory while another captures a graph.

    In the default capture mode, "global", either would make the other thread's capture fail. On ROCm it still does.
    """

    def __enter__(self) -> None:
        self.exchange = _exchange_capture_mode()
        if self.exchange is not None:
            self.mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
            self.exchange(ctypes.byref(self.mode))  # it is the thread's former mode now

    def __exit__(self, *_: object) -> None:
        if self.exchange is not None:
            self.exchange(ctypes.byref(self.mode))


CAPTURE_MODE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _exchange_capture_mode() -> Any:
    """cuThreadExchangeStreamCaptureMode of CUDA's driver, or None where there is another's."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
