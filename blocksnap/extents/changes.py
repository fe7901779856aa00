"""What a source says about a snapshot: which bytes to read, which are holes, and why.

This is the one answer every source gives, whichever way it found it; ``operations`` turns it into
chunks to read. A set may always be too wide, never too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from blocksnap.extents.mapped_set import MappedSet
from blocksnap.extents.model import ExtentList

Method = Literal["thin-tree", "thin-time", "cow", "btrfs-tree", "btrfs-send", "fiemap", "compare"]
BasePolicy = Literal["none", "keep", "auto"]
"""Whether a run leaves its snapshot on the host as the base of the next one."""
JsonValue = str | int | float | bool | None | list["JsonValue"] | dict[str, "JsonValue"]
Binding = Mapping[str, JsonValue]
"""What identifies a snapshot's source, stored in the manifest and compared the next time."""
BASE_KEPT = "base_kept"
BASE_REASON = "base_reason"


@dataclass(frozen=True, slots=True)
class BaseDecision:
    """Whether a snapshot stays as a base, and why; stored in the manifest, so that its loss is noticed."""

    stays: bool
    reason: str

    def to_binding(self) -> dict[str, JsonValue]:
        """Return what is stored with the binding."""
        return {BASE_KEPT: self.stays, BASE_REASON: self.reason}


def read_fields(identity: type, binding: Binding, *, lowest: int | None = 0) -> dict[str, Any] | None:
    """Return the fields of an identity, a dataclass of int and str, as a manifest has them.

    None when one is missing, of another type, an empty string, or a number below ``lowest``.
    """
    values = {each.name: binding.get(each.name) for each in fields(identity)}
    for each in fields(identity):
        value = values[each.name]
        # A bool is an int to Python, but not to us.
        if type(value).__name__ != each.type or value == "":
            return None
        if isinstance(value, int) and lowest is not None and value < lowest:
            return None
    return values


@dataclass(frozen=True, slots=True)
class Parent:
    """What the parent backup remembers of its source.

    ``known_here`` tells that this host wrote the parent's run down when it was committed.

    ``load_mapped`` returns the mapped set in the repository, or None when none was stored; it is
    called only where it is needed.
    """

    size: int
    binding: Binding
    known_here: bool
    load_mapped: Callable[[], MappedSet | None]


@dataclass(frozen=True, slots=True)
class Changes:
    """The answer of a source for one snapshot.

    ``allocated`` are the extents that hold data; everything else reads as zeros (with ``inherits`` it is
    complete only within 64 MiB of what is discarded and of the ends, where it is asked for). ``changed`` are
    those of them that may differ from the parent, and ``discarded`` the extents that held data in
    the parent and do not any more (both empty of meaning when ``inherits`` is False: then nothing
    of the parent is taken over unread and ``changed`` equals ``allocated``). All are within ``[0,
    size)``.
    """

    method: Method
    reason: str
    inherits: bool
    allocated: ExtentList
    changed: ExtentList
    discarded: ExtentList
    mapped: MappedSet | None = None
    """To be stored with the backup, for sources that need it the next time."""


_NEIGHBOURHOOD = 64 << 20
"""At least the size of the largest chunk of a repository."""


def neighbourhood(discarded: ExtentList, *, size: int, parent_size: int) -> ExtentList:
    """Return where ``Changes.allocated`` has to be complete.

    Whether a chunk of the repository lost all of its data or only some is decided by that, and no other chunk
    asks: so an incremental does not look at all that is allocated.
    """
    ends = [(end - 1, 1) for end in (size, min(parent_size, size)) if end]
    return discarded.union(ExtentList.of(ends)).align(_NEIGHBOURHOOD, limit=size)
