"""A run that is killed at any step, and what the next run or `doctor --fix` makes of it, on real LVM."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import lvm
from support.in_process import InProcess
from support.killed import killed
from support.lvm_lab import ThinPool, tool, write_at

KIB, MIB = 1 << 10, 1 << 20
SOAK = pytest.mark.skipif("BLOCKSNAP_SOAK" not in os.environ, reason="make soak-kill runs it")


@pytest.fixture
def volumes(pool: ThinPool) -> Iterator[list[str]]:
    """Two small volumes, and what others have: a snapshot, and a volume with a name like ours."""
    names = [pool.create(name, "4M") for name in ("one", "two")]
    for name in ("one", "two"):
        write_at(pool.node(name), 0, os.urandom(MIB))
    tool("lvcreate", "-s", "-n", "theirs", names[0])
    pool.create("blocksnap-lookalike", "4M")
    yield names
    for name in pool.names():
        if name.startswith("blocksnap-") or name in ("one", "two", "theirs"):
            pool.remove(name)


def held_root(pool: ThinPool) -> str:
    name = f"{pool.group.replace('-', '--')}-{pool.pool.replace('-', '--')}-tpool"
    return tool("dmsetup", "status", "--noflush", name).split()[6]


def our_snapshots(pool: ThinPool) -> dict[str, str]:
    """The names of all that carries our tag, with its tags."""
    words = ("--noheadings", "--separator", "|", "-o", "lv_name,lv_tags", "--select", "lv_tags=blocksnap")
    lines = tool("lvs", "-a", *words, pool.group).split()
    return {line.split("|")[0]: line.split("|")[1] for line in lines}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", ["one", pytest.param("group", marks=SOAK)])
def test_killed_at_every_step(pool: ThinPool, volumes: list[str], blocksnap: InProcess, case: str) -> None:
    """Nothing of ours stays, nothing else is touched, and the next incremental is the volume itself."""
    chosen, base = (volumes, "keep") if case == "group" else (volumes[:1], "none")
    nodes = [pool.node(name.partition("/")[2]) for name in chosen]
    blocksnap.done("backup", *chosen, "--base", base)
    foreign = set(pool.names()) - set(our_snapshots(pool))
    for step in range(60):
        for node in nodes:
            write_at(node, step % 16 * 64 * KIB, os.urandom(4 * KIB))
        if not killed(step, "backup", *chosen, "--base", base, "-q"):
            break
        code, out, err = blocksnap("doctor", "--fix", "--json")
        assert (code, json.loads(out)["failed"]) == (0, []), (step, out, err)
        ours = our_snapshots(pool)
        # Bases are left on purpose, at most one for each volume.
        assert all("blocksnap-base." in tags for tags in ours.values()), (step, ours)
        assert len(ours) <= (len(chosen) if base == "keep" else 0), (step, ours)
        assert os.listdir(blocksnap.folder / "state" / "journal") == []
    assert step > (12 if case == "group" else 8)
    assert step < 59
    assert held_root(pool) == "-"
    assert set(pool.names()) - set(our_snapshots(pool)) == foreign
    write_at(nodes[0], 5 * 64 * KIB, os.urandom(4 * KIB))
    assert blocksnap.backup(*chosen, "--base", base)["kind"] == "incremental"
    for name, node in zip(chosen, nodes, strict=True):
        out = blocksnap.done("restore", f"{name}@latest", "-")
        with open(node, "rb") as device:
            assert out == device.read()


def test_it_tells_and_changes_nothing_until_asked(
    pool: ThinPool, volumes: list[str], blocksnap: InProcess, tmp_path: Path
) -> None:
    assert blocksnap("doctor")[0] == 0
    # Far enough that the snapshot is there.
    assert killed(3, "backup", volumes[0], "-q")
    (snapshot,) = our_snapshots(pool)
    tool("lvchange", "-ay", "-K", f"{pool.group}/{snapshot}")
    code, out, _ = blocksnap("doctor", "--json")
    found = {each["subject"]: each for each in json.loads(out)["findings"]}
    assert code == 3
    left = found[f"{pool.group}/{snapshot}"]
    assert (left["ours"], left["severity"]) == (True, "warning")
    assert left["message"].endswith("left, active")
    assert len(found) == 2
    assert snapshot in pool.snapshots()
    # One that cannot be removed is told, with exit code 1, and the journal stays for the next try.
    with open(pool.node(snapshot), "rb"):
        lvm_attempts, lvm._REMOVE_ATTEMPTS = lvm._REMOVE_ATTEMPTS, 2
        try:
            code, out, err = blocksnap("doctor", "--fix")
        finally:
            lvm._REMOVE_ATTEMPTS = lvm_attempts
    assert (code, snapshot in pool.snapshots()) == (1, True)
    assert err.startswith("failed:  cannot remove")
    code, out, _ = blocksnap("doctor", "--fix")
    assert code == 0
    assert out.decode().splitlines()[0].startswith(f"fixed:   removed {pool.group}/{snapshot}")
    assert blocksnap("doctor")[1] == b"nothing found\n"


def test_metadata_snapshots_and_suspended_volumes_of_others(
    pool: ThinPool, volumes: list[str], blocksnap: InProcess
) -> None:
    mapped = f"{pool.group.replace('-', '--')}"
    target = f"{mapped}-{pool.pool.replace('-', '--')}-tpool"
    tool("dmsetup", "message", target, "0", "reserve_metadata_snap")
    tool("dmsetup", "suspend", f"{mapped}-two")
    try:
        code, out, _ = blocksnap("doctor", "--fix", "--json")
        found = {each["subject"]: each for each in json.loads(out)["findings"]}
        assert code == 1
        assert "metadata snapshot" in found[f"{pool.group}/{pool.pool}"]["message"]
        assert found[f"{mapped}-two"]["severity"] == "error"
        assert not any(each["ours"] for each in found.values())
        assert held_root(pool) != "-"
        assert (
            tool("dmsetup", "info", "-c", "--noheadings", "-o", "suspended", f"{mapped}-two").strip()
            == "Suspended"
        )
    finally:
        tool("dmsetup", "resume", f"{mapped}-two")
        tool("dmsetup", "message", target, "0", "release_metadata_snap")


def test_a_volume_that_a_dead_lvcreate_left_suspended(
    pool: ThinPool, volumes: list[str], blocksnap: InProcess
) -> None:
    # Dead right before lvcreate, which has suspended the volume and died as well.
    assert killed(1, "backup", volumes[0], "-q")
    name = f"{pool.group.replace('-', '--')}-one"
    tool("dmsetup", "suspend", name)
    try:
        code, out, _ = blocksnap("doctor", "--fix", "--json")
    finally:
        tool("dmsetup", "resume", name)
    assert code == 0, out
    assert any("left suspended" in message for message in json.loads(out)["fixed"])
