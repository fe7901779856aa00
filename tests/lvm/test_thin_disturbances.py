"""Thin volumes under every kind of disturbance, by times with nothing kept and by trees with a base.

One volume keeps a base and one keeps nothing; the same is done to both, both are backed up at one instant,
and what is said to have changed has to lead from the last backup to this one, byte for byte, by the method
that is expected and without reading more than the chunks that were touched.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.lvm_lab import ThinPool, thin_pool, tool
from support.thin_lab import OWNER, Disturbed, Group

KIB, MIB = 1 << 10, 1 << 20
SIZE = 12 * MIB
BY_BOTH = ("thin-time", "thin-tree")
COMPARED = ("compare", "compare")


@pytest.fixture(scope="module")
def disturbed_pool(_lab: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThinPool]:
    with thin_pool(tmp_path_factory.mktemp("pool")) as made:
        yield made


@pytest.fixture(scope="module")
def group(disturbed_pool: ThinPool, tmp_path_factory: pytest.TempPathFactory) -> Group:
    return begin(disturbed_pool, "1.x", tmp_path_factory.mktemp("state"), 64 * KIB)


def begin(pool: ThinPool, suffix: str, state: Path, chunk_size: int) -> Group:
    """Make two volumes with some data, and take a first backup of each."""
    volumes = [Disturbed(pool, f"bare-{suffix}", stays=False), Disturbed(pool, f"based-{suffix}", stays=True)]
    for each in volumes:
        pool.create(each.name, f"{SIZE}b")
        each.write(0, os.urandom(3 * MIB))
        each.write(8 * MIB, os.urandom(MIB))
    made = Group(volumes, state, chunk_size)
    reasons = made.take(COMPARED)
    assert reasons == ["first backup of this volume"] * 2
    return made


def scatter(each: Disturbed, seed: int, count: int = 5, size: int = SIZE) -> None:
    dice = random.Random(seed)
    for _ in range(count):
        length = dice.choice([512, 4 * KIB, 100 * KIB])
        each.write(dice.randrange(0, size - length) // 512 * 512, dice.randbytes(length))


# The order of the tests is the history of the two volumes; each begins where the one before it ended.


def test_an_idle_volume_has_no_changes(group: Group) -> None:
    group.take(BY_BOTH)
    for each in group.volumes:
        assert each.last is not None
        assert not each.last.changes.changed
        assert not each.last.changes.discarded


def test_foreign_snapshots_come_and_go(group: Group, disturbed_pool: ThinPool) -> None:
    pool = disturbed_pool
    other = pool.create("other", "4M")
    for number, each in enumerate(group.volumes):
        scatter(each, 1)
        tool("lvcreate", "-s", "-n", f"theirs{number}", each.full_name)
        tool("lvcreate", "-s", "-n", f"short{number}", each.full_name)
        # The same chunks again, so that they are copied once more, and a snapshot of the snapshot.
        scatter(each, 1)
        pool.remove(f"short{number}")
        tool("lvcreate", "-s", "-kn", "-n", f"second{number}", f"{pool.group}/theirs{number}")
        scatter(each, 2)
    tool("lvcreate", "-s", "-n", "other-snap", other)
    group.take(BY_BOTH)
    for number, each in enumerate(group.volumes):
        pool.remove(f"theirs{number}")
        scatter(each, 2)
        scatter(each, 3)
        pool.remove(f"second{number}")
    pool.remove("other-snap", "other")
    group.take(BY_BOTH)


def test_the_same_data_written_again(group: Group) -> None:
    for each in group.volumes:
        each.rewrite(MIB, 300 * KIB)
        each.rewrite(8 * MIB + 4 * KIB, 4 * KIB)
    group.take(BY_BOTH)


def test_discards_of_chunks_and_of_parts(group: Group) -> None:
    discard_chunks_and_parts(group)
    group.take(BY_BOTH)
    for each in group.volumes:
        assert each.last is not None
        assert each.last.changes.discarded.total == 4 * group.chunk_size


def discard_chunks_and_parts(group: Group) -> None:
    size = group.chunk_size
    for each in group.volumes:
        each.discard(2 * size, 3 * size)
        # Parts are dropped by the kernel: nothing changes, and nothing has to be read.
        each.discard(6 * size + 4 * KIB, size - 8 * KIB)
        each.discard(8 * size - 4 * KIB, size + 8 * KIB)
        # Mapped anew after it was unmapped, within one backup.
        each.discard(10 * size, size)
        each.write(10 * size + 8 * KIB, os.urandom(4 * KIB))
        # Never mapped at all.
        each.discard(6 * MIB, MIB)


def test_old_mappings_show_again_after_a_shrink(group: Group) -> None:
    for each in group.volumes:
        scatter(each, 4)
        each.resize(8 * MIB)
    group.take(BY_BOTH)
    for each in group.volumes:
        # The megabyte at 8 MiB, which the backup before never saw, is there again, and some more besides.
        each.resize(SIZE)
        each.resize(SIZE - 4 * MIB)
        each.resize(SIZE + 4 * MIB)
        scatter(each, 5, size=SIZE + 4 * MIB)
    group.take(BY_BOTH)
    for each in group.volumes:
        assert each.last is not None
        assert each.last.changes.changed.total >= MIB


def test_another_name_and_larger_metadata(group: Group, disturbed_pool: ThinPool) -> None:
    names = [each.name for each in group.volumes]
    tool("lvextend", "--poolmetadatasize", "+4M", f"{disturbed_pool.group}/{disturbed_pool.pool}")
    for each in group.volumes:
        tool("lvrename", disturbed_pool.group, each.name, f"{each.name}-renamed")
        each.name += "-renamed"
        scatter(each, 6)
    group.take(BY_BOTH)
    for each, name in zip(group.volumes, names, strict=True):
        tool("lvrename", disturbed_pool.group, each.name, name)
        each.name = name


def test_a_merge_brings_back_old_content(group: Group, disturbed_pool: ThinPool) -> None:
    for number, each in enumerate(group.volumes):
        scatter(each, 8)
        tool("lvcreate", "-s", "-kn", "-n", f"before{number}", each.full_name)
        scatter(each, 9)
        tool("lvconvert", "--merge", f"{disturbed_pool.group}/before{number}")
    # LVM has forgotten whose snapshot the base is; the base knows, and a tree is a tree.
    (based,) = (each for each in group.volumes if each.stays)
    assert (
        tool("lvs", "--noheadings", "-o", "origin", f"{disturbed_pool.group}/{based.bases[0]}").strip() == ""
    )
    reasons = group.take(("compare", "thin-tree"), bounded=False)
    assert "as after a merge" in reasons[0]
    for each in group.volumes:
        scatter(each, 10)
    group.take(BY_BOTH)


def test_reverting_to_the_base_itself(group: Group, disturbed_pool: ThinPool) -> None:
    bare, based = group.volumes
    before = based.last
    scatter(based, 11)
    scatter(bare, 11)
    tool("lvconvert", "--merge", f"{disturbed_pool.group}/{based.bases[0]}")
    reasons = group.take(("thin-time", "compare"))
    assert "as after a merge" in reasons[1]
    assert "the base snapshot of the parent backup is gone" in reasons[1]
    assert before is not None
    assert based.last is not None
    assert based.last.content == before.content


@pytest.mark.parametrize("how", ["removed", "replaced", "written to", "of another run"])
def test_a_base_that_cannot_be_used(group: Group, disturbed_pool: ThinPool, how: str) -> None:
    """The volume falls back on times, and says why."""
    pool = disturbed_pool
    bare, based = group.volumes
    (base,) = based.bases
    path = f"{pool.group}/{base}"
    tags = tool("lvs", "--noheadings", "-o", "lv_tags", path).strip().split(",")
    if how in ("removed", "replaced"):
        pool.remove(base)
    if how == "replaced":
        tool(
            "lvcreate",
            "-s",
            "-pr",
            *(w for tag in tags for w in ("--addtag", tag)),
            "-n",
            base,
            based.full_name,
        )
    if how == "written to":
        tool("lvchange", "-prw", path)
        tool("lvchange", "-ay", "-K", path)
        fd = os.open(pool.node(base), os.O_WRONLY)
        os.pwrite(fd, b"x", 5 * MIB)
        os.fsync(fd)
        os.close(fd)
        tool("lvchange", "-an", path)
    if how == "of another run":
        (run,) = (tag for tag in tags if tag.startswith("blocksnap."))
        tool("lvchange", "--deltag", run, "--addtag", "blocksnap.other", path)
    scatter(bare, 12)
    scatter(based, 12)
    reasons = group.take(("thin-time", "thin-time"))
    expected = {
        "removed": "the base snapshot of the parent backup is gone",
        "replaced": "the base snapshot is not that of the parent backup",
        "written to": "the base snapshot was changed since the parent backup",
        "of another run": "the base snapshot of the parent backup is gone",
    }
    assert reasons[1].endswith(f"; the base is not used: {expected[how]}")


def test_a_base_stays_asleep(group: Group, disturbed_pool: ThinPool) -> None:
    (base,) = group.volumes[1].bases
    tool("vgchange", "-ay", disturbed_pool.group)
    fields = "lv_active,lv_permissions,lv_skip_activation"
    said = tool("lvs", "--noheadings", "--separator", "|", "-o", fields, f"{disturbed_pool.group}/{base}")
    assert said.strip() == "|read-only|skip activation"
    assert OWNER in tool("lvs", "--noheadings", "-o", "lv_tags", f"{disturbed_pool.group}/{base}")


def test_a_repaired_pool(group: Group, disturbed_pool: ThinPool) -> None:
    pool = f"{disturbed_pool.group}/{disturbed_pool.pool}"
    for each in group.volumes:
        scatter(each, 14)
    tool("vgchange", "-an", disturbed_pool.group)
    tool("lvconvert", "-y", "--repair", pool)
    tool("vgchange", "-ay", disturbed_pool.group)
    reasons = group.take(COMPARED)
    assert "as a repair does" in reasons[0]
    assert reasons[1].count("as a repair does") == 2
    for each in group.volumes:
        scatter(each, 15)
    group.take(BY_BOTH)
    assert group.volumes[1].bases


def test_it_goes_with_the_policy(group: Group) -> None:
    """A job that does not keep a base any more leaves none."""
    bare, based = group.volumes
    bare.stays, based.stays = True, False
    for each in group.volumes:
        scatter(each, 16)
    group.take(BY_BOTH)
    assert (len(bare.bases), based.bases) == (1, [])
    for each in group.volumes:
        scatter(each, 17)
    group.take(("thin-tree", "thin-time"))


def test_chunks_of_no_power_of_two(group: Group, disturbed_pool: ThinPool, tmp_path: Path) -> None:
    name, size = disturbed_pool.group, 192 * KIB
    words = ("--type", "thin-pool", "-L", "128M", "--poolmetadatasize", "4M", "--chunksize", f"{size}b")
    tool("lvcreate", "-y", *words, "-n", "coarse", name)
    pool = ThinPool(name, "coarse", tmp_path)
    coarse = begin(pool, "coarse", tmp_path / "state", size)
    for number, each in enumerate(coarse.volumes):
        scatter(each, 1)
        tool("lvcreate", "-s", "-n", f"coarse{number}", each.full_name)
        scatter(each, 1)
    discard_chunks_and_parts(coarse)
    coarse.take(BY_BOTH)
    for number, each in enumerate(coarse.volumes):
        pool.remove(f"coarse{number}")
        each.resize(8 * MIB)
        each.resize(SIZE)
        each.rewrite(8 * MIB, 300 * KIB)
    coarse.take(BY_BOTH)
