"""Subvolumes in one another: whether their snapshots are of one instant is told rightly, either way."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.volumes.base import Ledger
from blocksnap.volumes.subvolume import SubvolumeSnapshot, SubvolumeVolume
from support import btrfs_calls as calls
from support.btrfs_lab import BtrfsLab
from support.in_process import InProcess
from support.loops import call
from support.require import require
from support.standing import hook_folder, safe_base, write_hook

PLACES = ("a/file", "a/inner/file", "b/file", "file")
"""In the order in which snapshots are taken: of whoever holds the others last."""


@pytest.fixture
def top(lab: BtrfsLab) -> Path:
    """The top directory of a filesystem with subvolumes in it, and in these."""
    calls.delete_subvolume(str(lab.live))
    for name in ("a", "a/inner", "b"):
        calls.create_subvolume(str(lab.mount / name))
    # Written in place, without a new extent.
    call("chattr", "+C", lab.mount / "b")
    for place in PLACES:
        (lab.mount / place).write_bytes(bytes(4096))
    return lab.mount


def write(path: Path, number: int) -> None:
    """Overwrite in place, which is what btrfs tells of the latest."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.pwrite(fd, number.to_bytes(8, "little") * 512, 0)
    os.close(fd)


class Meddler(SubvolumeVolume):
    """A subvolume after whose snapshot something happens."""

    def __init__(self, path: str, happens: Callable[[], object]) -> None:
        super().__init__(path)
        self._happens = happens

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> SubvolumeSnapshot:
        snapshot = super().take_snapshot(run, ledger)
        self._happens()
        return snapshot


def group_of(top: Path) -> list[SubvolumeVolume]:
    volume = SubvolumeVolume(str(top))
    return [volume, *volume.nested()]


def number_in(snapshot: SubvolumeSnapshot) -> int:
    """What the file in a snapshot holds."""
    fd = os.open("file", os.O_RDONLY, dir_fd=snapshot._fd)
    try:
        return int.from_bytes(os.pread(fd, 8, 0), "little")
    finally:
        os.close(fd)


def test_our_own_snapshots_are_no_skew(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    blocksnap = InProcess(tmp_path, monkeypatch, capsysbinary)
    blocksnap.done("init", "--no-encryption")
    for number in range(3):
        # Written before, and dirty when the snapshots are taken.
        for place in PLACES:
            write(top / place, number)
        # A warning would end it with exit code 3.
        out = blocksnap.done("backup", "--json", top)
    taken = [each["volume"] for each in json.loads(out.splitlines()[-1])["backups"]]
    assert taken == [str(top / name) for name in ("", "a", "a/inner", "b")]


@pytest.mark.parametrize(
    ("after", "place", "torn"),
    [
        ("a", "a/file", ["a"]),
        ("b", "a/inner/file", ["a/inner"]),
        ("b", "b/file", ["b"]),
        ("a", "b/file", []),
        ("a", "file", []),
        ("b", "a/new", ["a"]),
        ("", "a/file", ["a"]),
    ],
)
def test_a_write_between_two_snapshots(
    after: str, place: str, torn: list[str], top: Path, tmp_path: Path
) -> None:
    """Nothing is missed of what was written before the last; right after it counts too, on the safe side."""
    volumes = [
        Meddler(volume.name, lambda: write(top / place, 7)) if volume.name == str(top / after) else volume
        for volume in group_of(top)
    ]
    with SnapshotSession(volumes, "run", tmp_path / "state") as session:
        assert session.torn == tuple(str(top / name) for name in torn)


@contextmanager
def writing(top: Path, seed: int, pause: Path | None = None) -> Iterator[None]:
    """A writer that goes through all places in order, again and again, in bursts.

    While there is a file ``pause`` it does not, and has said so in ``paused`` beside it.
    """
    stop = threading.Event()
    chance = random.Random(seed)

    def wait() -> None:
        while pause is not None and pause.exists() and not stop.is_set():
            (pause.parent / "paused").touch()
            time.sleep(0.001)

    def work() -> None:
        number = 0
        while not stop.is_set():
            until = time.monotonic() + chance.choice((0.0005, 0.002, 0.01, 0.03))
            while time.monotonic() < until:
                number += 1
                for place in PLACES:
                    wait()
                    write(top / place, number)
            time.sleep(chance.choice((0, 0.01, 0.05)) if pause is None else 0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_whoever_writes_in_order_is_never_seen_out_of_order_untold(top: Path, tmp_path: Path) -> None:
    """An earlier snapshot that is behind a later one is torn, and each of them is told."""
    rounds, behind = int(os.environ.get("BLOCKSNAP_SKEW_ROUNDS", "12")), 0
    with writing(top, 1):
        for number in range(rounds + 500):
            # A writer that is hardly ever let run has to be waited for.
            if number >= rounds and behind:
                break
            with SnapshotSession(group_of(top), f"run{number}", tmp_path / "state") as session:
                held = {
                    volume.name: number_in(snapshot)
                    for volume, snapshot in zip(session.volumes, session.snapshots, strict=True)
                }
                inner = held.pop(str(top / "a/inner"))
                values = [held[str(top / "a")], inner, held[str(top / "b")], held[str(top)]]
                names = [str(top / "a"), str(top / "a/inner"), str(top / "b")]
                wrong = {
                    name for at, name in enumerate(names) if any(values[at] < later for later in values[at:])
                }
                behind += bool(wrong)
                assert wrong <= set(session.torn), (values, session.torn)
    assert behind, "nothing was torn: the test shows nothing"


def test_whoever_stands_still_makes_no_skew(top: Path, tmp_path: Path) -> None:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as hooks, writing(top, 2, hooks / "pause"):
        waits = f"rm -f '{hooks}/paused'; touch '{hooks}/pause'; while [ ! -e '{hooks}/paused' ]; do :; done"
        before = write_hook(hooks, "before", waits)
        after = write_hook(hooks, "after", f"rm '{hooks}/pause'")
        request = QuiesceRequest(
            QuiesceSettings.model_validate(
                {"deadline_seconds": 120, "hooks": [{"before": [before], "after": [after]}]}
            )
        )
        for number in range(5):
            with SnapshotSession(group_of(top), f"run{number}", tmp_path / "state", request) as session:
                values = {number_in(snapshot) for snapshot in session.snapshots}
                assert max(values) - min(values) <= 1
                assert session.torn == ()
