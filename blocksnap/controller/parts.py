"""Volumes that hold a part of something larger: their snapshots alone are no whole.

A btrfs over a logical volume and a disk, a striped set over two volumes, a filesystem whose log is elsewhere:
what is on the other devices is of another instant, or not in the backup at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError
from blocksnap.quiesce.places import Target
from blocksnap.system import spans
from blocksnap.system.spans import Span
from blocksnap.volumes.base import Volume


@dataclass(frozen=True, slots=True)
class PartOfMore:
    """Volumes that hold a part of something, and the devices of the rest, by their names."""

    volumes: tuple[str, ...]
    span: Span
    others: tuple[str, ...]

    @property
    def brief(self) -> str:
        """What is wrong, in one line."""
        return (
            f"only a part of {self.span.name} is on {', '.join(self.volumes)}: the rest is on "
            f"{', '.join(self.others)}, and not backed up at the same instant"
        )

    @property
    def resolution(self) -> str:
        """What to do about it."""
        together = "name all the volumes that it lies on in one job with group = true, or in one command"
        if self.span.is_btrfs:
            return f"back up its subvolumes instead (blocksnap backup {self.span.point}), or {together}"
        return together


def find_parts(volumes: Sequence[Volume]) -> list[PartOfMore]:
    """Return of what else than themselves these volumes, which are one group, hold only a part.

    Devices that come and go meanwhile are nobody's: then nothing is said.
    """
    above: dict[str, frozenset[int]] = {}
    own: set[int] = set()
    with contextlib.suppress(OSError, BlocksnapError):
        for volume in volumes:
            if (device := volume.snapshot_device) is None:
                continue
            image = volume.name if volume.kind == "image" else None
            above[volume.name] = Target(volume.key, device, image).numbers_above()
            if image is None:
                own.add(device)
        return list(_parts(above, own))
    return []


def _parts(above: dict[str, frozenset[int]], own: set[int]) -> Iterator[PartOfMore]:
    """Say it of what lies above; a volume of the group is itself whole, whatever it is made of."""
    inside = frozenset().union(*above.values())
    for span, outside in spans.find_outside(spans.spans_of(inside, own), inside):
        names = tuple(name for name, numbers in above.items() if numbers & span.devices)
        others = tuple(sorted(map(spans.call_device, outside)))
        yield PartOfMore(names, span, others)
