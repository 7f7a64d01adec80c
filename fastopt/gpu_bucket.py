"""A bucket: the rows of a step that one launch serves, with their buffer on the device and their compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .backends import _C
from .gpu_memory import Staging, Uploads, current_stream
from .kernels import multi_tensor, passes

if TYPE_CHECKING:
    from ._C import Want
    from .extras import Extras

DTYPES = tuple(getattr(torch, name) for name in _C.dtypes)  # by the numbers that the plan has for them

# What captured graphs read and write at every replay. A graph may outlive the optimizer that was captured, and torch
# does not tell when it is gone, so this stays. Graphs that upload the same share it.
held_for_graphs: list[Any] = []


class LaunchKind(NamedTuple):
    """What kernels a step wants beside those of the update alone."""

    unscales: bool = False
    clips: bool = False
    norm_known: bool = False
    searches: bool = False
    skips: bool = False

    @classmethod
    def of(cls, extras: Extras | None) -> LaunchKind:
        if extras is None:
            return _UPDATE_ALONE
        clips = extras.max_norm is not None
        norm_known, skips = clips and extras.norm is not None, extras.found_inf is not None
        return cls(extras.inverse_scale is not None, clips, norm_known, extras.searches, skips)


_UPDATE_ALONE = LaunchKind()


class Launchers(NamedTuple):
    """The kernels of one kind of launch; None are those that it does not need."""

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
        self.launchers: dict[LaunchKind, Launchers] = {}
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

    def compile(self, kind: LaunchKind) -> None:
        index = self.device.index or 0
        unscales, clips, norm_known, searches, skips = kind
        update_alone = self.algorithm, self.used, self.dtype, self.state_dtype
        draws = 0 if not self.draws else 2 if self.capturable else 1
        beside = unscales + clips, self.averages, self.grad_dtype, self.companions, draws, skips
        update = multi_tensor.update_launcher(*update_alone, index, *beside)
        prepare = norm = finish = None
        if self.capturable:
            prepare = multi_tensor.prepare_launcher(self.algorithm, self.dtype, index, skips)
        if clips or searches:
            kind_of_norm = passes.GIVEN if norm_known else passes.SQUARES
            finish = passes.finish_launcher(kind_of_norm.value, self.norm_dtype, index)
        if (clips or searches) and not norm_known:
            kind_of_pass = passes.SQUARES.value, self.grad_dtype, index
            norm = passes.step_norm_launcher(*kind_of_pass, self.columns, int(unscales))
        self.launchers[kind] = Launchers(update, prepare, norm, finish)

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
            held_for_graphs.append((staging, self.buffer, work))
        self._copy(staging, image, start, stop)
        return work.data_ptr()
