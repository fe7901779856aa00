"""What a check has looked at, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from blocksnap.errors import BlocksnapError
from blocksnap.repository.documents import Backup
from blocksnap.repository.errors import NewerFormatError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (``damage``), of no use (``garbage``), or of a later version (``newer``)."""

    severity: str
    object: str
    message: str


@dataclass(frozen=True, slots=True)
class Loss:
    """A range of a backup, in bytes, that cannot be restored.

    Of a subvolume it is a range of the file ``inode``, or, without a length, what there is to know of it.
    """

    backup: str
    volume: str
    offset: int
    length: int
    inode: int = 0

    @property
    def extent(self) -> dict[str, int]:
        """Return it for a document."""
        inode = {"inode": self.inode} if self.inode else {}
        return {"offset": self.offset, "length": self.length, **inode}

    @property
    def place(self) -> str:
        """Where it is, as people say it."""
        if self.inode and not self.length:
            return f"the record of inode {self.inode}, or of those after it,"
        of = f" of inode {self.inode}" if self.inode else ""
        return f"bytes {self.offset} to {self.offset + self.length}{of}"


@dataclass(frozen=True, slots=True)
class BackupLosses:
    """What cannot be restored of one backup: all of it in figures, and the ``first`` ranges, at least one.

    A chunk that is lost once may stand in a map millions of times. ``end`` is where the last range ends;
    of a subvolume it is 0.
    """

    backup: str
    volume: str
    ranges: int
    size_bytes: int
    end: int
    first: tuple[Loss, ...]

    @property
    def who(self) -> str:
        """Which backup it is, as people say it."""
        return _called(self.backup, self.volume)

    @property
    def left_out(self) -> str:
        """What is to be said of the ranges that are not listed, if there are any."""
        more = self.ranges - len(self.first)
        return f"{more} more ranges, {self.size_bytes} bytes in all" if more else ""

    @property
    def figures(self) -> dict[str, str | int]:
        """Return them for a document."""
        return {
            "backup": self.backup,
            "volume": self.volume,
            "ranges": self.ranges,
            "bytes": self.size_bytes,
            "listed": len(self.first),
        }

    def at_most(self, count: int) -> tuple[Loss, ...]:
        """Return no more than ``count`` ranges that all lost ones are in, the last as wide as it takes.

        Of a subvolume they are the first ones: whoever hears of one takes all of it for lost.
        """
        if self.ranges <= min(count, len(self.first)) or not self.end:
            return self.first[:count]
        *kept, last = self.first[:count]
        return (*kept, replace(last, length=self.end - last.offset))


@dataclass(slots=True)
class CheckResult:
    """What a check has looked at and found.

    ``packs_read`` were read whole and ``packs_left`` should have been, but the budget was spent.
    """

    findings: list[Finding] = field(default_factory=list)
    harmed: list[BackupLosses] = field(default_factory=list)
    level: int = 2
    backups: int = 0
    nodes: int = 0
    chunks: int = 0
    packs: int = 0
    packs_read: int = 0
    packs_left: int = 0
    read_bytes: int = 0
    bad_ids: set[bytes] = field(default_factory=set)

    @property
    def losses(self) -> list[Loss]:
        """The ranges that are listed, of all backups."""
        return [loss for each in self.harmed for loss in each.first]

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong."""
        return any(finding.severity == "damage" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether everything could be looked at: what a later version wrote could not."""
        return all(finding.severity != "newer" for finding in self.findings)

    def damage(self, name: str, message: str) -> None:
        """Note damage."""
        self.findings.append(Finding("damage", name, message))

    def lose(self, harmed: BackupLosses) -> None:
        """Note what a backup has lost, range by range as far as they are listed."""
        self.harmed.append(harmed)
        for loss in harmed.first:
            self.damage(harmed.who, f"{loss.place} cannot be restored")
        if harmed.left_out:
            self.damage(harmed.who, f"{harmed.left_out}, cannot be restored")

    def trouble(self, name: str, err: BlocksnapError) -> None:
        """Note what an error says: damage, unless it is only this version that is too old."""
        self.findings.append(finding_of(name, err))

    def garbage(self, name: str, message: str) -> None:
        """Note something that no backup needs."""
        self.findings.append(Finding("garbage", name, message))


def named(backup: Backup) -> str:
    """Return what people call a backup."""
    return _called(backup.id, backup.volume.name)


def _called(backup: str, volume: str) -> str:
    return f"backup {backup[:8]} of {volume}"


def finding_of(name: str, err: BlocksnapError) -> Finding:
    """Return what an error says of an object."""
    return Finding("newer" if isinstance(err, NewerFormatError) else "damage", name, err.brief)
