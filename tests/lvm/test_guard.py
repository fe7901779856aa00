"""A pool that a writer fills while a backup is taken: the snapshot goes before the writer notices."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from blocksnap.controller import guard
from blocksnap.system import devmapper
from blocksnap.system.dm_status import StatusReader, lvm_uuid
from support.held_reading import hold_reading
from support.in_process import InProcess
from support.lvm_lab import ThinPool, tool, write_at

KIB, MIB = 1 << 10, 1 << 20
SIZE = 40 * MIB
BLOCK = 256 * KIB
_PAUSE_SECONDS = 0.06
"""Between two writes: at 4 MiB a second it takes six seconds to fill the pool."""
_LONGEST_SECONDS = 20.0
"""Far below what a pool that is full lets writers wait, and above what a busy machine does."""


@pytest.fixture
def small(pool: ThinPool, tmp_path: Path) -> Iterator[ThinPool]:
    """A pool of 64 MiB with a volume that fills 40 of them: written all over twice, it does not fit."""
    words = ("--type", "thin-pool", "-L", "64M", "--poolmetadatasize", "4M", "--chunksize", "64k")
    tool("lvcreate", "-y", *words, "-n", "small", pool.group)
    # Whoever fills it is to see an error at once, not after a minute.
    tool("lvchange", "--errorwhenfull", "y", f"{pool.group}/small")
    made = ThinPool(pool.group, "small", tmp_path)
    made.create("busy", f"{SIZE}b")
    write_at(made.node("busy"), 0, os.urandom(SIZE))
    yield made
    tool("lvremove", "-ff", "-y", f"{pool.group}/small")


@dataclass(frozen=True)
class Seen:
    """What a writer saw: the longest that a write took, and the first error."""

    writes: int
    longest: float
    error: str


class Writer:
    """A process that writes a device all over, again and again, each block through to the medium."""

    def __init__(self, node: str) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(read_end)
                os.write(write_end, json.dumps(self._write(node)).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        self._answer = os.fdopen(read_end, "rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._answer.close()

    @staticmethod
    def _write(node: str) -> tuple[int, float, str]:
        ended: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _: ended.append(number))
        fd = os.open(node, os.O_WRONLY)
        writes, longest = 0, 0.0
        while not ended:
            began = time.monotonic()
            try:
                os.pwrite(fd, os.urandom(BLOCK), writes * BLOCK % SIZE)
                os.fsync(fd)
            except OSError as err:
                return writes, longest, str(err)
            longest = max(longest, time.monotonic() - began)
            writes += 1
            time.sleep(_PAUSE_SECONDS)
        return writes, longest, ""

    def has_failed(self) -> bool:
        """Whether it has ended by itself, which it does at the first error."""
        return bool(select.select([self._answer], [], [], 0)[0])

    def stop(self) -> Seen:
        """End it, and return what it saw."""
        os.kill(self.pid, signal.SIGUSR1)
        return Seen(*json.loads(self._answer.read()))


def slowly(blocksnap: InProcess, limits: str = "") -> None:
    """Let a backup of all of the volume take minutes."""
    text = f'[defaults.pace]\npolicy = "fixed"\nread_rate = "256K"\n[defaults.limits]\n{limits}'
    (blocksnap.folder / "blocksnap.toml").write_text(text)


def is_snapshotted() -> bool:
    """Whether the kernel has a snapshot of ours, which LVM would say too, but slowly."""
    for name in Path("/sys/block").glob("dm-*/dm/name"):
        with suppress(OSError):
            if "-blocksnap--" in name.read_text():
                return True
    return False


def test_a_writer_that_fills_the_pool_sees_nothing_of_us(
    small: ThinPool, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, node = f"{small.group}/busy", small.node("busy")
    blocksnap.done("backup", volume)
    with Writer(node) as writer:
        time.sleep(2)
        alone = writer.stop()
    assert (alone.error, alone.writes > 0) == ("", True)
    # However long the writer takes, nothing is read before the guard has acted.
    hold_reading(monkeypatch, blocksnap.folder / "blocksnap.toml", lambda: not is_snapshotted())
    with Writer(node) as writer:
        code, _, err = blocksnap("backup", volume)
        # It goes on over all of the volume once more: whatever we had is given back.
        time.sleep(2)
        seen = writer.stop()
    assert (code, seen.error) == (14, ""), err
    assert small.snapshots() == []
    first, *_, last = [line for line in err.splitlines() if line.startswith(("error:", "fix:"))]
    assert f"data of thin pool {small.group}/small is " in first
    assert "the snapshot was removed before it is full" in first
    assert f"lvextend --size +SIZE {small.group}/small" in last
    told = f"longest write: {alone.longest:.3f} s alone, {seen.longest:.3f} s during the backup"
    print(told, file=sys.__stdout__)
    assert seen.longest < _LONGEST_SECONDS
    assert os.listdir(blocksnap.folder / "state" / "journal") == []
    (blocksnap.folder / "blocksnap.toml").unlink()
    told = blocksnap.backup(volume)
    assert told["kind"] == "incremental"
    out = blocksnap.done("restore", "latest", "-")
    with open(node, "rb") as device:
        assert out == device.read()


def test_without_the_guard_the_writer_gets_an_error(
    small: ThinPool, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(guard.LevelWatch, "__call__", lambda _: None)
    with Writer(small.node("busy")) as writer:
        hold_reading(monkeypatch, blocksnap.folder / "blocksnap.toml", writer.has_failed)
        code, _, _ = blocksnap("backup", f"{small.group}/busy")
        assert writer.stop().error
    assert code == 14
    assert small.snapshots() == []


def test_a_snapshot_lives_as_long_as_it_may(small: ThinPool, blocksnap: InProcess) -> None:
    slowly(blocksnap, "snapshot_seconds = 1\n")
    code, _, err = blocksnap("backup", f"{small.group}/busy")
    assert code == 14
    assert "because it lived for 1 s" in err
    assert small.snapshots() == []
    # A snapshot is not begun in a pool that is too full.
    slowly(blocksnap, "pool_data_percent = 50\n")
    code, _, err = blocksnap("backup", f"{small.group}/busy")
    assert (code, "62.5 % full" in err) == (14, True)


def test_the_kernel_is_asked_without_a_program(pool: ThinPool) -> None:
    pool.create("one", "4M")
    name = f"{pool.group.replace('-', '--')}-{pool.pool.replace('-', '--')}-tpool"
    uuid = tool("dmsetup", "info", "-c", "--noheadings", "-o", "uuid", name).strip()
    fields = tool("lvs", "--noheadings", "-o", "vg_uuid,lv_uuid", f"{pool.group}/{pool.pool}").split()
    assert lvm_uuid(*fields, "tpool") == uuid
    with StatusReader() as reader:
        said = reader.read(uuid)
        assert said is not None
        assert devmapper.parse_pool_status(said) == devmapper.parse_pool_status(
            tool("dmsetup", "status", "--noflush", name)
        )
        assert reader.read(uuid + "x") is None
    pool.remove("one")
