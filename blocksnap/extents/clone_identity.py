"""What a backup remembers of the clone it read, and whether a file is that clone, as it was then."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, cast

from blocksnap.extents.changes import Binding, JsonValue, Parent, read_fields
from blocksnap.system.clones import ClonedFile

CloneSource = Literal["xfs-clone", "btrfs-clone"]
"""On what the clone is, and so how two of them are compared."""


@dataclass(frozen=True, slots=True)
class CloneIdentity:
    """What a backup remembers of the clone it read, which stays on the host as the base of the next."""

    source: str
    filesystem: str
    inode: int
    generation: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: ClonedFile, source: CloneSource) -> CloneIdentity:
        """Return what there is to remember of a clone in its last state."""
        facts = asdict(file)
        del facts["immutable"]
        return cls(source, **facts)

    def to_binding(self) -> dict[str, JsonValue]:
        """Return the form that is stored in the manifest."""
        return cast("dict[str, JsonValue]", asdict(self))

    @classmethod
    def from_binding(cls, binding: Binding, source: CloneSource) -> CloneIdentity | None:
        """Return the identity in a manifest; None when it is not one of that source, or not whole."""
        values = read_fields(cls, binding, lowest=None)
        return cls(**values) if values and values["source"] == source else None


def doubt_about_base(base: ClonedFile, clone: ClonedFile, parent: Parent, source: CloneSource) -> str | None:
    """Return why a file may not be the clone that the parent backup read, as it was then; None when it is."""
    known = CloneIdentity.from_binding(parent.binding, source)
    if known is None:
        return "the parent backup does not say which clone it was taken of"
    doubts = (
        (
            (base.filesystem, base.inode, base.generation)
            != (known.filesystem, known.inode, known.generation),
            "the base is another file than the parent's clone",
        ),
        (base.size != known.size or base.size != parent.size, "the base has another size than the parent"),
        (base.modified_ns != known.modified_ns, "the base was written to since the parent backup"),
        (base.changed_ns != known.changed_ns, "the base's attributes changed since the parent backup"),
        (not base.immutable, "the base is not immutable, so it may have been written to"),
        (base.filesystem != clone.filesystem, "the clone is on another filesystem than the base"),
        (
            (base.inode, base.generation) == (clone.inode, clone.generation),
            "the clone is the base itself",
        ),
    )
    return next((reason for found, reason in doubts if found), None)
