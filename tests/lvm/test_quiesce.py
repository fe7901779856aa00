"""Standing still for snapshots of real thin volumes: one instant for a group, nothing left by killed runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blocksnap.controller.journal import read_entries
from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.recover import recover
from blocksnap.controller.session import SnapshotSession
from blocksnap.quiesce.filesystem import FilesystemFreeze
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.system import blockdev
from blocksnap.volumes.base import Snapshot
from blocksnap.volumes.resolve import resolve_volume
from support.loops import call, loop_device
from support.lvm_lab import ThinPool, tool
from support.standing import control_group, holding, hook_folder, read_log, thaw, wait_until, write_hook
from support.standing_crashes import count_points, die_at, watchdogs_of
from support.thin_lab import Backups, read_all

SOAK = "BLOCKSNAP_SOAK_ROUNDS" in os.environ
ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "3"))
OWN_POINTS = {
    *(f"{when} {step}" for when in ("before", "after") for step in ("snapshot+quiesce", "taken", "released")),
    "snapshot taken",
}
MAGIC = b"blocksnap counts"
NAMES = ("data-1", "wal.1")
SIZE = "24M"

# Writes the same number to one volume and then to the other, each through to the medium, again and again.
WRITER = """
import os, sys
fds = [os.open(path, os.O_WRONLY) for path in sys.argv[1:]]
number = 0
print("running", flush=True)
while True:
    number += 1
    for fd in fds:
        os.pwrite(fd, b"blocksnap counts" + number.to_bytes(8, "little"), 0)
        os.fsync(fd)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of the test's own."""
    with control_group() as folder:
        yield folder


@pytest.fixture(scope="module")
def mounts(pool: ThinPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two volumes with a filesystem directly on each."""
    base = tmp_path_factory.mktemp("mounts")
    with ExitStack() as stack:
        folders = []
        for name in NAMES:
            pool.create(name, SIZE)
            stack.callback(pool.remove, name)
            call("mkfs.ext4", "-q", "-b", "4096", pool.node(name))
            folders.append(stack.enter_context(holding(pool.node(name), base / name)))
            block = folders[-1] / "counter"
            block.write_bytes(MAGIC.ljust(4096, b"\0"))
        tool("sync")
        yield folders
    assert pool.snapshots() == []


@pytest.fixture
def writer(mounts: list[Path], group: Path) -> Iterator[None]:
    """Somebody who writes to both in turn."""
    argv = [sys.executable, "-I", "-S", "-c", WRITER, *(str(folder / "counter") for folder in mounts)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        try:
            yield
        finally:
            # What a run left standing still would not end.
            (group / "cgroup.freeze").write_text("0")
            for folder in mounts:
                thaw(folder)
            process.kill()


class Counters:
    """Reads the numbers out of snapshots, and remembers where they are."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def read(self, place: int, snapshot: Snapshot) -> int:
        """The number in a snapshot of the volume with that place in the group."""
        with snapshot.open_reader() as fd:
            if place not in self._places:
                buffer = blockdev.aligned_buffer(snapshot.size)
                os.preadv(fd, [buffer], 0)
                found = [at for at in range(0, snapshot.size, 4096) if buffer[at : at + 16] == MAGIC]
                assert len(found) == 1
                self._places[place] = found[0]
            buffer = blockdev.aligned_buffer(4096)
            os.preadv(fd, [buffer], self._places[place])
        assert buffer[:16] == MAGIC
        return int.from_bytes(buffer[16:24], "little")


def take(state: Path, run: str, counters: Counters, settings: QuiesceSettings | None) -> tuple[int, float]:
    """One backup of the group: how many writes the snapshots are apart, and how long all stood still."""
    volumes = [resolve_volume(f"my-vg.a+b/{name}") for name in NAMES]
    request = QuiesceRequest(settings) if settings else None
    with SnapshotSession(volumes, run, state, request) as session:
        assert session.skew_seconds > 0
        first, second = (counters.read(place, each) for place, each in enumerate(session.snapshots))
    assert session.warnings == []
    seconds = session.quiesced.seconds if session.quiesced else 0.0
    assert seconds >= session.skew_seconds or settings is None
    return first - second, seconds


def test_a_group_is_of_one_instant_when_its_writers_stand_still(
    pool: ThinPool, mounts: list[Path], writer: None, group: Path, state: Path
) -> None:
    counters = Counters()
    settings = QuiesceSettings.model_validate({"cgroups": [str(group)], "deadline_seconds": 600})
    apart = [take(state, f"still{number}", counters, settings)[0] for number in range(ROUNDS)]
    # The first volume is written before the second: it is ahead by the write that was under way, or equal.
    assert set(apart) <= {0, 1}, apart
    # The test is able to see it: without, what is written between the two snapshots is in the second only,
    # and only a writer who gets no time writes nothing then.
    free = (take(state, f"free{number}", counters, None)[0] for number in range(20))
    assert any(abs(writes) > 1 for writes in free)


@contextmanager
def encrypted(node: str, name: str) -> Iterator[str]:
    """A device that encrypts what goes to another one, as LUKS makes them."""
    sectors = tool("blockdev", "--getsz", node).strip()
    tool("dmsetup", "create", name, "--table", f"0 {sectors} crypt aes-xts-plain64 {'0' * 64} 0 {node} 0")
    try:
        yield f"/dev/mapper/{name}"
    finally:
        tool("dmsetup", "remove", "--retry", name)


def test_a_filesystem_above_encryption_is_frozen_and_one_on_the_volume_left_to_lvm(
    pool: ThinPool, mounts: list[Path], tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool("modprobe", "dm-crypt")
    content, copy = os.urandom(1 << 20), tmp_path / "copy"
    with ExitStack() as stack:
        stack.callback(pool.remove, "secret")
        pool.create("secret", SIZE)
        node = stack.enter_context(encrypted(pool.node("secret"), "opened"))
        call("mkfs.ext4", "-q", node)
        folder = stack.enter_context(holding(node, tmp_path / "secret"))
        volumes = [resolve_volume(f"{pool.group}/{each}") for each in ("secret", NAMES[0])]

        def write_late(freezer: FilesystemFreeze, deadline: float) -> None:
            # Dirty, and flushed by nobody before the freeze itself.
            (folder / "file").write_bytes(content)
            begin(freezer, deadline)

        begin = FilesystemFreeze.begin
        monkeypatch.setattr(FilesystemFreeze, "begin", write_late)
        request = QuiesceRequest(QuiesceSettings(deadline_seconds=600))
        with SnapshotSession(volumes, "crypt", state, request) as session:
            assert session.quiesced is not None
            assert session.quiesced.by == (f"filesystem on {folder}",)
            assert session.quiesced.state == "frozen"
            assert not thaw(folder)
            copy.write_bytes(read_all(session.snapshots[0]))
        assert session.warnings == []
    with loop_device(copy) as device, encrypted(device, "copy") as node:
        assert "clean" in tool("e2fsck", "-n", node)
        with holding(node, tmp_path / "restored") as restored:
            assert (restored / "file").read_bytes() == content


# In the soak for one volume too: it takes the same steps, and tests/quiesce kills it at each of them.
@pytest.mark.parametrize("count", [1, 2] if SOAK else [2])
def test_a_run_that_is_killed_at_any_step_leaves_nothing_behind(
    pool: ThinPool, mounts: list[Path], writer: None, group: Path, state: Path, count: int
) -> None:
    names = [f"{pool.group}/{name}" for name in NAMES[:count]]
    with hook_folder() as hooks:
        lock = write_hook(hooks, "lock", 'read a; [ "$a" = begin ] || exit 0; echo ready; read a')
        pair = write_hook(hooks, "pair", 'log "$BLOCKSNAP_PHASE"')
        settings = QuiesceSettings.model_validate(
            {
                "deadline_seconds": 600,
                "hooks": [{"session": [lock]}, {"before": [pair], "after": [pair]}],
                "cgroups": [str(group)],
            }
        )

        def run(name: str) -> None:
            volumes = [resolve_volume(each) for each in names]
            with SnapshotSession(volumes, name, state, QuiesceRequest(settings)) as session:
                session.committing()

        backups = [Backups(name, state) for name in names]
        parents = [each.take() for each in backups]
        before = pool.names()
        points = count_points(lambda: run("whole"))
        for number, point in enumerate(points):
            # The others are those of tests/quiesce, where a run does not take seconds.
            if not SOAK and point not in OWN_POINTS:
                continue
            die_at(number, lambda name=f"dead{number}": run(name), also_watchdog=number % 2 == 1)
            found = recover(state)
            assert found.warnings == (), point
            assert pool.names() == before, point
            assert (group / "cgroup.freeze").read_text() == "0\n", point
            assert not any(thaw(folder) for folder in mounts), point
            assert read_entries(state) == [], point
            # Its last word is in the journal before it ends.
            assert wait_until(lambda run=f"dead{number}": not watchdogs_of(run=run))
        assert read_log(hooks).count("after") >= read_log(hooks).count("before")
        for each, parent in zip(backups, parents, strict=True):
            # Proves that what it says has changed leads from the parent to what is there.
            assert each.take(parent).changes.method == "thin-time"
