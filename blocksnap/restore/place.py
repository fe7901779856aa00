"""An open file or device that a restore writes to: past the page cache where it can, in any order.

Writing past the page cache (O_DIRECT) to room that is already allocated costs no copy, leaves nothing to
flush at the end, and does not push the host's own data out of memory. Where that is not possible writes go
through the page cache, and what is dirty is flushed while the rest still arrives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable

from blocksnap.restore.flushing import Flusher
from blocksnap.restore.record import HEAD_BYTES, RECORD_BYTES, RestoreRecord, decode_record, encode_record
from blocksnap.restore.targets import TargetFailedError
from blocksnap.system import blockdev

_BLOCK = 4096
_RECORD_SECONDS = 5.0


class Place:
    """What all targets share. Takes the descriptor over, which is read and written through the page cache."""

    def __init__(self, fd: int, name: str, size: int, *, is_device: bool = False) -> None:
        self._fd = fd
        self._name = name
        self._size = size
        self._is_device = is_device
        self._direct = -1
        self._lock = threading.Lock()
        self._flusher = Flusher(fd)
        self._record: RestoreRecord | None = None
        self._recorded = time.monotonic()
        self._reached = 0
        self._head_is_due = False
        self.kept = False
        """Whether what is written so far was left for another restore to go on with."""

    @property
    def name(self) -> str:
        """The path it was named by."""
        return self._name

    @property
    def what_stays(self) -> str:
        """What is left when it is not finished."""
        return "is not complete, and begins with a record that says so"

    def open_direct(self) -> None:
        """From now on write whole blocks past the page cache, where the place allows it."""
        try:
            self._direct = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self._direct = -1

    def comparable(self) -> int:
        """Return a descriptor to read what is there now."""
        return self._direct if self._direct >= 0 else self._fd

    def head(self) -> RestoreRecord | None:
        """Return the record of an interrupted restore that stands at the beginning."""
        return decode_record(os.pread(self._fd, RECORD_BYTES, 0))

    def begin_with(self, record: RestoreRecord) -> int:
        """Clear the beginning and write the record there; return how far an earlier restore came.

        A place that has no room for it is written in one go.
        """
        try:
            before = self.head()
            if before is not None and before.continues(record):
                record = before
            # What differs is found anew each time, so only a restore of everything goes on where it was.
            self._reached = record.reached if record.mode == "whole" else 0
            self._record = record
            if self._size > HEAD_BYTES:
                self._write_record(record)
                self._clear_head()
                self._flusher.sync()
        except OSError as err:
            raise self.failed(err) from err
        return self._reached

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write at an offset: whole blocks past the page cache if ``data`` is aligned, the rest not."""
        view = memoryview(data)
        whole = len(view) // _BLOCK * _BLOCK if self._direct >= 0 and not offset % _BLOCK else 0
        if whole and self._write_direct(view[:whole], offset):
            view, offset = view[whole:], offset + whole
        if not view:
            return
        count = len(view)
        try:
            if self._is_device:
                self._write_cached(view, offset)
            else:
                # The kernel would let only one in anyway, and burn the others' time on spinning.
                with self._lock:
                    self._write_cached(view, offset)
        except OSError as err:
            raise self.failed(err) from err
        self._flusher.wrote(count)

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Nothing has to be made room for."""

    def reached(self, offset: int) -> None:
        """Note it, and every few seconds make it durable."""
        if self._record is None or self._record.mode != "whole" or self._head_is_due:
            return
        self._reached = max(self._reached, offset)
        if time.monotonic() - self._recorded >= _RECORD_SECONDS:
            self.keep_record()

    def keep_record(self) -> bool:
        """Flush, and write down how far the restore has come; tell whether one can go on from there."""
        self._recorded = time.monotonic()
        if self._record is None or self._size <= HEAD_BYTES or self._reached <= HEAD_BYTES:
            return False
        try:
            self._flusher.sync()
            self._begin_unfinished(self._reached)
        except OSError as err:
            raise self.failed(err) from err
        return True

    def take_back(self) -> None:
        """Have a target begin as one that is not finished, though its beginning may have been written."""
        if self._record is None or not self._head_is_due or self._size <= HEAD_BYTES:
            return
        # A failure here must not hide what led to it.
        with contextlib.suppress(OSError):
            self._begin_unfinished(0)

    def flush(self) -> None:
        """Make what was written durable; after it the beginning is written, over the record."""
        try:
            self._flusher.sync()
        except OSError as err:
            raise self.failed(err) from err
        self._head_is_due = True

    def finish_writing(self) -> None:
        """Make everything durable: it is complete; raises TargetFailedError, also for earlier losses."""
        self._flush_all()
        self._record = None

    def forget_cache(self) -> int:
        """Flush, drop the page cache so that the storage itself is read, and return the descriptor."""
        self._flush_all()
        try:
            blockdev.drop_cache(self._fd)
        except OSError as err:
            raise self.failed(err) from err
        return self._fd

    def give_up(self) -> None:
        """Nothing waits here."""

    def release(self) -> None:
        """Close; a second call does nothing."""
        if self._fd < 0:
            return
        self._flusher.stop()
        if self._direct >= 0:
            os.close(self._direct)
        os.close(self._fd)
        self._fd = self._direct = -1

    def failed(self, err: OSError) -> TargetFailedError:
        """Return the error to raise."""
        return TargetFailedError(self._name, err, is_device=self._is_device)

    def _flush_all(self) -> None:
        try:
            self._flusher.finish()
        except OSError as err:
            raise self.failed(err) from err

    def _write_direct(self, view: memoryview, offset: int) -> bool:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._direct, view[done:], offset + done)
                if done % _BLOCK:
                    # The rest is not aligned any more; written once more, through the cache, it is whole.
                    return False
        except OSError as err:
            # Not every filesystem that opens a file so also writes it so.
            if err.errno == errno.EINVAL:
                return False
            raise self.failed(err) from err
        return True

    def _write_cached(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count

    def _begin_unfinished(self, reached: int) -> None:
        """Write the record again, and clear what of the beginning may be there; raises OSError."""
        if self._record is None:
            raise ValueError("nothing was begun, or all is finished")
        self._write_record(self._record.model_copy(update={"reached": reached}))
        if self._head_is_due:
            self._clear_head()
        self._flusher.sync()

    def _write_record(self, record: RestoreRecord) -> None:
        self._write_cached(memoryview(encode_record(record)), 0)

    def _clear_head(self) -> None:
        self._write_cached(memoryview(bytes(HEAD_BYTES - RECORD_BYTES)), RECORD_BYTES)
