"""Fetch, open, verify and write the chunks of a backup, several ranges at once, in bounded memory.

Guarantees: every chunk's id is proven before it is written; a chunk that cannot be proven ends the
restore with the volume's byte range, unless the caller takes note of such ranges and zeros are written
there; the beginning of a target is written when all the rest is durable. It does not guarantee any other
order of writes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import BinaryIO, TypeVar

from blocksnap.errors import DamageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import Ranges, select_either
from blocksnap.repository.blockmap import Entry
from blocksnap.repository.frame import FrameType
from blocksnap.repository.lookup import Location
from blocksnap.repository.repository import Repository
from blocksnap.restore.batch import Batch
from blocksnap.restore.outstanding import Outstanding
from blocksnap.restore.plan import (
    FrameFetch,
    RangeFetch,
    Window,
    plan_windows,
    planned_ahead,
)
from blocksnap.restore.record import HEAD_BYTES
from blocksnap.restore.targets import Progress, Target, write_stream

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

WORKERS = 4
"""More than a small machine has processors: each waits for the storage about as long as it computes."""
_PENDING = WORKERS * 2
_WINDOWS = 9
"""How many may be on their way: none goes further ahead of one that is slow."""
_STREAM_BYTES = 4 << 20
"""What a stream's window holds at most, or one chunk; ``_PENDING`` windows are fetched ahead."""


_MOST_LOOSE = 1 << 16
"""Ranges that are held before they are merged, to 16 bytes each."""


class UnreadableRangeError(DamageError):
    """A range of the backup, in bytes, cannot be read from the repository."""

    def __init__(self, offset: int, length: int, err: DamageError) -> None:
        self.offset, self.length, self.reason = offset, length, err
        super().__init__(
            f"bytes {offset} to {offset + length} cannot be restored: {err.brief}",
            resolution="run: blocksnap check --read-data; an older backup may hold this range unharmed",
        )


class UnreadableChunkError(UnreadableRangeError):
    """A chunk of the backup cannot be read from the repository."""

    def __init__(self, numbers: Iterable[int], geometry: Geometry, err: DamageError) -> None:
        first = min(numbers)
        super().__init__(first * geometry.chunk_size, geometry.length(first), err)


class Losses:
    """Takes what cannot be read: with this, a restore writes zeros there and goes on."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._lock = threading.Lock()
        self._merged = Ranges()
        self._loose: list[tuple[int, int]] = []

    def note(self, begin: int, end: int, _: DamageError) -> None:
        """Note that the chunks ``[begin, end)`` cannot be read; from any thread."""
        with self._lock:
            self._loose.append((begin, end))
            if len(self._loose) > max(_MOST_LOOSE, len(self._merged) // 4):
                self._merge()

    def chunks(self) -> Ranges:
        """Return the ranges of chunks."""
        with self._lock:
            self._merge()
            return self._merged

    def _merge(self) -> None:
        self._merged = select_either(self._merged, sorted(self._loose))
        self._loose.clear()


class ChunkFetcher:
    """Reads ranges of packs and yields their chunks, opened and proven.

    Several may share ``buffers``, of which each thread has its own; they are not used side by side in one.
    """

    def __init__(
        self,
        repository: Repository,
        geometry: Geometry,
        losses: Losses | None = None,
        buffers: threading.local | None = None,
    ) -> None:
        self._repository = repository
        self._geometry = geometry
        self._losses = losses
        self._buffers = threading.local() if buffers is None else buffers

    def chunks(self, fetch: RangeFetch) -> Iterator[tuple[tuple[int, ...], bytes | memoryview]]:
        """Yield (chunk numbers, content) for every frame of a range, and zeros for what may be missing.

        The content is valid until the next one is asked for.
        """
        try:
            buffer = self._read(fetch)
        except DamageError:
            buffer = None
        for frame in fetch.frames:
            try:
                plain = self._open(fetch, frame, buffer)
            except UnreadableChunkError as err:
                if self._losses is None:
                    raise
                for number in frame.numbers:
                    self._losses.note(number, number + 1, err)
                    yield (number,), bytes(self._geometry.length(number))
            else:
                yield frame.numbers, plain

    def _open(self, fetch: RangeFetch, frame: FrameFetch, buffer: memoryview | None) -> bytes | memoryview:
        plain: bytes | memoryview | None = None
        if buffer is not None:
            at = frame.offset - fetch.offset
            where = f"frame at {frame.offset} of {fetch.pack}"
            with contextlib.suppress(DamageError):
                plain = self._repository.opener().open(
                    buffer[at : at + frame.length], where=where, kind=FrameType.DATA, id_=frame.id
                )
        if plain is None:
            plain = self._load_elsewhere(frame)
        self._require_length(frame.numbers, len(plain))
        return plain

    def open_into(
        self, fetch: RangeFetch, room: Callable[[], memoryview]
    ) -> Iterator[tuple[tuple[int, ...], int]]:
        """Open every frame of a range into what ``room`` returns; yield (chunk numbers, length).

        ``room`` returns the same again as long as nothing was yielded. What may be missing becomes zeros.
        """
        try:
            buffer = self._read(fetch)
        except DamageError:
            buffer = None
        for frame in fetch.frames:
            try:
                length = self._open_one_into(fetch, frame, buffer, room())
            except UnreadableChunkError as err:
                if self._losses is None:
                    raise
                for number in frame.numbers:
                    self._losses.note(number, number + 1, err)
                    length = self._geometry.length(number)
                    room()[:length] = bytes(length)
                    yield (number,), length
            else:
                yield frame.numbers, length

    def _open_one_into(
        self, fetch: RangeFetch, frame: FrameFetch, buffer: memoryview | None, out: memoryview
    ) -> int:
        length = -1
        if buffer is not None:
            at = frame.offset - fetch.offset
            where = f"frame at {frame.offset} of {fetch.pack}"
            with contextlib.suppress(DamageError):
                length = self._repository.opener().open_into(
                    buffer[at : at + frame.length], out, where=where, kind=FrameType.DATA, id_=frame.id
                )
        if length < 0:
            plain = self._load_elsewhere(frame)
            length = len(plain)
            self._require_length(frame.numbers, length)
            out[:length] = plain
        self._require_length(frame.numbers, length)
        return length

    def _load_elsewhere(self, frame: FrameFetch) -> bytes:
        """A later run may have stored the chunk again."""
        try:
            return self._repository.load(FrameType.DATA, frame.id)
        except DamageError as err:
            raise UnreadableChunkError(frame.numbers, self._geometry, err) from err

    def _require_length(self, numbers: tuple[int, ...], length: int) -> None:
        for number in numbers:
            if length != self._geometry.length(number):
                err = DamageError(f"chunk {number} has {length} bytes")
                raise UnreadableChunkError(numbers, self._geometry, err)

    def _read(self, fetch: RangeFetch) -> memoryview:
        buffer: bytearray | None = getattr(self._buffers, "range", None)
        if buffer is None or len(buffer) < fetch.length:
            buffer = self._buffers.range = bytearray(max(fetch.length, 5 << 20))
        view = memoryview(buffer)[: fetch.length]
        self._repository.read_range(fetch.pack, fetch.offset, view)
        return view


ReadMap = Callable[[int, int], Iterator[tuple[int, int, Entry]]]
"""Returns the runs of a map between two chunk numbers, in order; all of them, or those that are wanted."""


class _Restoring:
    """One restore of a map, or parts of one, to a target."""

    def __init__(
        self,
        repository: Repository,
        geometry: Geometry,
        target: Target,
        progress: Progress,
        losses: Losses | None,
    ) -> None:
        self._repository = repository
        self._geometry = geometry
        self._target = target
        self._progress = progress
        self._losses = losses
        self._fetcher = ChunkFetcher(repository, geometry, losses)
        self._threads = threading.local()
        self._pending: dict[Future[int], tuple[Outstanding, int]] = {}
        self._windows: deque[Outstanding] = deque()
        self._reached = 0

    def bring_ahead(self, runs: Iterator[tuple[int, int, Entry]]) -> None:
        """Write these runs, which may be read by another thread."""
        with contextlib.closing(planned_ahead(plan_windows(runs, _locator(self._repository)))) as windows:
            self.bring(windows)

    def bring(self, windows: Iterator[Window]) -> None:
        """Write what is in these windows."""
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="blocksnap-restore") as pool:
            try:
                for window in windows:
                    self._begin_window(window)
                    firsts = [min(min(frame.numbers) for frame in fetch.frames) for fetch in window.ranges]
                    outstanding = Outstanding(firsts, window.end)
                    self._windows.append(outstanding)
                    for number, fetch in enumerate(window.ranges):
                        self._await(_PENDING - 1)
                        self._pending[pool.submit(self._bring, fetch)] = outstanding, number
                    while self._pending and len(self._windows) >= _WINDOWS:
                        self._await(len(self._pending) - 1)
                self._await(0)
            except BaseException:
                # Who waits for room would hold the end up.
                self._target.give_up()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _begin_window(self, window: Window) -> None:
        size = self._geometry.chunk_size
        lost = _pass_over(window, self._geometry, self._losses)
        _clear(window, self._geometry, self._target, self._progress)
        for number in lost:
            length = self._geometry.length(number)
            self._target.clear(number * size, length, hole=False, progress=self._progress)
        numbers = (n for fetch in window.ranges for frame in fetch.frames for n in frame.numbers)
        self._target.expect((begin * size, (end - begin) * size) for begin, end in _ranges(sorted(numbers)))

    def _await(self, most: int) -> None:
        """Wait until no more than so many ranges are on their way, and note what is complete."""
        while len(self._pending) > most:
            done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                outstanding, number = self._pending.pop(future)
                if future.exception() is None:
                    outstanding.written(number)
            while self._windows:
                if (reached := self._windows[0].reached) > self._reached:
                    self._reached = reached
                    self._target.reached(reached * self._geometry.chunk_size)
                if not self._windows[0].is_whole:
                    break
                self._windows.popleft()
            self._progress(sum(future.result() for future in done))

    def _bring(self, fetch: RangeFetch) -> int:
        batch: Batch | None = getattr(self._threads, "batch", None)
        if batch is None:
            batch = self._threads.batch = Batch(self._geometry, self._target)
        before = batch.written
        for numbers, length in self._fetcher.open_into(fetch, batch.room):
            batch.add(numbers, length)
        batch.flush()
        return batch.written - before


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    begin = end = -1
    for number in numbers:
        if number != end:
            if begin >= 0:
                yield begin, end
            begin = number
        end = number + 1
    if begin >= 0:
        yield begin, end


def head_bytes(geometry: Geometry) -> int:
    """Return how much of the beginning of a target is written last."""
    return min(-(-HEAD_BYTES // geometry.chunk_size) * geometry.chunk_size, geometry.size)


def restore_to_target(
    repository: Repository,
    geometry: Geometry,
    read_map: ReadMap,
    target: Target,
    progress: Progress,
    losses: Losses | None = None,
) -> None:
    """Write a map, or what ``read_map`` gives of it, to a target, the beginning last.

    Goes on where an interrupted restore was. The caller finishes the target.
    """
    head = -(-head_bytes(geometry) // geometry.chunk_size)
    reached = max(target.begin() // geometry.chunk_size, head)
    progress(min(reached - head, geometry.count - head) * geometry.chunk_size)
    restoring = _Restoring(repository, geometry, target, progress, losses)
    restoring.bring_ahead(read_map(reached, geometry.count))
    target.flush()
    restoring.bring_ahead(read_map(0, head))


def restore_runs(
    repository: Repository,
    geometry: Geometry,
    runs: Iterator[tuple[int, int, Entry]],
    target: Target,
    progress: Progress,
    losses: Losses | None = None,
    *,
    window_chunks: int,
) -> None:
    """Write runs to a target in their order, no more than so many chunks on their way in each window.

    For runs whose reading makes what is written to: a window is read when all of the one before is begun.
    """
    windows = plan_windows(runs, _locator(repository), window=window_chunks)
    _Restoring(repository, geometry, target, progress, losses).bring(windows)


def restore_to_stream(
    repository: Repository,
    geometry: Geometry,
    runs: Iterator[tuple[int, int, Entry]],
    stream: BinaryIO,
    progress: Progress,
    losses: Losses | None = None,
) -> None:
    """Write a whole map to a stream, in order; holes become zeros."""
    fetcher = ChunkFetcher(repository, geometry, losses)
    zeros = memoryview(bytes(geometry.chunk_size))

    def bring(window: Window) -> dict[int, bytes]:
        _pass_over(window, geometry, losses)
        return {
            number: bytes(plain)
            for fetch in window.ranges
            for numbers, plain in fetcher.chunks(fetch)
            for number in numbers
        }

    chunks = max(_STREAM_BYTES // geometry.chunk_size, 1)
    planned = planned_ahead(plan_windows(runs, _locator(repository), window=chunks))
    with (
        contextlib.closing(planned) as windows,
        ThreadPoolExecutor(WORKERS, thread_name_prefix="blocksnap-restore") as pool,
    ):
        try:
            for window, found in _ahead(pool, bring, windows):
                for number in range(window.begin, window.end):
                    content = found.get(number, zeros[: geometry.length(number)])
                    write_stream(stream, content)
                    progress(len(content))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def verify_chunks(
    repository: Repository,
    geometry: Geometry,
    runs: Iterator[tuple[int, int, Entry]],
    progress: Progress,
    note: Callable[[UnreadableChunkError], None],
) -> None:
    """Read and prove every chunk of a map; ``note`` is told what cannot be read, about in the map's order."""
    fetcher = ChunkFetcher(repository, geometry)

    def prove(fetch: RangeFetch) -> tuple[int, list[UnreadableChunkError]]:
        # A damaged frame says nothing about its neighbours, so each is read alone once one has failed.
        try:
            return sum(len(plain) * len(numbers) for numbers, plain in fetcher.chunks(fetch)), []
        except UnreadableChunkError as err:
            if len(fetch.frames) == 1:
                return 0, [err]
        alone = [RangeFetch(fetch.pack, frame.offset, frame.length, (frame,)) for frame in fetch.frames]
        results = [prove(one) for one in alone]
        return sum(done for done, _ in results), [err for _, errors in results for err in errors]

    planned = planned_ahead(plan_windows(runs, _locator(repository)))
    with (
        contextlib.closing(planned) as windows,
        ThreadPoolExecutor(WORKERS, thread_name_prefix="blocksnap-verify") as pool,
    ):
        ranges = _ranges_of(windows, geometry, note, progress)
        try:
            for _, (done, errors) in _ahead(pool, prove, ranges):
                progress(done)
                for err in errors:
                    note(err)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _locator(repository: Repository) -> Callable[[bytes], Location]:
    return lambda id_: repository.locate(FrameType.DATA, id_)


def _pass_over(window: Window, geometry: Geometry, losses: Losses | None) -> list[int]:
    """Return the chunks that no pack holds, noted; raise where that may not be."""
    found = []
    for numbers, err in window.missing:
        if losses is None:
            raise UnreadableChunkError(numbers, geometry, err)
        for number in numbers:
            losses.note(number, number + 1, err)
            found.append(number)
    return found


def _ranges_of(
    windows: Iterator[Window],
    geometry: Geometry,
    note: Callable[[UnreadableChunkError], None],
    progress: Progress,
) -> Iterator[RangeFetch]:
    """Yield what is to be read; of the rest note what no pack holds, and count what is empty."""
    for window in windows:
        progress(sum(length for _, length in _extents((*window.holes, *window.zeros), geometry)))
        for numbers, err in window.missing:
            note(UnreadableChunkError(numbers, geometry, err))
        yield from window.ranges


def _clear(window: Window, geometry: Geometry, target: Target, progress: Progress) -> None:
    for ranges, hole in ((window.holes, True), (window.zeros, False)):
        for offset, length in _extents(ranges, geometry):
            target.clear(offset, length, hole=hole, progress=progress)


def _extents(ranges: Iterable[tuple[int, int]], geometry: Geometry) -> Iterator[tuple[int, int]]:
    """Yield ranges of chunks as (offset, length), up to the end of the volume."""
    for begin, end in ranges:
        offset = begin * geometry.chunk_size
        length = min(end * geometry.chunk_size, geometry.size) - offset
        if length > 0:
            yield offset, length


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[_Item], _Result], items: Iterator[_Item]
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order, while a few more are worked on."""
    queue = [(item, pool.submit(work, item)) for item in islice(items, _PENDING)]
    while queue:
        item, future = queue.pop(0)
        yield item, future.result()
        queue.extend((item, pool.submit(work, item)) for item in islice(items, 1))
