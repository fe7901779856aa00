"""A run killed at every step, with or without its watchdog: the next one finds nothing standing still.

The volumes here have no snapshots of their own; tests/lvm does the same with those.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blocksnap.controller.journal import read_entries
from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.quiesce.freezer import CgroupFreezer
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.volumes.base import Ledger, SnapshotTiming
from support.loops import call, loop_device
from support.standing import holding, read_log, thaw, wait_until, write_hook
from support.standing_crashes import count_points, die_at, watchdogs_of


class StandIn:
    """A volume whose snapshots are nothing but an instant."""

    kind = "thin"
    size = 4096

    def __init__(self, name: str, device: int) -> None:
        self.name, self.key = name, f"key:{name}"
        self.snapshot_device = device
        self.binding: dict[str, Any] = {}
        self.timing = SnapshotTiming(0.0, 0.0)

    def trace(self, run: str) -> dict[str, str] | None:
        return None

    def prepare(self) -> None:
        pass

    def take_snapshot(self, run: str, ledger: Ledger) -> StandIn:
        return self

    def check(self) -> None:
        pass

    def remove(self) -> None:
        pass


class World:
    """Volumes with a filesystem in a filesystem on each, a control group with a process, and hooks."""

    def __init__(self, folder: Path, group: Path, hooks: Path, stack: ExitStack, count: int) -> None:
        self.group, self.hooks, self.state = group, hooks, folder / "state"
        self.inner: list[Path] = []
        self.volumes: list[StandIn] = []
        for number in range(count):
            device = stack.enter_context(loop_device(folder / f"{number}.img", size=48 << 20))
            call("mkfs.ext4", "-q", device)
            outer = stack.enter_context(holding(device, folder / f"outer{number}"))
            inside = stack.enter_context(loop_device(outer / "inner.img", size=16 << 20))
            call("mkfs.ext4", "-q", inside)
            self.inner.append(stack.enter_context(holding(inside, folder / f"inner{number}")))
            self.volumes.append(StandIn(f"volume{number}", os.stat(device).st_rdev))
        lock = write_hook(
            hooks, "lock", 'read a; [ "$a" = begin ] || exit 0; log $a; echo ready; read a; log end'
        )
        pair = write_hook(hooks, "pair", 'log "$BLOCKSNAP_PHASE"')
        self.settings = QuiesceSettings.model_validate(
            {
                "deadline_seconds": 20,
                "hooks": [{"session": [lock]}, {"before": [pair], "after": [pair]}],
                "cgroups": [str(group)],
            }
        )

    def run(self, name: str) -> None:
        """One run that stands still."""
        request = QuiesceRequest(self.settings, (), "job")
        with SnapshotSession(self.volumes, name, self.state, request) as session:  # type: ignore[arg-type]
            session.committing()
        assert session.warnings == []
        assert session.quiesced is not None
        assert session.quiesced.state == "application"

    def next_run(self) -> list[str]:
        """One that does not, and what it had to clean up."""
        with SnapshotSession(self.volumes, f"next{os.getpid()}", self.state) as session:  # type: ignore[arg-type]
            assert session.warnings == []
        return session.recovered

    def assert_clean(self, run: str, *, in_doubt: bool = False) -> None:
        """Nothing stands still, every hook that was begun was ended once, and nobody is left.

        Who has nothing but the journal cannot know whether `before` was run, or `after`, and runs `after`.
        """
        assert wait_until(lambda: read_log(self.hooks).count("end") == read_log(self.hooks).count("begin"))
        log = read_log(self.hooks)
        assert log.count("after") == log.count("before") or (in_doubt and log.count("after") in (1, 2))
        (self.hooks / "log").unlink(missing_ok=True)
        assert (self.group / "cgroup.freeze").read_text() == "0\n"
        for folder in self.inner:
            assert not thaw(folder)
        assert wait_until(lambda: watchdogs_of(run=run) == [])
        assert read_entries(self.state) == []


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, group: Path, hooks: Path) -> Iterator[World]:
    with ExitStack() as stack:
        made = World(tmp_path, group, hooks, stack, request.param)
        program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(1000)"]
        sleeper = stack.enter_context(subprocess.Popen(program))
        (group / "cgroup.procs").write_text(str(sleeper.pid))
        stack.callback(sleeper.kill)
        yield made


# A watchdog that dies too is nothing that one volume or several make a difference to.
@pytest.mark.parametrize(
    ("world", "also_watchdog"),
    [(1, False), (2, False), (2, True)],
    ids=["one volume", "a group", "a group, and its watchdog too"],
    indirect=["world"],
)
def test_killed_at_every_step(world: World, *, also_watchdog: bool) -> None:
    points = count_points(lambda: world.run("whole"))
    world.assert_clean("whole")
    assert {"before quiesce", "after quiesce", "before released", "after released"} <= set(points)
    assert points.count("FilesystemFreeze begin") == len(world.volumes)
    let_go: set[str] = set()
    for number, point in enumerate(points):
        # Another test, beside this one, has other runs.
        run = f"dead{number}of{os.getpid()}"
        try:
            die_at(number, lambda run=run: world.run(run), also_watchdog=also_watchdog)
            let_go |= {message.partition(", which")[0].split(" on ")[0] for message in world.next_run()}
            world.assert_clean(run, in_doubt=also_watchdog)
        except AssertionError as err:
            raise AssertionError(f"killed at {point!r}, point {number}") from err
    if also_watchdog:
        script, group = world.hooks / "pair", world.group
        assert let_go == {f"ran {script}", "thawed the filesystem", f"thawed control group {group}"}
    else:
        assert let_go == set()


def test_an_interrupt_while_everything_stands_still_lets_go_and_removes(
    tmp_path: Path, group: Path, hooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        world = World(tmp_path, group, hooks, stack, 1)
        removed: list[str] = []
        monkeypatch.setattr(StandIn, "remove", lambda volume: removed.append(volume.name))

        # Once while all stand still, and once more while they are let go.
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        real = CgroupFreezer.end

        def late(freezer: CgroupFreezer, deadline: float) -> None:
            real(freezer, deadline)
            raise KeyboardInterrupt

        monkeypatch.setattr(CgroupFreezer, "end", late)
        with pytest.raises(KeyboardInterrupt):
            world.run("late")
        assert removed == ["volume0"]
        world.assert_clean("late")
        monkeypatch.setattr(CgroupFreezer, "end", real)
        monkeypatch.setattr(StandIn, "take_snapshot", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.run("early")
        world.assert_clean("early")
