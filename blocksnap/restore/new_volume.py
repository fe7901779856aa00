"""A logical volume made for a restore: it stays only if the restore is whole."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from blocksnap.errors import BlocksnapError, TargetError
from blocksnap.restore.device_target import DeviceTarget
from blocksnap.restore.pool_watch import USUAL_LIMITS, RestoreLimits
from blocksnap.restore.record import RestoreRecord
from blocksnap.system import lvm

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvReport

TAG = "blocksnap.restoring"
"""On the volume until it is complete: ``lvs -o +tags`` tells an unfinished one after a crash."""


class VolumeExistsError(TargetError):
    """The volume that is to be made is there already."""

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name
        super().__init__(
            f"the volume {group}/{name} exists already",
            resolution="name another one, or restore over it by leaving out --create; "
            f"if it carries the tag {TAG}, it is an unfinished restore of something else: "
            "remove it with lvremove",
        )


class NoPoolError(TargetError):
    """There is no such thin pool."""

    def __init__(self, group: str, pool: str) -> None:
        self.group, self.pool = group, pool
        super().__init__(
            f"there is no thin pool {pool} in {group}",
            resolution="name one that `lvs` shows, or leave out --pool",
        )


class NewVolume:
    """A context manager; ``target`` writes to the new volume, which is gone if the restore fails.

    ``pool`` is the thin pool it has to be in; ``pool_uuid`` tells one to use if it is there.
    Without a pool the volume is a classic one. It gets ``volume_bytes``, at least the backup's ``size``. A
    restore that was interrupted leaves the volume with its tag, and another of the same backup takes it over.
    """

    def __init__(
        self,
        group: str,
        name: str,
        size: int,
        record: RestoreRecord,
        *,
        pool: str | None,
        pool_uuid: str | None = None,
        volume_bytes: int = 0,
        limits: RestoreLimits = USUAL_LIMITS,
    ) -> None:
        self._group, self._name, self._size = group, name, size
        self._record = record
        self._limits = limits
        self._pool, self._pool_uuid = pool, pool_uuid
        self._volume_bytes = max(size, volume_bytes)
        self._target: DeviceTarget | None = None
        # Two restores may want one name at a time; the one that loses must not remove the other's volume.
        self._own_tag = f"{TAG}.{secrets.token_hex(8)}"

    @property
    def target(self) -> DeviceTarget:
        """Where to write."""
        if self._target is None:
            raise ValueError("the volume is not made yet")
        return self._target

    def __enter__(self) -> Self:
        report = lvm.report(self._group)
        found = report.find(self._group, self._name)
        if found is not None:
            self._take_over(found.lv_tags)
            return self
        pool = choose_pool(report, self._group, self._pool, self._pool_uuid)
        tags = (TAG, self._own_tag)
        try:
            if pool is None:
                node = lvm.create_thick(self._group, self._name, size_bytes=self._volume_bytes, tags=tags)
            else:
                node = lvm.create_thin(
                    self._group, pool, self._name, size_bytes=self._volume_bytes, tags=tags
                )
            self._target = DeviceTarget(node, self._size, self._record, self._limits)
            self._target.is_new = True
        except BaseException:
            # An interrupted lvcreate has run to its end. Why there is no volume matters more than what
            # keeps it from being removed; the tag tells what it is.
            with contextlib.suppress(BlocksnapError):
                lvm.remove_volume(self._group, self._name, tag=self._own_tag)
            raise
        return self

    def _take_over(self, tags: Sequence[str]) -> None:
        """Go on with what an interrupted restore of the same backup left; raises VolumeExistsError."""
        if TAG not in tags:
            raise VolumeExistsError(self._group, self._name)
        # Held exclusively by whoever is still at work on it.
        node = f"/dev/{self._group}/{self._name}"
        target = DeviceTarget(node, self._size, self._record, self._limits)
        before = target.head()
        if before is None or not before.continues(self._record):
            target.close()
            raise VolumeExistsError(self._group, self._name)
        self._target = target
        target.is_new = True
        others = [tag for tag in tags if tag.startswith(f"{TAG}.")]
        lvm.add_tag(self._group, self._name, self._own_tag)
        for tag in others:
            lvm.delete_tag(self._group, self._name, tag)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.target.close()
        if kind is None:
            lvm.delete_tag(self._group, self._name, self._own_tag)
            lvm.delete_tag(self._group, self._name, TAG)
        elif not self.target.kept:
            lvm.remove_volume(self._group, self._name, tag=self._own_tag)


def choose_pool(report: LvReport, group: str, wanted: str | None, uuid: str | None) -> str | None:
    """Return the thin pool that is wanted, or the one with this UUID if it is there; raises NoPoolError."""
    if wanted is not None:
        if report.find(group, wanted) is None:
            raise NoPoolError(group, wanted)
        return wanted
    found = report.find_uuid(uuid) if uuid else None
    return found.name if found is not None else None
