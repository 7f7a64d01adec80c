"""The GPU backend between plan and kernels: uploads what changed of the plan's arrays, and launches.

The plan has checked everything and laid out, for the rows that one launch serves, an image (csrc/step/image.h): the
arrays that kernels/multi_tensor.py describes. Imported, and Triton with it, when a GPU tensor is stepped for the first
time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from .backends import _C

if TYPE_CHECKING:
    from ._C import Launch, Want

try:
    from .kernels import multi_tensor
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ImportError(
        "fastopt steps GPU tensors with Triton, and the package `triton` is not installed: pip install triton "
        "(torch's CUDA builds bring it along)"
    ) from error

DTYPES = tuple(getattr(torch, name) for name in _C.dtypes)  # by the numbers that the plan has for them
assert multi_tensor.CHUNK == _C.gpu_chunk


# What captured graphs read and write at every replay: a graph may outlive the optimizer that was captured.
_held_for_graphs: list[Any] = []


class Staging:
    """Page-locked memory that the device copies from, and how to know whether it still does."""

    def __init__(self, words: int, device: torch.device):
        on_gpu = device.type != "cpu"
        self.words = words
        with torch.inference_mode(False):  # it will be used outside too
            self.memory = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
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
    """The device buffer and the compiled kernels of rows that one launch serves."""

    def __init__(self, algorithm: str, device: torch.device, used: int, param: int, state: int, capturable: bool):
        self.device = device
        index = device.index or 0
        self.launcher = multi_tensor.update_launcher(algorithm, used, DTYPES[param], DTYPES[state], index)
        self.preparer = multi_tensor.prepare_launcher(algorithm, DTYPES[param], index) if capturable else None
        self._buffers: list[torch.Tensor] = []
        self._for_graph: Staging | None = None  # made ahead: older torch cannot make page-locked memory in a capture
        self.grow(0)
        self.staging: deque[Staging] = deque()  # in the order of use, which is that in which copies end
        self.uploads = 0
        self.uploaded_words = 0

    def grow(self, words: int) -> None:
        # Replays fill their buffer at times that the plan doesn't know; so steps outside graphs have another.
        count = 1 if self.preparer is None else 2
        with torch.inference_mode(False):
            buffers = [torch.empty(words, dtype=torch.int64, device=self.device) for _ in range(count)]
        if self.device.type != "cpu":
            for old in self._buffers:  # a launch may still read it, and on another stream than it was made on
                old.record_stream(torch.cuda.current_stream())
        self._buffers = buffers
        self.use(in_graph=False)

    def use(self, in_graph: bool) -> None:
        self.buffer = self._buffers[in_graph and self.preparer is not None]  # without one it is never captured
        self._targets: dict[tuple[int, int], torch.Tensor] = {}  # parts of it; slicing takes as long as copying
        if self.preparer is not None and not in_graph:
            words = self.buffer.numel()
            if self._for_graph is None or self._for_graph.words < words:
                self._for_graph = Staging(words, self.device)

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

    def upload_in_graph(self, image: int, words: int) -> None:
        """The whole image, as a part of the graph being captured: at each replay, from memory that stays as it is."""
        staging, self._for_graph = self._for_graph or Staging(words, self.device), None
        _held_for_graphs.append((staging, self.buffer))
        self._copy(staging, image, 0, words)

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


class Gpu:
    """What an optimizer keeps for its GPU parameters."""

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.buckets: dict[int, Bucket] = {}
        self.launches = 0
        self._in_graph = False  # whether the last step was captured
        self._on_cuda = _C.gpu_type() == "cuda"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or pickled optimizer makes its own

    def begin(self, optimizer: Any) -> None:
        """Refuses a capture that would not be right, and has captured steps and others use buffers of their own."""
        capturing = self._on_cuda and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group.get("capturable") for group in optimizer.param_groups):
            kind = type(optimizer).__name__
            if "capturable" not in optimizer.defaults:
                raise RuntimeError(f"{kind} cannot be captured in a CUDA graph: torch's has no capturable option")
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {kind} "
                "but param_groups' capturable is False."
            )
        if capturing != self._in_graph:
            self._in_graph = capturing
            for bucket in self.buckets.values():
                bucket.use(capturing)
            self._use_buffers(optimizer, self.buckets)

    def prepare(self, optimizer: Any, wants: tuple[Want, ...]) -> None:
        """Compiles kernels and makes buffers, before anything is written."""
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NOT_WARM)
        for want in wants:
            device = torch.device(_C.gpu_type(), want.device)
            with _current(device):
                bucket = self.buckets.get(want.image)
                if bucket is None:
                    kernel = want.used, want.param, want.state, want.capturable
                    bucket = self.buckets[want.image] = Bucket(self.algorithm, device, *kernel)
                if bucket.buffer.numel() < want.words:
                    bucket.grow(want.words * 2 if bucket.buffer.numel() else want.words)
            self._use_buffers(optimizer, [want.image])

    def _use_buffers(self, optimizer: Any, numbers: Iterable[int]) -> None:
        """Has the plan hand over the whole images of these buckets at the next step."""
        for number in numbers:
            buffer = self.buckets[number].buffer
            _C.set_buffer(optimizer, number, buffer.numel(), buffer.data_ptr())

    def run(self, optimizer: Any, launches: tuple[Launch, ...]) -> None:
        done = 0
        try:
            for launch in launches:
                self._run(launch)
                done += 1
        except BaseException:  # what the plan takes for counted and uploaded may not be
            for launch in launches[done:]:
                _C.take_back(optimizer, launch.image)
            self._use_buffers(optimizer, self.buckets)
            raise

    def _run(self, launch: Launch) -> None:
        image, programs, table_at, scalars_at, changed_from, changed_to, address, prepared, hypers_at = launch
        bucket = self.buckets[image]
        with _current(bucket.device):
            if self._in_graph:
                bucket.upload_in_graph(address, scalars_at)
            elif changed_from < changed_to:
                bucket.upload(address, changed_from, changed_to)
            base = bucket.buffer.data_ptr()
            stream = multi_tensor.driver.active.get_current_stream(bucket.device.index or 0)
            scalars = base + 8 * scalars_at
            if bucket.preparer is not None:
                bucket.preparer.launch(prepared, stream, base + 8 * hypers_at, scalars)
            if programs:
                bucket.launcher.launch(programs, stream, base, base + 8 * table_at, scalars)
        self.launches += 1


NOT_WARM = (
    "step() was captured in a CUDA graph before it ran outside of one with the same parameters and options: "
    "state, kernels and buffers are made at such a step. Run one or more before the capture, as torch's notes on "
    "CUDA graphs say (warm-up)."
)
_no_switch = contextlib.nullcontext()


def _current(device: torch.device) -> Any:
    """Makes `device` the current one, which launches and allocations are for; free where it already is."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return _no_switch
    return torch.cuda.device(device)
