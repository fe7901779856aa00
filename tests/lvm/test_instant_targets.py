# SPDX-License-Identifier: Apache-2.0
"""Instant restores whose target fails, fills up, shrinks or is taken away.

Who uses the volume never reads anything wrong, what was written is kept, and the restore goes on when the
target is mended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.system import lvm_config
from support.in_process import InProcess
from support.instant_restore import (
    MIB,
    NAME,
    Gate,
    Restoring,
    clean_up,
    device_name,
    nothing_is_left,
    restoring,
)
from support.lvm_lab import ThinPool, switch, tool
from support.standing import wait_until
from support.used_volume import (
    BLOCK,
    KILLED_WHEN_WHOLE,
    QUICK,
    SIZE,
    Application,
    Expected,
    backed_up,
    failing_from,
    part,
    take_devices_away,
    using,
    warned_of,
)

soak = pytest.mark.skipif(not os.environ.get("BLOCKSNAP_SOAK"), reason="make soak-instant")
BEFORE_THE_MERGE = """
import os
import subprocess
from blocksnap.restore.arrival_devices import ArrivalDevices
merge = ArrivalDevices.merge
def merged(self, *words):
    subprocess.run(os.environ["BEFORE_THE_MERGE"], shell=True, check=True)
    merge(self, *words)
ArrivalDevices.merge = merged
"""
SERVED_BY_ONE_THAT_STANDS_STILL = """
import os
from pathlib import Path
from blocksnap.system import nbd
bringing._ANSWER_SECONDS = 2
connect, reconnect = bringing.ImageServer._connect, nbd.reconnect
def connected(self, server, connection):
    def standing_still(*words):
        # Before the kernel has it: once it does, it may have answered who waits.
        os.kill(server.pid, 19)
        while "State:\tT" not in Path(f"/proc/{server.pid}/status").read_text():
            pass
        reconnect(*words)
    nbd.reconnect = standing_still
    return connect(self, server, connection)
bringing.ImageServer._connect = connected
"""


@pytest.fixture
def content(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> Iterator[Expected]:
    with backed_up(pool, blocksnap, tmp_path) as expected:
        yield expected


@pytest.mark.parametrize(
    ("kind", "begin"),
    [("error", 8), pytest.param("flakey", 8, marks=soak), pytest.param("error", 0, marks=soak)],
    ids=["end", "writes", "all"],
)
def test_a_target_that_begins_to_fail_is_waited_for(
    pool: ThinPool, blocksnap: InProcess, content: Expected, tmp_path: Path, kind: str, begin: int
) -> None:
    volume, gate = f"{pool.group}/{NAME}", Gate(tmp_path, 6 * MIB)
    if kind == "flakey":
        tool("modprobe", "dm-flakey")
    with restoring("latest", volume, "--classic", prelude=QUICK + gate.prelude) as first:
        device = first.until("usable")["device"]
        table = tool("dmsetup", "table", part(pool, "arriving"))
        with using(device, content) as application:
            application.write_here_and_there(50)
            switch(part(pool, "arriving"), failing_from(table, begin * MIB, kind))
            gate.open()
            remedy = warned_of(first, "cannot write")
            assert "goes on by itself" in remedy
            assert (application.failing() == 0) or not begin
            application.write_here_and_there(20)
            assert first.end(signal.SIGTERM) == 143
            assert any("--resume" in str(event.get("resolution")) for event in first.events)
            code, out, _ = blocksnap("doctor", "--json")
            assert (code, volume.encode() in out) == (1, True)
            with restoring("--resume", volume, prelude=QUICK) as second:
                second.until("usable")
                warned_of(second, "cannot write")
                # What had arrived may be lost with the volume; nothing else is.
                assert application.failing() == 0 or not begin
                application.write_here_and_there(20)
                switch(part(pool, "arriving"), table)
                assert second.done() == 3
                assert application.failing() == 0
                application.write_here_and_there(20)
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


def test_a_pool_that_fills_up_loses_nothing(pool: ThinPool, content: Expected, tmp_path: Path) -> None:
    (tmp_path / "blocksnap.toml").write_text("[defaults.limits]\nrestore_wait_seconds = 0.5\n")
    volume = f"{pool.group}/{NAME}"
    tiny = f"{pool.group}/tiny"
    tool("lvcreate", "-y", "-qq", "--type", "thin-pool", "-L", "20M", "-n", "tiny", pool.group)
    tool("lvchange", "-qq", "--errorwhenfull", "y", tiny)
    try:
        with restoring("latest", volume, "--pool", "tiny", prelude=QUICK) as first:
            device = first.until("usable")["device"]
            with using(device, content) as application:
                application.write_here_and_there(50)
                remedy = warned_of(first, "would be full")
                assert f"lvextend --size +SIZE {tiny}" in remedy
                assert application.failing() == 0
                with pytest.raises(OSError, match="Input/output error"):
                    application.write_everywhere()
                assert application.failing() > 0
                warned_of(first, "has failed")
                tool("lvextend", "-qq", "-L", "64M", tiny)
                # The data arrives all the same; the store cannot be taken up while the volume is used.
                assert first.ended() == 1
                error = first.events[-1]
                assert (error["event"], error["error"]) == ("error", "WritesFailedError"), error
                assert "in use" in error["message"]
        with restoring("--resume", volume, prelude=QUICK) as second:
            assert second.done() == 0
        nothing_is_left(pool, NAME)
        assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []
    finally:
        clean_up(pool)
        pool.remove("tiny")


def test_what_is_whole_needs_no_repository_though_somebody_waits(
    pool: ThinPool, content: Expected, tmp_path: Path
) -> None:
    volume = f"{pool.group}/{NAME}"
    with restoring("latest", volume, prelude=QUICK + KILLED_WHEN_WHOLE) as first:
        device = first.until("usable")["device"]
        with using(device, content) as application:
            application.write_here_and_there(20)
            application.write(BLOCK)
            assert first.ended() == -signal.SIGKILL
            failing: list[int] = []
            reader = threading.Thread(target=lambda: failing.append(application.failing()))
            reader.start()
            reader.join(1)
            assert reader.is_alive()
            (tmp_path / "repository").rename(tmp_path / "forgotten")
            with restoring("--resume", volume, prelude=QUICK + SERVED_BY_ONE_THAT_STANDS_STILL) as second:
                # It does not wait for ever.
                assert second.ended() == 1
                assert second.events[-1]["error"] == "CommandTimeoutError", second.events
            with restoring("--resume", volume, prelude=QUICK) as third:
                assert third.done() == 0
            reader.join(300)
            assert failing == [0]
            application.write_here_and_there(20)
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
@pytest.mark.parametrize("is_ended", [True, False], ids=["between-runs", "while-it-runs"])
def test_a_target_that_was_made_smaller_is_brought_again(
    pool: ThinPool, content: Expected, tmp_path: Path, is_ended: bool
) -> None:
    volume, gate = f"{pool.group}/{NAME}", Gate(tmp_path, 16 * MIB)
    with restoring("latest", volume, "--classic", prelude=QUICK + gate.prelude) as run:
        device = run.until("usable")["device"]
        with using(device, content) as application:
            application.write_here_and_there(50)
            assert wait_until(lambda: reached(pool) >= 10 * MIB, 300)
            if is_ended:
                run.end(signal.SIGKILL)
            # As we do it: any other LVM command might wait for the server that is gone.
            tool("lvreduce", *lvm_config.settings(), "-f", "-y", "-qq", "-L", "8M", f"{volume}-arriving")
            gate.open()
            with restoring("--resume", volume, prelude=QUICK) if is_ended else nothing(run) as second:
                if is_ended:
                    second.until("usable")
                remedy = warned_of(second, "was made smaller")
                command = f"lvextend --size {SIZE}b {volume}-arriving"
                assert command in remedy
                second_look(application)
                # Another failure of the same sort is told as well.
                tool(
                    "lvreduce",
                    *lvm_config.settings(),
                    "-f",
                    "-y",
                    "-qq",
                    "-L",
                    "4M",
                    f"{volume}-arriving",
                )
                warned_of(second, f"it has {4 * MIB} bytes")
                # What it gets back is what others have left there.
                tool(*command.split(), *lvm_config.settings())
                assert second.done() == 3
                assert application.failing() == 0
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@contextmanager
def nothing(run: Restoring) -> Iterator[Restoring]:
    yield run


def second_look(application: Application) -> None:
    application.failing()
    application.write_here_and_there(10)
    assert application.failing() == 0


def reached(pool: ThinPool) -> int:
    """Tell up to where the device below reads the volume itself."""
    end = 0
    for line in map(str.split, tool("dmsetup", "table", f"{device_name(pool)}-blocksnap").splitlines()):
        if not line[3].startswith("43:"):
            end = int(line[0]) * 512 + int(line[1]) * 512
    return end


@soak
def test_a_store_that_fails_is_taken_up_again(pool: ThinPool, content: Expected, tmp_path: Path) -> None:
    volume = f"{pool.group}/{NAME}"
    with restoring("latest", volume, "--classic", prelude=QUICK + Gate(tmp_path, 6 * MIB).prelude) as first:
        device = first.until("usable")["device"]
        table = tool("dmsetup", "table", part(pool, "meanwhile"))
        with using(device, content) as application:
            application.write_here_and_there(300)
            switch(part(pool, "meanwhile"), failing_from(table, 0))
            with pytest.raises(OSError, match="Input/output error"):
                application.write_here_and_there(300)
            assert application.failing() > 0
            warned_of(first, "has failed")
            first.end(signal.SIGKILL)
        with restoring("--resume", volume, prelude=QUICK) as second:
            assert second.ended() == 1
            error = second.events[-1]
            assert (error["event"], error["error"]) == ("error", "StoreUnreadableError"), error
        switch(part(pool, "meanwhile"), table)
        with restoring("--resume", volume, prelude=QUICK) as third:
            third.until("usable")
            with using(device, content) as again:
                assert again.failing() == 0
                again.write_here_and_there(50)
            assert third.done() == 0
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
@pytest.mark.parametrize(("which", "begin"), [("arriving", 12 * MIB), ("meanwhile", 0)])
def test_a_merge_that_fails_is_begun_anew_when_nobody_uses_the_volume(
    pool: ThinPool, content: Expected, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str, begin: int
) -> None:
    """In memory the kernel may have cleared what it could not clear on the disk: the list is read again."""
    volume, failing = f"{pool.group}/{NAME}", part(pool, which)
    broken = tmp_path / "table"
    load = f"dmsetup load {failing} {broken} && dmsetup suspend --nolockfs --noflush {failing}"
    monkeypatch.setenv("BEFORE_THE_MERGE", f"{load} && dmsetup resume {failing}")
    tool("modprobe", "dm-flakey")
    with restoring("latest", volume, "--classic", prelude=QUICK + BEFORE_THE_MERGE) as first:
        device = first.until("usable")["device"]
        table = tool("dmsetup", "table", failing)
        broken.write_text(failing_from(table, begin, "flakey"))
        with using(device, content) as application:
            application.write_here_and_there(400)
            assert first.ended() == 1
            error = first.events[-1]
            assert (error["event"], error["error"]) == ("error", "MergeFailedError"), error
            assert application.failing() == 0
            switch(failing, table)
            with restoring("--resume", volume, prelude=QUICK) as second:
                assert second.ended() == 1
                assert second.events[-1]["error"] == "MergeFailedError", second.events[-1]
            assert application.failing() == 0
        with restoring("--resume", volume, prelude=QUICK) as third:
            assert third.done() == 0
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
def test_parts_that_somebody_removes_after_a_crash(
    pool: ThinPool, blocksnap: InProcess, content: Expected, tmp_path: Path
) -> None:
    volume, gate = f"{pool.group}/{NAME}", Gate(tmp_path, 6 * MIB)
    with restoring("latest", volume, "--classic", prelude=QUICK + gate.prelude) as first:
        device = first.until("usable")["device"]
        with using(device, content) as application:
            application.write_here_and_there(50)
        first.end(signal.SIGKILL)
    take_devices_away(pool)
    pool.remove(f"{NAME}-arriving")
    code, _, err = blocksnap("restore", "--instant", "--resume", volume)
    assert (code, f"{volume}-arriving is gone" in err) == (1, True), err
    command = f"lvcreate --size {SIZE}b --name {NAME}-arriving --addtag blocksnap.instant {pool.group}"
    assert command in err
    tool(*command.split(), "-y")
    with restoring("--resume", volume, prelude=QUICK + KILLED_WHEN_WHOLE + gate.prelude) as second:
        second.until("usable")
        with using(device, content) as again:
            assert again.failing() == 0
            again.write_here_and_there(10)
        gate.open()
        assert second.ended() == -signal.SIGKILL
    take_devices_away(pool)
    pool.remove(f"{NAME}-meanwhile")
    code, _, err = blocksnap("restore", "--instant", "--resume", volume)
    assert (code, f"{volume}-meanwhile is gone" in err, "--abandon" in err) == (1, True, True), err
    blocksnap.done("restore", "--instant", "--abandon", volume)
    assert [name for name in pool.names() if name.startswith(NAME)] == []
