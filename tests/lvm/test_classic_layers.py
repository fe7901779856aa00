"""Classic volumes that lie on others of LVM: the legs of a RAID, a cache in front of the disk."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from blocksnap.errors import VolumeError
from blocksnap.volumes.resolve import resolve_volume
from support.classic_volume import ClassicVolume, classic_group, make_volume, read_device
from support.in_process import InProcess
from support.killed import killed
from support.lvm_lab import suspended, tool, write_at

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 128 * KIB
SIZE = 24 * MIB
NAME = "data"
BELOW = {
    "raid1": ["data_rimage_1", "data_rmeta_1", "data_rimage_0", "data_rmeta_0"],
    "cache": ["data_corig", "fast_cpool_cdata", "fast_cpool_cmeta"],
    "writecache": ["fast_cvol", "data_wcorig"],
}
"""What LVM suspends with the volume for a snapshot, in this order (lvcreate -vvvv)."""
SOAK = pytest.mark.skipif("BLOCKSNAP_SOAK" not in os.environ, reason="make soak-kinds runs it")


@pytest.fixture(scope="module")
def group(_lab: None) -> Iterator[str]:
    with classic_group() as made:
        yield made


@pytest.fixture(params=list(BELOW))
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def volume(group: str, kind: str) -> Iterator[ClassicVolume]:
    make_volume(group, NAME, SIZE, kind)
    made = ClassicVolume(group, NAME)
    write_at(made.node, 0, random.Random(1).randbytes(8 * MIB))
    yield made
    tool("lvremove", "-ff", "-y", f"{group}/{NAME}")


def test_backed_up_tracked_restored(kind: str, volume: ClassicVolume, blocksnap: InProcess) -> None:
    name = f"{volume.group}/{NAME}"
    first = blocksnap.backup(name, "--base", "keep")
    assert (first["volume_kind"], first["method"], first["volume_bytes"]) == ("classic", "compare", SIZE)
    before = read_device(volume.node)
    write_at(volume.node, 3 * MIB, os.urandom(5 * KIB))
    told = blocksnap.backup(name, "--base", "keep")
    assert (told["method"], told["read_bytes"]) == ("cow", CHUNK)
    assert blocksnap.done("restore", "latest", "-", "-q") == read_device(volume.node)
    listed = {each["name"]: each for each in json.loads(blocksnap.done("volumes", "--json"))["volumes"]}
    mine = [each for each in listed if each.startswith(volume.group)]
    assert [each for each in mine if "blocksnap" not in each] == [name]
    assert (listed[name]["kind"], listed[name]["tracking"], listed[name]["supported"]) == (
        "classic",
        "cow",
        True,
    )
    assert blocksnap.done("doctor") == b"nothing found\n"
    blocksnap.done("restore", first["id"], name, "--in-place", "--verify")
    assert read_device(volume.node) == before
    blocksnap.done("verify", first["id"], name)
    script = blocksnap.done("show", "latest", "--host").decode()
    assert f"# {name} was of type {kind}, and comes back linear" in script
    newest = json.loads(blocksnap.done("list", name, "--json"))["backups"][-1]["id"]
    assert f"blocksnap restore {newest} {name} --create --classic" in script


@pytest.mark.parametrize(
    "kind", ["raid1", *(pytest.param(each, marks=SOAK) for each in ("cache", "writecache"))]
)
def test_what_a_dead_lvcreate_left_suspended_goes_on(
    kind: str, volume: ClassicVolume, blocksnap: InProcess
) -> None:
    name = f"{volume.group}/{NAME}"
    blocksnap.backup(name, "--base", "keep")
    (base,) = (
        each.strip()
        for each in tool("lvs", "--noheadings", "-o", "lv_name", volume.group).split()
        if "snap" in each
    )
    # Dead right before lvcreate, which has suspended everything and died as well.
    assert killed(1, "backup", name, "-q")
    nodes = [volume.node, volume.node_of(base), volume.node_of(NAME, "-real")]
    nodes += [*map(volume.node_of, BELOW[kind]), volume.node_of(base, "-cow")]
    try:
        for node in nodes:
            tool("dmsetup", "suspend", node)
        assert len(suspended()) == len(nodes)
        code, out, _ = blocksnap("doctor", "--fix", "--json")
        assert code == 0, out
        assert any("left suspended" in message for message in json.loads(out)["fixed"])
        assert suspended() == []
    finally:
        for node in reversed(nodes):
            subprocess.run(["dmsetup", "resume", node], check=False, capture_output=True)
    write_at(volume.node, 0, os.urandom(MIB))
    assert blocksnap.backup(name)["method"] == "cow"
    assert blocksnap.done("restore", "latest", "-", "-q") == read_device(volume.node)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("cachevol", "cached by a single volume"), ("integrity", "a RAID volume with integrity")],
)
def test_of_what_lvm_takes_no_snapshots(group: str, kind: str, message: str) -> None:
    make_volume(group, NAME, 8 * MIB, kind)
    try:
        with pytest.raises(VolumeError, match=message):
            resolve_volume(f"{group}/{NAME}")
        argv = ("lvcreate", "-y", "-s", "-pr", "-L", "8M", "-n", "tried", f"{group}/{NAME}")
        assert subprocess.run(argv, check=False, capture_output=True).returncode
    finally:
        subprocess.run(["lvchange", "-an", f"{group}/{NAME}"], check=False, capture_output=True)
        subprocess.run(["lvremove", "-ff", "-y", f"{group}/tried"], check=False, capture_output=True)
        tool("lvremove", "-ff", "-y", f"{group}/{NAME}")
