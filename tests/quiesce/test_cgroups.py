"""Frozen control groups, real ones, and what becomes of them when the controller does not come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.errors import DeadlineError
from blocksnap.quiesce.freezer import CgroupFreezer
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from blocksnap.system.cgroup import CgroupError
from blocksnap.system.watchdog import Watchdog, Write
from support.standing import Application, is_gone, wait_until

# Makes everything stand still and waits for what comes; with "late", it is stopped right before it freezes.
CONTROLLER = """
import os, signal, sys, time
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.system import cgroup
settings, journal, when = sys.argv[1:]
standstill = assemble(QuiesceSettings.model_validate_json(settings), [], [])
fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
standstill.attend(fd, {"BLOCKSNAP_RUN": "run1"})
print(standstill._watchdog.pid, flush=True)
if when == "late":
    real = os.pwrite
    def stopped_before(fd, data, offset):
        os.pwrite = real
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(fd, data, offset)
    os.pwrite = stopped_before
standstill.begin()
os.kill(os.getpid(), getattr(signal, when, signal.SIGKILL))
standstill.end()
standstill.close()
"""

PRETENDER = "import time; open('/proc/self/comm', 'w').write('systemd-udevd'); time.sleep(99)"


@pytest.fixture
def application(group: Path, tmp_path: Path) -> Iterator[Application]:
    """A process in the group that writes all the time."""
    made = Application(tmp_path / "data", cgroup=group)
    yield made
    (group / "cgroup.freeze").write_text("0")
    made.kill()


def is_frozen(group: Path) -> bool:
    return "frozen 1" in (group / "cgroup.events").read_text()


def has_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def attended(group: Path, **settings: object) -> Standstill:
    standstill = assemble(QuiesceSettings.model_validate({"cgroups": [str(group)], **settings}), [], [])
    fd = os.open(os.devnull, os.O_WRONLY)
    standstill.attend(fd, {})
    os.close(fd)
    return standstill


def test_processes_stand_still_and_go_on(group: Path, application: Application) -> None:
    (group / "below").mkdir()
    try:
        standstill = attended(group)
        standstill.begin()
        assert is_frozen(group)
        assert standstill.traces() == [
            {"kind": "cgroup", "path": str(group), "name": f"control group {group}"}
        ]
        standstill.end()
        assert not is_frozen(group)
        outcome = standstill.conclude()
        assert (outcome.state, outcome.by) == ("frozen", (f"control group {group}",))
        standstill.close()
        assert not is_frozen(group)
    finally:
        (group / "below").rmdir()


def test_who_thaws_it_meanwhile_is_noticed(group: Path, application: Application) -> None:
    standstill = attended(group)
    standstill.begin()
    (group / "cgroup.freeze").write_text("0")
    standstill.end()
    with pytest.raises(CgroupError, match="somebody thawed it before"):
        standstill.conclude()
    standstill.close()


def test_what_is_not_ours_to_freeze_is_refused(group: Path, application: Application) -> None:
    (group / "cgroup.freeze").write_text("1")
    with pytest.raises(CgroupError, match="somebody else has frozen it"):
        CgroupFreezer.of_folder(str(group))
    (group / "cgroup.freeze").write_text("0")
    with pytest.raises(CgroupError, match="no control group of version 2"):
        CgroupFreezer.of_folder(str(group.parent))
    with pytest.raises(CgroupError, match="no control group of version 2"):
        CgroupFreezer.of_folder("/etc")
    with pytest.raises(CgroupError, match="No such file"):
        CgroupFreezer.of_folder(str(group / "nothing"))


def test_we_do_not_freeze_ourselves_nor_whom_lvm_waits_for(group: Path) -> None:
    program = (
        "import os, sys; from blocksnap.quiesce.freezer import CgroupFreezer\n"
        f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        f"CgroupFreezer.of_folder({str(group)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "blocksnap itself runs in it" in done.stderr
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; open('/proc/self/comm', 'w').write('systemd-udevd'); time.sleep(99)",
        ]
    ) as udevd:
        try:
            (group / "cgroup.procs").write_text(str(udevd.pid))
            comm = Path(f"/proc/{udevd.pid}/comm")
            assert wait_until(lambda: comm.read_text() == "systemd-udevd\n")
            with pytest.raises(CgroupError, match="systemd-udevd"):
                CgroupFreezer.of_folder(str(group))
        finally:
            udevd.kill()


@pytest.mark.parametrize("when", ["SIGKILL", "SIGSTOP", "late"])
def test_the_application_goes_on_within_the_deadline_and_a_second(
    group: Path, application: Application, tmp_path: Path, when: str
) -> None:
    deadline = 1.0
    beside = Application(tmp_path / "beside")
    settings = json.dumps({"cgroups": [str(group)], "deadline_seconds": deadline})
    argv = [sys.executable, "-c", CONTROLLER, settings, str(tmp_path / "journal"), when]
    try:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as controller:
            assert controller.stdout is not None
            watchdog = int(controller.stdout.readline())
            try:
                if when == "late":
                    # Let go before it was frozen; then the controller wakes up and freezes it after all.
                    assert wait_until(lambda: has_stopped(controller.pid))
                    time.sleep(deadline + 0.2)
                    controller.send_signal(signal.SIGCONT)
                    assert wait_until(lambda: is_gone(controller.pid))
                else:
                    # It has done that to itself once everything stood still.
                    assert wait_until(lambda: has_stopped(controller.pid) or is_gone(controller.pid))
                    assert wait_until(lambda: not is_frozen(group))
            finally:
                controller.kill()
        assert wait_until(lambda: is_gone(watchdog))
        assert not is_frozen(group)
        # What this machine, busy with other tests, makes anybody wait is not ours.
        assert application.longest_stall() < deadline + 1 + beside.longest_stall()
    finally:
        beside.kill()


def test_what_is_frozen_when_the_time_was_up_runs_on(group: Path, application: Application) -> None:
    freeze = os.open(group / "cgroup.freeze", os.O_RDWR | os.O_CLOEXEC)
    watchdog = Watchdog([Write(freeze, "0"), Write(freeze, "0")], 0.05)
    try:
        watchdog.arm(0)
        assert wait_until(lambda: watchdog.expired_after is not None)
        watchdog.disarm(0)
        watchdog.arm(1)
        os.pwrite(freeze, b"1", 0)
        assert wait_until(lambda: os.pread(freeze, 1, 0) == b"0")
        assert wait_until(lambda: not is_frozen(group))
    finally:
        watchdog.close(10.0)
        os.close(freeze)


def test_a_deadline_that_passes_fails_the_standstill(group: Path, application: Application) -> None:
    standstill = attended(group, deadline_seconds=5)
    standstill.begin()
    assert wait_until(lambda: not is_frozen(group))
    standstill.end()
    with pytest.raises(DeadlineError):
        standstill.conclude()
    standstill.close()


def test_a_process_that_does_not_stop_is_not_waited_for(group: Path, tmp_path: Path) -> None:
    # The parent of a vfork waits in the kernel, where the freezer does not find it, until its child execs.
    program = tmp_path / "vfork.c"
    program.write_text(
        "#include <unistd.h>\nint main(void) { if (vfork() == 0) { sleep(200); _exit(0); } return 0; }\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "vfork", program], check=True)
    waits = ["sh", "-c", f"read go; exec {tmp_path / 'vfork'}"]
    with subprocess.Popen(waits, stdin=subprocess.PIPE) as stubborn:
        try:
            (group / "cgroup.procs").write_text(str(stubborn.pid))
            assert stubborn.stdin is not None
            stubborn.stdin.close()
            children = Path(f"/proc/{stubborn.pid}/task/{stubborn.pid}/children")
            assert wait_until(children.read_text)
            standstill = attended(group, deadline_seconds=1.0, on_failure="crash-consistent")
            standstill.begin()
            standstill.end()
            outcome = standstill.conclude()
            standstill.close()
            if outcome.state == "failed":
                # Newer kernels find it.
                assert "do not stop in time" in (outcome.reason or "")
            assert (group / "cgroup.freeze").read_text() == "0\n"
        finally:
            subprocess.run(["pkill", "-9", "-P", str(stubborn.pid)], check=False)
            stubborn.kill()
