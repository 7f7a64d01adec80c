"""The GPU backend between plan and kernels: uploads what changed of the plan's arrays, and launches.

The plan has checked everything and laid out, for the rows that one launch serves, an image (csrc/step/image.h): the
arrays that kernels/multi_tensor.py describes. What a step does beside the update is a part of it: the norm of all
gradients is taken over the same arrays (kernels/passes.py) and, with the coefficient that clips, stays on the device,
where the update reads it. Nothing waits. Imported, and Triton with it, when a GPU tensor is stepped for the first time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .backends import _C
from .gpu_bucket import Bucket, Launchers, LaunchKind
from .gpu_memory import address_of, bits_of, current, current_stream, joined_on_first, number_on

if TYPE_CHECKING:
    from ._C import Launch, Want
    from .extras import Extras

NOT_WARM = (
    "step() was captured in a CUDA graph before it ran outside of one with the same parameters and options: "
    "state, kernels and buffers are made at such a step. Run one or more before the capture, as torch's notes on "
    "CUDA graphs say (warm-up)."
)
NO_KERNEL = (
    "Triton could not make fastopt's kernel of {algorithm} for {device}: {error}. Nothing was changed. Triton needs a "
    "C compiler (CC), the ptxas it came with, and a folder to write to (TRITON_CACHE_DIR)."
)
NO_LAUNCH = (
    "step() failed at launch {number} of {count} of {algorithm}'s kernel, on {device}: {error}. The parameters of this "
    "launch and of later ones were not stepped. CUDA may report here what an earlier kernel did wrong; "
    "CUDA_LAUNCH_BLOCKING=1 shows which."
)


class Sent(NamedTuple):
    """A launch whose arrays are on the device: their addresses there."""

    bucket: Bucket
    launchers: Launchers
    programs: int
    prepared: int
    stream: int
    work: int
    table: int
    scalars: int
    words: tuple[int, ...]
    hypers: int


class Beside(NamedTuple):
    """What the launches of a device are told of what there is to do beside the update."""

    words: tuple[int, ...]  # of the update
    found_inf: int  # the address, or 0


_NOTHING_BESIDE = Beside((), 0)


class Gpu:
    """What an optimizer keeps for its GPU parameters."""

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.buckets: dict[int, Bucket] = {}
        # By device and stream: the coefficient that clips, a flag of what is not finite, the partial norms of a step;
        # and a number by which gradients are multiplied.
        self.numbers: dict[tuple[torch.device, int], Tensor] = {}
        self._factors: dict[tuple[torch.device, int], tuple[float, Tensor]] = {}
        self._in_use: Any = None
        self._in_graph = False  # whether the last step was captured
        self._on_cuda = _C.gpu_type() == "cuda"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copied or pickled optimizer makes its own

    def begin(self, optimizer: Any) -> None:
        """Refuses a capture that would not be right, and has captured steps and others use buffers of their own."""
        capturing = self._is_capturing()
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

    def make_ready(self, extras: Extras | None) -> None:
        """Compiles what a step with these extras launches, before anything is written."""
        kind = LaunchKind.of(extras)
        for bucket in self.buckets.values():
            if kind not in bucket.launchers:
                self._refuse_capture()
                with current(bucket.device):
                    self._compile(bucket, kind)

    def _is_capturing(self) -> bool:
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self) -> None:
        if self._is_capturing():
            raise RuntimeError(NOT_WARM)

    def prepare(self, optimizer: Any, wants: tuple[Want, ...], extras: Extras | None = None) -> None:
        """Compiles kernels and makes buffers, before anything is written."""
        self._refuse_capture()
        for want in wants:
            device = torch.device(_C.gpu_type(), want.device)
            with current(device):
                bucket = self.buckets.get(want.image)
                if bucket is None:
                    bucket = self._bucket(device, want)
                    self._compile(bucket, LaunchKind.of(extras))
                    bucket.grow(want.words)
                    self.buckets[want.image] = bucket
                if bucket.buffer.numel() < want.words:
                    bucket.grow(want.words * 2)
            self._use_buffers(optimizer, [want.image])

    def _bucket(self, device: torch.device, want: Want) -> Bucket:
        with self._compiling(device):
            return Bucket(self.algorithm, device, want)

    def _compile(self, bucket: Bucket, kind: LaunchKind) -> None:
        with self._compiling(bucket.device):
            bucket.compile(kind)

    @contextlib.contextmanager
    def _compiling(self, device: torch.device) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise RuntimeError(NO_KERNEL.format(algorithm=self.algorithm, device=device, error=why)) from error

    def _use_buffers(self, optimizer: Any, numbers: Iterable[int]) -> None:
        """Has the plan hand over the whole images of these buckets at the next step."""
        for number in numbers:
            buffer = self.buckets[number].buffer
            _C.set_buffer(optimizer, number, buffer.numel(), buffer.data_ptr())

    def run(self, optimizer: Any, launches: tuple[Launch, ...], extras: Extras | None = None) -> Tensor | None:
        """Uploads and launches a step. Returns the norm of all gradients, if it clips: a tensor of its own."""
        done, norm, kind = 0, None, LaunchKind.of(extras)
        beside: dict[torch.device, Beside] = {}
        try:
            sent = [self._upload(launch, kind) for launch in launches]
            if extras is not None:
                beside, norm = self._beside([Sent(*one) for one in sent], extras)
            for one in sent:
                self._launch(one, beside)
                done += 1
        except BaseException as error:  # what the plan takes for counted and uploaded may not be
            for launch in launches[done:]:
                _C.take_back(optimizer, launch.image)
            self._use_buffers(optimizer, self.buckets)
            if isinstance(error, RuntimeError):
                device, count = self.buckets[launches[done].image].device, len(launches)
                where = dict(algorithm=self.algorithm, device=device, number=done + 1, count=count)
                error.args = (NO_LAUNCH.format(error=error, **where),)
            raise
        return norm

    def _upload(self, launch: Launch, kind: LaunchKind) -> tuple[Any, ...]:
        """What Sent has, whose names cost a small step a tenth of its time."""
        image, programs, table_at, scalars_at, changed_from, changed_to, address, prepared, hypers_at = launch
        bucket = self.buckets[image]
        with current(bucket.device):
            base = bucket.buffer.data_ptr()
            work, scalars, words = base, base + 8 * scalars_at, bucket.no_words
            stream = current_stream(bucket.device)
            if self._in_graph:
                work = bucket.upload_in_graph(address, table_at, hypers_at, scalars_at)
            else:
                bucket.launched_on(stream)
                stop = changed_to
                if not bucket.capturable and (row := bucket.one_row_of_scalars(address, scalars_at, changed_from)):
                    scalars, words, stop = 0, row, min(stop, scalars_at)
                if changed_from < stop:
                    bucket.upload(address, changed_from, stop)
                    if bucket.capturable and changed_from < table_at:
                        bucket.make_ready_for_graph(address, table_at, hypers_at, stop)
        table, hypers = base + 8 * table_at, base + 8 * hypers_at
        return bucket, bucket.launchers[kind], programs, prepared, stream, work, table, scalars, words, hypers

    def _launch(self, sent: tuple[Any, ...], beside: dict[torch.device, Beside]) -> None:
        bucket, launchers, programs, prepared, stream, work, table, scalars, words, hypers = sent
        more, found_inf = beside.get(bucket.device, _NOTHING_BESIDE)
        with current(bucket.device):
            if prepared:
                launchers.prepare.launch(prepared, stream, hypers, scalars, found_inf)
            if programs:
                launchers.update.launch(programs, stream, work, table, scalars, words + more)

    # ---- beside the update

    def _beside(self, sent: list[Sent], extras: Extras) -> tuple[dict[torch.device, Beside], Tensor | None]:
        """For each device what its launches are told; and the norm, if the step clips."""
        streams = {one.bucket.device: one.stream for one in sent}
        factors: dict[torch.device, list[Tensor]] = {device: [] for device in streams}
        if extras.inverse_scale is not None:
            for device, stream in streams.items():
                factors[device].append(self._factor(device, stream, extras.inverse_scale))
        norm, clips, searches = None, extras.max_norm is not None, extras.searches
        if clips or searches:
            first, numbers, programs = self._partial_norms(sent, streams, factors, extras.norm is None)
            launcher, dtype = max(((one.launchers.finish, one.bucket.norm_dtype) for one in sent), key=_itemsize)
            with current(first):
                if extras.norm is None:
                    norm = torch.empty((), dtype=dtype, device=first)
                else:
                    norm = number_on(first, extras.norm).to(dtype)
                max_norm = bits_of(math.inf if extras.max_norm is None else extras.max_norm)
                arrays = numbers.data_ptr() + 16, programs, max_norm, norm.data_ptr(), numbers.data_ptr()
                launcher.launch(1, streams[first], *arrays)
            if searches:
                cast(Tensor, extras.found_inf).copy_(numbers[1], non_blocking=True)
            if clips:
                for device in streams:
                    factors[device].append(numbers if device == first else numbers[:1].to(device))
        flags = {} if extras.found_inf is None else {device: number_on(device, extras.found_inf) for device in streams}
        self._in_use = factors, flags  # until their launches are queued
        weight = () if extras.ema_decay is None else (bits_of(1 - extras.ema_decay),)
        beside = {}
        for device in streams:
            flag = (address_of(flags[device]),) if flags else ()
            beside[device] = Beside((*map(address_of, factors[device]), *weight, *flag), *flag or (0,))
        return beside, norm if clips else None

    def _factor(self, device: torch.device, stream: int, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor) or self._in_graph:  # a graph keeps its own
            return number_on(device, value)
        known = self._factors.get((device, stream))
        if known is None or known[0] != value:
            known = self._factors[device, stream] = value, number_on(device, value)
        return known[1]

    def _partial_norms(
        self,
        sent: list[Sent],
        streams: dict[torch.device, int],
        factors: dict[torch.device, list[Tensor]],
        wanted: bool,
    ) -> tuple[torch.device, Tensor, int]:
        """Launches those of each device. Returns the first device, its numbers with those of all, and how many."""
        counts = dict.fromkeys(streams, 0)
        for one in sent:
            counts[one.bucket.device] += one.programs
        numbers = {device: self._numbers(device, streams[device], 2 + count) for device, count in counts.items()}
        first = sent[0].bucket.device
        if not wanted:
            return first, numbers[first], 0
        addresses = {device: made.data_ptr() + 16 for device, made in numbers.items()}
        for one in sent:
            device = one.bucket.device
            if one.programs:
                factor = address_of(factors[device][0]) if factors[device] else 0
                with current(device):
                    one.launchers.norm.launch(one.programs, one.stream, one.work, one.table, addresses[device], factor)
            addresses[device] += 8 * one.programs
        joined = joined_on_first([numbers[device][: 2 + count] for device, count in counts.items()], numbers[first])
        return first, joined, sum(counts.values())

    def _numbers(self, device: torch.device, stream: int, count: int) -> Tensor:
        found = None if self._in_graph else self.numbers.get((device, stream))
        if found is None or found.numel() < count:
            with current(device), torch.inference_mode(False):
                found = torch.empty(1 << (count - 1).bit_length(), dtype=torch.float64, device=device)
            if not self._in_graph:  # whose memory is the graph's
                self.numbers[device, stream] = found
        return found


def _itemsize(launcher_and_dtype: tuple[Any, torch.dtype]) -> int:
    return launcher_and_dtype[1].itemsize


