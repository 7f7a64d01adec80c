"""The GPU backend between plan and kernels: uploads what changed of the plan's arrays, and launches.

The plan has checked everything and laid out, for the rows that one launch serves, an image (csrc/step/image.h): the
arrays that kernels/multi_tensor.py describes. What a step does beside the update is a part of it: the norm of all
gradients is taken over the same arrays (kernels/passes.py) and, with the coefficient that clips, stays on the device,
where the update reads it. Nothing waits. Imported, and Triton with it, when a GPU tensor is stepped for the first time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from .backends import _C

if TYPE_CHECKING:
    from ._C import Launch, Want
    from .extras import Extras

try:
    from .kernels import multi_tensor, passes
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ImportError(
        "fastopt steps GPU tensors with Triton, and the package `triton` is not installed: pip install triton "
        "(torch's CUDA builds bring it along)"
    ) from error

DTYPES = tuple(getattr(torch, name) for name in _C.dtypes)  # by the numbers that the plan has for them
assert multi_tensor.CHUNK == _C.gpu_chunk

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

# What captured graphs read and write at every replay. A graph may outlive the optimizer that was captured, and torch
# does not tell when it is gone, so this stays. Graphs that upload the same share it.
_held_for_graphs: list[Any] = []


class Staging:
    """Page-locked memory that the device copies from, and how to know whether it still does."""

    def __init__(self, words: int, device: torch.device):
        on_gpu = device.type != "cpu"
        self.words = words
        with _ThreadMayUseCuda(), torch.inference_mode(False):  # it will be used outside of that too
            self.memory = torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.address = self.memory.data_ptr()
        self.copied: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._first = self.memory

    def free(self) -> bool:
        if self.copied is None:
            return True
        with _ThreadMayUseCuda():
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


class Stages(NamedTuple):
    """What kernels a step wants beside those of the update alone."""

    unscales: bool = False
    clips: bool = False
    norm_known: bool = False
    searches: bool = False
    skips: bool = False

    @classmethod
    def of(cls, extras: Extras | None) -> Stages:
        if extras is None:
            return _UPDATE_ALONE
        clips = extras.max_norm is not None
        norm_known, skips = clips and extras.norm is not None, extras.found_inf is not None
        return cls(extras.inverse_scale is not None, clips, norm_known, extras.searches, skips)


_UPDATE_ALONE = Stages()


class Launchers(NamedTuple):
    update: Any
    prepare: Any
    norm: Any
    finish: Any


class Bucket(Uploads):
    """The device buffer and the compiled kernels of rows that one launch serves."""

    def __init__(self, algorithm: str, device: torch.device, want: Want):
        super().__init__(device)
        self.algorithm, self.used, self.capturable = algorithm, want.used, want.capturable
        self.dtype, self.grad_dtype, self.state_dtype = DTYPES[want.param], DTYPES[want.grad], DTYPES[want.state]
        self.averages, self.companions, self.draws = want.averages, want.companions, want.draws
        self.launchers: dict[Stages, Launchers] = {}
        self.columns = multi_tensor.table_columns(algorithm, want.averages, want.companions, want.draws)
        words = multi_tensor.scalars_words(algorithm, self.dtype)
        self.no_words, self._row_of_scalars = (0,) * words, ctypes.c_int64 * words
        self.one_row = False
        self._buffers: list[torch.Tensor] = []
        self._streams: set[int] = set()  # that have used the buffer of steps outside graphs
        self._work: torch.Tensor | None = None  # of the last step outside graphs, if capturable; stays as it is
        self._work_numels: list[int] = []  # which it follows from
        self._for_graph: Staging | None = None  # made ahead: older torch cannot make page-locked memory in a capture
        self._captured: dict[tuple[int, bytes], Staging] = {}  # what graphs upload

    def compile(self, stages: Stages) -> None:
        index = self.device.index or 0
        unscales, clips, norm_known, searches, skips = stages
        kind = self.algorithm, self.used, self.dtype, self.state_dtype
        draws = 0 if not self.draws else 2 if self.capturable else 1
        beside = unscales + clips, self.averages, self.grad_dtype, self.companions, draws, skips
        update = multi_tensor.update_launcher(*kind, index, *beside)
        prepare = norm = finish = None
        if self.capturable:
            prepare = multi_tensor.prepare_launcher(self.algorithm, self.dtype, index, skips)
        if clips or searches:
            kind_of_norm = passes.GIVEN if norm_known else passes.SQUARES
            finish = passes.finish_launcher(kind_of_norm.value, self.norm_dtype, index)
        if (clips or searches) and not norm_known:
            kind_of_pass = passes.SQUARES.value, self.grad_dtype, index
            norm = passes.step_norm_launcher(*kind_of_pass, self.columns, int(unscales))
        self.launchers[stages] = Launchers(update, prepare, norm, finish)

    @property
    def norm_dtype(self) -> torch.dtype:
        return multi_tensor.compute_dtype(self.dtype)  # type: ignore[no-any-return]

    def grow(self, words: int) -> None:
        # Replays fill their buffer at times that the plan doesn't know; so steps outside graphs have another.
        count = 2 if self.capturable else 1
        with torch.inference_mode(False):
            self._buffers = [torch.empty(words, dtype=torch.int64, device=self.device) for _ in range(count)]
        self._streams = {current_stream(self.device)}
        self._captured = {}
        self.use(in_graph=False)

    def use(self, in_graph: bool) -> None:
        self.buffer = self._buffers[in_graph and self.capturable]
        self._targets.clear()

    def launched_on(self, stream: int) -> None:
        """Keeps the allocator from handing the buffer out again before what is queued on another stream is done."""
        if stream not in self._streams:
            self._streams.add(stream)
            self.buffer.record_stream(torch.cuda.current_stream(self.device))

    def one_row_of_scalars(self, image: int, scalars_at: int, changed_from: int) -> tuple[int, ...] | None:
        """If all rows of the table share one: its words, which come with the launch then and need no upload.

        When their number changes, the plan hands over the whole image: of two scalars or more, more rows take more
        words.
        """
        if changed_from < scalars_at:
            last_row = image + 8 * (scalars_at - self.columns)
            self.one_row = ctypes.c_int64.from_address(last_row + 8).value == 0
        return tuple(self._row_of_scalars.from_address(image + 8 * scalars_at)) if self.one_row else None

    def make_ready_for_graph(self, image: int, table_at: int, hypers_at: int, stop: int) -> None:
        """After an upload of the whole image outside graphs: what a capture of the same tensors needs."""
        numels = self._numels(image, table_at, hypers_at)
        if self._work is None or self._work_numels != numels:
            self._work, self._work_numels = self.buffer[:table_at].clone(), numels
        if self._for_graph is None or self._for_graph.words < stop - table_at:
            self._for_graph = Staging(stop - table_at, self.device)

    def _numels(self, image: int, table_at: int, hypers_at: int) -> list[int]:
        return (ctypes.c_int64 * (hypers_at - table_at)).from_address(image + 8 * table_at)[:: self.columns]

    def upload_in_graph(self, image: int, table_at: int, hypers_at: int, stop: int) -> int:
        """The image, as a part of the graph being captured: at each replay, from memory that stays as it is.

        Not its list of work, by far the largest part, where that is the last step's outside graphs: no replay changes
        it. Returns the address of the list.
        """
        work, start = self.buffer, 0
        if self._work is not None and self._work_numels == self._numels(image, table_at, hypers_at):
            work, start = self._work, table_at
        content = start, ctypes.string_at(image + 8 * start, 8 * (stop - start))
        staging = self._captured.get(content)
        if staging is None:
            staging, self._for_graph = self._for_graph, None
            if staging is None or staging.words < stop - start:
                staging = Staging(stop - start, self.device)
            self._captured[content] = staging
            _held_for_graphs.append((staging, self.buffer, work))
        self._copy(staging, image, start, stop)
        return work.data_ptr()


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
        self.launches = 0
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

    def make_ready(self, extras: Extras | None) -> None:
        """Compiles what a step with these extras launches, before anything is written."""
        stages = Stages.of(extras)
        for bucket in self.buckets.values():
            if stages not in bucket.launchers:
                self._refuse_capture()
                with _current(bucket.device):
                    self._compile(bucket, stages)

    def _refuse_capture(self) -> None:
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NOT_WARM)

    def prepare(self, optimizer: Any, wants: tuple[Want, ...], extras: Extras | None = None) -> None:
        """Compiles kernels and makes buffers, before anything is written."""
        self._refuse_capture()
        for want in wants:
            device = torch.device(_C.gpu_type(), want.device)
            with _current(device):
                bucket = self.buckets.get(want.image)
                if bucket is None:
                    bucket = self._bucket(device, want)
                    self._compile(bucket, Stages.of(extras))
                    bucket.grow(want.words)
                    self.buckets[want.image] = bucket
                if bucket.buffer.numel() < want.words:
                    bucket.grow(want.words * 2)
            self._use_buffers(optimizer, [want.image])

    def _bucket(self, device: torch.device, want: Want) -> Bucket:
        with self._compiling(device):
            return Bucket(self.algorithm, device, want)

    def _compile(self, bucket: Bucket, stages: Stages) -> None:
        with self._compiling(bucket.device):
            bucket.compile(stages)

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
        done, norm, stages = 0, None, Stages.of(extras)
        beside: dict[torch.device, Beside] = {}
        try:
            sent = [self._upload(launch, stages) for launch in launches]
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

    def _upload(self, launch: Launch, stages: Stages) -> tuple[Any, ...]:
        """What Sent has, whose names cost a small step a tenth of its time."""
        image, programs, table_at, scalars_at, changed_from, changed_to, address, prepared, hypers_at = launch
        bucket = self.buckets[image]
        with _current(bucket.device):
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
        return bucket, bucket.launchers[stages], programs, prepared, stream, work, table, scalars, words, hypers

    def _launch(self, sent: tuple[Any, ...], beside: dict[torch.device, Beside]) -> None:
        bucket, launchers, programs, prepared, stream, work, table, scalars, words, hypers = sent
        more, found_inf = beside.get(bucket.device, _NOTHING_BESIDE)
        with _current(bucket.device):
            if prepared:
                launchers.prepare.launch(prepared, stream, hypers, scalars, found_inf)
            if programs:
                launchers.update.launch(programs, stream, work, table, scalars, words + more)
        self.launches += 1

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
            with _current(first):
                if extras.norm is None:
                    norm = torch.empty((), dtype=dtype, device=first)
                else:
                    norm = number_on(first, extras.norm).to(dtype)
                max_norm = _bits(math.inf if extras.max_norm is None else extras.max_norm)
                arrays = numbers.data_ptr() + 16, programs, max_norm, norm.data_ptr(), numbers.data_ptr()
                launcher.launch(1, streams[first], *arrays)
            if searches:
                cast(Tensor, extras.found_inf).copy_(numbers[1], non_blocking=True)
            if clips:
                for device in streams:
                    factors[device].append(numbers if device == first else numbers[:1].to(device))
        flags = {} if extras.found_inf is None else {device: number_on(device, extras.found_inf) for device in streams}
        self._in_use = factors, flags  # until their launches are queued
        weight = () if extras.ema_decay is None else (_bits(1 - extras.ema_decay),)
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
                with _current(device):
                    one.launchers.norm.launch(one.programs, one.stream, one.work, one.table, addresses[device], factor)
            addresses[device] += 8 * one.programs
        joined = joined_on_first([numbers[device][: 2 + count] for device, count in counts.items()], numbers[first])
        return first, joined, sum(counts.values())

    def _numbers(self, device: torch.device, stream: int, count: int) -> Tensor:
        found = None if self._in_graph else self.numbers.get((device, stream))
        if found is None or found.numel() < count:
            with _current(device), torch.inference_mode(False):
                found = torch.empty(1 << (count - 1).bit_length(), dtype=torch.float64, device=device)
            if not self._in_graph:  # whose memory is the graph's
                self.numbers[device, stream] = found
        return found


def number_on(device: torch.device, value: float | Tensor) -> Tensor:
    """A number that kernels read on this device, in float32 or float64; nothing is waited for."""
    with _current(device):
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


def _itemsize(launcher_and_dtype: tuple[Any, torch.dtype]) -> int:
    return launcher_and_dtype[1].itemsize


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


_no_switch = contextlib.nullcontext()
_CPUS = torch.device("cpu"), torch.device("cpu", 0)  # to ask a device for its type takes ten times as long


def current_stream(device: torch.device) -> int:
    """The handle of the stream on which the device is sent work."""
    return multi_tensor.driver.active.get_current_stream(device.index or 0)  # type: ignore[no-any-return]


def _current(device: torch.device) -> Any:
    """Makes `device` the current one, which launches and allocations are for; free where it already is."""
    if device in _CPUS or device.index == torch.cuda.current_device():
        return _no_switch
    return torch.cuda.device(device)


class _ThreadMayUseCuda:
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
