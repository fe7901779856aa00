"""Reading the metadata device of a live thin pool: a device's facts, its mappings, two devices compared.

No metadata snapshot is needed: the tree of a snapshot that is never written is never modified, so it is
enough that the device is the same after the walk as before (kernel: dm-thin-metadata.c, persistent-data/).
Only the look-up of a device can be disturbed, by a commit between its reads. A pool that commits faster than
a device can be looked up, again and again, is asked to hold a metadata snapshot for the while, if the caller
has a way to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from blocksnap.errors import VolumeError
from blocksnap.extents.model import ExtentList

_ATTEMPTS = 5
_PAUSE_SECONDS = 0.2
_NEEDS_CHECK = 1
_Answer = TypeVar("_Answer")
WINDOW_CHUNKS = 1 << 24
"""A bitmap of 2 MiB: 1 TiB at 64 KiB a chunk. Memory is that of a window, however large the volume."""


class PoolBusyError(VolumeError):
    """The pool commits faster than a device can be looked up."""

    def __init__(self) -> None:
        super().__init__(
            "the thin pool commits faster than its metadata can be read",
            resolution="run it again when fewer volumes are made or removed in the pool",
        )


class NoDeviceInPoolError(VolumeError):
    """The pool has no device of an id."""

    def __init__(self, thin_id: int) -> None:
        self.thin_id = thin_id
        super().__init__(
            f"the metadata of the thin pool makes no sense: there is no device {thin_id}",
            resolution="run it again; if it stays so, compare what LVM and the pool know: lvs -o +thin_id",
        )


class DisturbedTreeError(VolumeError):
    """The pool's metadata makes no sense, however often it is read."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"the metadata of the thin pool makes no sense: {problem}",
            resolution="run it again; if it stays so, look at the pool: dmsetup status, and the kernel log",
        )


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the pool's metadata says about the pool and one thin device."""

    pool_time: int
    pool_transaction: int
    needs_check: bool
    held_root: int
    chunk_size: int
    device_root: int
    mapped_chunks: int
    transaction: int
    created: int

    def is_same_tree(self, other: DeviceFacts) -> bool:
        """Whether both saw the same, unmodified mapping tree of the same device."""
        return (self.device_root, self.mapped_chunks, self.transaction, self.created) == (
            other.device_root,
            other.mapped_chunks,
            other.transaction,
            other.created,
        )


@dataclass(frozen=True, slots=True)
class ScannedWindow:
    """Part of a device: where it begins, what of it changed (in bytes), and a bitmap of its mapped chunks."""

    first_chunk: int
    changed: ExtentList
    bitmap: bytes


def scan_windows(nr_chunks: int) -> Iterator[tuple[int, int, bool]]:
    """Cut a device in windows: the first chunk of each, how many it has, and whether there are more."""
    for first in range(0, max(nr_chunks, 1), WINDOW_CHUNKS):
        count = min(WINDOW_CHUNKS, nr_chunks - first)
        yield first, count, first + count < nr_chunks


class ThinMetadata:
    """The metadata device of a pool, opened by the caller with O_DIRECT.

    Every method raises VolumeError when the metadata cannot be read consistently. ``hold`` is a context in
    which the pool holds a metadata snapshot, whose block it yields.
    """

    def __init__(self, fd: int, hold: Callable[[], AbstractContextManager[int]] | None = None) -> None:
        self._fd = fd
        self._hold = hold

    def facts(self, thin_id: int) -> DeviceFacts:
        """Return what identifies one device; raises NoDeviceInPoolError."""
        return self._undisturbed(lambda held_root: self._look(thin_id, held_root))

    def scan(self, thin_id: int, *, since: int, nr_chunks: int) -> Iterator[ScannedWindow]:
        """Return what of a device is mapped, window by window, and what of that since a pool time."""
        found = 0
        for window in scan_windows(nr_chunks):
            changed, bitmap, mappings, _ = self._scan_window(thin_id, since, window)
            found += mappings
            yield ScannedWindow(window[0], ExtentList(changed), bitmap)
        mapped = self.facts(thin_id).mapped_chunks
        if found != mapped:
            raise DisturbedTreeError(f"{found} chunks in the tree and {mapped} in the device's details")

    def _scan_window(
        self, thin_id: int, since: int, window: tuple[int, int, bool]
    ) -> tuple[bytes, bytes, int, int]:
        from blocksnap._native import thin_scan

        return self._undisturbed(lambda held_root: thin_scan(self._fd, thin_id, since, *window, held_root))

    def compare(self, base_id: int, thin_id: int, *, nr_chunks: int) -> tuple[ExtentList, ExtentList]:
        """Return the chunks that changed from one device to another, and those that only the first maps."""
        from blocksnap._native import thin_diff

        def walk(held_root: int) -> tuple[ExtentList, ExtentList]:
            changed, discarded, _ = thin_diff(self._fd, base_id, thin_id, 0, nr_chunks, held_root)
            return ExtentList(changed), ExtentList(discarded)

        return self._undisturbed(walk)

    def mapped(self, thin_id: int, first_chunk: int, end_chunk: int) -> ExtentList:
        """Return which chunks of a range a device maps."""
        from blocksnap._native import THIN_NO_DEVICE, thin_diff

        def walk(held_root: int) -> ExtentList:
            return ExtentList(
                thin_diff(self._fd, THIN_NO_DEVICE, thin_id, first_chunk, end_chunk, held_root)[0]
            )

        return self._undisturbed(walk)

    def _look(self, thin_id: int, held_root: int) -> DeviceFacts:
        from blocksnap._native import thin_device

        raw = thin_device(self._fd, thin_id, held_root)
        return DeviceFacts(
            pool_time=raw[0],
            pool_transaction=raw[1],
            needs_check=bool(raw[2] & _NEEDS_CHECK),
            held_root=raw[3],
            chunk_size=raw[4],
            device_root=raw[8],
            mapped_chunks=raw[9],
            transaction=raw[10],
            created=raw[11],
        )

    def _undisturbed(self, walk: Callable[[int], _Answer]) -> _Answer:
        """Walk the live metadata; if the pool is too busy for that, a metadata snapshot."""
        try:
            return self._insist(lambda: walk(0))
        except PoolBusyError:
            if self._hold is None:
                raise
        with self._hold() as held_root:
            return self._insist(lambda: walk(held_root))

    def _insist(self, read: Callable[[], _Answer]) -> _Answer:
        """Try again what a commit may have disturbed: blocks of the upper trees are reused."""
        problem: str | int = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            try:
                return read()
            except KeyError as err:
                problem = int(err.args[0])
            except ValueError as err:
                problem = str(err)
            except BlockingIOError as err:
                raise PoolBusyError from err
            except OSError as err:
                raise VolumeError(f"cannot read the metadata of the thin pool: {err.strerror}") from err
        if isinstance(problem, int):
            raise NoDeviceInPoolError(problem)
        raise DisturbedTreeError(problem)
