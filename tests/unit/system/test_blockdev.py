"""Real loop devices, asked for and never named; they are gone when a test ends."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocksnap.extents.model import ExtentList
from blocksnap.system import blockdev, mounts
from blocksnap.volumes.device import DeviceVolume
from blocksnap.volumes.errors import VolumeChangedError, VolumeInUseError
from blocksnap.volumes.resolve import resolve_volume
from support.require import require

SIZE = 16 << 20


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    available = os.geteuid() == 0 and Path("/dev/loop-control").exists()
    require("loop", available, "loop devices need root")
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    made = subprocess.run(
        ["losetup", "-f", "--show", str(image)], capture_output=True, text=True, check=False
    )
    require("loop", made.returncode == 0, made.stderr)
    node = made.stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["umount", "-q", node], check=False)
        # The flag would stay with the node, for whoever gets it next.
        subprocess.run(["blockdev", "--setrw", node], check=True)
        subprocess.run(["losetup", "-d", node], check=True)


@pytest.fixture
def mounted(loop: str, tmp_path: Path) -> Callable[[str], Path]:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    point = tmp_path / "mnt"
    point.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-o", options, loop, str(point)], check=True)
        return point

    return mount


def test_device_by_number(loop: str) -> None:
    number = os.stat(loop).st_rdev
    fd = blockdev.open_by_number(number)
    try:
        assert blockdev.device_number(fd) == number
        assert blockdev.size_of(fd) == SIZE
        assert blockdev.logical_block_size(fd) == 512
        assert blockdev.physical_block_size(fd) >= 512
        assert not blockdev.is_read_only(fd)
        buffer = blockdev.aligned_buffer(4096)
        assert os.preadv(fd, [buffer], 4096) == 4096
    finally:
        os.close(fd)
    assert blockdev.node_of(number) == loop
    assert blockdev.holders(number) == blockdev.partitions(number) == blockdev.slaves(number) == []


def test_device_that_is_not_there() -> None:
    with pytest.raises(blockdev.NoDeviceError):
        blockdev.open_by_number(os.makedev(4095, 7))
    with pytest.raises(blockdev.NoDeviceError):
        blockdev.open_exclusive("/nowhere")
    with pytest.raises(blockdev.NoDeviceError):
        blockdev.open_exclusive(__file__)


@pytest.mark.parametrize("discard", [False, True])
@pytest.mark.parametrize(
    ("begin", "end"),
    [(512, 3 << 20), (1 << 20, (2 << 20) + 100), (700, 5000), (100, 300), (500, 600), (0, 7)],
)
def test_cleared_ranges_read_as_zeros_and_only_they(loop: str, discard: bool, begin: int, end: int) -> None:
    fd = blockdev.open_exclusive(loop)
    try:
        before = os.pread(fd, SIZE, 0)
        blockdev.clear(fd, begin, end - begin, discard=discard)
        blockdev.drop_cache(fd)
        assert os.pread(fd, SIZE, 0) == before[:begin] + bytes(end - begin) + before[end:]
    finally:
        os.close(fd)


def test_zeros_are_told_before_they_are_written(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a target in a thin pool they take the room, and who is told can keep them from being written."""
    monkeypatch.setattr(blockdev, "_COUNTED_ZEROS_BYTES", 1 << 20)
    begin, end = 512 + 100, (5 << 19) + 1000
    fd = blockdev.open_exclusive(loop)
    told: list[int] = []

    def refuse_the_second(length: int) -> None:
        told.append(length)
        if len(told) == 2:
            raise TimeoutError

    try:
        before = os.pread(fd, SIZE, 0)
        with pytest.raises(TimeoutError):
            blockdev.clear(fd, begin, end - begin, discard=False, before_zeros=refuse_the_second)
        blockdev.drop_cache(fd)
        assert os.pread(fd, SIZE, 0) == before[:1024] + bytes(1 << 20) + before[1024 + (1 << 20) :]
        told.clear()
        blockdev.clear(fd, begin, end - begin, discard=False, before_zeros=told.append)
        # Whole blocks first; then the parts of blocks at both ends.
        assert told == [1 << 20, 1 << 20, end // 512 * 512 - 1024 - (2 << 20), 1024 - begin, end % 512]
        blockdev.drop_cache(fd)
        assert os.pread(fd, SIZE, 0) == before[:begin] + bytes(end - begin) + before[end:]
    finally:
        os.close(fd)


@pytest.mark.parametrize("discard", [False, True])
def test_a_large_range_is_cleared_in_pieces(
    loop: str, discard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In between signals are heard, and it is told: a disk that writes zeros may need an hour for a hole."""
    monkeypatch.setattr(blockdev, "PIECE_BYTES", 4 << 20)
    begin, end, asked, told = 1 << 20, (11 << 20) + 512 + 100, [], list[int]()
    by_ioctl, by_fallocate = fcntl.ioctl, blockdev.punch_hole

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        if len(argument) == 16:
            asked.append(struct.unpack("<QQ", argument))
        return by_ioctl(fd, request, argument)

    def punch_hole(fd: int, offset: int, length: int) -> bool:
        done = by_fallocate(fd, offset, length)
        asked.extend([(offset, length)] if done else [])
        return done

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(blockdev, "punch_hole", punch_hole)
    fd = blockdev.open_exclusive(loop)
    try:
        before = os.pread(fd, SIZE, 0)
        blockdev.clear(fd, begin, end - begin, discard=discard, progress=told.append)
        assert [length for length in told if length] == [4 << 20, 4 << 20, (2 << 20) + 512, 100]
        assert asked == [(1 << 20, 4 << 20), (5 << 20, 4 << 20), (9 << 20, (2 << 20) + 512)]
        monkeypatch.undo()
        blockdev.drop_cache(fd)
        assert os.pread(fd, SIZE, 0) == before[:begin] + bytes(end - begin) + before[end:]
    finally:
        os.close(fd)


def test_a_large_range_of_zeros_needs_little_memory(tmp_path: Path) -> None:
    """Where nothing can be punched, as on FAT and NFS 3, a hole of any size is written."""
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"x" * SIZE)
        file.flush()
        tracemalloc.start()
        try:
            blockdev.write_zeros(file.fileno(), 5, SIZE - 7)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()
        file.seek(0)
        assert file.read() == b"x" * 5 + bytes(SIZE - 12) + b"x" * 7


def test_exclusive_is_exclusive_and_says_who_uses_it(loop: str, mounted: Callable[[str], Path]) -> None:
    point = mounted("rw")
    with pytest.raises(blockdev.DeviceBusyError, match=f"mounted on {point}"):
        blockdev.open_exclusive(loop)
    assert mounts.users_of_device(os.stat(loop).st_rdev) == [f"mounted on {point}"]
    with pytest.raises(VolumeInUseError, match=f"mounted on {point}") as caught:
        resolve_volume(loop).prepare()
    assert caught.value.exit_code == 14


@contextmanager
def machine_with(disk: str) -> Iterator[int]:
    """As a virtual machine has its disk: not exclusively, and nothing in sysfs tells of it."""
    script = "import os, sys; os.open(sys.argv[1], os.O_RDWR); print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", script, disk]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as machine:
        assert machine.stdout is not None
        machine.stdout.readline()
        try:
            yield machine.pid
        finally:
            machine.communicate()


def test_device_that_a_process_writes_is_no_target(loop: str) -> None:
    with machine_with(loop) as pid:
        with pytest.raises(blockdev.DeviceBusyError, match=f"for writing by process {pid} "):
            blockdev.open_exclusive(loop)
        os.close(blockdev.open_exclusive(loop, writable=False))
    os.close(blockdev.open_exclusive(loop))


def test_device_that_a_process_writes_is_not_read(loop: str) -> None:
    volume = resolve_volume(loop)
    with machine_with(loop) as pid, pytest.raises(VolumeInUseError, match=f"by process {pid} ") as caught:
        volume.prepare()
    assert caught.value.exit_code == 14
    snapshot = volume.take_snapshot("r")
    try:
        # One that only reads it, and one that is gone in a moment, are no writers.
        with open(loop, "rb"):
            snapshot.check()
        with machine_with(loop) as pid, pytest.raises(VolumeChangedError, match=f"by process {pid} "):
            snapshot.check()
        snapshot.check()
    finally:
        snapshot.remove()


def test_device_that_was_written_to_while_it_was_read(loop: str) -> None:
    """By somebody who is gone when it is looked at; what was dirty before is no change."""
    argv = ["dd", "if=/dev/urandom", f"of={loop}", "bs=4096", "count=3", "conv=notrunc", "status=none"]
    with open(loop, "rb"):
        # As long as somebody has it open, what is dirty stays so.
        subprocess.run(argv, check=True)
        snapshot = DeviceVolume(loop).take_snapshot("r")
    try:
        with snapshot.open_reader() as fd:
            assert os.preadv(fd, [blockdev.aligned_buffer(1 << 20)], 0) == 1 << 20
        snapshot.check()
        subprocess.run(argv, check=True)
        with pytest.raises(VolumeChangedError, match="12288 bytes were written"):
            snapshot.check()
    finally:
        snapshot.remove()


def test_read_only_device_is_no_target(loop: str) -> None:
    subprocess.run(["blockdev", "--setro", loop], check=True)
    with pytest.raises(blockdev.DeviceError, match="read-only"):
        blockdev.open_exclusive(loop)
    os.close(blockdev.open_exclusive(loop, writable=False))


def test_unused_device_is_held_while_it_is_read(loop: str) -> None:
    volume = resolve_volume(loop)
    assert (volume.name, volume.kind, volume.size) == (loop, "device", SIZE)
    snapshot = volume.take_snapshot("r")
    try:
        with pytest.raises(blockdev.DeviceBusyError):
            blockdev.open_exclusive(loop)
        changes = snapshot.find_changes(None)
        assert (changes.method, changes.allocated) == ("compare", ExtentList.whole(SIZE))
        with snapshot.open_reader() as fd:
            assert os.preadv(fd, [blockdev.aligned_buffer(4096)], 0) == 4096
        snapshot.check()
    finally:
        snapshot.remove()
    os.close(blockdev.open_exclusive(loop))


def test_device_that_is_mounted_read_only_is_read_but_watched(
    loop: str, mounted: Callable[[str], Path], tmp_path: Path
) -> None:
    mounted("ro,noload")
    snapshot = DeviceVolume(loop).take_snapshot("r")
    try:
        snapshot.check()
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "mnt")], check=True)
        with pytest.raises(VolumeChangedError, match="mounted for writing"):
            snapshot.check()
    finally:
        snapshot.remove()


def test_loop_devices_of_a_file(loop: str, tmp_path: Path) -> None:
    assert mounts.loop_devices_of(str(tmp_path / "disk.img")) == [loop]
    assert mounts.loop_devices_of(__file__) == []


class Held:
    """A device that somebody holds for so many attempts to open it; its clock runs while it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attempts: int, users: list[str]) -> None:
        self.now, self.left = 0.0, attempts
        self._open = os.open
        monkeypatch.setattr(blockdev, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(mounts, "users_of_device", lambda _: users)
        monkeypatch.setattr(os, "open", self.open)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def open(self, path: str, flags: int) -> int:
        self.left -= 1
        if self.left >= 0:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        return self._open(path, flags & ~os.O_EXCL)


def test_who_holds_a_device_for_a_moment_does_not_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the scan for btrfs after an event of udev did up to Linux 6.2, and multipath does."""
    held = Held(monkeypatch, 3, [])
    # It was opened in the end, and is no block device.
    with pytest.raises(blockdev.NoDeviceError, match="something else"):
        blockdev.open_exclusive("/dev/null", writable=False)
    assert 0 < held.now < 0.5


def test_who_holds_a_device_for_longer_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, 1000, [])
    with pytest.raises(blockdev.DeviceBusyError, match="somebody holds it open exclusively"):
        blockdev.open_exclusive("/dev/null", writable=False)
    assert 0.5 < held.now < 1


def test_a_device_with_users_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, 1, ["mounted on /x"])
    with pytest.raises(blockdev.DeviceBusyError, match="mounted on /x"):
        blockdev.open_exclusive("/dev/null", writable=False)
    assert held.now == 0


def test_a_busy_device_may_go_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.touch()
    held = Held(monkeypatch, 1000, [])
    monkeypatch.setattr("blocksnap.system.blockdev.time.sleep", lambda _: node.unlink())
    with pytest.raises(blockdev.NoDeviceError, match="No such file"):
        blockdev.open_exclusive(str(node), writable=False)
    assert held.left < 1000
