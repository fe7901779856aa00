# SPDX-License-Identifier: Apache-2.0
"""Instant restores as a process, an application that uses the volume meanwhile, and what judges both."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from blocksnap.system import nbd
from support.in_process import InProcess
from support.lvm_lab import ThinPool, tool
from support.require import require
from support.standing import wait_until

MIB = 1 << 20
ROWS = 2000
NAME = "data"
_LONGEST_SECONDS = 600
"""More than any of these commands takes, on any machine."""
_KILLED_SECONDS = 60
_BEHIND_A_GATE = """
import os
from blocksnap.restore import place, plan
from blocksnap.restore.arriving_target import ArrivingTarget
place._RECORD_SECONDS = 0.0
plan._FIRST_CHUNKS, plan.MAX_RANGE = 8, 1 << 20
write = ArrivingTarget.write
def held(self, offset, data):
    while offset >= {end} and os.path.exists({gate!r}) and not self._given_up.wait(0.05):
        pass
    write(self, offset, data)
ArrivingTarget.write = held
"""


class Gate:
    """What lies behind some byte of the volume, or a MiB later, does not arrive until it is opened."""

    def __init__(self, folder: Path, end: int) -> None:
        self._file = folder / "gate"
        self._file.touch()
        self.prelude = _BEHIND_A_GATE.format(end=end, gate=str(self._file))

    def open(self) -> None:
        self._file.unlink()


class Restoring:
    """A restore that runs as a process of its own."""

    def __init__(self, *words: str, instant: bool, prelude: str = "") -> None:
        """``prelude`` is Python that runs in the process before the command."""
        options = ["--instant"] if instant else []
        running = f"import sys\nfrom blocksnap.cli.main import run\n{prelude}\nsys.exit(run(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", running, "restore", *words, *options, "--json"],
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
        self.process.communicate(timeout=_LONGEST_SECONDS)
        return self.process.returncode

    def ended(self) -> int:
        """Wait for an end that needs nothing, and return the exit code."""
        out, _ = self.process.communicate(timeout=_LONGEST_SECONDS)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode

    def kill(self) -> None:
        """End it, if it has not ended, and forget what it tells."""
        self.process.kill()
        # What descends from it may keep its output open.
        with suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=_KILLED_SECONDS)

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=_LONGEST_SECONDS)
        self.events += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode


@contextmanager
def restoring(*words: str, instant: bool = True, prelude: str = "") -> Iterator[Restoring]:
    run = Restoring(*words, instant=instant, prelude=prelude)
    try:
        yield run
    except BaseException:
        run.process.kill()
        # Or whatever cleans up after the test waits for ever for a server that is gone, as LVM's scan does.
        disconnect_all()
        raise
    finally:
        run.kill()


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    tool("mount", device, str(folder))
    try:
        yield folder
    except BaseException:
        # It could not be unmounted while it waits for a server that is gone.
        disconnect_all()
        raise
    finally:
        tool("umount", str(folder))


def arrived_share(name: str) -> float:
    """Tell from the table of the device below which share of the volume is read from the volume itself."""
    lines = [line.split() for line in tool("dmsetup", "table", name).splitlines()]
    lengths = dict.fromkeys((True, False), 0)
    for line in lines:
        lengths[line[3].startswith("43:")] += int(line[1])
    return lengths[False] / sum(lengths.values())


def part_has_arrived(name: str) -> bool:
    """Wait until some of the volume, told by the device below, is read from the volume itself."""
    return wait_until(lambda: arrived_share(name) > 0, _LONGEST_SECONDS)


def arrived_from(name: str) -> int:
    """Tell where in the volume the part begins that has arrived and is read from there; 0 before it has."""
    for line in map(str.split, tool("dmsetup", "table", name).splitlines()):
        if not line[3].startswith("43:") and int(line[0]):
            return int(line[0]) * 512
    return 0


def nothing_is_left(pool: ThinPool, name: str) -> None:
    """The volume is one of LVM's, and all that was made for it is gone."""
    assert [each for each in pool.names() if "arriving" in each or "meanwhile" in each] == []
    assert "blocksnap" not in tool("lvs", "--noheadings", "-o", "lv_tags", f"{pool.group}/{name}")
    devices = tool("dmsetup", "ls")
    assert "blocksnap" not in devices
    # Who looks at new devices may have one open for a moment yet.
    assert wait_until(lambda: served_devices() == [])
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
    # With FULL the removal of the journal is not flushed: a crash soon after may take the last commit back.
    connection.execute("PRAGMA synchronous = EXTRA")
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


@contextmanager
def lost_volume(pool: ThinPool, blocksnap: InProcess, folder: Path) -> Iterator[dict[str, str]]:
    """A volume with files and a database that is backed up and then removed; the digests of the files."""
    programs = Path("/usr/sbin/nbdkit"), Path("/usr/bin/nbdkit")
    require("nbdkit", any(path.exists() for path in programs), "needs nbdkit")
    volume = pool.create(NAME, "80M")
    try:
        # In blocks of the size in which writes are kept: none of them has to be filled up from the backup.
        tool("mkfs.ext4", "-q", "-b", "4096", pool.node(NAME))
        with mounted(pool.node(NAME), folder / "mnt") as mnt:
            digests = fill(mnt)
            tool("sync")
        blocksnap.backup(volume)
        pool.remove(NAME)
        yield digests
    finally:
        clean_up(pool)


def device_name(pool: ThinPool) -> str:
    """What device-mapper calls the volume that is restored."""
    return f"{pool.group.replace('-', '--')}-{NAME}"


def disconnect_all() -> None:
    """Take every server's device away; what waits for one fails."""
    for index in served_devices():
        nbd.disconnect(index)


def served_devices() -> list[int]:
    """The numbers of all devices of our servers."""
    found = []
    for backend in Path("/sys/block").glob("nbd*/backend"):
        # It may go meanwhile.
        with suppress(OSError):
            if backend.read_text().startswith("blocksnap"):
                found.append(int(backend.parent.name.removeprefix("nbd")))
    return found


def clean_up(pool: ThinPool) -> None:
    """Remove what a test has restored, also where it failed halfway."""
    # What looks at a device that waits for a server would not let go of it.
    disconnect_all()
    name = device_name(pool)
    for device in (name, f"{name}-blocksnap"):
        subprocess.run(["dmsetup", "remove", device], check=False, capture_output=True)
    for each in pool.names():
        if each.startswith(NAME):
            tool("lvremove", "-y", f"{pool.group}/{each}")
