"""The LVM snapshot that stays as the base of the next backup: found, marked, replaced.

A base is marked by a tag of its own once its manifest is durable, and not before; those before it go then.
It keeps what it was made with: it is read-only, and nothing of ours or of the system mounts it. Its
content is in the repository, so it may be lost at any time: the next backup says so and does without. Whether
one stays is decided by the kind of volume (``thin_base``, ``classic``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocksnap.errors import BlocksnapError
from blocksnap.extents.changes import Parent
from blocksnap.volumes.errors import SnapshotLostError

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport


def find_base(report: LvReport, lv_uuid: str, parent: Parent) -> LvRecord | None:
    """Return the base that the parent's run left of a volume; None when there is none."""
    from blocksnap.system import lvm

    run = parent.binding.get("run")
    for lv in report:
        mark = lvm.base_of(lv.lv_tags)
        if mark is not None and mark.lv_uuid == lv_uuid and lvm.run_of(lv.lv_tags) == run:
            return lv
    return None


def make_base(volume: LvRecord, snapshot: str, run: str, owner: str) -> None:
    """Make the snapshot that a committed run took of a volume the owner's base; raises BlocksnapError."""
    from blocksnap.system import lvm

    if not lvm.mark_base(volume.vg_name, snapshot, run, lvm.BaseMark(owner, volume.lv_uuid)):
        raise SnapshotLostError(volume.full_name, "it is gone")


def remove_bases(report: LvReport, owner: str, lv_uuid: str, *, but: str | None) -> list[str]:
    """Remove the bases that an owner's runs left of a volume, all ``but`` one; return their names.

    ``report`` may be of any time in this run, which has the volume to itself. Raises BlocksnapError, when it
    has tried them all.
    """
    from blocksnap.system import lvm

    removed: list[str] = []
    trouble: BlocksnapError | None = None
    for lv in report:
        run = lvm.run_of(lv.lv_tags)
        if run is None or lv.name == but or lvm.base_of(lv.lv_tags) != lvm.BaseMark(owner, lv_uuid):
            continue
        try:
            if lvm.remove_snapshot(lv.vg_name, lv.name, run):
                removed.append(lv.full_name)
        except BlocksnapError as err:
            trouble = err
    if trouble is not None:
        raise trouble
    return removed
