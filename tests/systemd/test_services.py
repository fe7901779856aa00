"""What systemd itself makes of us: timers, credentials, units that are frozen, services that are stopped.

It is process 1 of namespaces of its own, see support/systemd_host.py. The volumes are two files on XFS, whose
snapshots are clones, and a service writes the same number to one and then to the other all the time. A third
one between them has much to be written back, which takes its snapshot a while.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blocksnap.volumes.image import FOLDER
from support.commands import PASSPHRASE, Outcome
from support.loops import call, loop_device
from support.standing import holding, wait_until
from support.systemd_host import SystemdHost, blocksnap_program, require_systemd, systemd_host

ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "2"))
SIZE = 8 << 20
DIRTY = 64 << 20
DEADLINE = 4.0
SERVICE, TIMER = "blocksnap-backup-shop.service", "blocksnap-backup-shop.timer"
PRUNE = "blocksnap-prune-main.service"

# It keeps the longest time that it did not run. What it writes goes no further than the page cache by itself.
WRITER = """
import os, sys, time
fds = [os.open(path, os.O_WRONLY) for path in sys.argv[2:]]
number, longest, last = 0, 0.0, time.monotonic()
while True:
    number += 1
    for fd in fds:
        os.pwrite(fd, number.to_bytes(8, "little"), 0)
    now = time.monotonic()
    if now - last > longest:
        longest = now - last
        with open(sys.argv[1], "w") as file:
            file.write(str(longest))
    last = now
    time.sleep(0.0005)
"""
# Python reads it before anything else: the run gets a signal as soon as the unit stands still.
TRAP = """
import os, signal, time
real = os.pwrite
def trapped(fd, data, offset):
    written = real(fd, data, offset)
    path = os.readlink(f"/proc/self/fd/{fd}")
    if path.endswith("/cgroup.freeze") and data == b"1":
        events = path.replace("cgroup.freeze", "cgroup.events")
        while "frozen 1" not in open(events).read():
            time.sleep(0.001)
        os.kill(os.getpid(), getattr(signal, os.environ["TRAP_SIGNAL"]))
    return written
os.pwrite = trapped
"""
CONFIGURATION = """
repository = "main"

[repositories.main]
url = "{shared}/repository"
passphrase_credential = "shop"
prune_schedule = "yearly"

[jobs.shop]
retention = {{ last = 1 }}
volumes = ["{shared}/data/one.img", "{shared}/data/slow.img", "{shared}/data/two.img"]
schedule = "{schedule}"
{job}

[jobs.shop.quiesce]
deadline_seconds = {deadline}
{quiesce}
"""


class Shop:
    """A machine with a service, its two volumes, and a job that backs them up."""

    def __init__(self, host: SystemdHost, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.images = [folder / "one.img", folder / "two.img"]
        self.slow = folder / "slow.img"
        for image in (*self.images, self.slow):
            image.write_bytes(os.urandom(SIZE))
        (host.shared / "writer.py").write_text(WRITER)
        words = [sys.executable, "-I", host.shared / "writer.py", host.shared / "stall", *self.images]
        command = " ".join(map(str, words))
        host.write("/etc/systemd/system/writer.service", f"[Service]\nExecStart={command}\n")
        host.write("/etc/blocksnap/secret", f"{PASSPHRASE}\n")
        self.drop_in(SERVICE, "credential", "[Service]\nLoadCredential=shop:/etc/blocksnap/secret\n")
        self.drop_in(PRUNE, "credential", "[Service]\nLoadCredential=shop:/etc/blocksnap/secret\n")
        # The accuracy of a timer is a minute, so that a machine wakes up less often.
        self.drop_in(TIMER, "soon", "[Timer]\nAccuracySec=10ms\n")
        self.configure()
        assert self.run("init").code == 0
        host.done("systemctl", "start", "writer")

    def configure(
        self, schedule: str = "yearly", quiesce: str = 'units = ["writer.service"]', job: str = ""
    ) -> None:
        """Write the configuration, and have the units follow it."""
        text = CONFIGURATION.format(
            shared=self.host.shared, schedule=schedule, quiesce=quiesce, job=job, deadline=DEADLINE
        )
        self.host.write("/etc/blocksnap/blocksnap.toml", text)
        done = self.run("timers", "--install", "--json")
        assert done.code == 0, done
        assert done.document["activated"] is True

    def drop_in(self, unit: str, name: str, text: str) -> None:
        self.host.write(f"/etc/systemd/system/{unit}.d/{name}.conf", text)
        self.host.done("systemctl", "daemon-reload")

    def run(self, *words: str) -> Outcome:
        """What an administrator does by hand."""
        secret = f"BLOCKSNAP_PASSPHRASE={PASSPHRASE}"
        done = self.host.start("env", secret, blocksnap_program(), *words)
        return Outcome(done.returncode, done.stdout.encode(), done.stderr)

    def back_up(self) -> tuple[str, str]:
        """Start the service and wait for its end: systemd's result, and the code it ended with."""
        self.host.start("systemctl", "start", SERVICE)
        return self.result()

    def result(self) -> tuple[str, str]:
        return self.host.show(SERVICE, "Result"), self.host.show(SERVICE, "ExecMainStatus")

    def errors(self) -> list[str]:
        """The errors of all runs."""
        return [line for line in self.host.log(SERVICE).splitlines() if line.startswith("error:")]

    def backups(self) -> list[dict[str, Any]]:
        listed = self.run("list", "--json")
        assert listed.code == 0, listed
        found: list[dict[str, Any]] = listed.document["backups"]
        return found

    def apart(self) -> int:
        """How many writes the last backups of the two volumes are apart."""
        numbers = []
        for image in self.images:
            target = self.host.shared / f"restored {image.name}"
            target.unlink(missing_ok=True)
            done = self.run("restore", f"{image}@latest", str(target))
            assert done.code == 0, done
            numbers.append(int.from_bytes(target.read_bytes()[:8], "little"))
        return numbers[0] - numbers[1]

    def stall(self) -> float:
        return float((self.host.shared / "stall").read_text() or 0)

    def is_writing(self) -> bool:
        with self.images[1].open("rb") as file:
            before = file.read(8)
            return wait_until(lambda: os.pread(file.fileno(), 8, 0) != before, 5)

    def left(self) -> list[str]:
        """What a run has not cleaned up."""
        clones = [path.name for path in (self.folder / FOLDER).glob("clone-*")]
        found = self.run("doctor", "--json").document["findings"]
        group = self.host.group / "system.slice" / SERVICE / "cgroup.procs"
        processes = group.read_text().split() if group.exists() else []
        return [*clones, *processes, *(str(each) for each in found if each["ours"])]


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    if "BLOCKSNAP_SOAK" not in os.environ:
        pytest.skip("a systemd for each test: make soak-systemd")
    require_systemd()
    shared = tmp_path / "shared"
    shared.mkdir()
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(tmp_path / "xfs.img", size=512 << 20))
        call("mkfs.xfs", "-q", device)
        folder = stack.enter_context(holding(device, shared / "data"))
        yield Shop(stack.enter_context(systemd_host(shared)), folder)


def test_a_timer_backs_up(shop: Shop) -> None:
    names = [f"/etc/systemd/system/{name}" for name in (SERVICE, TIMER, PRUNE)]
    # The whole of systemd's units: those that ours name are not all among the ones it was booted with.
    verified = shop.host.start("systemd-analyze", "verify", "--man=no", *names)
    assert (verified.returncode, verified.stderr) == (0, "")
    shop.configure(schedule="*-*-* *:*:0/2")
    assert shop.host.show(TIMER, "ActiveState") == "active"
    assert shop.host("systemctl", "is-enabled", TIMER) == "enabled\n"
    assert wait_until(lambda: len(shop.backups()) >= 6, 60), shop.host.log(SERVICE)
    shop.host.done("systemctl", "stop", TIMER)
    assert wait_until(lambda: shop.host.show(SERVICE, "ActiveState") == "inactive")
    assert shop.result() == ("success", "0")
    assert {each["kind"] for each in shop.backups()} == {"full", "incremental"}
    assert shop.left() == []
    # Two commands, one after the other.
    shop.host.done("systemctl", "start", PRUNE)
    assert len(shop.backups()) == 3
    assert "prune" in shop.host.show(PRUNE, "ExecStart")

    shop.host.write("/etc/blocksnap/blocksnap.toml", "")
    shop.host.done(blocksnap_program(), "timers", "--install")
    for unit in (SERVICE, TIMER, PRUNE):
        assert shop.host.show(unit, "LoadState") == "not-found"
    assert "blocksnap" not in shop.host(
        "systemctl", "list-units", "--all", "blocksnap-*", "--plain", "--no-legend"
    )


def test_a_unit_stands_still_for_the_instant(shop: Shop) -> None:
    for _ in range(ROUNDS):
        shop.slow.write_bytes(bytes(DIRTY))
        assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)
        assert shop.is_writing()
        assert shop.apart() in (0, 1)
    assert shop.stall() < DEADLINE
    shown = shop.run("show", "latest", "--json").document
    assert shown["quiesced"]["by"] == ["unit writer.service"]
    # The test is able to see it: without, there are writes between the two clones.
    shop.configure(quiesce="")
    free = []
    for _ in range(2):
        shop.slow.write_bytes(bytes(DIRTY))
        assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)
        free.append(abs(shop.apart()))
    assert max(free) > 1, free


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_a_unit_goes_on_whatever_becomes_of_the_run(shop: Shop, signal: str) -> None:
    folder = shop.host.shared / "trap"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TRAP)
    trap = f"[Service]\nEnvironment=PYTHONPATH={folder} TRAP_SIGNAL={signal}\n"
    shop.drop_in(SERVICE, "trap", trap)
    shop.host.done("systemctl", "start", "--no-block", SERVICE)
    if signal == "SIGSTOP":
        assert wait_until(lambda: shop.stall() > DEADLINE - 1), shop.host.log(SERVICE)
        assert shop.is_writing()
        shop.host.done("systemctl", "kill", "--signal=KILL", "--kill-whom=main", SERVICE)
    assert wait_until(lambda: shop.host.show(SERVICE, "ActiveState") == "failed"), shop.host.log(SERVICE)
    assert shop.result() == (("exit-code", "143") if signal == "SIGTERM" else ("signal", "9"))
    assert shop.is_writing()
    assert shop.stall() < DEADLINE + 1
    assert shop.backups() == []

    shop.drop_in(SERVICE, "trap", "")
    assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)
    assert shop.apart() in (0, 1)
    assert shop.left() == []


def test_a_service_that_is_stopped_ends_cleanly(shop: Shop) -> None:
    shop.configure(job='pace = { policy = "fixed", read_rate = "256K" }')
    shop.host.done("systemctl", "start", "--no-block", SERVICE)
    clones = shop.folder / FOLDER
    assert wait_until(lambda: len(list(clones.glob("clone-*"))) == 3), shop.host.log(SERVICE)
    shop.host.done("systemctl", "stop", SERVICE)
    assert shop.result() == ("exit-code", "143")
    assert shop.left() == []
    assert shop.is_writing()
    assert shop.backups() == []
    shop.configure()
    assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)


def test_units_that_cannot_be_frozen_are_told(shop: Shop) -> None:
    shop.host.write("/etc/systemd/system/other.service", "[Service]\nExecStart=/bin/true\n")
    for unit, said in (
        ("nosuch.service", "no process of it runs"),
        ("other.service", "no process of it runs"),
        (SERVICE, "blocksnap itself runs in it"),
        ("system.slice", "and snapshots need it"),
        ("systemd-journald", "systemd-journal"),
        ("init.scope", "blocksnap itself runs in it"),
    ):
        shop.configure(quiesce=f'units = ["writer.service", "{unit}"]')
        before = len(shop.errors())
        assert shop.back_up() == ("exit-code", "15"), shop.host.log(SERVICE)
        (error,) = shop.errors()[before:]
        assert said in error
    assert shop.backups() == []
    assert shop.is_writing()

    # A warning is no failure for systemd.
    shop.configure(quiesce='units = ["other.service"]\non_failure = "crash-consistent"')
    assert shop.back_up() == ("success", "3"), shop.host.log(SERVICE)
    assert len(shop.backups()) == 3


def test_a_unit_that_its_administrator_has_frozen_is_left_alone(shop: Shop) -> None:
    shop.host.done("systemctl", "freeze", "writer")
    assert shop.back_up() == ("exit-code", "15")
    assert "somebody else has frozen it" in shop.host.log(SERVICE)
    assert shop.host.show("writer", "FreezerState") == "frozen"
    shop.host.done("systemctl", "thaw", "writer")
    assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)
    assert shop.host.show("writer", "FreezerState") == "running"
    # And systemd's own freezer goes on to work after ours.
    shop.host.done("systemctl", "freeze", "writer")
    shop.host.done("systemctl", "thaw", "writer")
    assert shop.is_writing()


def test_the_passphrase_is_a_credential(shop: Shop) -> None:
    shop.drop_in(SERVICE, "credential", "")
    assert shop.back_up() == ("exit-code", "12")
    assert shop.errors() == ["error: systemd has given this service no credential shop"]
    shop.host.write("/etc/blocksnap/secret", "something else\n")
    shop.drop_in(SERVICE, "credential", "[Service]\nLoadCredential=shop:/etc/blocksnap/secret\n")
    assert shop.back_up() == ("exit-code", "12")
    sealed = shop.host.start(
        "systemd-creds",
        "encrypt",
        "--with-key=host",
        "--name=shop",
        "-",
        "/etc/blocksnap/shop.cred",
        stdin=PASSPHRASE,
    )
    assert sealed.returncode == 0, sealed.stderr
    shop.drop_in(SERVICE, "credential", "[Service]\nLoadCredentialEncrypted=shop:/etc/blocksnap/shop.cred\n")
    assert shop.back_up() == ("success", "0"), shop.host.log(SERVICE)
    assert len(shop.backups()) == 3
