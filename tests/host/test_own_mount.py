"""A mount of ours among others: nothing else is ever taken away, and a failure of libfuse is told."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.restore.fuse import ENDED, FuseThread, Operations, serve
from blocksnap.system import namespace, own_mount
from support.loops import RELEASE_SECONDS, call, unmount
from support.require import require


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "our mount"
    made.mkdir()
    try:
        yield made
    finally:
        while subprocess.run(["umount", "-l", made], check=False, capture_output=True).returncode == 0:
            pass


def sources(folder: Path, pid: int | str = "self") -> list[str]:
    lines = Path(f"/proc/{pid}/mounts").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == str(folder).replace(" ", r"\040")]


def mount(folder: Path, source: str) -> None:
    call("mount", "-t", "tmpfs", source, folder)


def test_only_ours_is_unmounted(folder: Path) -> None:
    ours = own_mount.new_source()
    mount(folder, ours)
    mount(folder, "theirs")
    assert own_mount.is_there(ours)
    # They have put theirs over it.
    own_mount.unmount(ours)
    assert sources(folder) == [ours, "theirs"]
    unmount(folder)
    own_mount.unmount(ours)
    assert (sources(folder), own_mount.is_there(ours)) == ([], False)
    # They have mounted theirs in its place; the kernel may have given it the numbers that ours had.
    mount(folder, "theirs")
    own_mount.unmount(ours)
    assert sources(folder) == ["theirs"]


@pytest.mark.parametrize("how", ["renamed", "moved"])
def test_it_is_found_where_it_is_by_now(tmp_path: Path, how: str) -> None:
    """A directory above it has another name, in which the kernel escapes something; or it was moved."""
    ours, above, now = own_mount.new_source(), tmp_path / "above", tmp_path / "now\\ \n#"
    folder = above / "tree"
    folder.mkdir(parents=True)
    mount(folder, ours)
    try:
        if how == "renamed":
            above.rename(now)
            (above / "tree").mkdir(parents=True)
            mount(above / "tree", "theirs")
        else:
            now.mkdir()
            call("mount", "--make-private", folder)
            call("mount", "--move", folder, now)
        own_mount.unmount(ours)
        assert not own_mount.is_there(ours)
        assert sources(folder) == (["theirs"] if how == "renamed" else [])
    finally:
        for each in (folder, now, now / "tree"):
            subprocess.run(["umount", "-l", each], check=False, capture_output=True)


def test_in_the_mounts_of_others(folder: Path) -> None:
    ours, here = own_mount.new_source(), os.stat("/proc/thread-self/ns/mnt").st_ino
    script = f"mount -t tmpfs {ours} '{folder}' && echo mounted && cat"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mounted\n"
        fd = os.open(f"/proc/{other.pid}/ns/mnt", os.O_RDONLY)
        try:
            assert (sources(folder, other.pid), sources(folder)) == ([ours], [])
            own_mount.unmount_in(fd, "another")
            assert sources(folder, other.pid) == [ours]
            own_mount.unmount_in(fd, ours)
            assert sources(folder, other.pid) == []
        finally:
            os.close(fd)
            other.kill()
    assert os.stat("/proc/thread-self/ns/mnt").st_ino == here


class Empty(Operations):  # type: ignore[misc] # mfusepy has no types
    use_ns = True

    def __init__(self) -> None:
        self.ready = threading.Event()

    def init(self, path: str) -> None:
        self.ready.set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}


@pytest.mark.parametrize("what", ["umount", "failure"])
def test_an_end_of_libfuse_is_told(folder: Path, what: str) -> None:
    require("fuse", os.path.exists("/dev/fuse"), "needs /dev/fuse")
    operations, reasons = Empty(), list[str]()
    connection = namespace.mount_fuse(str(folder), own_mount.new_source())
    thread = FuseThread(lambda: serve(operations, f"/dev/fd/{connection}"), operations.ready, reasons.append)
    thread.start()
    assert look(folder / "x") == 0
    if what == "umount":
        unmount(folder)
    else:
        # The next read of the connection returns nothing, which the kernel never does.
        with open(os.devnull, "r+b") as null:
            os.dup2(null.fileno(), connection, inheritable=False)
        look(folder / "y")
    thread.join(RELEASE_SECONDS)
    assert reasons == [ENDED if what == "umount" else "short read on fuse device"]


def look(path: Path) -> int:
    command = [sys.executable, "-c", "import os, sys; os.stat(sys.argv[1])", str(path)]
    return subprocess.run(command, check=False, timeout=120, capture_output=True).returncode
