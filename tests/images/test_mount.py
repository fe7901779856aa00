"""Backups shown as a tree: right bytes, right files, many readers, and nothing left however it ends."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import RELEASE_SECONDS, call, loop_device, mounted, unmount
from support.repositories import harm_largest_pack
from support.shown import abort, children_of, is_mounted, mounting, shown
from support.standing import wait_until

MIB = 1 << 20
FILESYSTEMS = {"ext4": (64, "-q"), "xfs": (320, "-q"), "btrfs": (128, "-q")}


def make_filesystem(kind: str, image: Path) -> dict[str, str]:
    """Make an image with a filesystem; return the digests of its files."""
    size, quiet = FILESYSTEMS[kind]
    dice = random.Random(kind)
    digests = {}
    with loop_device(image, size=size * MIB) as device:
        call(f"mkfs.{kind}", quiet, device)
        with mounted(device, image.parent / "work") as folder:
            for number in range(8):
                content = dice.randbytes(dice.randrange(3 * MIB))
                path = folder / f"dir{number % 3}" / f"file {number}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                os.chown(path, 1000 + number, 100)
                digests[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
            os.symlink("../../../../etc/passwd", folder / "dir0" / "away")
            os.setxattr(folder / "dir0" / "file 0", "user.colour", b"green")
    return digests


def digests_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize("kind", sorted(FILESYSTEMS))
def test_the_files_of_each_filesystem(blocksnap: CommandLine, tmp_path: Path, kind: str) -> None:
    volume = tmp_path / "volume.img"
    digests = make_filesystem(kind, volume)
    blocksnap.done("backup", volume, "-q")
    tree = tmp_path / "tree"
    with shown(blocksnap, "latest", tree):
        assert sorted(os.listdir(tree)) == ["files", "image"]
        assert hashlib.sha256((tree / "image").read_bytes()).digest() == (
            hashlib.sha256(volume.read_bytes()).digest()
        )
        files = tree / "files"
        assert {k: v for k, v in digests_of(files).items() if k in digests} == digests
        assert (files / "dir0" / "file 0").stat().st_uid == 1000
        assert os.getxattr(files / "dir0" / "file 0", "user.colour") == b"green"
        assert os.readlink(files / "dir0" / "away") == "../../../../etc/passwd"
        with pytest.raises(OSError, match="Read-only"):
            (files / "new").write_text("x")


def test_all_backups_of_a_volume(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    contents = []
    for number in range(3):
        contents.append(random.Random(number).randbytes(2 * MIB))
        volume.write_bytes(contents[-1])
        blocksnap.done("backup", volume, "-q")
    tree = tmp_path / "tree"
    with shown(blocksnap, str(volume), tree):
        times = sorted(set(os.listdir(tree)) - {"latest"}, key=lambda name: (tree / name).stat().st_mtime_ns)
        assert [(tree / name / "image").read_bytes() for name in times] == contents
        assert os.readlink(tree / "latest") == times[-1]
        # There is no filesystem in it, and that is said where it is looked for.
        with pytest.raises(OSError, match="medium"):
            os.listdir(tree / "latest" / "files")


def test_who_comes_first_reads_far_ahead(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    volume.write_bytes(random.Random(5).randbytes(MIB))
    blocksnap.done("backup", volume, "-q")
    tree.mkdir()
    process = blocksnap.start("mount", "latest", tree)
    try:
        while not is_mounted(tree):
            assert process.poll() is None, process.communicate()
        with (tree / "image").open("rb"):
            device = os.stat(tree).st_dev
            bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            assert bdi.read_text() == "4096\n"
    finally:
        subprocess.run(["umount", "--lazy", tree], check=False)
        process.communicate(timeout=RELEASE_SECONDS)


def test_many_readers_of_random_ranges(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    content = random.Random(4).randbytes(24 * MIB) + bytes(9 * MIB) + b"text " * MIB
    volume.write_bytes(content[:-77])
    blocksnap.done("backup", volume, "-q")
    tree, wrong = tmp_path / "tree", []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        with (tree / "image").open("rb", buffering=0) as file:
            for _ in range(60):
                at, length = dice.randrange(len(content)), dice.randrange(1, 300_000)
                if os.pread(file.fileno(), length, at) != content[:-77][at : at + length]:
                    wrong.append((at, length))

    with shown(blocksnap, "latest", tree):
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_damage_is_an_error_and_never_other_bytes(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    content = random.Random(5).randbytes(8 * MIB)
    volume.write_bytes(content)
    blocksnap.done("backup", volume, "-q")
    harm_largest_pack(blocksnap.repository)
    tree = tmp_path / "tree"
    bad, step = [], 128 << 10
    with shown(blocksnap, "latest", tree) as process:
        fd = os.open(tree / "image", os.O_RDONLY | os.O_DIRECT)
        for at in range(0, len(content), step):
            try:
                buffer = os.pread(fd, step, at)
            except OSError:
                bad.append(at)
            else:
                assert buffer == content[at : at + step]
        os.close(fd)
        assert process.stderr is not None
    assert len(bad) == 1


@pytest.mark.parametrize("victim", ["main", "tree", "all", "terminated"])
def test_nothing_is_left_whoever_is_killed(blocksnap: CommandLine, tmp_path: Path, victim: str) -> None:
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    make_filesystem("ext4", volume)
    blocksnap.done("backup", volume, "-q")
    with mounting(blocksnap, "latest", tree) as process:
        assert os.listdir(tree / "files")
        tree_pid, inner_pid = children_of(process.pid)
        victims = {"all": [process.pid, tree_pid, inner_pid], "tree": [tree_pid]}
        for pid in victims.get(victim, [process.pid]):
            # The others may have ended by themselves once the first one has.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if victim == "terminated" else signal.SIGKILL)
        process.communicate(timeout=60)
        if victim == "all":
            # Nobody is left who could unmount the tree, but all that it was made of is gone.
            unmount(tree)
        assert wait_until(lambda: not is_mounted(tree), 60)


@pytest.mark.parametrize("which", ["tree", "images"])
def test_an_aborted_connection_ends_it(blocksnap: CommandLine, tmp_path: Path, which: str) -> None:
    """Of the tree itself, or of the images that it is made of; nothing stays that answers with an error."""
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    make_filesystem("ext4", volume)
    blocksnap.done("backup", volume, "-q")
    with mounting(blocksnap, "latest", tree) as process:
        assert os.listdir(tree / "files")
        point = str(tree) if which == "tree" else "/sys/fs/fuse/connections/images"
        abort(os.getpid() if which == "tree" else process.pid, point, tmp_path / "connections")
        _, err = process.communicate(timeout=60)
        errors = [line for line in err.decode().splitlines() if line.startswith("error:")]
        said = f"error: nothing is shown in {tree} any more: its FUSE connection was aborted"
        assert (process.returncode, errors) == (1, [said]), err
        assert not is_mounted(tree)


@pytest.mark.parametrize("end", ["interrupted", "unmounted", "images aborted"])
def test_it_ends_while_somebody_is_in_it(blocksnap: CommandLine, tmp_path: Path, end: str) -> None:
    """Whoever is there keeps the connection of the tree; it is not waited for."""
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    make_filesystem("ext4", volume)
    blocksnap.done("backup", volume, "-q")
    with mounting(blocksnap, "latest", tree) as process, ExitStack() as stack:
        inside = os.open(tree / "files", os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, inside)
        if end == "images aborted":
            abort(process.pid, "/sys/fs/fuse/connections/images", tmp_path / "connections")
        elif end == "unmounted":
            call("umount", "--lazy", tree)
        if end != "images aborted":
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == {"images aborted": 1}.get(end, 128 + signal.SIGINT), err
        assert not is_mounted(tree)


def test_what_somebody_else_has_mounted_there_stays(blocksnap: CommandLine, tmp_path: Path) -> None:
    """When the process that shows the tree is killed after that was unmounted, and before it saw it."""
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    volume.write_bytes(b"x" * MIB)
    blocksnap.done("backup", volume, "-q")
    with mounting(blocksnap, "latest", tree) as process:
        shower = children_of(process.pid)[0]
        os.kill(shower, signal.SIGSTOP)
        call("umount", "--lazy", tree)
        call("mount", "-t", "tmpfs", "theirs", tree)
        os.kill(shower, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, b"the process that mounts it has died" in err) == (1, True), err
        assert f"theirs {tree} tmpfs" in Path("/proc/mounts").read_text()


@pytest.mark.parametrize("victim", ["tree", "main"])
def test_nothing_is_left_where_a_directory_above_was_renamed(
    blocksnap: CommandLine, tmp_path: Path, victim: str
) -> None:
    volume, tree = tmp_path / "volume.img", tmp_path / "above" / "tree"
    volume.write_bytes(b"x" * MIB)
    blocksnap.done("backup", volume, "-q")
    tree.parent.mkdir()
    with mounting(blocksnap, "latest", tree) as process:
        (tmp_path / "above").rename(tmp_path / "elsewhere")
        moved = tmp_path / "elsewhere" / "tree"
        assert is_mounted(moved)
        try:
            shower = children_of(process.pid)[0]
            os.kill(shower if victim == "tree" else process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
            assert wait_until(lambda: not is_mounted(moved), 60)
        finally:
            subprocess.run(["umount", "-l", moved], check=False, capture_output=True)


def test_the_mounting_process_killed(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    digests = make_filesystem("ext4", volume)
    blocksnap.done("backup", volume, "-q")
    with shown(blocksnap, "latest", tree) as process:
        assert os.listdir(tree / "files")
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        assert digests_of(tree / "files").items() >= digests.items()


def test_a_tree_that_does_not_answer_is_not_waited_for(blocksnap: CommandLine, tmp_path: Path) -> None:
    """Every backup asks what lies on loop devices, also where a file of one is served by a process."""
    volume, tree = tmp_path / "volume.img", tmp_path / "tree"
    volume.write_bytes(random.Random(6).randbytes(4 * MIB))
    blocksnap.done("backup", volume, "-q")
    script = (
        "from blocksnap.system import freeze; import sys; print(freeze.backing_filesystem(int(sys.argv[1])))"
    )
    with shown(blocksnap, "latest", tree) as process:
        loop = call("losetup", "--find", "--show", "--read-only", tree / "image").strip()
        served = os.stat(tree).st_dev
        processes = [process.pid, *children_of(process.pid)]
        # The kernel has attributes for a moment without asking.
        time.sleep(2)
        try:
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
            argv = [sys.executable, "-c", script, str(os.stat(loop).st_rdev)]
            asked = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
            assert int(asked.stdout) == served
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
            call("losetup", "--detach", loop)


def test_what_cannot_be_shown(blocksnap: CommandLine, tmp_path: Path) -> None:
    assert blocksnap("mount", "latest", tmp_path).code == 2
    (tmp_path / "volume.img").write_bytes(b"x" * MIB)
    blocksnap.done("backup", tmp_path / "volume.img", "-q")
    missing = blocksnap("mount", "latest", tmp_path / "no")
    assert (missing.code, len(missing.errors)) == (1, 1), missing
    assert "no such directory" in missing.stderr
    wrong = blocksnap("mount", "latest", tmp_path, BLOCKSNAP_PASSPHRASE="wrong")
    assert wrong.code == 12
