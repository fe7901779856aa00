"""Round after round of everything that can happen to an image: the diff of two clones makes one of the other.

``make soak-xfs`` runs more of the same: XFS_ROUNDS rounds of each kind of filesystem, from XFS_SEED on.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocksnap import _native
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.clone_identity import CloneIdentity
from blocksnap.extents.compare import compare_descriptors
from blocksnap.extents.fiemap import find_fiemap_changes
from blocksnap.extents.scan import data_near
from blocksnap.pipeline.flow import Geometry
from blocksnap.pipeline.selection import select_changed
from blocksnap.system.xfs import look_at
from support.file_ioctls import opened
from support.loops import call
from support.xfs_work import OPERATIONS, PAGE, Image, hammered, remove, xfs

ROUNDS = int(os.environ.get("XFS_ROUNDS", "40"))
CHUNK = 64 << 10
SEED = int(os.environ.get("XFS_SEED", "1"))


@dataclass
class Tally:
    """What the rounds came to."""

    rounds: int = 0
    reported: int = 0
    differing: int = 0
    discarded: int = 0


@pytest.mark.timeout(max(900, 60 + ROUNDS * 3))
@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("-m", "reflink=1,rmapbt=0"), None),
        (("-m", "reflink=1,rmapbt=1"), "extsize 65536"),
        (("-m", "reflink=1", "-b", "size=1024"), "cowextsize 4096"),
    ],
    ids=["plain", "rmapbt-extsize", "small-blocks"],
)
def test_rounds(tmp_path: Path, options: tuple[str, ...], hint: str | None) -> None:
    rng = random.Random(SEED)
    tally = Tally()
    with xfs(tmp_path, *options) as mount:
        if hint:
            call("xfs_io", "-c", hint, mount)
        image = Image(mount, rng)
        clones = [image.clone("clone-0")]
        remembered = [remember(clones[0])]
        for number in range(1, ROUNDS + 1):
            for _ in range(rng.randint(1, 8)):
                image.disturb()
            # Chance may have refused an operation each time that it has chosen it.
            for name in sorted(set(OPERATIONS) - set(image.counted)) if number == ROUNDS else ():
                image.insist(name)
            # An application that is not stopped, in every other round.
            if number % 2:
                clone = image.clone(f"clone-{number}")
                compare(clones[-1], clone, remembered[-1], tally)
            else:
                with hammered(image, seed=number):
                    clone = image.clone(f"clone-{number}")
                    compare(clones[-1], clone, remembered[-1], tally)
            # With an older base too: the clones in between are there, or not.
            compare(clones[0], clone, remembered[0], tally)
            clones.append(clone)
            remembered.append(remember(clone))
            if len(clones) > 3:
                gone = rng.randrange(len(clones) - 1)
                remove(clones.pop(gone))
                remembered.pop(gone)
        for clone in clones:
            remove(clone)
        counted = image.counted
    print(f"\n{tally} {dict(sorted(counted.items()))}")
    if ROUNDS >= 40:
        assert set(counted) == set(OPERATIONS), "some operation was refused every time"
    assert tally.rounds == 2 * ROUNDS
    assert tally.differing
    assert tally.discarded
    # Too wide is allowed, but it should not be everything.
    assert tally.reported < 6 * tally.differing


def remember(clone: Path) -> Parent:
    with opened(clone) as fd:
        file = look_at(fd)
    return Parent(
        file.size, CloneIdentity.of(file, "xfs-clone").to_binding(), known_here=True, load_mapped=lambda: None
    )


def compare(base: Path, clone: Path, parent: Parent, tally: Tally) -> None:
    with opened(base) as base_fd, opened(clone) as fd:
        found = find_fiemap_changes(base_fd, fd, parent)
        assert found.method == "fiemap", found.reason
        was, now = base.read_bytes(), clone.read_bytes()
        assert applied(found, was, now) == now
        # The other engine, which reads, agrees: no page that it finds is missing.
        truth = compare_descriptors(base_fd, fd)
        assert applied(truth, was, now) == now
        differing = truth.changed.union(truth.discarded)
        told = found.changed.union(found.discarded).align(PAGE, limit=len(now))
        assert differing.intersect(told) == differing
        assert backed_up(found, was, now) == now
        near = data_near(fd, found.discarded, size=len(now), parent_size=len(was))
        assert near.intersect(found.allocated) == near
    tally.rounds += 1
    tally.reported += found.changed.total + found.discarded.total
    tally.differing += differing.total
    tally.discarded += found.discarded.total


def applied(changes: Changes, base: bytes, later: bytes) -> bytes:
    """Do to the base what the changes say."""
    result = bytearray(base[: len(later)].ljust(len(later), b"\0"))
    end = 0
    for offset, length in changes.changed.union(changes.discarded).pairs():
        assert end <= offset < offset + length <= len(later)
        end = offset + length
    for offset, length in changes.changed.pairs():
        result[offset : offset + length] = later[offset : offset + length]
    for offset, length in changes.discarded.pairs():
        result[offset : offset + length] = bytes(length)
    return bytes(result)


def backed_up(changes: Changes, base: bytes, later: bytes) -> bytes:
    """Put together what a backup has: chunks that are read, holes, and all others as the parent has them."""
    geometry = Geometry(len(later), CHUNK)
    selection = select_changed(
        geometry,
        allocated=changes.allocated,
        changed=changes.changed,
        discarded=changes.discarded,
        parent_size=len(base),
    )
    source = ["parent"] * geometry.count
    for begin, end in selection.holes:
        source[begin:end] = ["hole"] * (end - begin)
    for begin, end in selection.read:
        source[begin:end] = ["read"] * (end - begin)
    result = bytearray()
    for number, way in enumerate(source):
        begin, length = number * CHUNK, geometry.length(number)
        if way == "parent" and begin < len(base):
            chunk = base[begin : begin + CHUNK]
            # A chunk of zeros has no length of its own; any other is as long as it was.
            result += chunk if any(chunk) else bytes(length)
        else:
            result += later[begin : begin + length] if way == "read" else bytes(length)
    return bytes(result)


def test_a_map_of_many_windows(tmp_path: Path) -> None:
    """More extents than one answer of the kernel has, and again and again, without losing memory."""
    with xfs(tmp_path, "-m", "reflink=1") as mount:
        live = mount / "live"
        with opened(live, os.O_RDWR | os.O_CREAT) as fd:
            for number in range(5000):
                os.pwrite(fd, b"x" * PAGE, number * 2 * PAGE)
        image = Image.__new__(Image)
        image.folder, image.path = mount, live
        base = image.clone("base")
        with opened(live, os.O_RDWR) as fd:
            for number in range(0, 5000, 10):
                os.pwrite(fd, b"y", number * 2 * PAGE)
        clone = image.clone("clone")
        with opened(base) as base_fd, opened(clone) as fd:
            changed, discarded, base_records, records = _native.fiemap_diff(base_fd, fd)
            assert len(changed) == 500 * 16
            assert not discarded
            assert base_records == records == 5000
            descriptors = len(os.listdir("/proc/self/fd"))
            for _ in range(50):
                assert _native.fiemap_diff(base_fd, fd)[0] == changed
            assert len(os.listdir("/proc/self/fd")) == descriptors
        for path in (base, clone):
            remove(path)
