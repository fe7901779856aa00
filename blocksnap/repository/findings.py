"""What a check has looked at, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from blocksnap.errors import BlocksnapError
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


@dataclass(slots=True)
class CheckResult:
    """What a check has looked at and found.

    ``packs_read`` were read whole and ``packs_left`` should have been, but the budget was spent.
    """

    findings: list[Finding] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
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

    def trouble(self, name: str, err: BlocksnapError) -> None:
        """Note what an error says: damage, unless it is only this version that is too old."""
        self.findings.append(finding_of(name, err))

    def garbage(self, name: str, message: str) -> None:
        """Note something that no backup needs."""
        self.findings.append(Finding("garbage", name, message))


def finding_of(name: str, err: BlocksnapError) -> Finding:
    """Return what an error says of an object."""
    return Finding("newer" if isinstance(err, NewerFormatError) else "damage", name, err.brief)
