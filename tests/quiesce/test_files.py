"""Files and devices without snapshots, in use by a process that hooks stop until they are read."""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.controller.pacing import Pace, Wait
from blocksnap.system.files import is_being_written, is_open_for_writing, who_writes
from support.in_process import InProcess
from support.loops import call, loop_device, mounted
from support.require import require
from support.standing import Application, read_log, safe_base, wait_until, write_hook

MIB = 1 << 20
SIZE = 8 * MIB
WRITER = """\
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
with open(sys.argv[2], "w") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    os.pwrite(fd, os.urandom(512), 4096)
    time.sleep(0.002)
"""
LATE = """\
import os, sys, time
path, is_read, is_done = sys.argv[1:]
while not os.path.exists(is_read):
    time.sleep(0.01)
fd = os.open(path, os.O_RDWR)
def done():
    open(is_done, "w").close()
"""
SLOW = '[jobs.shop.pace]\npolicy = "fixed"\nread_rate = "8M"\n'
"""A second for the image: whoever starts again before it was read writes to it meanwhile."""


class Service:
    """A process that writes to a file all the time, and the commands that stop and start it."""

    def __init__(self, path: Path, hooks: Path) -> None:
        self.path, self._hooks = path, hooks
        (hooks / "writer.py").write_text(WRITER)
        self._sum = hooks / "sum"
        pid = hooks / "pid"
        stop = (
            f"log stop; read -r pid < '{pid}'; kill $pid; while [ -e /proc/$pid/exe ]; do sleep 0.01; done\n"
            f"sha256sum < '{path}' > '{self._sum}'"
        )
        start = (
            f"log start; rm -f '{pid}'\n"
            f"setsid '{sys.executable}' -I -S '{hooks}/writer.py' '{path}' '{pid}' >&- 2>&- <&- &\n"
            f"while [ ! -s '{pid}' ]; do sleep 0.01; done"
        )
        self.before = write_hook(hooks, "before", stop)
        self.after = write_hook(hooks, "after", start)
        self.session = write_hook(
            hooks, "session", f'read a; [ "$a" = begin ] || exit 0\n{stop}\necho ready\nread a\n{start}'
        )

    def start(self) -> None:
        call(self.after)
        assert wait_until(self.is_running)

    def is_running(self) -> bool:
        return is_being_written(str(self.path))

    def sum_when_stopped(self) -> str:
        return self._sum.read_text().split()[0]

    def kill(self) -> None:
        subprocess.run(["kill", "-9", (self._hooks / "pid").read_text().strip()], check=False)
        assert wait_until(lambda: not self.is_running())


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file that cannot be cloned."""
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with loop_device(tmp_path / "ext4.img", size=32 * MIB) as device:
        call("mkfs.ext4", "-q", "-O", "^has_journal", device)
        with mounted(device, tmp_path / "ext4") as folder:
            path = folder / "disk.img"
            path.write_bytes(random.Random(1).randbytes(SIZE))
            yield path


@pytest.fixture
def service(path: Path, hooks: Path) -> Iterator[Service]:
    service = Service(path, hooks)
    service.start()
    (hooks / "log").unlink()
    yield service
    service.kill()


@pytest.fixture
def blocksnap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> InProcess:
    command = InProcess(tmp_path, monkeypatch, capsysbinary)
    command.done("init", "--no-encryption")
    return command


def configure(blocksnap: InProcess, path: Path | str, quiesce: str, rest: str = "") -> None:
    text = f'[jobs.shop]\nvolumes = ["{path}"]\n[jobs.shop.quiesce]\n{quiesce}\n{rest}'
    (blocksnap.folder / "blocksnap.toml").write_text(text)


def pair(before: str, after: str) -> str:
    return f'hooks = [{{ before = ["{before}"], after = ["{after}"] }}]'


def hold_reading(monkeypatch: pytest.MonkeyPatch, until: Callable[[], object]) -> None:
    """Have all that is read wait for something, however fast or slow this machine is."""

    def before_read(pace: Pace, length: int, wait: Wait) -> None:
        until()

    monkeypatch.setattr(Pace, "before_read", before_read)


def nothing_is_stored(blocksnap: InProcess) -> bool:
    found: object = json.loads(blocksnap.done("list", "--json"))
    return found == {"backups": []}


@pytest.mark.parametrize("kind", ["pair", "session"])
def test_a_hook_that_stops_the_writer_holds_until_the_file_is_read(
    kind: str, service: Service, hooks: Path, blocksnap: InProcess
) -> None:
    hook = pair(service.before, service.after)
    if kind == "session":
        hook = f'hooks = [{{ session = ["{service.session}"] }}]'
    configure(blocksnap, service.path, hook, SLOW)
    assert blocksnap("backup", str(service.path))[0] == 14
    taken = blocksnap.backup("--job", "shop")
    assert (taken["consistency"], taken["method"]) == ("application", "compare")
    assert read_log(hooks) == ["stop", "start"]
    assert wait_until(service.is_running)
    # Had it gone on before all was read, it would have been written to.
    restored = blocksnap.done("restore", "latest", "-", "-q")
    assert hashlib.sha256(restored).hexdigest() == service.sum_when_stopped()
    shown = json.loads(blocksnap.done("show", "latest", "--json"))
    assert shown["quiesced"]["state"] == "application"
    assert taken["freeze_ms"] == shown["quiesced"]["ms"]


def test_a_hook_that_stops_nobody(service: Service, hooks: Path, blocksnap: InProcess) -> None:
    idle = write_hook(hooks, "idle", 'log "$BLOCKSNAP_PHASE"')
    configure(blocksnap, service.path, pair(idle, idle))
    code, _, err = blocksnap("backup", "--job", "shop")
    assert (code, "open for writing" in err, "quiesce" in err) == (14, True, True)
    assert read_log(hooks) == ["before", "after"]
    assert nothing_is_stored(blocksnap)
    # Nor does one that fails, whatever the policy: it would be of no instant.
    refuses = write_hook(hooks, "refuses", "exit 1")
    configure(blocksnap, service.path, 'on_failure = "crash-consistent"\n' + pair(refuses, idle))
    assert blocksnap("backup", "--job", "shop")[0] == 14
    configure(blocksnap, service.path, pair(refuses, idle))
    assert blocksnap("backup", "--job", "shop")[0] == 15
    assert nothing_is_stored(blocksnap)


@pytest.mark.parametrize(
    "writes", ["os.pwrite(fd, b'x', 0); done()", "done(); time.sleep(600)", "os.close(fd); done()"]
)
def test_who_writes_while_it_is_read(
    writes: str, service: Service, hooks: Path, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some other process opens it when the hook has stopped the one that it knows of."""
    (hooks / "late.py").write_text(f"{LATE}{writes}\n")
    is_read, is_done = hooks / "is read", hooks / "is done"

    def meet() -> None:
        is_read.touch()
        assert wait_until(is_done.exists, 60)

    hold_reading(monkeypatch, meet)
    late = f"'{hooks}/late.py' '{service.path}' '{is_read}' '{is_done}'"
    other = f"'{sys.executable}' -I -S {late} >&- 2>&- <&- &"
    before = write_hook(hooks, "leaks", f"'{service.before}'\n{other}\necho $! > '{hooks}/other'")
    configure(blocksnap, service.path, pair(before, service.after), SLOW)
    code, _, err = blocksnap("backup", "--job", "shop")
    subprocess.run(["kill", (hooks / "other").read_text().strip()], check=False, capture_output=True)
    assert read_log(hooks) == ["stop", "start"]
    if "close" in writes:
        assert code == 0, err
        return
    assert (code, "changed while it was read" in err) == (14, True)
    assert nothing_is_stored(blocksnap)


def test_the_time_for_reading_is_up(
    service: Service, hooks: Path, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = pair(service.before, service.after)
    limits = "deadline_seconds = 15\nreading_seconds = 0.1\n"
    hold_reading(monkeypatch, lambda: wait_until(service.is_running))
    configure(blocksnap, service.path, limits + hook, SLOW)
    code, _, err = blocksnap("backup", "--job", "shop")
    assert (code, "it took longer than 15.1 s" in err, "reading_seconds" in err) == (15, True, True), err
    assert wait_until(service.is_running)
    # The policy does not make a file whole that is written to while it is read.
    configure(blocksnap, service.path, 'on_failure = "crash-consistent"\n' + limits + hook, SLOW)
    assert blocksnap("backup", "--job", "shop")[0] == 14
    assert nothing_is_stored(blocksnap)
    # One that nobody writes to all the same is whole, and it is told.
    assert wait_until(service.is_running)
    after = write_hook(hooks, "only logs", "log after")
    hold_reading(monkeypatch, lambda: wait_until(lambda: "after" in read_log(hooks)))
    only_before = pair(service.before, after)
    configure(blocksnap, service.path, 'on_failure = "crash-consistent"\n' + limits + only_before, SLOW)
    code, out, err = blocksnap("backup", "--job", "shop", "--json")
    assert (code, "nobody wrote while it was read" in out.decode() + err) == (3, True)
    taken = json.loads(out.splitlines()[-1])["backups"][0]
    assert taken["consistency"] == "cold"


def test_killed_while_it_reads(service: Service, hooks: Path, blocksnap: InProcess) -> None:
    configure(blocksnap, service.path, pair(service.before, service.after), SLOW.replace("8M", "64K"))
    argv = [sys.executable, "-m", "blocksnap", "backup", "--job", "shop"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert wait_until((hooks / "sum").exists)
        time.sleep(0.3)
        process.kill()
    assert wait_until(service.is_running)
    assert wait_until(lambda: read_log(hooks) == ["stop", "start"])
    assert nothing_is_stored(blocksnap)
    configure(blocksnap, service.path, pair(service.before, service.after))
    blocksnap.backup("--job", "shop")
    assert wait_until(service.is_running)


def test_processes_that_are_frozen(path: Path, group: Path, blocksnap: InProcess) -> None:
    """They have the file open and do not write: it is as after a power cut."""
    application = Application(path, cgroup=group)
    try:
        configure(blocksnap, path, f'cgroups = ["{group}"]', SLOW)
        taken = blocksnap.backup("--job", "shop")
        assert taken["consistency"] == "crash"
        shown = json.loads(blocksnap.done("show", "latest", "--json"))
        assert (shown["quiesced"]["state"], shown["source"]["writers"]) == ("frozen", "frozen")
        assert application.longest_stall() > 0.5
        application = Application(path, cgroup=group)
        with path.open("r+b"):
            assert blocksnap("backup", "--job", "shop")[0] == 14
    finally:
        application.kill()


def test_a_device_that_frozen_processes_have_open(tmp_path: Path, group: Path, blocksnap: InProcess) -> None:
    with loop_device(tmp_path / "device.img", size=4 * MIB) as device:
        application = Application(Path(device), cgroup=group)
        try:
            assert blocksnap("backup", device)[0] == 14
            configure(blocksnap, device, f'cgroups = ["{group}"]')
            taken = blocksnap.backup("--job", "shop")
            assert taken["consistency"] == "crash"
        finally:
            application.kill()


def test_who_writes_is_told_from_what_maps_it_too(path: Path, group: Path) -> None:
    with path.open("rb") as file:
        assert who_writes(file.fileno()) == "none"
        with path.open("r+b") as other, mmap.mmap(other.fileno(), 0):
            other.close()
            assert who_writes(file.fileno()) == "running"
        with loop_device(path):
            # Nobody that /proc knows of, and not nobody.
            assert who_writes(file.fileno()) == "running"
        application = Application(path, cgroup=group)
        try:
            assert who_writes(file.fileno()) == "running"
            (group / "cgroup.freeze").write_text("1")
            assert wait_until(lambda: who_writes(file.fileno()) == "frozen")
        finally:
            (group / "cgroup.freeze").write_text("0")
            application.kill()


def test_who_opens_it_while_it_is_asked_does_not_end_us(path: Path) -> None:
    """The kernel tells whoever has a lease that somebody wants to write: by SIGIO, unless asked otherwise."""
    argv = [sys.executable, "-c", f"while True: open({str(path)!r}, 'r+b').close()"]
    with subprocess.Popen(argv) as process, path.open("rb") as file:
        seen: set[bool] = set()

        def look(times: int = 1) -> bool:
            seen.update(is_open_for_writing(file.fileno()) for _ in range(times))
            return seen == {True, False}

        try:
            assert wait_until(look, 120)
            assert look(20000)
        finally:
            process.kill()


@contextmanager
def filesystem_in_use(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    with loop_device(tmp_path / "device.img", size=16 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            (folder / "file").write_bytes(b"content")
            yield device, folder


def test_a_hook_that_unmounts_a_device(tmp_path: Path, hooks: Path, blocksnap: InProcess) -> None:
    with filesystem_in_use(tmp_path) as (device, folder):
        # Some other test may have a copy of all mounts, as long as a server of its runs.
        unused = (
            f"'{sys.executable}' -I -S -c 'import os; os.open(\"{device}\", os.O_RDONLY | os.O_EXCL)' 2>&-"
        )
        wait = f"until umount '{folder}' 2>&-; do sleep 0.1; done; until {unused}; do sleep 0.1; done"
        before = write_hook(hooks, "before", f"log before; {wait}")
        after = write_hook(hooks, "after", f"log after; mount '{device}' '{folder}'")
        assert blocksnap("backup", device)[0] == 14
        configure(blocksnap, device, f"deadline_seconds = 600\n{pair(before, after)}")
        assert blocksnap.backup("--job", "shop")["consistency"] == "application"
        assert read_log(hooks) == ["before", "after"]
        assert (folder / "file").read_bytes() == b"content"
