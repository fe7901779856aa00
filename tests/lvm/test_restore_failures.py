"""Targets that fail while they are written: it is said, nothing looks whole, and the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocksnap.restore.place import Place
from blocksnap.system import devmapper
from blocksnap.system.blockdev import slaves
from support.in_process import InProcess
from support.instant_restore import disconnect_all, restoring
from support.lvm_lab import ThinPool, tool

MIB = 1 << 20
SECTORS = 2048
"""In a MiB."""
SIZE = 48
_LEAST_FULL = 38
"""Percent of 64 MiB, where 40 is the limit and the write that would pass it has a MiB."""
NAME = "blocksnap-failing"
NODE = f"/dev/mapper/{NAME}"


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocksnap.restore.plan._FIRST_CHUNKS", 32)
    monkeypatch.setattr("blocksnap.restore.place._RECORD_SECONDS", 0.0)


@pytest.fixture
def content(blocksnap: InProcess, tmp_path: Path) -> bytes:
    source = tmp_path / "source.img"
    source.write_bytes(random.Random(3).randbytes(SIZE * MIB))
    blocksnap.done("backup", str(source), "-q")
    return source.read_bytes()


@pytest.fixture
def load(pool: ThinPool) -> Iterator[Callable[[str], None]]:
    """Yield a function that gives the target another table, of which ``{base}`` is a healthy device."""
    tool("lvcreate", "-y", "-qq", "-L", f"{SIZE + 8}M", "-n", "base", pool.group)
    base = pool.node("base")

    def change(table: str) -> None:
        table = table.format(base=base)
        if os.path.exists(NODE):
            tool("dmsetup", "load", NAME, "--table", table)
            tool("dmsetup", "resume", NAME)
        else:
            tool("dmsetup", "create", NAME, "--table", table)
        tool("udevadm", "settle")

    try:
        yield change
    finally:
        if os.path.exists(NODE):
            tool("dmsetup", "remove", "--retry", NAME)
        tool("lvremove", "-y", "-qq", f"{pool.group}/base")


WHOLE = f"0 {SIZE * SECTORS} linear {{base}} 0"
HALF_GONE = f"0 {20 * SECTORS} linear {{base}} 0\n{20 * SECTORS} {(SIZE - 20) * SECTORS} error"


def refused(blocksnap: InProcess, *options: str) -> str:
    code, _, err = blocksnap("restore", "latest", NODE, *options)
    assert code == 1, err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1, err
    assert NODE in err
    assert "run again" in err
    assert Path(NODE).read_bytes()[:9] == b"BLOCKSNAP"
    return err


def test_a_target_whose_end_cannot_be_written(
    blocksnap: InProcess, content: bytes, load: Callable[[str], None]
) -> None:
    load(HALF_GONE)
    code, _, err = blocksnap("restore", "latest", NODE)
    assert code == 1, err
    assert "Input/output error" in err
    load(WHOLE)
    assert Path(NODE).read_bytes()[:9] == b"BLOCKSNAP"
    blocksnap.done("restore", "latest", NODE, "--verify")
    assert Path(NODE).read_bytes() == content


def test_a_target_that_begins_to_fail(
    blocksnap: InProcess, content: bytes, load: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("modprobe", "dm-flakey")
    load(WHOLE)
    at_write(monkeypatch, 12, lambda: load(f"0 {SIZE * SECTORS} flakey {{base}} 0 0 600 1 error_writes"))
    code, _, err = blocksnap("restore", "latest", NODE)
    assert code == 1, err
    assert "Input/output error" in err
    load(WHOLE)
    assert Path(NODE).read_bytes()[:9] == b"BLOCKSNAP"
    blocksnap.done("restore", "latest", NODE)
    assert Path(NODE).read_bytes() == content


def test_a_target_that_shrinks(
    blocksnap: InProcess, content: bytes, load: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(WHOLE)
    at_write(monkeypatch, 12, lambda: load(f"0 {16 * SECTORS} linear {{base}} 0"))
    err = refused(blocksnap)
    # What was under way beyond the new end is an I/O error; what comes later is told that there is no room.
    assert "made smaller meanwhile" in err or "Input/output error" in err
    code, _, err = blocksnap("restore", "latest", NODE)
    assert (code, f"has {16 * MIB} bytes and the backup needs" in err) == (1, True)
    load(WHOLE)
    blocksnap.done("restore", "latest", NODE, "--in-place", "--verify")
    assert Path(NODE).read_bytes() == content


def test_a_target_that_shrinks_when_all_is_written(
    blocksnap: InProcess, content: bytes, load: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(WHOLE)
    whole_flush = Place.flush

    def flush(place: Place) -> None:
        whole_flush(place)
        load(f"0 {16 * SECTORS} linear {{base}} 0")

    monkeypatch.setattr(Place, "flush", flush)
    assert f"has {16 * MIB} bytes and the backup needs" in refused(blocksnap)


def test_a_pool_is_never_filled(
    blocksnap: InProcess, content: bytes, pool: ThinPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other volumes would stand still. What would be too much ends before, unless LVM makes room."""
    limits(blocksnap, "restore_wait_seconds = 1")
    tool("lvcreate", "-y", "-qq", "--type", "thin-pool", "-L", f"{SIZE // 2}M", "-n", "tiny", pool.group)
    target = f"{pool.group}/restored"
    fullest = 0.0
    write = Place.write

    def looking(place: Place, offset: int, data: bytes | memoryview) -> None:
        nonlocal fullest
        write(place, offset, data)
        (number,) = slaves(os.stat(f"/dev/{target}").st_rdev)
        fullest = max(fullest, devmapper.pool_status(number).data_percent)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Place, "write", looking)
            code, _, err = blocksnap("restore", "latest", target, "--create", "--pool", "tiny")
        assert (code, f"lvextend --size +SIZE {pool.group}/tiny" in err) == (1, True), err
        assert 40 < fullest < 100
        assert "restored" not in pool.names()
        tool("lvextend", "-qq", "-L", f"{SIZE + 16}M", f"{pool.group}/tiny")
        blocksnap.done("restore", "latest", target, "--create", "--pool", "tiny")
        assert Path(f"/dev/{target}").read_bytes()[: len(content)] == content
    finally:
        disconnect_all()
        tool("lvremove", "-y", "-qq", f"{pool.group}/tiny")


def test_a_restore_ends_where_its_limits_say(
    blocksnap: InProcess, content: bytes, pool: ThinPool, tmp_path: Path
) -> None:
    """A new volume, an instant restore, one in place; and zeros that are written take room like anything."""
    limits(blocksnap, "restore_wait_seconds = 0\nrestore_data_percent = 40")
    zeros = tmp_path / "zeros.img"
    zeros.write_bytes(bytes(SIZE * MIB))
    blocksnap.done("backup", str(zeros), "-q")
    tool("lvcreate", "-y", "-qq", "--type", "thin-pool", "-L", f"{SIZE + 16}M", "-n", "tiny", pool.group)
    target, into, data = f"{pool.group}/restored", ("--pool", "tiny"), f"{tmp_path}/source.img@latest"
    try:
        for backup in (data, f"{zeros}@latest"):
            code, _, err = blocksnap("restore", backup, target, "--create", *into)
            assert (code, "limits.restore_data_percent = 40" in err) == (1, True), err
            assert "restored" not in pool.names()
        with restoring(data, target, *into) as run:
            run.until("warning")
            assert "limits.restore_data_percent = 40" in str(run.events)
            assert _LEAST_FULL < fullness(pool, "tiny") < 55
            assert run.end(signal.SIGTERM) == 143
        blocksnap.done("restore", "--instant", "--abandon", target)
        tool("lvcreate", "-y", "-qq", "-V", f"{SIZE}M", "--thinpool", "tiny", "-n", "restored", pool.group)
        code, _, err = blocksnap("restore", data, target, "--in-place")
        assert (code, "limits.restore_data_percent = 40" in err) == (1, True), err
        assert _LEAST_FULL < fullness(pool, "tiny") < 55
    finally:
        disconnect_all()
        tool("lvremove", "-y", "-qq", f"{pool.group}/tiny")


def test_what_waits_does_not_hold_up_the_end(blocksnap: InProcess, content: bytes, pool: ThinPool) -> None:
    """For room in the pool, or in an instant restore for its turn."""
    limits(blocksnap, "restore_wait_seconds = 3600\nrestore_data_percent = 40")
    tool("lvcreate", "-y", "-qq", "--type", "thin-pool", "-L", f"{SIZE + 16}M", "-n", "tiny", pool.group)
    target, into = f"{pool.group}/restored", ("--pool", "tiny")
    waits = telling("blocksnap.restore.pool_watch", "PoolWatch", "_look")
    paced = telling("blocksnap.operations.bringing", "Bringing", "_hold_back")
    try:
        with restoring("latest", target, "--create", *into, instant=False, prelude=waits) as run:
            run.until("told")
            assert run.end(signal.SIGTERM) == 143
        tool("lvremove", "-y", "-qq", target)
        with restoring("latest", target, *into, "--rate", "1K", prelude=paced) as run:
            run.until("told")
            assert run.end(signal.SIGTERM) == 143
        blocksnap.done("restore", "--instant", "--abandon", target)
    finally:
        disconnect_all()
        tool("lvremove", "-y", "-qq", f"{pool.group}/tiny")


def telling(module: str, name: str, method: str) -> str:
    """Return Python by which a process tells as an event that a method has returned something to wait for."""
    return (
        f"from {module} import {name} as kind\n"
        f"whole = kind.{method}\n"
        "def call(*words):\n"
        "    found = whole(*words)\n"
        # With its end in one piece: others print as well.
        '    found and print(\'{"event": "told"}\\n\', end="", flush=True)\n'
        "    return found\n"
        f"kind.{method} = call\n"
    )


def test_a_signal_is_not_hidden_by_a_target_that_fails_too(
    blocksnap: InProcess, content: bytes, load: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("modprobe", "dm-flakey")
    load(WHOLE)

    def fail() -> None:
        load(f"0 {SIZE * SECTORS} flakey {{base}} 0 0 600 1 error_writes")
        os.kill(os.getpid(), signal.SIGTERM)

    at_write(monkeypatch, 24, fail)
    code, _, err = blocksnap("restore", "latest", NODE)
    assert (code, err.splitlines()[-1].startswith("terminated")) == (143, True), err
    load(WHOLE)
    blocksnap.done("restore", "latest", NODE)
    assert Path(NODE).read_bytes() == content


def limits(blocksnap: InProcess, text: str) -> None:
    (blocksnap.folder / "blocksnap.toml").write_text(f"[defaults.limits]\n{text}\n")


def fullness(pool: ThinPool, name: str) -> float:
    return float(tool("lvs", "--noheadings", "-o", "data_percent", f"{pool.group}/{name}"))


def at_write(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something right before one of the writes, and have the others wait for it."""
    whole_write, writes, lock = Place.write, iter(range(1, 1 << 30)), threading.Lock()

    def write(place: Place, offset: int, data: bytes | memoryview) -> None:
        with lock:
            if next(writes) == number:
                act()
        whole_write(place, offset, data)

    monkeypatch.setattr(Place, "write", write)
