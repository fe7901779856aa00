"""Reading the metadata of a pool that is in use: without a lock, with a metadata snapshot, against others.

``thin_delta`` and the plain reference model are asked the same; BLOCKSNAP_SOAK_ROUNDS multiplies the rounds.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blocksnap import _native
from blocksnap.controller.journal import read_entries
from blocksnap.controller.recover import recover
from blocksnap.controller.session import SnapshotSession
from blocksnap.extents.model import ExtentList
from blocksnap.extents.thin_metadata import DeviceFacts, ThinMetadata
from blocksnap.system import devmapper
from blocksnap.volumes import thin_hold
from blocksnap.volumes.resolve import resolve_volume
from blocksnap.volumes.thin_hold import MetadataHeldError
from support.dm_pool import delta_by_model, delta_by_tool, diff, held_root, holding, read_metadata
from support.forks import exit_code_of
from support.killed import dead_after
from support.lvm_lab import ThinPool, tool, write_at
from support.thin_lab import Backups

KIB, MIB = 1 << 10, 1 << 20
SOAK = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "1"))
SIZE = 16 * MIB

WRITER = """
import os, random, sys
fd, size, dice = os.open(sys.argv[1], os.O_WRONLY), int(sys.argv[2]), random.Random(1)
print("writing", flush=True)
while True:
    # Chunks that are new and chunks that are not, each one committed by the pool before the next.
    os.pwrite(fd, dice.randbytes(4096), dice.randrange(size // 4096) * 4096)
    os.fsync(fd)
"""


@contextmanager
def busy(node: str, size: int) -> Iterator[None]:
    """Write and flush all the time."""
    argv = [sys.executable, "-c", WRITER, node, str(size)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        try:
            yield
            assert writer.poll() is None
        finally:
            writer.kill()


@pytest.fixture
def volume(pool: ThinPool) -> Iterator[str]:
    name = pool.create("data", f"{SIZE}b")
    write_at(pool.node("data"), 0, os.urandom(2 * MIB))
    yield name
    pool.remove("data")
    assert pool.snapshots() == []


def tpool(pool: ThinPool) -> str:
    return f"{pool.group.replace('-', '--')}-{pool.pool.replace('-', '--')}-tpool"


def tmeta(pool: ThinPool) -> str:
    return f"/dev/mapper/{tpool(pool).removesuffix('-tpool')}_tmeta"


def thin_id(pool: ThinPool, name: str) -> int:
    return int(tool("lvs", "--noheadings", "-o", "thin_id", f"{pool.group}/{name}"))


@contextmanager
def opened(pool: ThinPool) -> Iterator[int]:
    fd = os.open(tmeta(pool), os.O_RDONLY | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def test_lock_free_reading_of_a_pool_that_commits_all_the_time(pool: ThinPool, volume: str) -> None:
    """A snapshot is in block 0 when lvcreate returns, and its tree is all there."""
    pool.create("busy", "64M")
    dice = random.Random(7)
    names: list[str] = []
    roots: dict[int, int] = {}
    with busy(pool.node("busy"), 64 * MIB):
        for number in range(4 * SOAK):
            for _ in range(6):
                write_at(pool.node("data"), dice.randrange(SIZE // 4096) * 4096, dice.randbytes(4096))
            at = dice.randrange(SIZE // 65536) * 65536
            tool(
                "blkdiscard",
                "-o",
                str(at),
                "-l",
                str(3 * 65536 if at < SIZE - 3 * 65536 else 65536),
                pool.node("data"),
            )
            name = f"s{number}"
            tool("lvcreate", "-s", "-pr", "-ky", "-n", name, volume)
            with opened(pool) as fd:
                # The id is one more than the last; no retry, and no question to LVM that would give it time.
                new = max(roots, default=thin_id(pool, name) - 1) + 1
                roots[new] = _native.thin_device(fd, new, 0)[8]
                if names:
                    found = diff(fd, new - 1, new)
                    with holding(tpool(pool)) as held:
                        assert diff(fd, new - 1, new, held) == found
                        assert delta_by_tool(tmeta(pool), new - 1, new, 65536) == found
                        model = read_metadata(tmeta(pool), held)
                    assert delta_by_model(model, new - 1, new) == found
                    assert found[0]
            assert thin_id(pool, name) == new
            names.append(name)
            if len(names) > 2:
                pool.remove(names.pop(0))
                del roots[min(roots)]
            with opened(pool) as fd:
                # The root of a snapshot that nobody touches stays, whatever else the pool does.
                assert {each: _native.thin_device(fd, each, 0)[8] for each in roots} == roots
    # One block written to it, and it is another.
    path = f"{pool.group}/{names[-1]}"
    tool("lvchange", "-prw", path)
    tool("lvchange", "-ay", "-K", path)
    write_at(pool.node(names[-1]), 0, b"x" * 4096)
    with opened(pool) as fd:
        assert _native.thin_device(fd, max(roots), 0)[8] != roots[max(roots)]
    pool.remove(*names, "busy")


# The metadata snapshot, for a pool that never stands still.


@pytest.fixture
def never_still(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every look-up in the live metadata finds the pool committing; what is asked of a held one is noted."""
    asked: list[int] = []

    def lookup(real: Any, at: int) -> Any:
        def wrapped(*words: int) -> Any:
            if words[at] == 0:
                raise BlockingIOError
            asked.append(words[at])
            return real(*words)

        return wrapped

    for name, at in (("thin_device", 2), ("thin_scan", 6), ("thin_diff", 5)):
        monkeypatch.setattr(_native, name, lookup(getattr(_native, name), at))
    monkeypatch.setattr(thin_hold, "_PAUSE_SECONDS", 0.01)
    return asked


def test_a_pool_that_never_stands_still_is_read_all_the_same(
    pool: ThinPool, volume: str, state: Path, never_still: list[int]
) -> None:
    backups = Backups(volume, state)
    first = backups.take()
    write_at(pool.node("data"), 5 * MIB, os.urandom(4 * KIB))
    second = backups.take(first)
    assert second.changes.method == "thin-time"
    assert second.changes.changed == ExtentList.of([(5 * MIB, 64 * KIB)])
    assert len(never_still) > 4
    assert held_root(tpool(pool)) == 0
    assert read_entries(state) == []


def test_the_metadata_snapshot_of_another_is_left_alone(
    pool: ThinPool, volume: str, state: Path, never_still: list[int]
) -> None:
    with holding(tpool(pool)) as theirs:
        with pytest.raises(MetadataHeldError):
            Backups(volume, state).take()
        assert held_root(tpool(pool)) == theirs
    assert never_still == []
    assert read_entries(state) == []


def die(volume: str, state: Path, step: str) -> None:
    """Have a run in a process of its own die while it needs the pool to hold a metadata snapshot."""

    def run() -> int:
        real = _native.thin_device

        def look(fd: int, device: int, held: int) -> Any:
            if not held:
                raise BlockingIOError
            if step == "held":
                os._exit(9)
            return real(fd, device, held)

        setattr(_native, "thin_device", look)  # noqa: B010 - not for the type checker
        dead_after(devmapper, "reserve_metadata_snapshot", when=step == "reserved")
        dead_after(devmapper, "release_metadata_snapshot", when=step == "released")
        with SnapshotSession([resolve_volume(volume)], f"dead-{step}", state) as session:
            session.snapshots[0].find_changes(None)
        return 0

    assert exit_code_of(run) == 9


@pytest.mark.parametrize("step", ["reserved", "held", "released"])
def test_the_next_run_releases_what_a_killed_one_held(
    pool: ThinPool, volume: str, state: Path, step: str
) -> None:
    die(volume, state, step)
    assert (held_root(tpool(pool)) != 0) == (step != "released")
    found = recover(state)
    if step == "reserved":
        # It may be anybody's: said, and left alone until it is gone.
        assert "perhaps of run dead-reserved" in found.puzzles[0]
        tool("dmsetup", "message", tpool(pool), "0", "release_metadata_snap")
        found = recover(state)
    assert found.warnings == ()
    assert any("released the metadata snapshot" in each for each in found.removed) == (step == "held")
    assert held_root(tpool(pool)) == 0
    assert read_entries(state) == []


def test_one_that_another_took_meanwhile_is_not_released(pool: ThinPool, volume: str, state: Path) -> None:
    die(volume, state, "held")
    tool("dmsetup", "message", tpool(pool), "0", "release_metadata_snap")
    write_at(pool.node("data"), 9 * MIB, b"x" * 4096)
    with holding(tpool(pool)) as theirs:
        assert not any("released" in each for each in recover(state).removed)
        assert held_root(tpool(pool)) == theirs
    assert read_entries(state) == []


def test_the_live_and_the_held_tree_give_the_same(pool: ThinPool, volume: str, state: Path) -> None:
    with SnapshotSession([resolve_volume(volume)], "run1", state) as session:
        known = session.snapshots[0].binding
        with opened(pool) as fd:
            live = ThinMetadata(fd)
            device, size = int(str(known["snapshot_id"])), SIZE // 65536
            facts: DeviceFacts = live.facts(device)
            with holding(tpool(pool)) as held:
                assert _native.thin_device(fd, device, held)[8:] == _native.thin_device(fd, device, 0)[8:]
                everything = (fd, device, 0, 0, size, False)
                assert _native.thin_scan(*everything, held) == _native.thin_scan(*everything, 0)
                with pytest.raises(ValueError, match="does not hold"):
                    _native.thin_device(fd, device, held + 1)
            assert facts.is_same_tree(live.facts(device))
