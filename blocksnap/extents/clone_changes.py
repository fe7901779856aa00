"""What changed between a clone that was kept as base and a new one, whatever tells where their bytes lie.

The same looks at both files before and after make sure that they are what was compared, and
``clone_identity`` that the base holds what the parent backup read. How two are compared is said by
``fiemap`` and ``btrfs_clones``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blocksnap.errors import VolumeError
from blocksnap.extents.changes import Changes, Method, Parent
from blocksnap.extents.clone_identity import CloneSource, doubt_about_base
from blocksnap.extents.model import ExtentList
from blocksnap.extents.scan import data_near, data_of, read_all
from blocksnap.system.clones import ClonedFile


@dataclass(frozen=True, slots=True)
class CloneEngine:
    """A way to compare two clones.

    ``compare`` takes the descriptors of base and clone and returns what differs, and what only the base has;
    it may raise OSError, ValueError and VolumeError, and then everything is read. ``what`` it compares is for
    the reason that is given. ``look_at`` raises ``refusal`` where a file is none that could be compared.
    """

    method: Method
    source: CloneSource
    what: str
    look_at: Callable[[int], ClonedFile]
    refusal: type[Exception]
    compare: Callable[[int, int], tuple[ExtentList, ExtentList]]


def find_clone_changes(
    engine: CloneEngine, base_fd: int | None, clone_fd: int, clone: ClonedFile, parent: Parent | None
) -> Changes:
    """Say what of a clone to read; ``clone`` is what it was found to be.

    ``base_fd`` is the clone that was kept at the parent backup, if it is still there. Raises VolumeError when
    somebody writes to the clone, OSError when it cannot be looked at.
    """
    found = _decide(engine, base_fd, clone_fd, clone, parent)
    if isinstance(found, str):
        found = read_all(data_of(clone_fd, clone.size), found)
    if engine.look_at(clone_fd) != clone:
        raise VolumeError(
            "the clone was written to, or its attributes changed, while its changes were looked for",
            resolution="run it again, and find out who works on the clones",
        )
    return found


def _decide(
    engine: CloneEngine, base_fd: int | None, clone_fd: int, clone: ClonedFile, parent: Parent | None
) -> Changes | str:
    """Return the answer of the engine, or why there is none."""
    if parent is None:
        return "first backup of this volume"
    if base_fd is None:
        return "the parent's clone is not on this host any more"
    try:
        base = engine.look_at(base_fd)
    except engine.refusal as err:
        return f"the base is not the parent's clone: {err}"
    doubt = doubt_about_base(base, clone, parent, engine.source)
    if doubt:
        return doubt
    try:
        changed, discarded = engine.compare(base_fd, clone_fd)
    except (OSError, ValueError, VolumeError) as err:
        return f"the {engine.what} of the clones cannot be compared: {err}"
    if engine.look_at(base_fd) != base:
        return "the base was changed while it was looked at"
    near = data_near(clone_fd, discarded, size=clone.size, parent_size=parent.size)
    return Changes(
        engine.method,
        "the parent's clone was kept as base and nobody has touched it",
        inherits=True,
        allocated=changed.union(near),
        changed=changed,
        discarded=discarded,
    )
