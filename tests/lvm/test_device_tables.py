"""Tables of device-mapper exchanged under a device that is used."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from blocksnap.system import dm_tables
from blocksnap.system.command import CommandTimeoutError
from support.loops import loop_device
from support.lvm_lab import tool
from support.standing import wait_until

SECTORS = 8192


@pytest.mark.parametrize("same", [True, False], ids=["the-same-table", "another-table"])
def test_an_exchange_beside_one_that_was_left_running(tmp_path: Path, same: bool) -> None:
    """Both wait for what is under way; who comes second finds the device as it is to be, or begins again."""
    names = [f"blocksnap-test-{os.getpid()}-{which}" for which in ("below", "used")]
    with loop_device(tmp_path / "disk.img", size=SECTORS * 1024) as disk:
        below, used = names
        try:
            dm_tables.create(below, f"0 {SECTORS} linear {_number(disk)} 0")
            through = f"0 {SECTORS} linear {_number(f'/dev/mapper/{below}')} 0"
            dm_tables.create(used, through)
            first, other = (f"0 {SECTORS} linear {_number(disk)} {start}" for start in (0, 8))
            for _ in range(5):
                dm_tables.replace(used, through, flushing=False)
                _exchange_twice(below, used, first, first if same else other)
        finally:
            for name in reversed(names):
                dm_tables.remove(name)


def _exchange_twice(below: str, used: str, first: str, second: str) -> None:
    tool("dmsetup", "suspend", below)
    reader = threading.Thread(target=_read, args=(f"/dev/mapper/{used}",))
    failures: list[BaseException] = []

    def exchange() -> None:
        try:
            dm_tables.replace(used, second, flushing=False, limit_seconds=60)
        except BaseException as err:  # noqa: BLE001 - it is the test's to judge
            failures.append(err)

    exchanging = threading.Thread(target=exchange)
    try:
        reader.start()
        # What nothing is under way on is exchanged at once.
        assert wait_until(lambda: _reads_under_way(used) > 0)
        with pytest.raises(CommandTimeoutError):
            dm_tables.replace(used, first, flushing=False, limit_seconds=0.5)
        exchanging.start()
        exchanging.join(0.5)
    finally:
        tool("dmsetup", "resume", below)
    exchanging.join(300)
    reader.join(300)
    assert failures == []
    assert dm_tables.read_table(used) == second
    _read(f"/dev/mapper/{used}")


def _reads_under_way(name: str) -> int:
    number = os.stat(f"/dev/mapper/{name}").st_rdev
    return int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/inflight").read_text().split()[0])


def _number(path: str) -> str:
    number = os.stat(path).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"


def _read(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    finally:
        os.close(fd)
