# SPDX-License-Identifier: Apache-2.0
"""Volumes that are used while they are restored: right data, whatever dies meanwhile, and nothing left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.in_process import InProcess
from support.lvm_lab import ThinPool, tool
from support.require import require

MIB = 1 << 20
ROWS = 2000
SLOW = ("--rate", "2M")


@pytest.fixture(autouse=True)
def _programs() -> None:
    require("nbdkit", Path("/usr/sbin/nbdkit").exists() or Path("/usr/bin/nbdkit").exists(), "needs nbdkit")


@pytest.fixture
def blocksnap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    command = InProcess(tmp_path, monkeypatch, capsysbinary)
    command.done("init")
    return command


class Restoring:
    """A restore that runs as a process of its own."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "blocksnap", "restore", *words, "--instant", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []

    def until(self, name: str) -> dict[str, Any]:
        """Read events up to one of this name."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError((name, self.events, self.process.communicate()))

    def done(self) -> int:
        """Wait for the end and return the exit code."""
        self.until("done")
        self.process.communicate(timeout=120)
        return self.process.returncode

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=120)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode


@contextmanager
def restoring(*words: str) -> Iterator[Restoring]:
    run = Restoring(*words)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.communicate()


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    tool("mount", device, str(folder))
    try:
        yield folder
    finally:
        tool("umount", str(folder))


def arrived_share(name: str) -> float:
    """Tell from the table of the device below which share of the volume is read from the volume itself."""
    lines = [line.split() for line in tool("dmsetup", "table", name).splitlines()]
    lengths = dict.fromkeys((True, False), 0)
    for line in lines:
        lengths[line[3].startswith("43:")] += int(line[1])
    return lengths[False] / sum(lengths.values())


def nothing_is_left(pool: ThinPool, name: str) -> None:
    """The volume is one of LVM's, and all that was made for it is gone."""
    assert [each for each in pool.names() if "arriving" in each or "meanwhile" in each] == []
    assert "blocksnap" not in tool("lvs", "--noheadings", "-o", "lv_tags", f"{pool.group}/{name}")
    devices = tool("dmsetup", "ls")
    assert "blocksnap" not in devices
    assert [p for p in Path("/sys/block").glob("nbd*/backend") if p.read_text().startswith("blocksnap")] == []
    assert list((Path(os.environ["BLOCKSNAP_STATE_DIRECTORY"]) / "instant").glob("*.json")) == []


def fill(folder: Path) -> dict[str, str]:
    """Put files and a database on a filesystem; return the digests of the files."""
    dice = random.Random(3)
    digests = {}
    for number in range(12):
        content = dice.randbytes(3 * MIB)
        (folder / f"file {number}").write_bytes(content)
        digests[f"file {number}"] = hashlib.sha256(content).hexdigest()
    with closing(open_database(folder)) as database, database:
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, body TEXT)")
        rows = [(number, f"row {number} " * 20) for number in range(ROWS)]
        database.executemany("INSERT INTO rows VALUES (?, ?)", rows)
    return digests


def open_database(folder: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / "database")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def use(folder: Path, since: int, count: int) -> None:
    """Query and write the database, as an application that goes on."""
    with closing(open_database(folder)) as database:
        assert database.execute("SELECT count(*) FROM rows").fetchone() == (ROWS + since,)
        with database:
            for number in range(since, since + count):
                database.execute("INSERT INTO rows VALUES (?, ?)", (ROWS + number, f"new {number}"))
                database.execute("UPDATE rows SET body = 'changed' WHERE id = ?", (number,))


def judge(folder: Path, digests: dict[str, str], new: int) -> None:
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in digests}
    assert found == digests
    with closing(open_database(folder)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        bodies = dict(database.execute("SELECT id, body FROM rows"))
    assert len(bodies) == ROWS + new
    assert all(bodies[number] == "changed" for number in range(new))
    assert all(bodies[ROWS + number] == f"new {number}" for number in range(new))
    assert bodies[ROWS - 1] == f"row {ROWS - 1} " * 20


@pytest.fixture
def lost(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A volume with a filesystem and a database, which was backed up and then removed."""
    volume = pool.create("data", "80M")
    tool("mkfs.ext4", "-q", pool.node("data"))
    with mounted(pool.node("data"), tmp_path / "mnt") as folder:
        digests = fill(folder)
        tool("sync")
    blocksnap.backup(volume)
    pool.remove("data")
    yield digests
    clean_up(pool)


def clean_up(pool: ThinPool) -> None:
    """Remove what a test has restored, also where it failed halfway."""
    name = f"{pool.group.replace('-', '--')}-data"
    for device in (name, f"{name}-blocksnap"):
        subprocess.run(["dmsetup", "remove", device], check=False, capture_output=True)
    for each in pool.names():
        if each.startswith("data"):
            tool("lvremove", "-y", f"{pool.group}/{each}")


def test_used_at_once_and_whole_in_the_end(pool: ThinPool, lost: dict[str, str], tmp_path: Path) -> None:
    volume = f"{pool.group}/data"
    below = f"{pool.group.replace('-', '--')}-data-blocksnap"
    with restoring("latest", volume, *SLOW) as run:
        told = run.until("usable")
        assert told["device"] == f"/dev/{volume}"
        with mounted(told["device"], tmp_path / "mnt") as folder:
            use(folder, 0, 50)
            share = arrived_share(below)
            assert share < 0.1, f"{share:.0%} had arrived"
            assert run.process.poll() is None
            assert run.done() == 0
            # The mount has never gone, and the volume is LVM's own now.
            use(folder, 50, 20)
            nothing_is_left(pool, "data")
        with mounted(pool.node("data"), tmp_path / "mnt") as folder:
            judge(folder, lost, 70)
    tool("e2fsck", "-fn", pool.node("data"))
    tool("lvchange", "-an", volume)
    tool("lvchange", "-ay", volume)
    with mounted(pool.node("data"), tmp_path / "mnt") as folder:
        judge(folder, lost, 70)
    print("usable after", told["seconds"], "s with", f"{share:.1%} arrived")


def test_a_server_that_is_killed_only_makes_wait(
    pool: ThinPool, lost: dict[str, str], tmp_path: Path
) -> None:
    volume = f"{pool.group}/data"
    with restoring("latest", volume, *SLOW) as run:
        device = run.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 10)
            (folder / "written alone").write_bytes(b"before" * 1000)
            os.sync()
            run.end(signal.SIGKILL)
            read: list[str] = []

            def look() -> None:
                read.append(hashlib.sha256((folder / "file 11").read_bytes()).hexdigest())

            reader = threading.Thread(target=look)
            reader.start()
            # What is written, and read again, needs nobody.
            fd = os.open(folder / "written alone", os.O_RDWR)
            os.pwrite(fd, b"x" * 5000, 0)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 6000, 0) == b"x" * 5000 + (b"before" * 1000)[5000:]
            os.close(fd)
            reader.join(2)
            assert (reader.is_alive(), read) == (True, [])
            with restoring("--resume", volume) as again:
                again.until("usable")
                reader.join(60)
                assert read == [lost["file 11"]]
                use(folder, 10, 10)
                assert again.done() == 0
            judge(folder, lost, 20)
            assert (folder / "written alone").read_bytes()[:5001] == b"x" * 5000 + b"f"
    nothing_is_left(pool, "data")
    tool("e2fsck", "-fn", pool.node("data"))
