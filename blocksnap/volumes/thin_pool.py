"""Whether a thin pool is fit for what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocksnap.extents.thin_identity import TIME_LIMIT
from blocksnap.system import devmapper
from blocksnap.system.devmapper import PoolStatus
from blocksnap.system.dm_status import StatusReader, lvm_uuid
from blocksnap.volumes.base import Level
from blocksnap.volumes.errors import PoolFullError, PoolHealthError, PoolWornOutError

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import ThinRecord

SPARE_SNAPSHOTS = 1 << 16
"""How many a pool has to have left: each try takes one of them, and others take theirs."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How full a pool may be for a snapshot to be taken."""

    data_percent: float = 95.0
    metadata_percent: float = 90.0


def check_pool(thin: ThinRecord, limits: PoolLimits) -> None:
    """Raise VolumeError when the pool of a volume is damaged or too full for a snapshot."""
    pool = thin.pool
    if pool.lv_check_needed:
        raise PoolHealthError(pool.full_name, "its metadata needs a check")
    if pool.lv_health_status not in ("", "out_of_data"):
        raise PoolHealthError(pool.full_name, pool.lv_health_status)
    metadata = thin.metadata.number
    number = devmapper.pool_above(metadata) if metadata is not None else None
    if number is None:
        return
    status = devmapper.pool_status(number)
    _require_health(pool.full_name, status)
    if status.data_percent > limits.data_percent:
        raise PoolFullError(pool.full_name, "data", status.data_percent, limits.data_percent)
    if status.metadata_percent > limits.metadata_percent:
        raise PoolFullError(pool.full_name, "metadata", status.metadata_percent, limits.metadata_percent)


def _require_health(pool: str, status: PoolStatus) -> None:
    if status.mode != "rw":
        modes = {
            "ro": "it is read-only",
            "fail": "it has failed",
            "out_of_data_space": "it is out of data space",
        }
        raise PoolHealthError(pool, modes[status.mode])
    if status.needs_check:
        raise PoolHealthError(pool, "its metadata needs a check")


class PoolLevels:
    """How full the pool of a volume is, asked of the kernel again and again."""

    def __init__(self, thin: ThinRecord) -> None:
        self._name = thin.pool.full_name
        self._uuid = lvm_uuid(thin.pool.vg_uuid, thin.pool.lv_uuid, "tpool")

    def read(self) -> tuple[Level, ...]:
        """Return the levels of data and metadata, none while it is not active; raises PoolHealthError."""
        with StatusReader() as reader:
            text = reader.read(self._uuid)
        if text is None:
            return ()
        status = devmapper.parse_pool_status(text)
        _require_health(self._name, status)
        return (
            Level(self._name, "pool data", status.data_used, status.data_total),
            Level(self._name, "pool metadata", status.metadata_used, status.metadata_total),
        )


def check_age(pool: str, pool_time: int) -> None:
    """Raise PoolWornOutError when the pool is about to run out of times: there is one for each snapshot."""
    if pool_time >= TIME_LIMIT - SPARE_SNAPSHOTS:
        raise PoolWornOutError(pool, pool_time, TIME_LIMIT)
