"""Restores that are killed, go on, write over what differs, and meet targets that fail; on loop devices."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from blocksnap.restore import flushing
from blocksnap.restore.disk_image import DiskImageTarget
from blocksnap.restore.place import Place
from blocksnap.restore.record import RestoreMode, RestoreRecord
from blocksnap.restore.targets import TargetFailedError
from blocksnap.restore.tree_place import NewTree
from support.commands import CommandLine
from support.in_process import InProcess
from support.loops import call, loop_device, mounted, unmount
from support.require import require
from support.standing import is_gone, wait_until

MIB = 1 << 20
SIZE = 96 * MIB


@pytest.fixture
def source(blocksnap: CommandLine, tmp_path: Path) -> Path:
    """A backed up volume with data, repeated data and holes."""
    dice = random.Random(1)
    volume = tmp_path / "volume.img"
    with volume.open("wb") as file:
        for number in range(SIZE // MIB):
            if number % 5 == 3:
                file.seek(MIB, os.SEEK_CUR)
            else:
                file.write(dice.randbytes(MIB) if number % 7 else b"same" * (MIB // 4))
        file.truncate(SIZE)
    blocksnap.done("backup", volume, "-q")
    return volume


def same(one: Path | str, other: Path | str, length: int = SIZE) -> bool:
    with open(one, "rb") as mine, open(other, "rb") as theirs:
        return mine.read(length) == theirs.read(length)


def kill_sometimes(blocksnap: CommandLine, target: Path | str, *options: str) -> int:
    """Run a restore again and again, killed a little later each time; return how often it was killed.

    The first is killed before the interpreter has begun, and the last has minutes: any machine is between.
    """
    for attempt in range(40):
        process = blocksnap.start("restore", "latest", target, "-q", *options)
        try:
            _, stderr = process.communicate(timeout=0.05 * 1.25**attempt)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        # One that was killed when all was done has only not said so.
        assert process.returncode == 0 or b"exists already" in stderr, stderr
        return attempt
    raise AssertionError("it never came to an end")


def test_killed_at_random_points(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    out.mkdir()
    assert kill_sometimes(blocksnap, out / "out") > 0
    assert os.listdir(out) == ["out"]
    assert same(out / "out", source)
    with loop_device(tmp_path / "target.img", size=SIZE + MIB) as device:
        Path(device).write_bytes(random.Random(2).randbytes(SIZE + MIB))
        assert kill_sometimes(blocksnap, device) > 0
        assert same(device, source)
        Path(device).write_bytes(random.Random(3).randbytes(SIZE + MIB))
        assert kill_sometimes(blocksnap, device, "--in-place") > 0
        assert same(device, source)


def test_an_unfinished_device_is_not_taken_for_a_volume(blocksnap: CommandLine, tmp_path: Path) -> None:
    with loop_device(tmp_path / "volume.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        blocksnap.done("backup", device, "-q")
    pack = max((blocksnap.repository / "packs").rglob("*-*"), key=lambda path: path.stat().st_size)
    whole = pack.read_bytes()
    pack.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with loop_device(tmp_path / "target.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        failed = blocksnap("restore", "latest", device)
        assert failed.code == 13, failed
        assert "bytes" in failed.stderr
        assert "is not complete" in failed.stderr
        # A backup of it would be the newest one, for which others are forgotten.
        refused = blocksnap("backup", device)
        assert (refused.code, "is not whole" in refused.stderr) == (14, True), refused
        assert subprocess.run(["blkid", "-p", device], check=False, capture_output=True).returncode == 2
        pack.write_bytes(whole)
        blocksnap.done("restore", "latest", device)
        call("e2fsck", "-fn", device)


@pytest.mark.parametrize("size", [1, 4097, 128 << 10])
def test_what_has_no_room_for_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], size: int
) -> None:
    """What is no larger than the beginning that comes last is written in one go, and nothing is told."""
    blocksnap = InProcess(tmp_path, monkeypatch, capsysbinary)
    blocksnap.done("init")
    source, out, disk = (tmp_path / name for name in ("source", "out", "disk"))
    source.write_bytes(random.Random(size).randbytes(size))
    blocksnap.done("backup", source)
    room = max(-(-size // 4096) * 4096, 64 << 10)
    disk.write_bytes(b"d" * room)
    with loop_device(disk) as device:
        for target, options in ((out, ()), (out, ("--in-place",)), (device, ()), (device, ("--in-place",))):
            code, _, err = blocksnap("restore", "latest", target, "--verify", *options)
            assert (code, "warning" in err) == (0, False), err
            with open(target, "rb") as restored:
                content = restored.read()
            assert content == source.read_bytes() + (b"d" * (room - size) if target == device else b"")
            out.write_bytes(b"other" * size)
            call("blkdiscard", "--zeroout", device)
            disk.write_bytes(b"d" * room)
            call("blockdev", "--flushbufs", device)


def test_only_what_differs(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(source.read_bytes() + b"longer")
    with target.open("r+b") as file:
        file.seek(50 * MIB + 1)
        file.write(b"other")
    for path in (target, target):
        done = blocksnap.done("restore", "latest", path, "--in-place", "--json").events[-1]
        assert same(target, source, SIZE + 100)
        assert done["method"] == "compare"
    assert done["written_bytes"] == 0
    with loop_device(target) as device:
        with open(device, "r+b") as file:
            file.seek(2 * MIB)
            file.write(bytes(MIB))
        done = blocksnap.done("restore", "latest", device, "--in-place", "--verify", "--json").events[-1]
        assert done["written_bytes"] == MIB
        refused = blocksnap("restore", "latest", target, "--in-place")
        assert refused.code == 1
        assert device in refused.stderr
    assert same(target, source)


def test_a_target_that_runs_full_in_place(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    """What can be found out before is: the room of a file is allocated before it is written."""
    with loop_device(tmp_path / "small.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", "-m", "0", device)
        with mounted(device, tmp_path / "small") as folder:
            (folder / "out").write_bytes(b"before")
            failed = blocksnap("restore", "latest", folder / "out", "--in-place")
            assert (failed.code, len(failed.errors)) == (1, 1), failed
            assert "No space left" in failed.stderr
            assert (folder / "out").read_bytes().startswith(b"BLOCKSNAP RESTORING")


def test_a_qcow2_image(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    require(
        "qemu-img", any(Path(p, "qemu-img").exists() for p in os.get_exec_path()), "apt install qemu-utils"
    )
    folder = tmp_path / "images"
    folder.mkdir()
    blocksnap.done("restore", "latest", folder / "out.qcow2", "--format", "qcow2", "--verify")
    assert os.listdir(folder) == ["out.qcow2"]
    call("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, folder / "out.qcow2")
    assert (folder / "out.qcow2").stat().st_size < SIZE * 0.85
    assert blocksnap("restore", "latest", folder / "out.qcow2", "--format", "qcow2").code == 1
    assert blocksnap("restore", "latest", "-", "--format", "qcow2").code == 2


def test_an_image_is_written_nowhere_else(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    """Whoever owns the directory puts links in the place of the raw image and of the one that is made."""
    real = shutil.which("qemu-img")
    require("qemu-img", real is not None, "apt install qemu-utils")
    folder, programs, victim = tmp_path / "images", tmp_path / "programs", tmp_path / "victim"
    folder.mkdir()
    programs.mkdir()
    victim.write_bytes(b"not theirs" * 1000)
    swapping = programs / "qemu-img"
    swapping.write_text(
        f"#!/bin/sh -e\nfor i in {folder}/.*.partial; do mv $i $i.aside; ln -s {victim} $i; done\n"
        f'exec {real} "$@"\n'
    )
    swapping.chmod(0o755)
    command = blocksnap.start(
        "restore", "latest", folder / "out.qcow2", "--format", "qcow2",
        PATH=f"{programs}:{os.environ['PATH']}",
    )  # fmt: skip
    _, stderr = command.communicate(timeout=120)
    assert command.returncode == 1, stderr
    assert b"Stale file handle" in stderr
    assert victim.read_bytes() == b"not theirs" * 1000
    assert not (folder / "out.qcow2").exists()
    (raw,) = folder.glob(".*-raw.partial.aside")
    assert same(raw, source)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_interrupted_is_begun_again_and_nothing_else(
    blocksnap: CommandLine, source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """The raw image waits; the converting program, which could go on for hours, does not."""
    real = shutil.which("qemu-img")
    require("qemu-img", real is not None, "apt install qemu-utils")
    folder, programs, pid = tmp_path / "images", tmp_path / "programs", tmp_path / "pid"
    folder.mkdir()
    programs.mkdir()
    slow = programs / "qemu-img"
    slow.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}\nexec sleep 600\n")
    slow.chmod(0o755)
    target = folder / "out.qcow2"
    command = ("restore", "latest", target, "--format", "qcow2")
    process = blocksnap.start(*command, PATH=f"{programs}:{os.environ['PATH']}")
    assert wait_until(pid.exists, 120)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), stderr
    converting = int(pid.read_text())
    assert wait_until(lambda: is_gone(converting), 60)
    if number == signal.SIGTERM:
        assert b"the raw image is complete" in stderr
        assert b"run again" in stderr
    (waiting,) = [name for name in os.listdir(folder) if name.endswith("-raw.partial")]
    assert same(folder / waiting, source)
    assert not target.exists()
    if number == signal.SIGTERM:
        # It is not brought again, as what somebody else has written to it shows; it is verified as any other.
        with (folder / waiting).open("r+b") as file:
            file.seek(SIZE // 2)
            file.write(b"something else")
        assert blocksnap(*command, "--verify").code == 13
        assert os.listdir(folder) == []
    blocksnap.done(*command, "--verify")
    assert os.listdir(folder) == ["out.qcow2"]
    call("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target)


def test_a_conversion_that_finds_no_room_leaves_the_raw_image(
    blocksnap: CommandLine, source: Path, tmp_path: Path
) -> None:
    require("qemu-img", shutil.which("qemu-img") is not None, "apt install qemu-utils")
    with loop_device(tmp_path / "disk.img", size=3 * SIZE) as device:
        call("mkfs.ext4", "-q", "-m", "0", device)
        with mounted(device, tmp_path / "disk") as folder:
            room = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with (folder / "in the way").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, room - SIZE - 2 * MIB)
            target = folder / "out.qcow2"
            command = ("restore", "latest", target, "--format", "qcow2")
            failed = blocksnap(*command)
            assert (failed.code, len(failed.errors)) == (1, 1), failed
            assert "No space left" in failed.stderr
            assert "the raw image is complete" in failed.stderr
            assert "run the same command again" in failed.stderr
            (waiting,) = [name for name in os.listdir(folder) if name.endswith(".partial")]
            assert same(folder / waiting, source)
            (folder / "in the way").unlink()
            blocksnap.done(*command)
            assert set(os.listdir(folder)) == {"lost+found", "out.qcow2"}
            call("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, target)


def test_a_raw_image_with_losses_is_not_taken_for_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("qemu-img", shutil.which("qemu-img") is not None, "apt install qemu-utils")

    def interrupted(*_words: str, **_options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("blocksnap.restore.disk_image.run", interrupted)

    def begun(mode: RestoreMode) -> tuple[int, bool]:
        """Tell how far it was before, and whether it is kept when its conversion is interrupted."""
        record = RestoreRecord(repository="r" * 32, backup="b" * 32, mode=mode)
        target = DiskImageTarget(str(tmp_path / "out"), MIB, record, "qcow2", compare=False)
        before = target.begin()
        target.flush()
        with pytest.raises(KeyboardInterrupt):
            target.finish()
        return before, target.close(keep=True)

    assert [begun("with-losses"), begun("with-losses")] == [(0, False), (0, False)]
    assert [begun("whole"), begun("whole")] == [(0, True), (MIB, True)]
    assert begun("with-losses") == (0, False)


def test_a_signal_says_what_became_of_it(blocksnap: CommandLine, source: Path, tmp_path: Path) -> None:
    with loop_device(tmp_path / "target.img", size=SIZE) as device:
        process = blocksnap.start("restore", "latest", device)
        with open(device, "rb", buffering=0) as file:
            while file.read(9) != b"BLOCKSNAP" and process.poll() is None:
                time.sleep(0.005)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
        process.terminate()
        _, stderr = process.communicate(timeout=60)
        if process.returncode == 143:
            assert b"run again" in stderr
        blocksnap.done("restore", "latest", device)
        assert same(device, source)


def test_a_lost_write_that_was_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells whoever flushes first; what is flushed afterwards must not be believed to be there."""
    monkeypatch.setattr(flushing, "_STEP_BYTES", 4 * MIB)
    record = RestoreRecord(repository="00" * 16, backup="11" * 16, mode="whole")
    (tmp_path / "small").mkdir()
    call("mount", "-t", "tmpfs", "-o", "size=8m", "none", tmp_path / "small")
    try:
        with loop_device(tmp_path / "small/image", size=64 * MIB) as device:
            place = Place(os.open(device, os.O_RDWR | os.O_CLOEXEC), device, 64 * MIB, is_device=True)
            try:
                place.begin_with(record)
                for number in range(1, 20):
                    place.write(number * MIB, random.Random(number).randbytes(MIB))
                time.sleep(1)
                place.reached(20 * MIB)
                with pytest.raises(TargetFailedError):
                    place.keep_record()
                with pytest.raises(TargetFailedError):
                    place.flush()
                assert place.head() == record
            finally:
                place.release()
    finally:
        unmount(tmp_path / "small")


def test_a_tree_of_which_something_was_lost(tmp_path: Path) -> None:
    """Also when somebody else has flushed the filesystem, and was told, in between."""
    (tmp_path / "small").mkdir()
    call("mount", "-t", "tmpfs", "-o", "size=24m", "none", tmp_path / "small")
    try:
        with loop_device(tmp_path / "small/image", size=64 * MIB) as device:
            call("mkfs.ext4", "-q", "-O", "^has_journal", device)
            with (
                mounted(device, tmp_path / "mnt") as folder,
                NewTree(str(folder / "out"), "12345678") as tree,
            ):
                fd = os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=tree.fd)
                os.write(fd, random.Random(1).randbytes(40 * MIB))
                os.close(fd)
                told = subprocess.run(["sync", "--file-system", folder], check=False, capture_output=True)
                assert told.returncode == 1
                with pytest.raises(OSError, match=r"error|space"):
                    tree.flush()
    finally:
        unmount(tmp_path / "small")
