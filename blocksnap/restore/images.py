"""Backups as files to read from anywhere: chunks fetched once, a bounded number kept, more fetched ahead.

Many threads read at once. Whoever wants a chunk that another thread already fetches waits for that one. A
reader that goes on where it was has more and more fetched ahead of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from blocksnap.errors import BlocksnapError, DamageError, StorageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import HOLE, ZERO, Entry, MapReader, MapRoot
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository
from blocksnap.restore.engine import ChunkFetcher, UnreadableChunkError
from blocksnap.restore.plan import plan_windows

_WORKERS = 3
_CACHE_BYTES = 48 << 20
_AHEAD_BYTES = 8 << 20
_GROUP_BYTES = 1 << 20
"""What one thread fetches at a time."""
_EMPTY = (HOLE, ZERO)


@dataclass(slots=True)
class Image:
    """A backup, or a file in one, as one reader opens it: its map, how it is cut, where the reader is."""

    geometry: Geometry
    root: MapRoot
    ahead: int = 0
    """Bytes that are fetched ahead of a reader that goes on at ``next``."""
    next: int = 0
    fetched: int = 0
    """Up to where that was asked for."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class ImageReader:
    """Reads byte ranges of images of one repository, from several threads."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._maps = MapReader(repository.load_node)
        self._maps_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="blocksnap-image")
        # Files of a tree have as many geometries as sizes: the buffers belong to the threads.
        self._buffers = threading.local()
        self._lock = threading.Lock()
        self._chunks: OrderedDict[bytes, memoryview] = OrderedDict()
        self._held = 0
        self._is_closed = False
        self._coming: dict[bytes, Future[memoryview]] = {}

    def read(self, image: Image, offset: int, size: int) -> bytes:
        """Return ``size`` bytes, less at the end; raises DamageError where they cannot be had."""
        geometry = image.geometry
        end = min(offset + size, geometry.size)
        if offset >= end:
            return b""
        first, last = geometry.numbers(offset, end - offset)
        wanted = self._want(image, first, last)
        # What is wrong there is for whoever reads it, if anybody does.
        with suppress(BlocksnapError):
            self._fetch_ahead(image, offset, end)
        parts: list[bytes | memoryview] = []
        for number, source in wanted:
            begin = number * geometry.chunk_size
            low, high = max(offset - begin, 0), min(end - begin, geometry.chunk_size)
            if source is None:
                parts.append(bytes(high - low))
                continue
            try:
                content = _content(source)
            except UnreadableChunkError as failed:
                # It may have been fetched for another place: the range is to be that of this one.
                raise UnreadableChunkError((number,), geometry, failed.reason) from failed
            if len(content) != geometry.length(number):
                # It was fetched for another place, where it had the right length.
                err = DamageError(f"chunk {number} has {len(content)} bytes")
                raise UnreadableChunkError((number,), geometry, err)
            parts.append(content[low:high])
        return b"".join(parts)

    def close(self) -> None:
        """Let the threads end; whoever still waits is told that nothing comes any more."""
        with self._lock:
            self._is_closed = True
            waiting, self._coming = list(self._coming.values()), {}
        self._pool.shutdown(wait=False, cancel_futures=True)
        for future in waiting:
            future.set_exception(_not_served())

    def _want(
        self, image: Image, first: int, last: int
    ) -> list[tuple[int, memoryview | Future[memoryview] | None]]:
        """Return where each chunk's content is or will be; None for zeros."""
        with self._maps_lock:
            entries = [
                (at, entry)
                for number, count, entry in self._maps.runs(image.root, first, last)
                for at in range(number, number + count)
            ]
        wanted: list[tuple[int, memoryview | Future[memoryview] | None]] = []
        missing: list[tuple[int, Entry]] = []
        most = max(_GROUP_BYTES // image.geometry.chunk_size, 1)
        with self._lock:
            if self._is_closed:
                raise _not_served()
            for number, entry in entries:
                source: memoryview | Future[memoryview] | None = None
                if entry not in _EMPTY:
                    source = self._chunks.get(entry) or self._coming.get(entry)
                    if source is None:
                        source = self._coming[entry] = Future()
                        missing.append((number, entry))
                    elif isinstance(source, memoryview):
                        self._chunks.move_to_end(entry)
                wanted.append((number, source))
            # With the lock, so that the threads have not been told to end meanwhile.
            for at in range(0, len(missing), most):
                self._pool.submit(self._bring, image.geometry, missing[at : at + most])
        return wanted

    def _fetch_ahead(self, image: Image, offset: int, end: int) -> None:
        """Fetch more where this read goes on, or nearly, where the last one ended; forget it elsewhere."""
        with image.lock:
            follows = abs(offset - image.next) <= _GROUP_BYTES
            image.ahead = min(max(image.ahead * 2, end - offset), _AHEAD_BYTES) if follows else 0
            if not follows:
                image.fetched = end
            image.next = end
            begin = max(end, image.fetched)
            until = min(end + image.ahead, image.geometry.size)
            # Not for a little: each time costs a look at the map.
            if until - begin < min(_GROUP_BYTES, image.ahead):
                return
            image.fetched = until
        self._want(image, *image.geometry.numbers(begin, until - begin))

    def _bring(self, geometry: Geometry, missing: Sequence[tuple[int, Entry]]) -> None:
        """Fetch chunks, each into memory of its own, and hand them to whoever waits."""
        left = dict(missing)
        numbers = {entry: number for number, entry in missing}
        try:
            for entry, content in self._load(geometry, missing):
                left.pop(numbers[entry], None)
                self._keep(entry, content)
        except BlocksnapError as err:
            if len(missing) > 1:
                # One that is damaged says nothing about the others.
                for number, entry in left.items():
                    self._bring(geometry, [(number, entry)])
                return
            self._fail(missing, err)
        except BaseException as err:
            self._fail(missing, err)
            raise

    def _load(
        self, geometry: Geometry, missing: Sequence[tuple[int, Entry]]
    ) -> Iterator[tuple[Entry, memoryview]]:
        fetcher = ChunkFetcher(self._repository, geometry, buffers=self._buffers)
        runs = ((number, 1, entry) for number, entry in missing)
        for window in plan_windows(runs, lambda id_: self._repository.locate(FrameType.DATA, id_)):
            for numbers, err in window.missing:
                raise UnreadableChunkError(numbers, geometry, err)
            for fetch in window.ranges:
                room: list[memoryview] = []

                def new_room(room: list[memoryview] = room) -> memoryview:
                    room.append(memoryview(bytearray(geometry.chunk_size)))
                    return room[-1]

                opened = fetcher.open_into(fetch, new_room)
                for frame, (_, length) in zip(fetch.frames, opened, strict=True):
                    content = room.pop()[:length]
                    # What is short must not hold the room of a whole chunk for as long as it is kept.
                    is_short = length < geometry.chunk_size
                    yield frame.id, memoryview(bytes(content)) if is_short else content

    def _keep(self, entry: Entry, content: memoryview) -> None:
        with self._lock:
            future = self._coming.pop(entry, None)
            if entry not in self._chunks:
                self._chunks[entry] = content
                self._held += len(content)
            while self._held > _CACHE_BYTES:
                self._held -= len(self._chunks.popitem(last=False)[1])
        if future is not None:
            future.set_result(content)

    def _fail(self, missing: Sequence[tuple[int, Entry]], err: BaseException) -> None:
        for _, entry in missing:
            with self._lock:
                future = self._coming.pop(entry, None)
            if future is not None:
                future.set_exception(err)


def _content(source: memoryview | Future[memoryview]) -> memoryview:
    return source if isinstance(source, memoryview) else source.result()


def _not_served() -> StorageError:
    return StorageError("the images are not served any more")
