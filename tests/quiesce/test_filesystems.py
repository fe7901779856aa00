"""Filesystems above others on loop devices: which are frozen, in which order, and that they are thawed."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.base import Trace
from blocksnap.quiesce.errors import FilesystemFreezeError
from blocksnap.quiesce.filesystem import (
    FilesystemFlush,
    FilesystemFreeze,
    decide,
    protected_filesystems,
    thaw_leftover,
)
from blocksnap.quiesce.places import Placement, Target
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from blocksnap.system import freeze
from blocksnap.system.freeze import layers_above
from blocksnap.system.watchdog import Thaw, Watchdog
from blocksnap.volumes.resolve import resolve_volume
from blocksnap.volumes.subvolume import SubvolumeVolume
from support import btrfs_calls as calls
from support.loops import call, call_until_done, loop_device, mounted, unmount
from support.require import require
from support.standing import Application, holding, is_gone, thaw, wait_until

CONTROLLER = """
import os, signal, sys
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.places import Target
from blocksnap.quiesce.settings import QuiesceSettings
device, deadline, end = sys.argv[1:]
settings = QuiesceSettings(deadline_seconds=float(deadline))
standstill = assemble(settings, [Target("key", int(device))], [])
standstill.attend(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), {})
standstill.begin()
print(standstill._watchdog.pid, flush=True)
os.kill(os.getpid(), getattr(signal, end))
standstill.end()
standstill.close()
"""


@dataclass
class Nested:
    """A volume with a filesystem that holds the image of another one."""

    device: str
    outer: Path
    inner_device: str
    inner: Path

    @property
    def number(self) -> int:
        return os.stat(self.device).st_rdev


@pytest.fixture(autouse=True)
def _root() -> None:
    require("root", os.geteuid() == 0, "loop devices need root")


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Nested]:
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(tmp_path / "outer.img", size=64 << 20))
        call("mkfs.ext4", "-q", device)
        outer = stack.enter_context(holding(device, tmp_path / "outer"))
        image = outer / "inner.img"
        inner_device = stack.enter_context(loop_device(image, size=32 << 20))
        call("mkfs.ext4", "-q", inner_device)
        inner = stack.enter_context(holding(inner_device, tmp_path / "inner"))
        yield Nested(device, outer, inner_device, inner)


def attended(number: int, **settings: object) -> Standstill:
    settings = {"deadline_seconds": 120, **settings}
    standstill = assemble(QuiesceSettings.model_validate(settings), [Target("key", number)], [])
    fd = os.open(os.devnull, os.O_WRONLY)
    standstill.attend(fd, {})
    os.close(fd)
    return standstill


def test_the_deepest_is_frozen_and_what_lies_directly_on_the_volume_is_not(nested: Nested) -> None:
    layers = layers_above(nested.number)
    assert [(Path(layer.mount.point), layer.depth) for layer in layers] == [
        (nested.inner, 1),
        (nested.outer, 0),
    ]
    decisions = [decide(layer, set()) for layer in layers]
    assert [decision.action for decision in decisions] == ["freeze", "leave"]
    assert "the snapshot freezes it" in decisions[1].reason
    standstill = attended(nested.number)
    standstill.begin()
    with subprocess.Popen(["touch", nested.inner / "file"]) as writer:
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.3)
        (nested.outer / "file").touch()
        standstill.end()
        assert writer.wait(30) == 0
    outcome = standstill.conclude()
    standstill.close()
    assert (outcome.state, outcome.by) == ("frozen", (f"filesystem on {nested.inner}",))
    assert not thaw(nested.inner)


def test_a_device_is_not_where_its_node_is(nested: Nested) -> None:
    """InnoDB may use one as it is."""
    placement = Placement([Target("key", nested.number)])
    assert placement.of_directory(os.getpid(), nested.device) == {"key"}


def test_never_asked_for_is_never_done(nested: Nested) -> None:
    assert attended(nested.number, filesystems="never").is_empty


def test_what_we_write_to_is_flushed_and_not_frozen(nested: Nested) -> None:
    repository = nested.inner / "repository" / "not there yet"
    protected = protected_filesystems([str(repository)])
    # And with it what it lies on.
    assert {os.stat(nested.inner).st_dev, os.stat(nested.outer).st_dev} <= protected
    layers = layers_above(nested.number)
    assert [decide(layer, protected).action for layer in layers] == ["flush", "leave"]
    standstill = assemble(QuiesceSettings(), [Target("key", nested.number)], [str(repository)])
    assert [type(each) for each in standstill._quiescers] == [FilesystemFlush]
    fd = os.open(os.devnull, os.O_WRONLY)
    standstill.attend(fd, {})
    os.close(fd)
    standstill.begin()
    (nested.inner / "file").write_text("not blocked")
    standstill.end()
    standstill.close()


def test_the_hosts_own_filesystems_are_protected_whatever_they_lie_on(nested: Nested) -> None:
    protected = protected_filesystems([])
    assert {os.stat(path).st_dev for path in ("/", "/etc", "/var", "/usr")} <= protected
    assert os.stat(nested.inner).st_dev not in protected


def test_what_somebody_else_froze_is_refused_and_stays_frozen(nested: Nested) -> None:
    call("fsfreeze", "--freeze", nested.inner)
    standstill = attended(nested.number)
    with pytest.raises(FilesystemFreezeError, match="somebody else has frozen it"):
        standstill.begin()
    standstill.close()
    assert thaw(nested.inner)


def test_who_thaws_it_meanwhile_is_noticed(nested: Nested) -> None:
    standstill = attended(nested.number)
    standstill.begin()
    call("fsfreeze", "--unfreeze", nested.inner)
    standstill.end()
    with pytest.raises(FilesystemFreezeError, match="somebody thawed it"):
        standstill.conclude()
    standstill.close()


def test_a_mount_that_was_replaced_is_not_frozen(nested: Nested) -> None:
    (layer, _) = layers_above(nested.number)
    unmount(nested.inner)
    try:
        with pytest.raises(FilesystemFreezeError, match="another one was mounted"):
            FilesystemFreeze(layer)
    finally:
        call("mount", nested.inner_device, nested.inner)


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_btrfs_directly_on_the_volume_is_frozen_by_us(tmp_path: Path, kind: str) -> None:
    require(kind, shutil.which(f"mkfs.{kind}") is not None, f"there is no mkfs.{kind}")
    with loop_device(tmp_path / "image", size=320 << 20) as device:
        call(f"mkfs.{kind}", "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            (layer,) = layers_above(os.stat(device).st_rdev)
            assert (layer.depth, layer.mount.point) == (0, str(folder))
            action = decide(layer, set()).action
            assert action == ("freeze" if kind == "btrfs" else "leave")
            if action == "freeze":
                standstill = attended(os.stat(device).st_rdev)
                standstill.begin()
                standstill.end()
                assert standstill.conclude().state == "frozen"
                standstill.close()
                assert not thaw(folder)


@dataclass
class Device:
    """A volume as far as standing still looks at it."""

    name: str
    key = "volume"
    kind = "classic"

    @property
    def snapshot_device(self) -> int:
        return os.stat(self.name).st_rdev


def test_a_snapshot_is_taken_in_a_filesystem_that_would_be_frozen(tmp_path: Path) -> None:
    """A volume and a subvolume of the btrfs on it in one run: frozen, that would make no snapshot."""
    require("btrfs", shutil.which("mkfs.btrfs") is not None, "no btrfs")
    with loop_device(tmp_path / "disk.img", size=160 << 20) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, tmp_path / "btrfs") as point:
            volume = SubvolumeVolume(str(point))
            request = QuiesceRequest(QuiesceSettings(deadline_seconds=30))
            standstill = request.assemble([Device(device), volume], tmp_path)  # type: ignore[list-item]
            assert standstill is not None
            with Path(os.devnull).open("wb") as journal:
                standstill.attend(journal.fileno(), {})
            try:
                standstill.begin()
                volume.take_snapshot("run").remove()
                standstill.end()
                outcome = standstill.conclude()
            finally:
                standstill.end()
                standstill.close()
    assert outcome.by == (f"flush of {point}",)


@pytest.mark.parametrize("kind", ["image on btrfs", "image on xfs", "subvolume"])
def test_what_is_mounted_from_an_image_is_frozen_for_its_clone(tmp_path: Path, kind: str) -> None:
    """On btrfs a file has a device number of its subvolume's own, which nothing is mounted from."""
    filesystem = "xfs" if kind.endswith("xfs") else "btrfs"
    require(filesystem, shutil.which(f"mkfs.{filesystem}") is not None, f"no {filesystem}")
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(tmp_path / "disk.img", size=320 << 20))
        call(f"mkfs.{filesystem}", "-q", device)
        point = stack.enter_context(holding(device, tmp_path / "point"))
        folder = point / "images"
        if filesystem == "btrfs":
            calls.create_subvolume(str(folder))
            calls.create_subvolume(str(point / "other"))
            assert layers_above((point / "other").stat().st_dev) == []
        else:
            folder.mkdir()
        image = folder / "image"
        inner_device = stack.enter_context(loop_device(image, size=16 << 20))
        call("mkfs.ext4", "-q", inner_device)
        inner = stack.enter_context(holding(inner_device, tmp_path / "inner"))
        volume = resolve_volume(str(folder if kind == "subvolume" else image))
        assert volume.kind == kind.partition(" ")[0]
        assert inner.stat().st_dev in Target("key", volume.snapshot_device or 0).numbers_above()
        volume.prepare()
        standstill = QuiesceRequest(QuiesceSettings(deadline_seconds=120)).assemble([volume], tmp_path)
        assert standstill is not None
        with Path(os.devnull).open("wb") as journal:
            standstill.attend(journal.fileno(), {})
        try:
            standstill.begin()
            with subprocess.Popen(["touch", inner / "file"]) as writer:
                with pytest.raises(subprocess.TimeoutExpired):
                    writer.wait(0.3)
                snapshot = volume.take_snapshot("run", lambda _step, _facts: None)
                standstill.end()
                assert writer.wait(30) == 0
            outcome = standstill.conclude()
        finally:
            standstill.end()
            standstill.close()
        snapshot.remove()
    assert (outcome.state, outcome.by) == ("frozen", (f"filesystem on {inner}",))


def test_a_filesystem_on_a_partition_is_found(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
        # One entry of the table of a PC: a Linux partition from sector 2048 to the end.
        file.seek(446)
        file.write(struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, (64 << 20) // 512 - 2048))
        file.seek(510)
        file.write(b"\x55\xaa")
    with loop_device(image) as device, ExitStack() as stack:
        call("partx", "--add", device)
        stack.callback(call_until_done, "partx", "--delete", device)
        partition = f"{device}p1"
        require(
            "partscan", wait_until(lambda: os.path.exists(partition), 5.0), "no node of a partition appears"
        )
        call("mkfs.ext4", "-q", partition)
        with mounted(partition, tmp_path / "mnt") as folder:
            (layer,) = layers_above(os.stat(device).st_rdev)
            assert (layer.depth, layer.mount.point) == (1, str(folder))
            assert decide(layer, set()).action == "freeze"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_the_application_goes_on_within_the_deadline_and_a_second(
    nested: Nested, tmp_path: Path, end: signal.Signals
) -> None:
    deadline = 5.0
    application = Application(nested.inner / "data", fsync=True)
    beside = Application(tmp_path / "beside", fsync=True)
    argv = [sys.executable, "-c", CONTROLLER, str(nested.number), str(deadline), end.name]
    try:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as controller:
            assert controller.stdout is not None
            watchdog = int(controller.stdout.readline())
            try:
                # Written by somebody else, it comes through when the filesystem is thawed.
                call("touch", nested.inner / "file")
            finally:
                controller.kill()
        assert wait_until(lambda: is_gone(watchdog))
        assert not thaw(nested.inner)
        # What the disk of this machine, busy with other tests, makes anybody wait is not ours; and what is
        # flushed in a filesystem in an image in another one is flushed several times.
        assert application.longest_stall() < deadline + 1 + 8 * beside.longest_stall()
    finally:
        # Or it could not be killed.
        thaw(nested.inner)
        application.kill()
        beside.kill()


def test_what_is_frozen_when_the_time_was_up_is_thawed(nested: Nested) -> None:
    """The first of two filesystems takes longer to freeze than all may stand still; then comes the other."""
    inner, outer = (os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (nested.inner, nested.outer))
    watchdog = Watchdog([Thaw(outer), Thaw(inner)], 0.05)
    try:
        watchdog.arm(0)
        assert wait_until(lambda: watchdog.expired_after is not None)
        watchdog.arm(1)
        freeze.freeze(inner)
        with subprocess.Popen(["touch", nested.inner / "file"]) as writer:
            try:
                assert wait_until(lambda: writer.poll() == 0)
            finally:
                thaw(nested.inner)
    finally:
        watchdog.close(10.0)
        os.close(inner)
        os.close(outer)


def test_what_a_dead_run_left_frozen_is_thawed_wherever_it_is_mounted_now(
    nested: Nested, tmp_path: Path
) -> None:
    (layer, _) = layers_above(nested.number)
    trace: Trace = {"kind": "filesystem", "point": str(nested.inner), "device": layer.mount.device}
    assert not thaw_leftover(trace)
    call("fsfreeze", "--freeze", nested.inner)
    assert thaw_leftover(trace)
    call("fsfreeze", "--freeze", nested.inner)
    unmount(nested.inner)
    try:
        # Nobody can reach it now, and it does not thaw by that.
        assert not thaw_leftover(trace)
        with holding(nested.inner_device, tmp_path / "elsewhere"):
            assert thaw_leftover(trace)
            assert not thaw_leftover(trace)
    finally:
        call("mount", nested.inner_device, nested.inner)
