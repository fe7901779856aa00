"""Backups of subvolumes as trees: everything as it was, each state, damage, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import socket
import stat
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from blocksnap.restore.tree_mount import hold_tree
from blocksnap.system.children import fork_child, wait_for_child
from support.btrfs_lab import BtrfsLab
from support.commands import CommandLine
from support.file_trees import (
    allow_changes,
    describe,
    differences,
    make_everything,
    make_final,
    make_of_btrfs,
    noise,
    rsync_differences,
)
from support.loops import RELEASE_SECONDS, call, unmount
from support.repositories import harm_largest_pack
from support.require import require
from support.shown import abort, children_of, is_mounted, mounting, shown, wait_for
from support.standing import is_gone, wait_until

MIB = 1 << 20
CHUNK = 128 << 10


@pytest.fixture(autouse=True)
def _fuse() -> None:
    require("fuse", os.path.exists("/dev/fuse"), "needs /dev/fuse")


def listings(root: Path) -> dict[str, tuple[int, bool, bool]]:
    """Return what the directories themselves say of their entries."""
    found = {}
    for folder, _, _ in os.walk(root):
        with os.scandir(folder) as entries:
            for each in entries:
                name = os.path.relpath(each.path, root)
                found[name] = each.inode(), each.is_dir(follow_symlinks=False), each.is_symlink()
    return found


def statuses(root: Path) -> dict[str, tuple[int, ...]]:
    """Return all that stat(2) says of every path, but the device."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (".", *folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[os.path.relpath(path, root)] = (
                status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size,
                status.st_rdev, status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns, status.st_blocks,
            )  # fmt: skip
    return found


def test_everything_is_shown_as_it_was(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    make_everything(lab.live)
    make_of_btrfs(lab.live)
    make_final(lab.live)
    os.truncate(lab.live / "sparse", 40 * MIB)
    tree = tmp_path / "tree"
    try:
        blocksnap.done("backup", "-q", lab.live)
        snapshot = lab.snapshot()
        with shown(blocksnap, "latest", tree):
            expected = describe(snapshot, layouts=False, flags=False)
            assert differences(expected, describe(tree, layouts=False, flags=False)) == []
            wanted, found = statuses(snapshot), statuses(tree)
            assert {name: (wanted[name], found[name]) for name in wanted if wanted[name] != found[name]} == {}
            assert listings(tree) == listings(snapshot)
            assert rsync_differences(snapshot, tree) == ""
            with pytest.raises(OSError, match="Read-only"):
                (tree / "new").write_text("x")
            with pytest.raises(OSError, match="Permission"):
                os.open(tree / "character", os.O_RDONLY)
            with pytest.raises(FileNotFoundError):
                (tree / "no").stat()
            room = os.statvfs(tree)
            assert room.f_blocks * room.f_frsize >= sum(
                os.lstat(path).st_size for path in (tree / "plain", tree / "layout")
            )
            assert room.f_bavail == 0
    finally:
        allow_changes(lab.live)


def test_each_state_of_a_volume(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    snapshots = []
    (lab.live / "same").write_bytes(noise(1, 300_000))
    os.link(lab.live / "same", lab.live / "linked")
    for number in range(3):
        (lab.live / "file").write_bytes(noise(number, 200_000 + number))
        (lab.live / f"only {number}").write_text("here\n")
        if number:
            (lab.live / f"only {number - 1}").unlink()
        blocksnap.done("backup", "-q", lab.live)
        snapshots.append(lab.snapshot())
    tree = tmp_path / "tree"
    with shown(blocksnap, str(lab.live), tree):
        assert stat.S_IMODE(tree.stat().st_mode) == 0o700
        names = sorted(
            set(os.listdir(tree)) - {"latest"}, key=lambda name: (tree / name / "file").stat().st_size
        )
        assert os.readlink(tree / "latest") == names[-1]
        for name, snapshot in zip(names, snapshots, strict=True):
            one, other = (describe(each, layouts=False, flags=False) for each in (snapshot, tree / name))
            assert differences(one, other) == []
        # Two names of one file are one, the same file in two backups is not.
        numbers = [[(tree / name / each).stat().st_ino for each in ("same", "linked")] for name in names]
        assert all(one == other for one, other in numbers)
        assert len({one for one, _ in numbers}) == 3


def test_a_nested_subvolume_is_an_empty_directory(
    lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path
) -> None:
    call("btrfs", "subvolume", "create", lab.live / "nested")
    (lab.live / "nested" / "file").write_text("x")
    backups = blocksnap.done("backup", "--json", lab.live).backups
    (own,) = [each["id"] for each in backups if not each["volume"].endswith("nested")]
    with shown(blocksnap, own, tmp_path / "tree"):
        assert os.listdir(tmp_path / "tree" / "nested") == []
        assert (tmp_path / "tree" / "nested").stat().st_ino == 2


def open_deep(top: Path, name: str, depth: int, *, make: bool) -> int:
    """Open a directory whose path no system call would take."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        if make:
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_a_path_that_is_too_long_for_a_system_call(
    lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path
) -> None:
    name = "n" * 200
    folder = open_deep(lab.live, name, 25, make=True)
    fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=folder)
    os.write(fd, b"deep")
    os.close(fd)
    os.close(folder)
    blocksnap.done("backup", "-q", lab.live)
    with shown(blocksnap, "latest", tmp_path / "tree"):
        folder = open_deep(tmp_path / "tree", name, 25, make=False)
        fd = os.open("file", os.O_RDONLY, dir_fd=folder)
        assert os.read(fd, 10) == b"deep"
        os.close(fd)
        os.close(folder)
    (tmp_path / "out").mkdir()
    path = "/".join([name] * 25 + ["file"])
    blocksnap.done("files", "latest", path, "--to", tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "deep"


def test_large_directories_and_many_readers(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    many = lab.live / "many"
    many.mkdir()
    for number in range(20_000):
        os.close(os.open(many / f"a name that is not short {number}", os.O_CREAT | os.O_WRONLY))
    big = noise(3, 24 * MIB + 77)
    (lab.live / "big").write_bytes(big)
    blocksnap.done("backup", "-q", lab.live)
    tree, wrong = tmp_path / "tree", []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        with (tree / "big").open("rb", buffering=0) as file:
            for _ in range(40):
                at, length = dice.randrange(len(big)), dice.randrange(1, 300_000)
                if os.pread(file.fileno(), length, at) != big[at : at + length]:
                    wrong.append((at, length))

    with shown(blocksnap, "latest", tree):
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        assert sorted(os.listdir(tree / "many")) == sorted(os.listdir(many))
        for thread in threads:
            thread.join()
        wanted = dict.fromkeys(random.Random(1).sample(os.listdir(many), 300))
        assert {n: (tree / "many" / n).stat().st_ino for n in wanted} == {
            n: (many / n).stat().st_ino for n in wanted
        }
        assert (tree / "big").read_bytes() == big
    assert wrong == []


def test_damage_is_an_error_and_never_other_bytes(
    lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path
) -> None:
    content = noise(5, 4 * MIB)
    (lab.live / "big").write_bytes(content)
    (lab.live / "other").write_bytes(noise(6, 3000))
    blocksnap.done("backup", "-q", lab.live)
    harm_largest_pack(blocksnap.repository)
    tree, bad = tmp_path / "tree", []
    tree.mkdir()
    process = blocksnap.start("mount", "latest", tree)
    try:
        wait_for(process, tree)
        fd = os.open(tree / "big", os.O_RDONLY | os.O_DIRECT)
        for _ in range(2):
            for at in range(0, len(content), CHUNK):
                try:
                    buffer = os.pread(fd, CHUNK, at)
                except OSError:
                    bad.append(at)
                else:
                    assert buffer == content[at : at + CHUNK]
        os.close(fd)
        assert (tree / "other").read_bytes() == noise(6, 3000)
        unmount(tree)
        _, said = process.communicate(timeout=RELEASE_SECONDS)
        assert process.returncode == 3
    finally:
        subprocess.run(["umount", "-l", tree], check=False, capture_output=True)
        process.kill()
    assert len(bad) == 2
    (line,) = [line for line in said.decode().splitlines() if "cannot" in line]
    assert f"bytes {bad[0]} to {bad[0] + CHUNK} of big" in line


@pytest.mark.parametrize("victim", ["main", "tree", "all", "terminated"])
def test_nothing_is_left_whoever_is_killed(
    lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path, victim: str
) -> None:
    (lab.live / "file").write_text("x")
    blocksnap.done("backup", "-q", lab.live)
    tree = tmp_path / "tree"
    with mounting(blocksnap, "latest", tree) as process:
        assert (tree / "file").read_text() == "x"
        (holder,) = children_of(process.pid)
        victims = {"all": [process.pid, holder], "tree": [holder]}
        for pid in victims.get(victim, [process.pid]):
            # The others may have ended by themselves once the first one has.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if victim == "terminated" else signal.SIGKILL)
        process.communicate(timeout=60)
        if victim == "all":
            # Nobody is left who could unmount it.
            unmount(tree)
        assert wait_until(lambda: not is_mounted(tree) and is_gone(holder), 60)


def test_an_aborted_connection_ends_it(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    (lab.live / "file").write_text("x")
    blocksnap.done("backup", "-q", lab.live)
    tree = tmp_path / "tree"
    with mounting(blocksnap, "latest", tree) as process:
        (holder,) = children_of(process.pid)
        abort(os.getpid(), str(tree), tmp_path / "connections")
        _, err = process.communicate(timeout=60)
        errors = [line for line in err.decode().splitlines() if line.startswith("error:")]
        said = f"error: nothing is shown in {tree} any more: its FUSE connection was aborted"
        assert (process.returncode, errors) == (1, [said]), err
        assert not is_mounted(tree)
        assert is_gone(holder)


def test_whoever_ends_before_it_serves_leaves_nothing(tmp_path: Path) -> None:
    """Such as while it opens a large repository: what was handed over to it is not taken any more."""
    require("fuse", os.path.exists("/dev/fuse"), "needs /dev/fuse")
    ours, its = socket.socketpair()

    def work() -> bool:
        ours.close()
        return hold_tree(str(tmp_path), "blocksnap-test", its)

    pid = fork_child(work)
    its.close()
    try:
        assert ours.recv(1, socket.MSG_PEEK) == b"m"
        assert is_mounted(tmp_path)
        ours.close()
        assert wait_for_child(pid) == 0
        assert not is_mounted(tmp_path)
    finally:
        ours.close()
        subprocess.run(["umount", "-l", tmp_path], check=False, capture_output=True)
