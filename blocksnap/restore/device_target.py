"""A block device that nothing uses, as a target; held exclusively while it is written."""

from __future__ import annotations

import os
from collections.abc import Callable

from blocksnap.restore.place import Place
from blocksnap.restore.pool_watch import PoolWatch, RestoreLimits
from blocksnap.restore.record import RestoreRecord
from blocksnap.restore.targets import Progress, TargetTooSmallError
from blocksnap.system import blockdev


class DeviceTarget(Place):
    """Refused when anything uses it or it is too small; what lies behind the backup's end stays as it is."""

    def __init__(
        self,
        path: str,
        size: int,
        record: RestoreRecord,
        limits: RestoreLimits,
        open_device: Callable[[str], int] = blockdev.open_exclusive,
        first: dict[str, int] | None = None,
    ) -> None:
        fd = open_device(path)
        try:
            capacity = blockdev.size_of(fd)
            if capacity < size:
                raise TargetTooSmallError(path, capacity, size)
            self._pool = PoolWatch(blockdev.device_number(fd), limits, first)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(fd, path, size, is_device=True)
        self.open_direct()
        self.wanted = record
        self.is_new = False
        """Whether it goes as a whole when the restore fails."""

    def begin(self) -> int:
        """Write the record over the beginning."""
        return self.begin_with(self.wanted)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write, unless the pool of the device is about to be full; raises PoolFillingError."""
        self._pool.before(len(data))
        super().write(offset, data)

    def clear(self, offset: int, length: int, *, hole: bool, progress: Progress) -> None:
        """Discard a hole where that leaves zeros; write zeros otherwise, which takes room of a pool.

        Raises PoolFillingError.
        """
        before_zeros = self._pool.before if self._pool.is_there else None
        try:
            blockdev.clear(
                self._fd, offset, length, discard=hole, before_zeros=before_zeros, progress=progress
            )
        except OSError as err:
            raise self.failed(err) from err

    def flush(self) -> None:
        """Flush, and make sure that the device did not shrink over what it holds by now."""
        super().flush()
        self._require_size()

    def finish(self) -> None:
        """Flush to the device; raises TargetTooSmallError where it has shrunk."""
        self._require_size()
        self.finish_writing()

    def _require_size(self) -> None:
        capacity = blockdev.size_of(self._fd)
        if capacity < self._size:
            raise TargetTooSmallError(self._name, capacity, self._size)

    def give_up(self) -> None:
        """Wait for room in the pool no longer."""
        self._pool.give_up()

    def reader(self) -> int:
        """Flush, and drop the device's page cache so that it is really read."""
        return self.forget_cache()

    def close(self, *, keep: bool = False) -> bool:
        """Close; where writing has begun the record stays in any case, with what was reached if ``keep``."""
        if self._fd < 0:
            return False
        begun = self._record is not None
        try:
            self.kept = keep and self.keep_record()
            if not self.kept:
                self.take_back()
        finally:
            self.release()
        return self.kept or (begun and not self.is_new)
