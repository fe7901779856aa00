"""What an image holds: one filesystem from its beginning, or a table of partitions with some.

The table is as untrusted as any content: where a partition cannot be what it says, that is told and nothing
in its place is shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError
from blocksnap.restore.filesystems import HEAD_BYTES, Inside, recognise
from blocksnap.system.partitions import UNIT, Table, TableEntry, name_content, read_table

PARTITIONS_MOST = 255
"""What the kernel takes of one disk (DISK_MAX_PARTS)."""


class NoFilesystemError(BlocksnapError):
    """The volume holds nothing that can be mounted."""

    def __init__(self) -> None:
        super().__init__(
            "no ext4, XFS or btrfs filesystem begins at the start of this volume, nor is there a table of "
            "partitions",
            resolution="restore it, or look at the image itself: blocksnap mount",
        )


class PartitionNotShownError(BlocksnapError):
    """A partition holds nothing that is shown, or cannot be where the table has it."""

    def __init__(self, partition: Partition) -> None:
        super().__init__(
            f"{partition.name} is not shown: {partition.reason}",
            resolution="serve the volume to whatever knows what is in it: blocksnap serve --writable",
        )


class UnnamedPartitionError(BlocksnapError):
    """A path in the backup of a disk begins with no partition."""

    def __init__(self, first: str, partitions: Iterable[Partition]) -> None:
        brief = f"there is no {first} in this backup" if first else "no partition is named"
        super().__init__(
            f"{brief}: it is of a disk with partitions, and a path begins with one of them: "
            + "; ".join(partition.describe() for partition in partitions)
        )


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition, what is in it, and why it cannot be shown if there is anything wrong with its place."""

    number: int
    offset: int
    size: int
    content: str
    inside: Inside | None
    fault: str

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"p{self.number}"

    @property
    def is_shown(self) -> bool:
        """Whether the files in it can be."""
        return self.inside is not None and not self.fault

    @property
    def reason(self) -> str:
        """Why it is not shown; nothing if it is."""
        if self.is_shown or self.fault:
            return self.fault
        return f"it holds {self.content}" if self.content else "it holds no filesystem that is known"

    def describe(self) -> str:
        """Say in a few words what it is."""
        if self.is_shown:
            return f"{self.name} {self.content}"
        if self.fault:
            return f"{self.name} (not shown: {self.fault})"
        return f"{self.name} ({self.content}: not shown)" if self.content else f"{self.name} (nothing known)"


@dataclass(frozen=True, slots=True)
class Contents:
    """One filesystem, or partitions, or neither."""

    whole: Inside | None
    partitions: tuple[Partition, ...] = ()
    fault: str = ""
    """What is wrong with the table as a whole."""

    def shown(self) -> list[Partition]:
        """Return the partitions with files to show."""
        return [partition for partition in self.partitions if partition.is_shown]

    def get(self, name: str) -> Partition:
        """Return the partition of a name, to be mounted.

        Raises UnnamedPartitionError, PartitionNotShownError.
        """
        found = next((partition for partition in self.partitions if partition.name == name), None)
        if found is None:
            raise UnnamedPartitionError(name, self.partitions)
        if not found.is_shown:
            raise PartitionNotShownError(found)
        return found

    def describe(self) -> str:
        """Return a table for people, a partition a line."""
        lines = [
            f"{partition.name:<5} {partition.offset:>16} {partition.size:>16} "
            + (partition.content if partition.is_shown else f"not shown: {partition.reason}")
            for partition in self.partitions
        ]
        head = f"{'name':<5} {'begins at':>16} {'bytes':>16} content"
        return "".join(f"{line}\n" for line in [*([self.fault] if self.fault else []), head, *lines])


def look_inside(image: str) -> Contents:
    """Tell what is in an image; raises OSError, MissingProgramError, CommandTimeoutError.

    Programs that make a filesystem wipe a table that was there, not the other way round: where partitions
    hold anything, what a filesystem left at the beginning is not looked at.
    """
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = recognise(os.pread(fd, HEAD_BYTES, 0))
        table = read_table(image)
        if table is None:
            return Contents(whole)
        places = judge(table, os.fstat(fd).st_size)
        partitions = tuple(_look_into(image, fd, entry, fault) for entry, fault in places)
    finally:
        os.close(fd)
    if whole is not None and not any(partition.content for partition in partitions):
        return Contents(whole)
    return Contents(None, partitions, _fault(table))


def judge(table: Table, size: int) -> list[tuple[TableEntry, str]]:
    """Return the partitions that hold something, with what is wrong with the place of each, if anything."""
    entries = sorted(
        (entry for entry in table.entries if not entry.is_container), key=lambda entry: entry.number
    )[:PARTITIONS_MOST]
    faults = {entry.number: _misplaced(entry, size) for entry in entries}
    reaching: TableEntry | None = None
    for entry in sorted((entry for entry in entries if entry.size), key=lambda entry: entry.offset):
        if reaching is not None and entry.offset < reaching.offset + reaching.size:
            faults[entry.number] = faults[entry.number] or f"it overlaps p{reaching.number}"
            faults[reaching.number] = faults[reaching.number] or f"it overlaps p{entry.number}"
        if reaching is None or entry.offset + entry.size > reaching.offset + reaching.size:
            reaching = entry
    return [(entry, faults[entry.number]) for entry in entries]


def _misplaced(entry: TableEntry, size: int) -> str:
    if entry.offset < UNIT:
        return "it begins in the table of partitions itself"
    if entry.offset + entry.size > size:
        return f"it ends {entry.offset + entry.size - size} bytes behind the end of the volume"
    return "" if entry.size else "it is empty"


def _look_into(image: str, fd: int, entry: TableEntry, fault: str) -> Partition:
    content, inside = "", None
    if not fault:
        inside = recognise(os.pread(fd, min(HEAD_BYTES, entry.size), entry.offset))
        content = inside.filesystem if inside else name_content(image, offset=entry.offset, size=entry.size)
    return Partition(entry.number, entry.offset, entry.size, content, inside, fault)


def _fault(table: Table) -> str:
    if table.is_endless:
        return "the list of logical partitions leads back into itself, or is too long: more may be missing"
    if len(table.entries) > PARTITIONS_MOST:
        return f"there are more than {PARTITIONS_MOST} partitions: those beyond are not shown"
    return ""
