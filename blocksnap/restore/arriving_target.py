"""A volume that data arrives at while it is read already, as far as the data is there."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from blocksnap.restore.device_target import DeviceTarget
from blocksnap.restore.pool_watch import RestoreLimits
from blocksnap.restore.record import RECORD_BYTES, RestoreRecord, decode_record, encode_record
from blocksnap.restore.targets import TargetFailedError


class ArrivingTarget(DeviceTarget):
    """``moved`` is called with what is durable up to now.

    ``hold_back`` is called before so many bytes are written, and returns how many seconds they have to wait.

    The device is not ours alone: device-mapper holds it, and keeps others from it.
    """

    def __init__(
        self,
        path: str,
        size: int,
        record: RestoreRecord,
        limits: RestoreLimits,
        moved: Callable[[int], None],
        hold_back: Callable[[int], float],
        first: dict[str, int],
    ) -> None:
        """Each new attempt is given the same ``first``: else each could fill the pool a little further."""
        open_device = partial(os.open, flags=os.O_RDWR | os.O_CLOEXEC)
        super().__init__(path, size, record, limits, open_device, first)
        self._moved = moved
        self._hold_back = hold_back
        self._given_up = threading.Event()

    @staticmethod
    def reached_of(path: str, record: RestoreRecord) -> int:
        """Return what the record of the same restore at the beginning of a device says.

        0 without one, and where it cannot be read: then nothing else need be readable there either.
        """
        with contextlib.suppress(OSError), _opened(path, os.O_RDONLY) as fd:
            found = decode_record(os.pread(fd, RECORD_BYTES, 0))
            return found.reached if found is not None and found.continues(record) else 0
        return 0

    @staticmethod
    def take_back_to(path: str, record: RestoreRecord, limit: int) -> None:
        """Have what lies from ``limit`` on brought again; raises TargetFailedError."""
        try:
            with _opened(path, os.O_RDWR) as fd:
                found = decode_record(os.pread(fd, RECORD_BYTES, 0))
                if found is not None and found.continues(record) and found.reached > limit:
                    os.pwrite(fd, encode_record(found.model_copy(update={"reached": limit})), 0)
                    os.fsync(fd)
        except OSError as err:
            raise TargetFailedError(path, err, is_device=True) from err

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write, at the pace that is allowed."""
        self._given_up.wait(self._hold_back(len(data)))
        super().write(offset, data)

    def give_up(self) -> None:
        """Keep to no pace any longer, and wait for no room."""
        self._given_up.set()
        super().give_up()

    def stay(self) -> None:
        """Have nothing more be read from here than is by now; what is kept after this counts later."""
        self._moved = lambda _: None

    def keep_record(self) -> bool:
        """Write down how far it has come, and have that be read from here."""
        kept = super().keep_record()
        if kept:
            self._moved(self._reached)
        return kept


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
