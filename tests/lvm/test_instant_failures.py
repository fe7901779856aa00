# SPDX-License-Identifier: Apache-2.0
"""Instant restores that something goes wrong with: a crash, kills at every command, no repository, damage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.cli.main import run
from blocksnap.system import command
from support.forks import exit_code_of
from support.in_process import InProcess
from support.instant_restore import (
    MIB,
    NAME,
    Gate,
    arrived_from,
    clean_up,
    device_name,
    disconnect_all,
    judge,
    lost_volume,
    mounted,
    nothing_is_left,
    part_has_arrived,
    restoring,
    use,
)
from support.lvm_lab import ThinPool, switch, tool, write_at

SOAK = bool(os.environ.get("BLOCKSNAP_SOAK"))
KILLED_WHEN_ARRIVED = """
import os
from blocksnap.restore.arrival_devices import ArrivalDevices
ArrivalDevices.merge = lambda *words: os.kill(os.getpid(), 9)
"""


@pytest.fixture
def lost(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> Iterator[dict[str, str]]:
    with lost_volume(pool, blocksnap, tmp_path) as digests:
        yield digests


def crash(pool: ThinPool) -> None:
    """Take everything away that a crash of the machine takes away."""
    disconnect_all()
    name = device_name(pool)
    for device in (name, f"{name}-blocksnap"):
        # By force: what waits for a device that was left suspended has to be over, as it is after a crash.
        subprocess.run(["dmsetup", "remove", "--force", "--retry", device], check=False, capture_output=True)
    Path(f"/dev/{pool.group}/{NAME}").unlink(missing_ok=True)
    for each in pool.names():
        if each.startswith(f"{NAME}-"):
            tool("lvchange", "-an", f"{pool.group}/{each}")


def test_a_crash_of_the_machine(
    pool: ThinPool, blocksnap: InProcess, lost: dict[str, str], tmp_path: Path
) -> None:
    volume = f"{pool.group}/{NAME}"
    # Of classic volumes, in no pool.
    gate = Gate(tmp_path, 16 * MIB)
    with restoring("latest", volume, "--classic", prelude=gate.prelude) as first:
        device = first.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 20)
        assert part_has_arrived(f"{device_name(pool)}-blocksnap")
        first.end(signal.SIGKILL)
    crash(pool)
    assert blocksnap("restore", "latest", volume, "--instant")[0] == 1
    code, out, _ = blocksnap("doctor", "--json")
    findings = json.loads(out)["findings"]
    (found,) = [each for each in findings if each["subject"] == volume]
    assert (code, found["advice"]) == (1, f"blocksnap restore --instant --resume {volume}")
    # What LVM would activate by itself is not taken for a filesystem.
    tool("lvchange", "-ay", f"{volume}-arriving")
    kind = subprocess.run(["blkid", "-p", f"/dev/{volume}-arriving"], check=False, capture_output=True)
    assert b"TYPE" not in kind.stdout
    # LVM does not know of the name yet: somebody makes a volume of it.
    pool.create(NAME, "8M")
    code, _, err = blocksnap("restore", "--instant", "--resume", volume)
    assert (code, "was made meanwhile" in err) == (1, True), err
    pool.remove(NAME)
    with restoring("--resume", volume, prelude=gate.prelude) as second:
        second.until("usable")
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 20, 10)
            # Ended in between as well, and everything goes on.
            assert second.end(signal.SIGTERM) == 143
            assert any("--resume" in str(event.get("resolution")) for event in second.events)
            with restoring("--resume", volume, prelude=KILLED_WHEN_ARRIVED) as third:
                assert third.ended() == -signal.SIGKILL
                assert third.events[-1]["event"] == "arrived"
            # From here on nothing is read from the repository.
            (tmp_path / "repository").rename(tmp_path / "gone")
            with restoring("--resume", volume) as fourth:
                assert fourth.done() == 0
            judge(folder, lost, 30)
    nothing_is_left(pool, NAME)


def forked(*words: str) -> int:
    """Run a command in a process of its own, and return its exit code."""
    return exit_code_of(lambda: run(list(words)))


def killed_at(number: int, *words: str) -> bool:
    """Run a command that kills itself before its n-th program; tell whether it got to its end."""
    count, locate = 0, command._locate

    def deadly(program: str) -> str:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return locate(program)

    def work() -> int:
        command._locate = deadly
        return run(list(words))

    status = exit_code_of(work)
    assert status in (0, -signal.SIGKILL), (number, status)
    return status == 0


@pytest.mark.skipif(not SOAK, reason="make soak-instant")
def test_killed_before_every_program(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> None:
    volume = pool.create(NAME, "16M")
    write_at(pool.node(NAME), 0, random.Random(1).randbytes(6 * MIB))
    expected = Path(pool.node(NAME)).read_bytes()
    blocksnap.backup(volume)
    pool.remove(NAME)
    number, told = 1, [""]
    while not killed_at(number, "restore", "latest", volume, "--instant"):
        code, out, err = blocksnap("doctor", "--json")
        state = list((tmp_path / "state" / "instant").glob("*.json"))
        if state:
            assert any(each["subject"] == volume for each in json.loads(out)["findings"]), (number, out, err)
            stage = json.loads(state[0].read_text())["stage"]
            if number % 2:
                crash(pool)
            code = forked("restore", "--instant", "--resume", volume)
            told.append(f"before program {number} {'and crashed' if number % 2 else ''}, at {stage}: {code}")
            assert code == (1 if stage == "making" else 0), told
            if stage != "making":
                assert Path(pool.node(NAME)).read_bytes() == expected, told
                nothing_is_left(pool, NAME)
                pool.remove(NAME)
        assert [each for each in pool.names() if each.startswith(NAME)] == [], number
        number += 1
    assert Path(pool.node(NAME)).read_bytes() == expected
    assert number > 15
    clean_up(pool)


def test_refusals_and_giving_up(
    pool: ThinPool, blocksnap: InProcess, lost: dict[str, str], tmp_path: Path
) -> None:
    volume = f"{pool.group}/{NAME}"
    other = pool.create(f"{NAME}-other", "8M")
    for words, code in (
        (("latest", other, "--instant"), 1),
        (("latest", str(tmp_path / "file"), "--instant"), 2),
        (("latest", volume, "--instant", "--in-place"), 2),
        (("latest", volume, "--instant", "--pool", "nowhere"), 1),
        (("--instant", "--resume", volume), 1),
        (("--instant", "--abandon", volume), 1),
        (("latest", volume, "--resume"), 2),
    ):
        assert forked("restore", *words) == code, words
    assert [name for name in pool.names() if name.startswith(NAME)] == [f"{NAME}-other"]
    with restoring("latest", volume, prelude=Gate(tmp_path, 0).prelude) as run_:
        device = run_.until("usable")["device"]
        with mounted(device, tmp_path / "mnt"):
            assert blocksnap("restore", "--instant", "--abandon", volume)[0] == 11
            run_.end(signal.SIGKILL)
            # What waits fails from now on; without that umount itself might wait for it.
            code, _, err = blocksnap("restore", "--instant", "--abandon", volume)
            assert (code, "mounted on" in err) == (1, True), err
        blocksnap.done("restore", "--instant", "--abandon", volume)
    pool.remove(f"{NAME}-other")
    assert [name for name in pool.names() if name.startswith(NAME)] == []
    assert "blocksnap" not in tool("dmsetup", "ls")


@pytest.mark.skipif(not SOAK, reason="make soak-instant")
def test_nbdkit_that_dies_is_started_again(pool: ThinPool, lost: dict[str, str], tmp_path: Path) -> None:
    volume = f"{pool.group}/{NAME}"
    with restoring("latest", volume, "--rate", "4M") as run_:
        device = run_.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            for number in range(3):
                for pid in children_called(run_.process.pid, "nbdkit"):
                    os.kill(pid, signal.SIGKILL)
                use(folder, number * 5, 5)
            assert run_.done() == 3
            judge(folder, lost, 15)
    nothing_is_left(pool, NAME)


def children_called(pid: int, name: str) -> list[int]:
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if Path(f"/proc/{child}/comm").read_text().strip() == name]


class Far:
    """A repository on a volume of its own that can be taken away, and what was lost and is in it."""

    def __init__(self, node: str, digests: dict[str, str]) -> None:
        self._node, self.digests = node, digests
        self._table = tool("dmsetup", "table", node).strip()

    def go(self) -> None:
        switch(self._node, f"0 {self._table.split()[1]} error")
        Path("/proc/sys/vm/drop_caches").write_text("3")

    def come(self) -> None:
        switch(self._node, self._table)


@pytest.fixture
def far(
    pool: ThinPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> Iterator[Far]:
    pool.create("store", "160M")
    tool("mkfs.ext4", "-q", pool.node("store"))
    with mounted(pool.node("store"), tmp_path / "far") as folder:
        blocksnap = InProcess(folder, monkeypatch, capsysbinary)
        # Only the repository goes; its filesystem is read-only once it could not note that it was read.
        monkeypatch.setenv("BLOCKSNAP_STATE_DIRECTORY", str(tmp_path / "state"))
        monkeypatch.setenv("BLOCKSNAP_CACHE", str(tmp_path / "cache"))
        blocksnap.done("init", "--no-encryption")
        with lost_volume(pool, blocksnap, tmp_path) as digests:
            yield Far(pool.node("store"), digests)
    pool.remove("store")


@pytest.mark.skipif(not SOAK, reason="make soak-instant")
def test_a_repository_that_is_away_is_waited_for(pool: ThinPool, far: Far, tmp_path: Path) -> None:
    volume = f"{pool.group}/{NAME}"
    # So slow that it is not over before the repository goes, on any machine.
    with restoring("latest", volume, "--rate", "1M") as run_:
        device = run_.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 5)
            tool("sync")
            far.go()
            told = run_.until("warning")
            assert "waits" in told["message"], told
            time.sleep(3)
            assert run_.process.poll() is None
            far.come()
            run_.until("arrived")
            use(folder, 5, 5)
            assert run_.done() == 3
            judge(folder, far.digests, 10)
    nothing_is_left(pool, NAME)


def test_who_waits_for_a_repository_waits_on_when_the_command_ends(
    pool: ThinPool, far: Far, tmp_path: Path
) -> None:
    """Nor does anybody wait beside him who reads what has arrived."""
    volume, below = f"{pool.group}/{NAME}", f"{device_name(pool)}-blocksnap"
    # So slow that it is not over before the repository goes, on any machine.
    with restoring("latest", volume, "--rate", "1M") as first:
        device = first.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            assert part_has_arrived(below)
            arrived = arrived_from(below)
            far.go()
            found: list[str] = []

            def read() -> None:
                found.append(hashlib.sha256((folder / "file 11").read_bytes()).hexdigest())

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            told = first.until("warning")
            assert "waits" in told["message"], told
            with open(device, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(arrived)
                assert len(file.read(4096)) == 4096
            assert first.end(signal.SIGTERM) == 143
            reader.join(3)
            assert (reader.is_alive(), found) == (True, [])
            far.come()
            with restoring("--resume", volume) as second:
                second.until("usable")
                reader.join(300)
                assert found == [far.digests["file 11"]]
                assert second.done() == 0
            judge(folder, far.digests, 0)
    nothing_is_left(pool, NAME)


def write_much(path: Path) -> None:
    with path.open("wb") as file:
        file.write(bytes(8 * MIB))
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.skipif(not SOAK, reason="make soak-instant")
@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "whole"])
def test_room_that_is_too_small_fails_writes_and_loses_none(
    pool: ThinPool, lost: dict[str, str], tmp_path: Path, is_ended: bool
) -> None:
    volume = f"{pool.group}/{NAME}"
    with restoring("latest", volume, "--write-room", "4M", "--rate", "1M") as first:
        device = first.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            use(folder, 0, 10)
            with pytest.raises(OSError, match=r"Input/output|Read-only"):
                write_much(folder / "much")
            assert "full" in first.until("warning")["message"]
            if not is_ended:
                # The data arrives all the same; what was written has to wait for room.
                assert first.ended() == 1
                error = first.events[-1]
                assert (error["event"], error["error"]) == ("error", "StoreFullError"), error
                assert f"mounted on {folder}" in error["message"] or "in use" in error["message"]
        if is_ended:
            assert first.end(signal.SIGTERM) == 143
    with restoring("--resume", volume) as second:
        if is_ended:
            second.until("usable")
        else:
            assert second.done() == 0
        with mounted(device, tmp_path / "mnt") as folder:
            (folder / "much").write_bytes(bytes(8 * MIB))
            use(folder, 10, 10)
            if is_ended:
                assert second.done() == 0
            judge(folder, lost, 20)
    nothing_is_left(pool, NAME)


@pytest.mark.skipif(not SOAK, reason="make soak-instant")
def test_damage_is_told_and_what_is_there_is_served(
    pool: ThinPool, blocksnap: InProcess, lost: dict[str, str], tmp_path: Path
) -> None:
    volume = f"{pool.group}/{NAME}"
    for pack in (tmp_path / "repository" / "packs").rglob("*-*"):
        content = bytearray(pack.read_bytes())
        if len(content) > 4 * MIB:
            content[-2 * MIB] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)
            break
    with restoring("latest", volume) as run_:
        device = run_.until("usable")["device"]
        with mounted(device, tmp_path / "mnt") as folder:
            told = run_.until("warning")
            assert "bytes" in told["message"], told
            use(folder, 0, 5)
            bad = 0
            for name in lost:
                try:
                    (folder / name).read_bytes()
                except OSError:
                    bad += 1
            # The chunk may have the end of one and the beginning of another.
            assert bad <= 2
            use(folder, 5, 5)
        assert run_.end(signal.SIGTERM) == 143
    blocksnap.done("restore", "--instant", "--abandon", volume)
