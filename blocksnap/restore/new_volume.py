"""A logical volume made for a restore: it stays only if the restore is whole."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from blocksnap.restore.targets import DeviceTarget
from blocksnap.system import lvm

TAG = "blocksnap.restoring"
"""On the volume until it is complete: ``lvs -o +tags`` tells an unfinished one after a crash."""


class NewVolume:
    """A context manager; ``target`` writes to the new volume."""

    def __init__(self, group: str, name: str, pool: str | None, size: int) -> None:
        self._group, self._name, self._pool, self._size = group, name, pool, size
        self._target: DeviceTarget | None = None

    @property
    def target(self) -> DeviceTarget:
        """Where to write."""
        if self._target is None:
            raise ValueError("the volume is not made yet")
        return self._target

    def __enter__(self) -> Self:
        if self._pool is None:
            lvm.create_thick(self._group, self._name, size_bytes=self._size, tags=(TAG,))
        else:
            lvm.create_thin(self._group, self._pool, self._name, size_bytes=self._size, tags=(TAG,))
        try:
            self._target = DeviceTarget(f"/dev/{self._group}/{self._name}", self._size)
        except BaseException:
            lvm.remove_volume(self._group, self._name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.target.close()
        if kind is None:
            lvm.delete_tag(self._group, self._name, TAG)
        else:
            lvm.remove_volume(self._group, self._name)
