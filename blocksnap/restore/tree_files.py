"""The files of a tree that is being restored, as one target: each has a range of chunk numbers for itself.

So chunks of many files are fetched, proven and written by the engine that restores volumes. A file is
complete when all numbers up to its own are; then it gets its holes, what it shares with others, and its
attributes. How many are open at a time is bounded by the windows that are on their way: only those of which
something is fetched are, however many others lie between them.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import Entry
from blocksnap.repository.inodes import InodeRecord
from blocksnap.restore.naming import printable
from blocksnap.restore.targets import Progress, TargetFailedError
from blocksnap.restore.tree_layout import is_layout, read_layout
from blocksnap.system import blockdev
from blocksnap.system.file_attributes import clone_range

_SHARED_CHUNKS = 131_072
"""How many chunks are remembered as what later files may share: 16 GiB of them."""
_LEAST_SHARED = 4096
_COPY_BYTES = 1 << 20
_ID = 32


@dataclass(frozen=True, slots=True)
class _Shared:
    """Where a chunk was written first."""

    path: bytes
    offset: int
    length: int
    ends_file: bool


@dataclass(slots=True)
class _Clone:
    """A range of a file that is to be shared with another."""

    source: bytes
    offset: int
    length: int
    place: int


@dataclass(frozen=True, slots=True)
class LostRange:
    """A range of a file, in bytes, that holds zeros because the repository has lost it."""

    path: bytes
    offset: int
    length: int


@dataclass(slots=True)
class OpenFile:
    """A file that is being written."""

    record: InodeRecord
    path: bytes
    fd: int
    """Negative where nothing is fetched for it, until it is finished."""
    state: bytes
    first: int
    count: int
    clones: list[_Clone] = field(default_factory=list)


class TreeFiles:
    """A target (restore.targets) of many files. ``finish_file`` is called with each when its data is there.

    ``open_path`` opens a file below the top of the tree, for reading or writing.
    """

    def __init__(
        self,
        name: str,
        chunk_size: int,
        open_path: Callable[[bytes, int], int],
        finish_file: Callable[[OpenFile], None],
    ) -> None:
        self._name = name
        self._chunk_size = chunk_size
        self._open_path = open_path
        self._finish_file = finish_file
        self._files: list[OpenFile] = []
        self._firsts: list[int] = []
        self._lock = threading.Lock()
        self._next = 0
        self._shared: OrderedDict[bytes, _Shared] = OrderedDict()
        self._lost: dict[bytes, list[LostRange]] = {}
        self.can_share = True
        self.shared_bytes = 0

    @property
    def name(self) -> str:
        """The directory."""
        return self._name

    def geometry(self) -> Geometry:
        """Return how chunk numbers are to be read."""
        return _TreeGeometry(1 << 62, self._chunk_size, self)

    def length(self, number: int) -> int:
        """Return the length of a chunk."""
        file = self._file(number)
        return min(self._chunk_size, file.record.size - (number - file.first) * self._chunk_size)

    def place(self, number: int) -> tuple[bytes, int]:
        """Return the path and the offset of a chunk."""
        file = self._file(number)
        return file.path, (number - file.first) * self._chunk_size

    def lose(self, begin: int, end: int) -> None:
        """Note that chunks of one file are zeros because the repository has lost them; from any thread."""
        file = self._file(begin)
        offset = (begin - file.first) * self._chunk_size
        length = min((end - begin) * self._chunk_size, file.record.size - offset)
        with self._lock:
            self._lost.setdefault(file.path, []).append(LostRange(file.path, offset, length))

    def lost(self) -> list[LostRange]:
        """Return what is zeros for that reason, by the paths of files."""
        with self._lock:
            return sorted(
                (each for ranges in self._lost.values() for each in ranges),
                key=lambda each: (each.path, each.offset),
            )

    def add(
        self, file: OpenFile, runs: Iterable[tuple[int, int, Entry]], *, may_share: bool
    ) -> Iterator[tuple[int, int, Entry]]:
        """Take an empty file; yield the chunks that have to be fetched for it, by numbers of their own."""
        file.first, self._next = self._next, self._next + max(file.count, 1)
        with self._lock:
            self._files.append(file)
            self._firsts.append(file.first)
        is_fetched = False
        for number, _, entry in runs:
            if len(entry) != _ID:
                # Zeros that were written become holes too: compressed, they had no room either.
                continue
            if may_share and self.can_share and self._share(file, number, entry):
                continue
            is_fetched = True
            yield file.first + number, 1, entry
        if is_fetched:
            return
        if file.clones:
            # What it shares may not be there yet.
            os.close(file.fd)
            file.fd = -1
            return
        self._complete(file)
        with self._lock:
            del self._files[-1], self._firsts[-1]

    def begin(self) -> int:
        """Nothing is gone on with."""
        return 0

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Room is asked for file by file."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes, perhaps of several files; several threads at once."""
        rest, size = memoryview(data), self._chunk_size
        while rest:
            file = self._file(offset // size)
            place = offset - file.first * size
            part = rest[: max(file.record.size - place, 0)]
            try:
                while len(part):
                    done = os.pwrite(file.fd, part, place)
                    part, place = part[done:], place + done
            except OSError as err:
                raise TargetFailedError(self._path_of(file), err) from err
            skipped = (file.first + file.count) * size - offset
            rest, offset = rest[skipped:], offset + skipped

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:  # noqa: ARG002
        """Files are made of holes."""
        progress(length)

    def reached(self, offset: int) -> None:
        """Finish the files that are complete."""
        self._finish(offset // self._chunk_size)

    def flush(self) -> None:
        """The whole filesystem is flushed at the end."""

    def finish(self) -> None:
        """Finish all files."""
        self._finish(self._next)

    def reader(self) -> int:
        """Raise ValueError: there is no one descriptor."""
        raise ValueError("a tree of files is not read back by one descriptor")

    def give_up(self) -> None:
        """Nothing waits here."""

    def close(self, *, keep: bool = False) -> bool:  # noqa: ARG002 - protocol
        """Let go of all files."""
        for file in self._files:
            if file.fd >= 0:
                os.close(file.fd)
        self._files, self._firsts = [], []
        return False

    def _path_of(self, file: OpenFile) -> str:
        return os.path.join(self._name, printable(file.path))

    def _file(self, number: int) -> OpenFile:
        with self._lock:
            return self._files[bisect_right(self._firsts, number) - 1]

    def _finish(self, number: int) -> None:
        done = 0
        while done < len(self._files) and self._files[done].first + max(self._files[done].count, 1) <= number:
            self._complete(self._files[done])
            done += 1
        with self._lock:
            del self._files[:done], self._firsts[:done]

    def _complete(self, file: OpenFile) -> None:
        """Give a file of which all is fetched the rest, and close it."""
        try:
            if file.fd < 0:
                file.fd = self._open_path(file.path, os.O_RDWR)
            self._share_all(file)
            self._make_holes(file)
        except OSError as err:
            raise TargetFailedError(self._path_of(file), err) from err
        self._finish_file(file)
        os.close(file.fd)
        file.fd = -1

    def _share(self, file: OpenFile, number: int, entry: Entry) -> bool:
        """Remember where a chunk goes, or where it was; tell whether it need not be fetched again."""
        offset = number * self._chunk_size
        length = min(self._chunk_size, file.record.size - offset)
        if length < _LEAST_SHARED:
            return False
        ends_file = offset + length == file.record.size
        known = self._shared.get(entry)
        if known is None:
            self._shared[entry] = _Shared(file.path, offset, length, ends_file)
            if len(self._shared) > _SHARED_CHUNKS:
                self._shared.popitem(last=False)
            return False
        self._shared.move_to_end(entry)
        if known.ends_file != ends_file and length % _LEAST_SHARED:
            return False
        last = file.clones[-1] if file.clones else None
        if (
            last
            and last.source == known.path
            and last.offset + last.length == known.offset
            and last.place + last.length == offset
        ):
            last.length += length
        else:
            file.clones.append(_Clone(known.path, known.offset, length, offset))
        return True

    def _lose_too(self, file: OpenFile, clone: _Clone) -> None:
        """What is shared with a range that was lost is lost here as well."""
        end, shift = clone.offset + clone.length, clone.place - clone.offset
        with self._lock:
            for lost in tuple(self._lost.get(clone.source, ())):
                begin, until = max(lost.offset, clone.offset), min(lost.offset + lost.length, end)
                if begin < until:
                    found = LostRange(file.path, begin + shift, until - begin)
                    self._lost.setdefault(file.path, []).append(found)

    def _share_all(self, file: OpenFile) -> None:
        for clone in file.clones:
            self._lose_too(file, clone)
            source = file.fd if clone.source == file.path else self._open_path(clone.source, os.O_RDONLY)
            try:
                if self.can_share and clone_range(source, clone.offset, clone.length, file.fd, clone.place):
                    self.shared_bytes += clone.length
                    continue
                self.can_share = False
                # What is written there was proven when it came.
                reader = self._open_path(clone.source, os.O_RDONLY) if source == file.fd else source
                try:
                    _copy(reader, clone, file.fd)
                finally:
                    if reader != source:
                        os.close(reader)
            finally:
                if source != file.fd:
                    os.close(source)

    def _make_holes(self, file: OpenFile) -> None:
        """Make holes, and room without data, of what was written as zeros because a chunk is larger."""
        if not is_layout(file.state):
            return
        end, size = 0, file.record.size
        for extent in read_layout(file.state):
            if min(extent.offset, size) > end:
                blockdev.punch_hole(file.fd, end, min(extent.offset, size) - end)
            end = min(extent.offset + extent.length, size)
            if extent.kind == "preallocated" and end > extent.offset:
                blockdev.punch_hole(file.fd, extent.offset, end - extent.offset)
                blockdev.preallocate(file.fd, extent.offset, extent.length)
        if end < size:
            blockdev.punch_hole(file.fd, end, size - end)


@dataclass(frozen=True, slots=True)
class _TreeGeometry(Geometry):
    files: TreeFiles

    def length(self, number: int) -> int:
        return self.files.length(number)


def _copy(source: int, clone: _Clone, target: int) -> None:
    done = 0
    while done < clone.length:
        data = os.pread(source, min(_COPY_BYTES, clone.length - done), clone.offset + done)
        if not data:
            raise ValueError("a file that was restored is shorter than it was")
        os.pwrite(target, data, clone.place + done)
        done += len(data)
