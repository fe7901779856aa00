# SPDX-License-Identifier: Apache-2.0
"""A volume that is used past the page cache while it is restored, and what has to be in it whatever fails."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.system.devmapper import encode_name
from support.in_process import InProcess
from support.instant_restore import MIB, NAME, Restoring, clean_up, device_name, disconnect_all
from support.lvm_lab import ThinPool, tool
from support.require import require

SIZE = 24 * MIB
BLOCK = 4096
QUICK = """
from blocksnap.operations import bringing
from blocksnap.restore import place, plan
place._RECORD_SECONDS = 0.2
plan._FIRST_CHUNKS = 8
bringing._TARGET_AGAIN_SECONDS = 0.5
bringing._WRITES_SECONDS = 0.5
"""
KILLED_WHEN_WHOLE = """
import os
reach = bringing.Bringing._reach
def reached(self, stage):
    reach(self, stage)
    if stage == "whole":
        os.kill(os.getpid(), 9)
bringing.Bringing._reach = reached
"""


class Expected:
    """What has to be in a volume: blocks whose writing failed have what was there, or what was written."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)
        self._either: dict[int, bytes] = {}

    def wrote(self, offset: int, data: bytes, *, surely: bool) -> None:
        for at in range(offset, offset + len(data), BLOCK):
            block = data[at - offset : at - offset + BLOCK]
            if surely:
                self._either.pop(at, None)
                self._content[at : at + BLOCK] = block
            else:
                self._either[at] = block

    def differing(self, offset: int, found: bytes) -> list[int]:
        """Return where the blocks begin that differ."""
        return [
            at
            for at in range(offset, offset + len(found), BLOCK)
            if (block := found[at - offset : at - offset + BLOCK]) != self._content[at : at + BLOCK]
            and block != self._either.get(at)
        ]


class Application:
    """Uses a volume past the page cache, and knows what has to be in it."""

    def __init__(self, device: str, expected: Expected) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, 1 << 16)
        self._expected = expected
        self._dice = random.Random(8)

    def close(self) -> None:
        os.close(self._fd)

    def write(self, offset: int, length: int = BLOCK) -> None:
        """Write something else; raises OSError."""
        data = self._dice.randbytes(length)
        self._buffer[:length] = data
        self._expected.wrote(offset, data, surely=False)
        assert os.pwrite(self._fd, memoryview(self._buffer)[:length], offset) == length
        self._expected.wrote(offset, data, surely=True)

    def write_here_and_there(self, count: int) -> None:
        for _ in range(count):
            self.write(self._dice.randrange(SIZE // BLOCK) * BLOCK)

    def write_everywhere(self) -> None:
        for offset in range(0, SIZE, 1 << 16):
            self.write(offset, 1 << 16)

    def failing(self) -> int:
        """Read everything: what can be read is right; return how many 64 KiB cannot."""
        failed = 0
        for offset in range(0, SIZE, len(self._buffer)):
            try:
                assert os.preadv(self._fd, [self._buffer], offset) == len(self._buffer)
            except OSError:
                failed += 1
            else:
                assert self._expected.differing(offset, self._buffer[:]) == []
        return failed


@contextmanager
def backed_up(pool: ThinPool, blocksnap: InProcess, folder: Path) -> Iterator[Expected]:
    """Back up an image, which is what has to be in the volume at first."""
    programs = Path("/usr/sbin/nbdkit"), Path("/usr/bin/nbdkit")
    require("nbdkit", any(path.exists() for path in programs), "needs nbdkit")
    source = folder / "source.img"
    source.write_bytes(random.Random(3).randbytes(SIZE))
    blocksnap.done("backup", str(source), "-q")
    try:
        yield Expected(source.read_bytes())
    finally:
        clean_up(pool)


@contextmanager
def using(device: str, content: Expected) -> Iterator[Application]:
    application = Application(device, content)
    try:
        yield application
    finally:
        application.close()


def part(pool: ThinPool, name: str) -> str:
    return f"/dev/mapper/{encode_name(pool.group, f'{NAME}-{name}')}"


def failing_from(table: str, begin: int, kind: str = "error") -> str:
    """Change the table of one segment so that from a byte on everything, or every write, fails."""
    _, sectors, target, *words = table.split()
    begin //= 512
    first = f"0 {begin} {target} {' '.join(words)}\n" if begin else ""
    device, offset = words
    rest = f"flakey {device} {int(offset) + begin} 0 600 1 error_writes" if kind == "flakey" else "error"
    return f"{first}{begin} {int(sectors) - begin} {rest}\n"


def warned_of(run: Restoring, words: str) -> str:
    """Wait for a warning, and return what is to be done."""
    while words not in (told := run.until("warning"))["message"]:
        pass
    return str(told["resolution"])


def take_devices_away(pool: ThinPool) -> None:
    """As a crash does, and nothing is active after it."""
    disconnect_all()
    name = device_name(pool)
    for device in (name, f"{name}-blocksnap"):
        tool("dmsetup", "remove", "--retry", device)
    for each in pool.names():
        if each.startswith(f"{NAME}-"):
            tool("lvchange", "-an", f"{pool.group}/{each}")
