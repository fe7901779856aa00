# SPDX-License-Identifier: Apache-2.0
"""Volumes that are used while they are restored: right data, whatever dies meanwhile, and nothing left."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import lvm
from support.in_process import InProcess
from support.instant_restore import (
    MIB,
    Gate,
    arrived_from,
    arrived_share,
    device_name,
    judge,
    lost_volume,
    mounted,
    nothing_is_left,
    part_has_arrived,
    restoring,
    use,
)
from support.lvm_lab import ThinPool, tool, write_at

FIRST = 16 * MIB
"""What may arrive before a test lets the rest come: some files, and by far not the last one."""


@pytest.fixture
def lost(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> Iterator[dict[str, str]]:
    with lost_volume(pool, blocksnap, tmp_path) as digests:
        yield digests


def test_used_at_once_and_whole_in_the_end(pool: ThinPool, lost: dict[str, str], tmp_path: Path) -> None:
    volume = f"{pool.group}/data"
    gate = Gate(tmp_path, 6 * MIB)
    with restoring("latest", volume, "--rate", "20M", prelude=gate.prelude) as run:
        told = run.until("usable")
        assert told["device"] == f"/dev/{volume}"
        with mounted(told["device"], tmp_path / "mnt") as folder:
            use(folder, 0, 50)
            share = arrived_share(f"{device_name(pool)}-blocksnap")
            assert share < 0.1, f"{share:.0%} had arrived"
            assert run.process.poll() is None
            gate.open()
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


def test_what_is_tiny(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    """Smaller than the beginning that is written last, and of no size that LVM takes as it is."""
    source, volume = tmp_path / "source.img", f"{pool.group}/tiny"
    for size in (1000, 64 << 10):
        source.write_bytes(os.urandom(size))
        blocksnap.done("backup", str(source), "-q")
        if size % 512:
            code, _, err = blocksnap("restore", "latest", volume, "--create", "--pool", pool.pool, "--verify")
            assert (code, "warning" in err) == (0, False), err
        else:
            with restoring("latest", volume, "--pool", pool.pool, "--verify") as run:
                assert run.done() == 0
                assert [event for event in run.events if event["event"] == "warning"] == []
        assert Path(f"/dev/{volume}").read_bytes()[:size] == source.read_bytes()
        nothing_is_left(pool, "tiny")
        pool.remove("tiny")


def test_a_server_that_is_killed_only_makes_wait(
    pool: ThinPool, lost: dict[str, str], tmp_path: Path
) -> None:
    volume = f"{pool.group}/data"
    with restoring("latest", volume, prelude=Gate(tmp_path, FIRST).prelude) as run:
        device = run.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 10)
            assert part_has_arrived(f"{device_name(pool)}-blocksnap")
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
            reader.join(1)
            assert (reader.is_alive(), read) == (True, [])
            # Neither do our LVM commands wait for a server that is gone, whatever names its devices have.
            assert lvm.report(pool.group).find(pool.group, "data-arriving") is not None
            with restoring("--resume", volume, "--verify") as again:
                again.until("usable")
                reader.join(300)
                assert read == [lost["file 11"]]
                use(folder, 10, 10)
                assert again.done() == 0
                assert again.events[-1]["verified"]
            judge(folder, lost, 20)
            assert (folder / "written alone").read_bytes()[:5001] == b"x" * 5000 + b"f"
    nothing_is_left(pool, "data")
    tool("e2fsck", "-fn", pool.node("data"))


@pytest.mark.skipif(not os.environ.get("BLOCKSNAP_SOAK"), reason="make soak-instant")
def test_what_arrives_wrong_is_not_read(pool: ThinPool, lost: dict[str, str], tmp_path: Path) -> None:
    """--verify finds it before anything written meanwhile goes to it; what follows is verified too."""
    volume = f"{pool.group}/data"
    gate = Gate(tmp_path, FIRST)
    with restoring("latest", volume, "--verify", prelude=gate.prelude) as run:
        device = run.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 10)
            assert part_has_arrived(f"{device_name(pool)}-blocksnap")
            begin = arrived_from(f"{device_name(pool)}-blocksnap")
            # A disk that takes writes and holds something else.
            write_at(f"/dev/{volume}-arriving", begin + 4096, os.urandom(8192))
            gate.open()
            run.until("serving-only")
            warned = [event["message"] for event in run.events if event["event"] == "warning"]
            assert any("bytes differ" in message for message in warned), warned
            assert arrived_share(f"{device_name(pool)}-blocksnap") < 0.1
            use(folder, 10, 10)
            assert run.end(signal.SIGTERM) == 143
            with restoring("--resume", volume) as again:
                again.until("verifying")
                again.end(signal.SIGKILL)
            use(folder, 20, 10)
            with restoring("--resume", volume) as again:
                # All of it had arrived, and was not yet proven.
                assert again.until("usable")["arrived_bytes"] == 80 * MIB
                again.until("verifying")
                assert again.done() == 0
                assert again.events[-1]["verified"]
            use(folder, 30, 10)
        with mounted(pool.node("data"), tmp_path / "mnt") as folder:
            judge(folder, lost, 40)
    nothing_is_left(pool, "data")
    tool("e2fsck", "-fn", pool.node("data"))
