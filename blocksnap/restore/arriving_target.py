"""A volume that data arrives at while it is read already, as far as the data is there."""

from __future__ import annotations

import os
from collections.abc import Callable

from blocksnap.restore.device_target import DeviceTarget
from blocksnap.restore.pool_watch import RestoreLimits
from blocksnap.restore.record import RECORD_BYTES, RestoreRecord, decode_record


class ArrivingTarget(DeviceTarget):
    """``moved`` is called with what is durable up to now; ``hold_back`` before so many bytes are written.

    The device is not ours alone: device-mapper holds it, and keeps others from it.
    """

    def __init__(
        self,
        path: str,
        size: int,
        record: RestoreRecord,
        limits: RestoreLimits,
        moved: Callable[[int], None],
        hold_back: Callable[[int], None],
    ) -> None:
        super().__init__(path, size, record, limits, lambda path: os.open(path, os.O_RDWR | os.O_CLOEXEC))
        self._moved = moved
        self._hold_back = hold_back

    @staticmethod
    def reached_of(path: str, record: RestoreRecord) -> int:
        """Return what the record of the same restore at the beginning of a device says; 0 without one."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = decode_record(os.pread(fd, RECORD_BYTES, 0))
        finally:
            os.close(fd)
        return found.reached if found is not None and found.continues(record) else 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write, at the pace that is allowed."""
        self._hold_back(len(data))
        super().write(offset, data)

    def keep_record(self) -> bool:
        """Write down how far it has come, and have that be read from here."""
        kept = super().keep_record()
        if kept:
            self._moved(self._reached)
        return kept
