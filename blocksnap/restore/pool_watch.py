"""A restore to a thin volume stops before the pool, which others live on too, is full.

A pool that is full makes the writes of all its volumes wait, and then fail. So it is looked at again and
again while it is written to. When it is nearly full the restore waits for a while, in which LVM may extend
the pool (thin_pool_autoextend_threshold), and then ends: a new volume is removed, what was there can be gone
on with.
"""

from __future__ import annotations

import threading
import time

from blocksnap.errors import TargetError
from blocksnap.system import devmapper
from blocksnap.system.blockdev import sysfs_folder
from blocksnap.system.dm_status import StatusReader

PATIENCE_SECONDS = 20.0
"""dmeventd looks at a pool every ten seconds."""
_LOOK_SECONDS = 0.25
_SPARE_PERCENT = 2.0
_SPARE_METADATA_PERCENT = 5.0
"""As much as a backup leaves before it removes its snapshot (controller.settings)."""
_UNDER_WAY_BYTES = 8 << 20
"""At least; less is written at a time, and counted before it is."""
_SECTOR = 512


class PoolFillingError(TargetError):
    """The pool of a target is nearly full."""

    def __init__(self, pool: str, part: str, percent: float) -> None:
        self.pool, self.part, self.percent = pool, part, percent
        option = "--size" if part == "data" else "--poolmetadatasize"
        super().__init__(
            f"the {part} of thin pool {pool} would be full: it is {percent:.1f} % full, and the restore ends "
            "before other volumes are hurt",
            resolution=f"extend it: lvextend {option} +SIZE {pool}; then restore again",
        )


class PoolWatch:
    """Told of every write before it is made, by several threads."""

    def __init__(self, device: int) -> None:
        """Watch the pool that a device lies on, if it does."""
        pool = devmapper.pool_below(device)
        self._uuid = devmapper.dm_uuid(pool) if pool is not None else None
        self._lock = threading.Lock()
        self._first: dict[str, int] = {}
        self._looked = 0.0
        self._may_write = 0
        if pool is not None:
            name = devmapper.dm_name(pool) or ""
            self._name = "/".join(devmapper.decode_name(name.removesuffix("-tpool")) or (name,))
            self._size_file = sysfs_folder(pool) / "size"
            self._look()

    def before(self, length: int) -> None:
        """Wait, or raise PoolFillingError, where that many bytes more could be too much."""
        if self._uuid is None:
            return
        with self._lock:
            self._may_write -= length
            if self._may_write > 0 and time.monotonic() - self._looked < _LOOK_SECONDS:
                return
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (found := self._look()) is not None:
                if time.monotonic() >= deadline:
                    raise found
                time.sleep(_LOOK_SECONDS)

    def _look(self) -> PoolFillingError | None:
        """Look once. What is written over what is there takes no room of a pool that is as full as before."""
        with StatusReader() as reader:
            text = reader.read(self._uuid or "")
        self._looked = time.monotonic()
        if text is None:
            return None
        status = devmapper.parse_pool_status(text)
        if not status.data_total:
            return None
        size = int(self._size_file.read_text()) * _SECTOR
        spare = max(size * _SPARE_PERCENT / 100, min(_UNDER_WAY_BYTES, size / 4))
        left = size * (100 - status.data_percent) / 100 - spare
        # What comes until half of that is written cannot be too much.
        self._may_write = int(left / 2)
        for part, used, percent, is_short in (
            ("data", status.data_used, status.data_percent, left <= 0),
            (
                "metadata",
                status.metadata_used,
                status.metadata_percent,
                status.metadata_percent > 100 - _SPARE_METADATA_PERCENT,
            ),
        ):
            if used > self._first.setdefault(part, used) and is_short:
                return PoolFillingError(self._name, part, percent)
        return None
