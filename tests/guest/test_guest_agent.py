"""A backup of a guest's disk with a real guest agent in it, and what becomes of the guest whatever happens.

Its disk is a file on XFS, whose snapshot is a clone. A program in the guest appends numbered records to a
file, each followed by fsync, and tells the longest time between two.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blocksnap.volumes.image import FOLDER
from support.commands import CommandLine, Outcome
from support.guests import NAME, Guest, checked, guest_on, pause, read_records, require_guests
from support.loops import call, loop_device, mounted
from support.standing import holding, wait_until
from support.standing_crashes import watchdogs_of

ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "3"))
DEADLINE = 8.0
CONFIGURATION = """
[jobs.guest]
volumes = ["{disk}"]

[jobs.guest.quiesce]
guests = "{guests}"
libvirt_uri = "{uri}"
deadline_seconds = {deadline}
on_failure = "{policy}"
"""
# Python reads it before anything else: the run, or its watchdog too, gets a signal when all stands still.
TRAP = """
import os, signal, sys
sys.path.insert(0, os.environ["TRAP_TESTS"])
from blocksnap.quiesce.standstill import Standstill
from support.standing_crashes import watchdogs_of
real = Standstill.begin
def trapped(self):
    real(self)
    if "watchdog" in os.environ["TRAP_SIGNAL"]:
        for pid in watchdogs_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), getattr(signal, os.environ["TRAP_SIGNAL"].split()[0]))
Standstill.begin = trapped
"""


class World:
    """A host with a guest that runs, and a job that backs it up."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest, self.folder = guest, folder
        self.blocksnap = CommandLine(folder)
        self.configure()
        self.blocksnap.done("init")

    def configure(self, guests: str = "auto", policy: str = "fail", deadline: float = DEADLINE) -> None:
        text = CONFIGURATION.format(
            disk=self.guest.disk, guests=guests, uri=self.guest.uri, deadline=deadline, policy=policy
        )
        (self.folder / "blocksnap.toml").write_text(text)

    def back_up(self) -> Outcome:
        return self.blocksnap("backup", "--job", "guest", "--json")

    def trapped(self, how: str) -> dict[str, str]:
        """The environment of a run that gets a signal in the standstill."""
        trap = self.folder / "trap"
        trap.mkdir(exist_ok=True)
        (trap / "sitecustomize.py").write_text(TRAP)
        tests = str(Path(__file__).parents[1])
        return {"PYTHONPATH": str(trap), "TRAP_TESTS": tests, "TRAP_SIGNAL": how}

    def shown(self) -> dict[str, Any]:
        document: dict[str, Any] = self.blocksnap.done("show", "latest", "--json").document
        return document

    def restored(self) -> Path:
        target = self.folder / "restored.img"
        target.unlink(missing_ok=True)
        self.blocksnap.done("restore", "latest", target, "--verify")
        return target

    def count(self) -> int:
        return len(self.blocksnap.done("list", "--json").document["backups"])

    def left(self) -> list[str]:
        """What runs have not cleaned up."""
        clones = [path.name for path in (self.guest.disk.parent / FOLDER).glob("clone-*")]
        found = self.blocksnap("doctor", "--json").document["findings"]
        return clones + [str(each) for each in found if each["ours"]]


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    if "BLOCKSNAP_SOAK" not in os.environ:
        pytest.skip("boots an emulated machine: make soak-guest")
    require_guests()
    # The name of a socket has at most 107 bytes.
    shared = Path(tempfile.mkdtemp(prefix="blocksnap-guest.", dir="/var/tmp"))
    try:
        with ExitStack() as stack:
            device = stack.enter_context(loop_device(shared / "xfs.img", size=512 << 20))
            call("mkfs.xfs", "-q", device)
            folder = stack.enter_context(holding(device, shared / "data"))
            yield stack.enter_context(guest_on(shared, folder / "guest.img"))
    finally:
        shutil.rmtree(shared)


@pytest.fixture
def world(guest: Guest, tmp_path: Path) -> Iterator[World]:
    assert guest.goes_on()
    guest.order("longest")
    made = World(guest, tmp_path)
    yield made
    assert guest.is_running()
    assert guest.goes_on(), guest.console()
    assert not guest.is_frozen()


def test_the_filesystem_in_the_guest_is_at_rest_in_the_backup(world: World, tmp_path: Path) -> None:
    for _ in range(ROUNDS):
        acknowledged = world.guest.written()
        done = world.back_up()
        assert done.code == 0, done
        # The clone is taken when it stands still, and it goes on before anything is read.
        assert world.guest.goes_on()
        image = world.restored()
        features, status, said = checked(image)
        assert "needs_recovery" not in features
        assert status == 0, said
        assert "journal" not in said
        with loop_device(image, read_only=True) as device:
            with mounted(device, tmp_path / "mounted", "-o", "ro,noload") as folder:
                assert read_records(folder) >= acknowledged
        shown = world.shown()
        assert shown["consistency"] == "application"
        assert (shown["quiesced"]["state"], shown["quiesced"]["by"]) == (
            "application",
            [f"guest {NAME} (vda)"],
        )
        assert world.guest.stall() < DEADLINE
    assert world.left() == []

    # The test is able to see it: without the agent, the journal of the filesystem is in use.
    world.configure(guests="never")
    assert world.back_up().code == 0
    features, _, _ = checked(world.restored())
    assert "needs_recovery" in features
    assert world.shown()["consistency"] == "crash"


def test_a_guest_without_its_agent_is_told_and_left_alone(world: World) -> None:
    world.guest.order("killall qemu-ga")
    assert wait_until(lambda: not world.guest.answers())
    try:
        done = world.blocksnap("backup", "--job", "guest")
        assert done.code == 15, done
        failed = "does not freeze its filesystems: its agent does not answer"
        assert done.errors[0] == f"error: guest {NAME} {failed}"
        assert "QEMU guest agent is not connected" in done.stderr
        assert f"fix:   see whether it does: virsh domfsinfo '{NAME}'" in done.stderr
        assert "warning" not in done.stderr
        assert world.guest.goes_on()
        assert world.count() == 0

        world.configure(policy="crash-consistent")
        done = world.blocksnap("backup", "--job", "guest")
        assert done.code == 3, done
        assert world.shown()["consistency"] == "crash"
        assert world.guest.goes_on()
    finally:
        world.guest.order("agent")
        assert wait_until(world.guest.answers)
    assert world.left() == []


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_a_guest_goes_on_whatever_becomes_of_the_run(world: World, how: str) -> None:
    process = world.blocksnap.start("backup", "--job", "guest", **world.trapped(how))
    try:
        if how == "SIGSTOP":
            assert wait_until(lambda: world.guest.stall() > 1.0), world.guest.console()
            assert world.guest.goes_on()
    finally:
        if how == "SIGSTOP":
            process.kill()
        _, said = process.communicate(timeout=120)
    assert process.returncode == (143 if how == "SIGTERM" else -signal.SIGKILL), said
    assert world.guest.goes_on()
    assert wait_until(lambda: not world.guest.is_frozen())
    assert world.guest.stall() < DEADLINE + 1
    assert world.count() == 0
    assert world.back_up().code == 0
    assert world.left() == []


def test_a_guest_is_thawed_by_the_next_run_when_the_watchdog_died_too(world: World) -> None:
    process = world.blocksnap.start("backup", "--job", "guest", **world.trapped("SIGKILL watchdog"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    assert world.guest.is_frozen()
    assert not world.guest.goes_on(2)
    assert world.left() != []
    done = world.blocksnap("doctor", "--fix")
    assert f"thawed guest {NAME}" in done.text
    print(done)
    assert world.guest.goes_on()
    assert not world.guest.is_frozen()
    assert world.back_up().code == 0
    assert world.left() == []


def test_a_guest_goes_on_when_libvirt_was_restarted_meanwhile(world: World) -> None:
    world.configure(deadline=4)
    process = world.blocksnap.start("backup", "--job", "guest", **world.trapped("SIGSTOP"))
    try:
        assert wait_until(world.guest.is_frozen)
        world.guest.kill_daemon()
        assert world.guest.goes_on(60)
    finally:
        process.kill()
        process.communicate(timeout=120)
    world.configure()
    assert world.back_up().code == 0
    assert world.left() == []


@pytest.mark.parametrize("seconds", [8, 45])
def test_a_freeze_that_takes_longer_than_the_deadline_is_undone(world: World, seconds: int) -> None:
    """Its hook in the guest waits, and the agent freezes after that, when the run has given up.

    libvirt lets a command wait for another one for 30 seconds, and no longer.
    """
    world.configure(deadline=3)
    world.guest.order(f"echo {seconds} > /slow")
    try:
        done = world.blocksnap("backup", "--job", "guest")
        assert done.code == 15, done
        assert "virsh domfsfreeze" in done.errors[0]
        assert "warning" not in done.stderr
        # It was told to thaw when it had frozen, and the run has waited for that.
        assert world.guest.goes_on(5)
        assert not world.guest.is_frozen()
    finally:
        world.guest.order("rm /slow")
    assert wait_until(lambda: not watchdogs_of())
    world.configure()
    assert world.back_up().code == 0
    assert world.left() == []


def test_an_agent_that_hangs_is_not_asked(world: World) -> None:
    """It would find the order to freeze when it goes on, and libvirt waits for that half a minute only."""
    world.guest.order("killall -STOP qemu-ga")
    try:
        done = world.blocksnap("backup", "--job", "guest")
        assert done.code == 15, done
        assert "its agent does not answer" in done.errors[0]
        assert world.guest.goes_on()
        pause(35)
    finally:
        world.guest.order("killall -CONT qemu-ga")
    assert wait_until(world.guest.answers, 60)
    pause(2)
    assert not world.guest.is_frozen()
    assert world.back_up().code == 0
    assert world.left() == []
