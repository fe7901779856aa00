"""btrfs-send on real filesystems: against the truth, against btrfs-tree, against a reader in plain Python."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from blocksnap import _native
from blocksnap.errors import VolumeError
from blocksnap.extents.btrfs import compare_snapshots, find_subvolume_changes
from blocksnap.extents.btrfs_changes import InodeChange
from blocksnap.extents.btrfs_send import compare_by_send, stream_version
from blocksnap.system.btrfs import open_subvolume, subvolume_info
from support import btrfs_calls as calls
from support import send_stream
from support.btrfs_covers import covers
from support.btrfs_lab import MOUNTS, BtrfsLab
from support.btrfs_model import Backup
from support.btrfs_truth import capture
from support.btrfs_work import Workload
from support.commands import CommandLine
from support.loops import call, unmount

BTRFS_IOC_SEND = 0x40489426
NO_FILE_DATA = 1
KINDS = (
    "create", "create directory", "rename", "link", "remove", "data", "hole", "resize", "touch",
)  # fmt: skip
NOBODY = 65534

LabMaker = Callable[[str], BtrfsLab]


@contextmanager
def opened(*snapshots: Path) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        fds = []
        for snapshot in snapshots:
            fds.append(open_subvolume(str(snapshot)))
            stack.callback(os.close, fds[-1])
        yield fds


def stream_of(base: Path, snapshot: Path, version: int) -> bytes:
    argv = ["btrfs", "send", "-q", "--no-data", "--proto", str(version), "-p", str(base), str(snapshot)]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout


class Follower:
    """Follows a subvolume from round to round by btrfs-send alone, in both versions of the stream."""

    def __init__(self, lab: BtrfsLab) -> None:
        self.lab = lab
        self.base = lab.snapshot()
        self.before = capture(self.base)
        self.backups = {1: Backup(), 2: Backup()}
        self.changed = self.reported = self.only_send = self.reused = 0
        with opened(self.base) as (fd,):
            for backup in self.backups.values():
                backup.update(find_subvolume_changes(fd, None), self.before)

    def round(self) -> None:
        """Take a snapshot; what the engine tells has to make it of the last one, byte for byte."""
        snapshot = self.lab.snapshot()
        after = capture(snapshot)
        with opened(self.base, snapshot) as (base_fd, fd):
            for version, backup in self.backups.items():
                answer = compare_by_send(fd, base_fd, version=version)
                assert (answer.method, answer.inherits) == ("btrfs-send", True)
                told = list(answer.walk)
                coverage = covers(compare_snapshots(fd, base_fd).walk, told, self.before, after)
                assert not coverage.problems, coverage.problems
                self.only_send += coverage.only_other
                self.reused += sum(
                    isinstance(change, InodeChange) and change.is_new and change.number in self.before.inodes
                    for change in told
                )
                tally = backup.update(replace(answer, walk=iter(told)), after)
                assert not tally.missed
                self.changed += tally.changed
                self.reported += tally.reported
        self.lab.delete(self.base)
        self.base, self.before = snapshot, after


@pytest.mark.parametrize("mount", sorted(MOUNTS))
def test_applied_to_the_parent_it_gives_the_child(make_lab: LabMaker, mount: str) -> None:
    lab = make_lab(mount)
    with contextlib.closing(Workload(lab.live, 17, beside=lab.mount)) as work:
        work.run(80)
        follower = Follower(lab)
        for _ in range(10):
            work.run(work.random.randrange(1, 40))
            follower.round()
    assert 0 < follower.changed <= follower.reported


def test_inode_numbers_that_are_used_again(lab: BtrfsLab) -> None:
    """After a mount the highest numbers are given away anew, to other inodes of other generations."""
    with contextlib.closing(Workload(lab.live, 23, upkeep=False)) as work:
        work.run(60)
        follower = Follower(lab)
        for _ in range(8):
            # The newest inodes go, whatever they are.
            newest = sorted(work.files + work.others, key=lambda name: os.lstat(work.path(name)).st_ino)[-6:]
            for name in newest:
                with contextlib.suppress(PermissionError):
                    os.unlink(work.path(name))
                    work.gone(name)
            work.close()
            lab.sync()
            lab.cycle()
            work.run(15)
            follower.round()
    assert follower.reused


def native_steps(found: list[tuple[int, bytes, bytes, int, bytes | None]]) -> list[send_stream.Step]:
    return [(KINDS[kind], *rest) for kind, *rest in found]  # type: ignore[misc]


@pytest.mark.parametrize("version", [1, 2])
def test_the_kernel_s_stream_is_read_like_the_reference_reads_it(lab: BtrfsLab, version: int) -> None:
    with contextlib.closing(Workload(lab.live, 31, beside=lab.mount)) as work:
        work.run(100)
        base = lab.snapshot()
        for _ in range(4):
            work.run(60)
            snapshot = lab.snapshot()
            stream = stream_of(base, snapshot, version)
            expected = send_stream.steps(send_stream.read(stream))
            with opened(base, snapshot) as (base_fd, fd):
                tree = subvolume_info(base_fd).tree_id
                assert native_steps(_native.btrfs_send(fd, tree, version)) == expected
            assert native_steps(_native.btrfs_send_steps(stream)) == expected
            assert len(expected) > 20
            base = snapshot


def test_without_a_parent_all_is_new(lab: BtrfsLab) -> None:
    (lab.live / "a").mkdir()
    (lab.live / "a" / "file").write_bytes(b"x" * 5000)
    with opened(lab.snapshot()) as (fd,):
        steps = native_steps(_native.btrfs_send(fd, 0, stream_version()))
    assert [kind for kind, *_ in steps if kind.startswith("create")] == ["create directory", "create"]
    assert ("data", b"a/file", b"", 0, struct.pack("<QQ", 0, 5000)) in steps


def changes(lab: BtrfsLab, work: Callable[[], object], version: int | None = None) -> dict[str, InodeChange]:
    """Do something between two snapshots; return what the engine tells, by the first name of each inode."""
    base = lab.snapshot()
    work()
    snapshot = lab.snapshot()
    with opened(base, snapshot) as (base_fd, fd):
        told = list(compare_by_send(fd, base_fd, version=version).walk)
    return {
        os.fsdecode(change.links[0].name): change for change in told if isinstance(change, InodeChange)
    }  # fmt: skip


def test_nothing_changed(lab: BtrfsLab) -> None:
    (lab.live / "file").write_bytes(b"x")
    assert changes(lab, lambda: None) == {}


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_stream_does_not_carry_is_told_all_the_same(lab: BtrfsLab, version: int) -> None:
    """Inode flags (version 1) and blocks beyond the end: the inode is named, and read from its items."""
    path = lab.live / "file"
    path.write_bytes(b"x" * 5000)
    fd = os.open(path, os.O_RDWR)
    try:
        told = changes(lab, lambda: calls.fallocate(fd, calls.FALLOC_KEEP_SIZE, 8192, 65536), version)
        # The stream names the last block, although it is as it was.
        assert list(told["file"].changed.pairs()) == [(4096, 904)]
        before = told["file"].attributes.flags
        told = changes(lab, lambda: calls.set_inode_flags(fd, calls.FLAG_NODUMP), version)
        assert told["file"].attributes.flags != before
        assert not told["file"].changed
    finally:
        os.close(fd)
    told = changes(lab, lambda: os.setxattr(path, "user.a", b"b"), version)
    assert told["file"].xattrs == ((b"user.a", b"b"),)


@pytest.mark.parametrize("version", [1, 2])
def test_a_hole_is_told(lab: BtrfsLab, version: int) -> None:
    """As changed bytes in version 1, which has no command for it, and as a hole in version 2."""
    path = lab.live / "file"
    path.write_bytes(b"x" * 65536)
    fd = os.open(path, os.O_RDWR)
    try:
        punch = calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE
        told = changes(lab, lambda: calls.fallocate(fd, punch, 8192, 8192), version)["file"]
    finally:
        os.close(fd)
    (found, empty) = (told.changed, told.holes) if version == 1 else (told.holes, told.changed)
    assert list(found.pairs()) == [(8192, 8192)]
    assert not empty


def test_snapshots_without_a_common_history(lab: BtrfsLab) -> None:
    """After a rollback the source is another subvolume; btrfs-tree must not, and btrfs-send can compare."""
    with contextlib.closing(Workload(lab.live, 41, upkeep=False)) as work:
        work.run(150)
        base = lab.snapshot()
        before = capture(base)
        work.run(50)
    lab.live.rename(lab.mount / "abandoned")
    calls.snapshot(str(base), str(lab.live), read_only=False)
    with contextlib.closing(Workload(lab.live, 42, upkeep=False)) as work:
        work.relist()
        work.run(80)
    snapshot = lab.snapshot()
    backup = Backup()
    with opened(base, snapshot) as (base_fd, fd):
        assert not compare_snapshots(fd, base_fd).inherits
        backup.update(find_subvolume_changes(base_fd, None), before)
        tally = backup.update(compare_by_send(fd, base_fd), capture(snapshot))
    assert tally.changed
    assert not tally.missed


def test_the_debug_command(lab: BtrfsLab, tmp_path: Path) -> None:
    (lab.live / "folder").mkdir()
    (lab.live / "folder" / "file").write_bytes(b"x" * 20000)
    base = lab.snapshot()
    with (lab.live / "folder" / "file").open("r+b") as file:
        file.seek(5000)
        file.write(b"y")
    (lab.live / "folder").rename(lab.live / "renamed")
    snapshot = lab.snapshot()
    command = CommandLine(tmp_path)
    argv = ("debug", "btrfs-diff", "--engine", "send", base, snapshot)
    assert command.done(*argv).text == "4096 4096 renamed/file\n"
    told = command.done(*argv, "--json").document
    assert told["engine"] == "btrfs-send"
    assert "the kernel compared it" in told["reason"]
    refused = command("debug", "btrfs-diff", "--engine", "send", base, lab.live)
    assert refused.code == 14
    assert "only read-only snapshots" in refused.stderr


# --- refusals ---


def test_snapshots_that_are_writable_or_elsewhere(make_lab: LabMaker) -> None:
    one, other = make_lab("noatime"), make_lab("noatime")
    base, foreign = one.snapshot(), other.snapshot()
    with opened(base, one.live) as (fd, live_fd):
        for pair in ((fd, live_fd), (live_fd, fd)):
            with pytest.raises(VolumeError, match="only read-only snapshots") as caught:
                compare_by_send(*pair)
            assert caught.value.resolution
    with opened(base, foreign) as (fd, foreign_fd), pytest.raises(VolumeError, match="different filesystems"):
        compare_by_send(foreign_fd, fd)


def test_a_snapshot_that_is_made_writable_meanwhile(lab: BtrfsLab) -> None:
    base = lab.snapshot()
    (lab.live / "file").touch()
    snapshot = lab.snapshot()
    with opened(base, snapshot) as (base_fd, fd):
        answer = compare_by_send(fd, base_fd)
        calls.set_read_only(str(snapshot), read_only=False)
        with pytest.raises(VolumeError, match="made writable while"):
            list(answer.walk)


def test_something_mounted_in_the_earlier_snapshot(lab: BtrfsLab) -> None:
    """Its inodes have numbers of another filesystem."""
    (lab.live / "folder").mkdir()
    (lab.live / "folder" / "file").touch()
    base = lab.snapshot()
    (lab.live / "folder" / "file").chmod(0o600)
    snapshot = lab.snapshot()
    call("mount", "--bind", "/proc", base / "folder")
    try:
        with opened(base, snapshot) as (base_fd, fd), pytest.raises(VolumeError, match="makes no sense"):
            compare_by_send(fd, base_fd)
    finally:
        unmount(base / "folder")
    (lab.live / "folder").chmod(0o700)
    later = lab.snapshot()
    call("mount", "--bind", "/proc", snapshot / "folder")
    try:
        with opened(snapshot, later) as (base_fd, fd), pytest.raises(VolumeError, match="mounted in the ear"):
            compare_by_send(fd, base_fd)
    finally:
        unmount(snapshot / "folder")


def test_without_privilege(lab: BtrfsLab) -> None:
    with opened(lab.snapshot(), lab.snapshot()) as (base_fd, fd):
        os.seteuid(NOBODY)
        try:
            with pytest.raises(VolumeError, match="not permitted") as caught:
                compare_by_send(fd, base_fd)
        finally:
            os.seteuid(0)
    assert "as root" in (caught.value.resolution or "")


@pytest.mark.parametrize("which", [0, 1])
def test_a_snapshot_that_was_deleted(lab: BtrfsLab, which: int) -> None:
    snapshots = [lab.snapshot(), lab.snapshot()]
    with opened(*snapshots) as (base_fd, fd):
        lab.delete(snapshots[which])
        with pytest.raises(VolumeError, match="No such file or directory"):
            compare_by_send(fd, base_fd)


class PausedSend:
    """A send whose stream nobody reads, so that the kernel stays in the middle of it."""

    def __init__(self, fd: int, parent_tree: int) -> None:
        self.result: list[int] = []
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, 4096)
        arguments = struct.pack("<qQQQQ32s", self._write_end, 0, 0, parent_tree, NO_FILE_DATA, b"")
        self._thread = threading.Thread(target=self._send, args=(fd, arguments))

    def _send(self, fd: int, arguments: bytes) -> None:
        try:
            fcntl.ioctl(fd, BTRFS_IOC_SEND, arguments)
            self.result.append(0)
        except OSError as err:
            self.result.append(err.errno or 0)

    def __enter__(self) -> Self:
        self._thread.start()
        # When this has come, the ioctl is under way.
        os.read(self._read_end, 1)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read_end)
        self._thread.join()
        os.close(self._write_end)


def test_what_the_kernel_refuses_while_it_sends(lab: BtrfsLab) -> None:
    """Neither snapshot can be deleted or made writable; deduplication in them has to wait."""
    (lab.live / "file").write_bytes(bytes(8192))
    base = lab.snapshot()
    for number in range(2000):
        (lab.live / f"new-{number}").touch()
    snapshot = lab.snapshot()
    with opened(base, snapshot) as (base_fd, fd):
        with PausedSend(fd, subvolume_info(base_fd).tree_id) as paused:
            for path in (base, snapshot):
                for refused in (
                    lambda path=path: lab.delete(path),
                    lambda path=path: calls.set_read_only(str(path), read_only=False),
                ):
                    with pytest.raises(PermissionError):
                        refused()
                file = os.open(path / "file", os.O_RDONLY)
                try:
                    assert calls.dedupe_range(file, 0, 4096, file, 4096) == -errno.EAGAIN
                finally:
                    os.close(file)
        # The reader died.
        assert paused.result == [errno.EPIPE]
        # All is as before.
        assert len(list(compare_by_send(fd, base_fd).walk)) == 2001
    lab.delete(base)
    lab.delete(snapshot)


def test_an_answer_outlives_the_snapshots_of_which_it_holds_descriptors(lab: BtrfsLab) -> None:
    """The tree of a deleted subvolume is dropped only when nobody has it open any more."""
    for number in range(300):
        (lab.live / f"old-{number}").write_bytes(b"x" * 5000)
    snapshots = [lab.snapshot()]
    for number in range(300):
        (lab.live / f"old-{number}").write_bytes(b"y" * 5000)
        (lab.live / f"new-{number}").mkdir()
    snapshots.append(lab.snapshot())
    with opened(*snapshots) as (base_fd, fd):
        expected = list(compare_by_send(fd, base_fd).walk)
        answer = compare_by_send(fd, base_fd)
        for snapshot in snapshots:
            lab.delete(snapshot)
        lab.sync()
        lab.sync()
        assert list(answer.walk) == expected
    assert len(expected) == 601


def test_a_signal_ends_it_and_leaves_nothing(lab: BtrfsLab, tmp_path: Path) -> None:
    base = lab.snapshot()
    for number in range(6000):
        (lab.live / f"new-{number}").touch()
    snapshot = lab.snapshot()
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from blocksnap import _native
        from blocksnap.system.btrfs import open_subvolume, subvolume_info

        def stop(*_):
            raise InterruptedError("stopped")

        base_fd, fd = (open_subvolume(path) for path in sys.argv[1:])
        tree = subvolume_info(base_fd).tree_id
        whole = _native.btrfs_send(fd, tree, 1)

        def held():
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        def comes_to(wanted):
            # A thread that was waited for may be listed for a moment yet.
            return any(held() == wanted or time.sleep(0.01) for _ in range(6000))

        before = held()[0], 1
        assert comes_to(before)
        signal.signal(signal.SIGALRM, stop)
        stopped = 0
        while stopped < 5:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.001 + stopped * 0.004)
                while True:
                    _native.btrfs_send(fd, tree, 1)
            except InterruptedError:
                stopped += 1
            assert comes_to(before)
        assert _native.btrfs_send(fd, tree, 1) == whole
        print(len(whole) > 6000)
        """
    )
    argv = [sys.executable, "-c", script, str(base), str(snapshot)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
