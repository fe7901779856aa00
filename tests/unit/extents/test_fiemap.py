"""When the map of a kept clone is believed, and when everything is read instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from blocksnap.errors import VolumeError
from blocksnap.extents import fiemap
from blocksnap.extents.changes import Binding, Parent
from blocksnap.extents.clone_identity import CloneIdentity, doubt_about_base
from blocksnap.extents.fiemap import find_fiemap_changes
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.extents.model import ExtentList
from blocksnap.system.clones import ClonedFile
from blocksnap.system.xfs import NotXfsError, look_at

PAGE = 4096
BASE = ClonedFile(
    filesystem="5802be21-8766-4a43-93fa-0f7bd06ad088",
    inode=131,
    generation=77,
    size=100 * PAGE,
    modified_ns=1_000,
    changed_ns=2_000,
    immutable=True,
)
CLONE = replace(BASE, inode=132, generation=5, size=120 * PAGE)


def parent_of(base: ClonedFile, **changes: object) -> Parent:
    binding: Binding = {**CloneIdentity.of(base, "xfs-clone").to_binding(), **changes}  # type: ignore[dict-item]

    def none_is_asked_for() -> MappedSet | None:
        pytest.fail("no mapped set is needed")

    return Parent(base.size, binding, known_here=False, load_mapped=none_is_asked_for)


def test_the_binding_is_read_back() -> None:
    identity = CloneIdentity.of(BASE, "xfs-clone")
    assert CloneIdentity.from_binding(identity.to_binding(), "xfs-clone") == identity
    for each in fields(CloneIdentity):
        for value in (None, True, "", 1.5):
            assert (
                CloneIdentity.from_binding({**identity.to_binding(), each.name: value}, "xfs-clone") is None
            )
    assert CloneIdentity.from_binding({**identity.to_binding(), "source": "file"}, "xfs-clone") is None
    assert CloneIdentity.from_binding({}, "xfs-clone") is None


def test_an_untouched_base_is_believed() -> None:
    assert doubt_about_base(BASE, CLONE, parent_of(BASE), "xfs-clone") is None


@pytest.mark.parametrize(
    ("base", "clone", "reason"),
    [
        (replace(BASE, filesystem="other"), CLONE, "another file"),
        (replace(BASE, inode=9), CLONE, "another file"),
        (replace(BASE, generation=9), CLONE, "another file"),
        (replace(BASE, size=9), CLONE, "another size"),
        (replace(BASE, modified_ns=1_001), CLONE, "written to"),
        (replace(BASE, modified_ns=999), CLONE, "written to"),
        (replace(BASE, changed_ns=2_001), CLONE, "attributes changed"),
        (replace(BASE, immutable=False), CLONE, "not immutable"),
        (BASE, replace(CLONE, filesystem="other"), "another filesystem"),
        (BASE, BASE, "the base itself"),
    ],
)
def test_every_doubt(base: ClonedFile, clone: ClonedFile, reason: str) -> None:
    assert reason in (doubt_about_base(base, clone, parent_of(BASE), "xfs-clone") or "")


def test_a_parent_of_something_else_is_no_parent() -> None:
    assert "does not say" in (
        doubt_about_base(BASE, CLONE, parent_of(BASE, source="file"), "xfs-clone") or ""
    )
    parent = replace(parent_of(BASE), size=1)
    assert "another size" in (doubt_about_base(BASE, CLONE, parent, "xfs-clone") or "")


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A base, and a clone with data in its first page only; on no XFS, so what it is has to be told."""
    opened = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for name in ("base", "clone")]
    for fd, file in zip(opened, (BASE, CLONE), strict=True):
        os.truncate(fd, file.size)
        os.pwrite(fd, b"x" * PAGE, 0)
    yield opened[0], opened[1]
    for fd in opened:
        os.close(fd)


class Looks:
    """Answers for ``look_at``, by descriptor; the last one stays."""

    def __init__(self, **answers: list[ClonedFile]) -> None:
        self.base, self.clone = answers["base"], answers["clone"]
        self.base_fd = -1

    def __call__(self, fd: int) -> ClonedFile:
        left = self.base if fd == self.base_fd else self.clone
        return left.pop(0) if len(left) > 1 else left[0]


def look(monkeypatch: pytest.MonkeyPatch, base_fd: int, **answers: list[ClonedFile]) -> None:
    looks = Looks(**{"base": [BASE], "clone": [CLONE], **answers})
    looks.base_fd = base_fd
    monkeypatch.setattr(fiemap, "look_at", looks)


def maps_say(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    def compare_maps(base_fd: int, clone_fd: int) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(fiemap, "compare_maps", compare_maps)


MOVED = (ExtentList.of([(PAGE, PAGE)]), ExtentList.of([(50 * PAGE, PAGE)]))


def test_what_the_maps_say_is_the_answer(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    look(monkeypatch, descriptors[0])
    maps_say(monkeypatch, MOVED)
    found = find_fiemap_changes(*descriptors, parent_of(BASE))
    assert (found.method, found.inherits) == ("fiemap", True)
    assert (found.changed, found.discarded) == MOVED
    # Its data near what was discarded, and near the ends, is told as well.
    assert found.allocated == ExtentList.of([(0, 2 * PAGE)])


@pytest.mark.parametrize("err", [ValueError("delayed"), OSError(95, "not supported")])
def test_maps_that_cannot_be_compared(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch, err: Exception
) -> None:
    look(monkeypatch, descriptors[0])
    maps_say(monkeypatch, err)
    check_all_is_read(find_fiemap_changes(*descriptors, parent_of(BASE)), "cannot be compared")


def check_all_is_read(found: fiemap.Changes, reason: str) -> None:
    assert (found.method, found.inherits) == ("compare", False)
    assert reason in found.reason
    assert found.changed == found.allocated == ExtentList.of([(0, PAGE)])
    assert not found.discarded


def test_without_a_parent_or_a_base(descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, descriptors[0])
    maps_say(monkeypatch, AssertionError("nobody asks the maps"))
    check_all_is_read(find_fiemap_changes(*descriptors, None), "first backup")
    check_all_is_read(find_fiemap_changes(None, descriptors[1], parent_of(BASE)), "not on this host")
    look(monkeypatch, descriptors[0], base=[replace(BASE, size=7)])
    check_all_is_read(find_fiemap_changes(*descriptors, parent_of(BASE)), "another size")


def test_a_base_that_changes_meanwhile(descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, descriptors[0], base=[BASE, replace(BASE, changed_ns=2_001)])
    maps_say(monkeypatch, MOVED)
    check_all_is_read(find_fiemap_changes(*descriptors, parent_of(BASE)), "changed while")


@pytest.mark.parametrize("parent", [None, parent_of(BASE)])
def test_a_clone_that_changes_meanwhile(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch, parent: Parent | None
) -> None:
    look(monkeypatch, descriptors[0], clone=[CLONE, replace(CLONE, modified_ns=1_001)])
    maps_say(monkeypatch, MOVED)
    with pytest.raises(VolumeError, match="written to"):
        find_fiemap_changes(*descriptors, parent)


def test_what_is_not_on_xfs_is_read(descriptors: tuple[int, int], tmp_path: Path) -> None:
    memory = os.memfd_create("clone")
    try:
        os.truncate(memory, 10 * PAGE)
        os.pwrite(memory, b"x", 0)
        with pytest.raises(NotXfsError, match="not on XFS"):
            look_at(memory)
        check_all_is_read(find_fiemap_changes(descriptors[0], memory, parent_of(BASE)), "not on XFS")
    finally:
        os.close(memory)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(NotXfsError, match="not a regular file"):
            look_at(folder)
    finally:
        os.close(folder)
