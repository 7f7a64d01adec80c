"""Norms, clipping and averages of GPU tensors: uploads what changed of the extension's arrays, and launches.

The extension has checked everything and answered a GpuPass; kernels/passes.py describes its arrays. Nothing waits for
the device, and a call like the one before allocates nothing but the norm that it returns. Imported, and Triton with it,
with the first such tensors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import _C, is_capturing
from .gpu import NO_KERNEL
from .gpu_bucket import DTYPES
from .gpu_memory import Uploads, address_of, current, current_stream, joined_on_first, number_on
from .kernels import passes

if TYPE_CHECKING:
    from ._C import Done, GpuPart, GpuPass, LeftToTorch


class Buffer(Uploads):
    """What lies on the device for an image of the extension: the image, and the numbers of a norm."""

    def __init__(self, device: torch.device, words: int, programs: int):
        super().__init__(device)
        self.version = 0  # of the image that it holds
        with torch.inference_mode(False):  # it will be used outside too
            self.buffer = torch.empty(words, dtype=torch.int64, device=device)
            self.numbers = torch.empty(2 + programs, dtype=torch.float64, device=device)  # as Gpu's


class _Buffers(threading.local):
    """By image. As the extension's images each is of one thread and one stream, on which it is made and dropped."""

    def __init__(self) -> None:
        self.of: dict[int, Buffer] = {}


_buffers = _Buffers()


class Launches:
    """The launches of a GpuPass, whose arrays are uploaded first; its device is the current one."""

    def __init__(self, todo: GpuPass, device: torch.device):
        self.todo, self.device, self.index = todo, device, todo.device
        buffer = self._uploaded()
        self.stream = current_stream(device)
        self.numbers = buffer.numbers
        self.work = buffer.buffer.data_ptr()
        self.table = self.work + 8 * todo.table_at
        self.coefficient = buffer.numbers.data_ptr()
        self.partials = self.coefficient + 16

    def _uploaded(self) -> Buffer:
        todo = self.todo
        start, stop = todo.changed_from, todo.changed_to
        buffer = _buffers.of.get(todo.image)
        if buffer is None or buffer.buffer.numel() < todo.words or buffer.numbers.numel() < 2 + todo.programs:
            buffer = _buffers.of[todo.image] = Buffer(self.device, _rounded(todo.words), _rounded(todo.programs))
        if buffer.version != todo.version - 1:  # new, or a version was never uploaded
            start, stop = 0, todo.words
        buffer.version = 0
        if start < stop:
            buffer.upload(todo.address, start, stop)
        buffer.version = todo.version
        return buffer

    def norm(self) -> Tensor:
        """Launches the norm, with the coefficient that clips to the number of the pass."""
        norm = torch.empty((), dtype=self.norm_dtype, device=self.device)
        self.partial_norms()
        self.finish(self.todo.norm, norm)
        return norm

    @property
    def norm_dtype(self) -> torch.dtype:
        f64 = any(DTYPES[part.dtype] == torch.float64 for part in self.todo.parts)
        return torch.float64 if f64 else torch.float32

    def partial_norms(self, factor: Tensor | None = None) -> None:
        """Of each chunk, after the product with a factor."""
        address = 0 if factor is None else address_of(factor)
        for launcher, (_, first, programs) in self._launchers(passes.norm_launcher, self.todo.norm, int(address != 0)):
            arrays = self.work + 8 * first, self.table, self.partials + 8 * first
            launcher.launch(programs, self.stream, *arrays, address)

    def finish(self, kind: int, norm: Tensor, numbers: Tensor | None = None, programs: int | None = None) -> None:
        """Of this device's partial norms, or of those of several."""
        address = self.coefficient if numbers is None else numbers.data_ptr()
        count = self.todo.programs if programs is None else programs
        arrays = address + 16, count, self.todo.number, norm.data_ptr(), address
        self._launcher(passes.finish_launcher, kind, norm.dtype).launch(1, self.stream, *arrays)

    def write(self, name: str, number: int) -> None:
        """Launches a pass of passes.PASSES."""
        for launcher, (_, first, programs) in self._launchers(passes.pass_launcher, name):
            launcher.launch(programs, self.stream, self.work + 8 * first, self.table, number)

    def _launchers(self, make: Callable[..., Any], kind: int | str, *options: int) -> list[tuple[Any, GpuPart]]:
        """All of them before one is used: what cannot be compiled changes nothing."""
        parts = self.todo.parts
        return [(self._launcher(make, kind, DTYPES[part.dtype], *options), part) for part in parts if part.programs]

    def _launcher(self, make: Callable[..., Any], kind: int | str, dtype: torch.dtype, *options: int) -> Any:
        try:
            return make(kind, dtype, self.index, *options)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            what = f"{make.__name__.removesuffix('_launcher')} {kind}"
            raise RuntimeError(NO_KERNEL.format(algorithm=what, device=self.device, error=why)) from error


def run(
    todo: GpuPass, name: str, norm: Tensor | None = None, error_if_nonfinite: bool = False
) -> Tensor | Done | LeftToTorch:
    """Does a GpuPass: "norm", which it returns, "clip", which clips to it as well, or a pass of passes.PASSES.

    "scale" clips to a norm that is given.
    """
    device = torch.device(_C.gpu_type(), todo.device)
    done: Done = _C.DONE
    with current(device):
        if is_capturing(device):
            captured: LeftToTorch = _C.LeftToTorch(("a CUDA graph is being captured",))
            return captured
        launches = Launches(todo, device)
        if name in ("norm", "clip"):
            norm = launches.norm()
            if error_if_nonfinite:
                refuse_nonfinite(norm, todo.order)
            if name == "clip":
                launches.write("scale", launches.coefficient)
            return norm
        if norm is not None:
            launches.finish(passes.GIVEN.value, norm)
        launches.write(name, todo.number if norm is None else launches.coefficient)
    return done


def search(
    grads: list[Tensor], inverse_scale: float | Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor] | None:
    """The norm of gradients on GPUs, as if each were multiplied by a number first, and whether it is finite.

    One read of the gradients, and nothing is waited for.

    Args:
        grads: at least one tensor.
        inverse_scale: the number, or a tensor without dimensions on a GPU that has it. Default None: 1.
        dtype: of the norm, float32 or float64. Default None: float64 if some gradient is, else float32.

    Returns:
        Two tensors without dimensions on the first gradient's device: the norm; and found_inf, float32, 1 if some
        gradient is NaN or infinite then, else 0. None for gradients that are not for this library, or while a CUDA
        graph is captured.
    """
    devices = list(dict.fromkeys(grad.device for grad in grads))
    todo = []
    for device in devices:
        with current(device):
            if is_capturing(device):
                return None
            answer = _C.total_norm([grad for grad in grads if grad.device == device], 2.0, False)
        if type(answer) is not _C.GpuPass:
            return None
        todo.append(answer)
    parts = []
    for answer, device in zip(todo, devices, strict=True):
        with current(device):
            launches = Launches(answer, device)
            launches.partial_norms(None if inverse_scale is None else number_on(device, inverse_scale))
            parts.append(launches)
    first = parts[0]
    numbers = joined_on_first([part.numbers[: 2 + part.todo.programs] for part in parts], first.numbers)
    dtype = dtype or max((part.norm_dtype for part in parts), key=lambda dtype: dtype.itemsize)
    with current(first.device):
        norm = torch.empty((), dtype=dtype, device=first.device)
        first.finish(todo[0].norm, norm, numbers, sum(part.todo.programs for part in parts))
        return norm, numbers[1].float()


NOT_FINITE = (
    "The total norm of order {order} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
    "disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
)


def refuse_nonfinite(norm: Tensor, order: float) -> None:
    """As torch's functions with ``error_if_nonfinite``; the norm, a number on a GPU, is waited for."""
    if not math.isfinite(norm.item()):
        raise RuntimeError(NOT_FINITE.format(order=order))


def _rounded(number: int) -> int:
    """Up to a power of two: a few more tensors want no other buffer."""
    return 1 << max(number - 1, 0).bit_length()
