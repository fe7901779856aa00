"""Subvolumes belong together: nested ones are backed up with the one they are in, at one instant."""

from __future__ import annotations

from collections.abc import Sequence

from blocksnap.controller.parts import find_parts
from blocksnap.controller.session import SnapshotSession
from blocksnap.operations.reporting import Reporter
from blocksnap.volumes.base import Volume


def with_nested(volumes: Sequence[Volume], report: Reporter) -> list[Volume]:
    """Return volumes with the subvolumes that are nested in some of them, each once.

    A snapshot holds an empty directory in the place of each. Read-only ones are snapshots, which somebody
    else keeps; they are told of and left out.
    """
    found, keys = list(volumes), {volume.key for volume in volumes}
    left_out: list[str] = []
    for volume in volumes:
        if volume.kind != "subvolume":
            continue
        from blocksnap.volumes.subvolume import SubvolumeVolume

        for nested in volume.nested() if isinstance(volume, SubvolumeVolume) else ():
            if nested.key in keys:
                continue
            if nested.read_only:
                left_out.append(nested.name)
            else:
                keys.add(nested.key)
                found.append(nested)
    if left_out:
        report.event(
            "left-out", reason="read-only snapshots are not backed up", subvolumes=", ".join(left_out)
        )
    return found


def tell_of_parts(volumes: Sequence[Volume], report: Reporter) -> None:
    """Warn of volumes that hold only a part of a filesystem, an array or another volume."""
    for part in find_parts(volumes):
        report.warn(part.brief, resolution=part.resolution)


def tell_of_skew(session: SnapshotSession, report: Reporter) -> None:
    """Warn when snapshots of subvolumes of one filesystem are not of one instant."""
    if session.torn:
        report.warn(
            f"not of the same instant as the others: the snapshot of {', '.join(session.torn)}",
            resolution="let the applications stand still for it: quiesce in the job",
        )
