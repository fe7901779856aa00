"""Rolling a thin volume back in place: what differs is known without reading, and there is a way back."""

from __future__ import annotations

import itertools
import json
import os
import random
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from blocksnap.restore.place import Place
from support.in_process import InProcess
from support.lvm_lab import ThinPool, tool

MIB = 1 << 20
SIZE = 64 * MIB


def write(node: str, offset: int, data: bytes) -> None:
    fd = os.open(node, os.O_WRONLY)
    os.pwrite(fd, data, offset)
    os.fsync(fd)
    os.close(fd)


def content(node: str) -> bytes:
    return Path(node).read_bytes()


def in_place(blocksnap: InProcess, backup: str, target: str) -> dict[str, Any]:
    out = blocksnap.done("restore", backup, target, "--in-place", "--verify", "--json")
    done: dict[str, Any] = json.loads(out.splitlines()[-1])
    return done


def merge(volume: str, way_back: str) -> None:
    tool("lvchange", "-an", volume)
    tool("lvconvert", "--merge", way_back)
    tool("lvchange", "-ay", volume)


def test_to_any_backup_and_back(pool: ThinPool, blocksnap: InProcess) -> None:
    dice = random.Random(5)
    volume, node = pool.create("data"), pool.node("data")
    write(node, 0, dice.randbytes(20 * MIB))
    states, ids = [], []
    for _ in range(3):
        write(node, dice.randrange(40) * MIB, dice.randbytes(MIB))
        ids.append(blocksnap.backup(volume)["id"])
        states.append(content(node))
    # Since the last backup: something was written, something discarded.
    write(node, 50 * MIB, b"lately" * 1000)
    tool("blkdiscard", "-o", str(4 * MIB), "-l", str(2 * MIB), node)
    lately = content(node)
    told = in_place(blocksnap, ids[0], volume)
    assert (told["method"], content(node) == states[0]) == ("thin-time", True)
    assert 0 < told["written_bytes"] <= 8 * MIB
    way_back = told["way_back"]
    assert way_back.startswith(f"{volume}-before-")
    told = in_place(blocksnap, ids[2], volume)
    assert (told["method"], content(node) == states[2]) == ("thin-time", True)
    assert blocksnap.backup(volume)["method"] == "thin-time"
    assert in_place(blocksnap, ids[1], volume)["method"] == "thin-time"
    assert content(node) == states[1]
    # The way back is LVM's own merge.
    merge(volume, way_back)
    assert content(node) == lately


def test_without_a_backup_of_it_what_is_mapped_is_read(pool: ThinPool, blocksnap: InProcess) -> None:
    volume = pool.create("one")
    write(pool.node("one"), 0, random.Random(6).randbytes(3 * MIB))
    backup = blocksnap.backup(volume)["id"]
    other = pool.create("two")
    write(pool.node("two"), 2 * MIB, b"x" * 5 * MIB)
    told = in_place(blocksnap, backup, other)
    assert told["method"] == "compare"
    assert content(pool.node("two")) == content(pool.node("one"))
    blocksnap.backup(other)
    assert in_place(blocksnap, backup, other)["written_bytes"] <= MIB


def test_an_interrupted_one_goes_on(
    pool: ThinPool, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, node = pool.create("cut"), pool.node("cut")
    write(node, 0, random.Random(7).randbytes(16 * MIB))
    backup, state = blocksnap.backup(volume)["id"], content(node)
    write(node, 0, random.Random(8).randbytes(16 * MIB))
    lately, writes = content(node), itertools.count(1)
    whole_write = Place.write

    def interrupted(place: Place, offset: int, data: bytes | memoryview) -> None:
        if next(writes) == 5:
            raise KeyboardInterrupt
        whole_write(place, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", interrupted)
        code, _, err = blocksnap("restore", backup, volume, "--in-place")
    assert (code, "run again" in err) == (130, True), err
    assert content(node)[:9] == b"BLOCKSNAP"
    (first,) = [name for name in pool.names() if name.startswith("cut-before-")]
    told = in_place(blocksnap, backup, volume)
    assert content(node) == state
    # The snapshot taken first is the way back, not one of what was half written.
    assert told["way_back"] == f"{pool.group}/{first}"
    assert [name for name in pool.names() if name.startswith("cut-before-")] == [first]
    merge(volume, f"{pool.group}/{first}")
    assert content(node) == lately


def test_a_way_back_that_somebody_removes_is_told_and_nothing_else_is_lost(
    pool: ThinPool, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, node = pool.create("alone"), pool.node("alone")
    write(node, 0, random.Random(11).randbytes(8 * MIB))
    backup, state = blocksnap.backup(volume)["id"], content(node)
    write(node, 0, random.Random(12).randbytes(8 * MIB))
    whole_flush = Place.flush

    def removing(place: Place, *, cut: bool) -> None:
        pool.remove(*ways_back(pool, "alone"))
        if cut:
            raise KeyboardInterrupt
        whole_flush(place)

    # Between two runs: what is there now is half written, and no way back is made of it.
    with monkeypatch.context() as patch:
        patch.setattr(Place, "flush", partialmethod(removing, cut=True))
        assert blocksnap("restore", backup, volume, "--in-place")[0] == 130
    code, out, err = blocksnap("restore", backup, volume, "--in-place", "--verify")
    assert (code, err.count("is gone"), b"lvconvert" in out) == (3, 1, False), (out, err)
    assert (content(node) == state, ways_back(pool, "alone")) == (True, [])
    # While it runs.
    write(node, 0, random.Random(13).randbytes(8 * MIB))
    with monkeypatch.context() as patch:
        patch.setattr(Place, "flush", partialmethod(removing, cut=False))
        code, out, err = blocksnap("restore", backup, volume, "--in-place", "--json")
    done = json.loads(out.splitlines()[-1])
    assert (code, done["way_back"], content(node) == state) == (3, None, True), (out, err)
    assert [b"is gone" in line for line in out.splitlines()].count(True) == 1


def ways_back(pool: ThinPool, name: str) -> list[str]:
    return [each for each in pool.names() if each.startswith(f"{name}-before-")]


def test_new_volumes_of_every_kind(pool: ThinPool, blocksnap: InProcess) -> None:
    volume = pool.create("made")
    write(pool.node("made"), MIB, random.Random(9).randbytes(4 * MIB))
    blocksnap.backup(volume)
    expected = content(pool.node("made"))
    group = pool.group
    blocksnap.done("restore", "latest", f"{group}/classic", "--create", "--classic", "--size", "96M")
    assert tool("lvs", "--noheadings", "-o", "segtype", f"{group}/classic").strip() == "linear"
    restored = content(pool.node("classic"))
    assert (len(restored), restored[:SIZE] == expected) == (96 * MIB, True)
    for words in (("--classic", "--pool", pool.pool), ("--size", "8M")):
        assert blocksnap("restore", "latest", f"{group}/no", "--create", *words)[0] == 2
    assert in_place(blocksnap, "latest", f"{group}/classic")["written_bytes"] == 0
    tool("lvcreate", "-y", "-qq", "-L", "8M", "-n", "small", group)
    code, _, err = blocksnap("restore", "latest", f"{group}/small")
    assert (code, "small" in err, "--create" in err) == (1, True, True)


def test_a_new_volume_that_is_interrupted_is_taken_over(
    pool: ThinPool, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = pool.create("whole")
    write(pool.node("whole"), 0, random.Random(10).randbytes(24 * MIB))
    blocksnap.backup(volume)
    target, writes = f"{pool.group}/again", itertools.count(1)
    whole_write = Place.write
    monkeypatch.setattr("blocksnap.restore.place._RECORD_SECONDS", 0.0)
    monkeypatch.setattr("blocksnap.restore.plan._FIRST_CHUNKS", 16)

    def interrupted(place: Place, offset: int, data: bytes | memoryview) -> None:
        if next(writes) == 15:
            raise KeyboardInterrupt
        whole_write(place, offset, data)

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", interrupted)
        assert blocksnap("restore", "latest", target, "--create")[0] == 130
    tags = tool("lvs", "--noheadings", "-o", "lv_tags", target)
    assert "blocksnap.restoring" in tags
    blocksnap.done("restore", "latest", target, "--create", "--verify")
    assert content(pool.node("again")) == content(pool.node("whole"))
    assert "blocksnap" not in tool("lvs", "--noheadings", "-o", "lv_tags", target)
