"""Backups of whole disks: the filesystems in their partitions shown, copied out and drilled."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from blocksnap.restore.partitions import look_inside
from images.test_drill import configure, drilled
from images.test_mount import digests_of
from support.commands import CommandLine
from support.disks import MIB, boot_sector, make_gpt, make_mbr, make_sectors
from support.loops import call, loop_device, unmount
from support.shown import children_of, is_mounted, shown, wait_for
from support.sleepers import long_time
from support.standing import wait_until


def host_partitions(folder: Path) -> set[str]:
    """Return the partitions of loop devices that the host has, without those of the tests beside this one.

    What we attach lies in mounts of our own, where nobody else finds it; what they attach is a file for all.
    """
    found = set()
    for path in Path("/sys/class/block").glob("loop*p*"):
        try:
            file = path.resolve().with_name("loop").joinpath("backing_file").read_text().rstrip("\n")
        except OSError:
            # One whose device has no file any more was left behind, but for the moment in which both go.
            if not path.exists():
                continue
            file = ""
        if file.startswith(f"{folder}/") or not os.path.exists(file):
            found.add(path.name)
    return found


@pytest.fixture(autouse=True)
def _no_partition_appears(blocksnap: CommandLine, tmp_path: Path) -> object:
    before = host_partitions(tmp_path)
    yield
    assert wait_until(lambda: host_partitions(tmp_path) <= before, 60), host_partitions(tmp_path) - before


@pytest.fixture
def disk(blocksnap: CommandLine, tmp_path: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """A backed up disk with a GPT."""
    image = tmp_path / "disk.img"
    digests = make_gpt(image)
    blocksnap.done("backup", image, "-q")
    return image, digests


def test_a_disk_is_shown_listed_copied_and_drilled(
    blocksnap: CommandLine, tmp_path: Path, disk: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    image, digests = disk
    assert sorted(digests) == ["p1", "p2", "p4"]
    tree = tmp_path / "tree"
    with shown(blocksnap, "latest", tree):
        assert sorted(os.listdir(tree)) == ["image", "p1", "p2", "p4", "partitions"]
        for name, files in digests.items():
            found = digests_of(tree / name)
            assert {path: found[path] for path in files} == files
        with pytest.raises(FileNotFoundError):
            os.stat(tree / "files")
        lines = (tree / "partitions").read_text().splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["p1", "p2", "p3", "p4", "p5"]
        assert lines[3].endswith("not shown: it holds LVM2_member")
        assert lines[5].endswith("not shown: it holds crypto_LUKS")

    entries = blocksnap.done("files", "latest", "--json").document["entries"]
    assert [(e["path"], e["kind"], e["content"], bool(e["reason"])) for e in entries] == [
        ("p1", "partition", "ext4", False),
        ("p2", "partition", "xfs", False),
        ("p3", "partition", "LVM2_member", True),
        ("p4", "partition", "btrfs", False),
        ("p5", "partition", "crypto_LUKS", True),
    ]
    assert "not shown: it holds crypto_LUKS" in blocksnap.done("files", "latest").text
    listed = blocksnap.done("files", "latest", "/p2/etc", "--json").document["entries"]
    assert [e["path"] for e in listed] == ["p2/etc/app.conf", "p2/etc/fstab"]
    found = blocksnap.done("files", "latest", "--find", "*.conf", "--json").document["entries"]
    assert [e["path"] for e in found] == [f"{name}/etc/app.conf" for name in ("p1", "p2", "p4")]
    for path, why in (
        ("etc/fstab", "there is no etc in this backup: it is of a disk with partitions"),
        ("p3/x", "p3 is not shown: it holds LVM2_member"),
        ("../p1", "leads out"),
        ("p1/../p2", "leads out"),
        ("p9", "p4 btrfs"),
    ):
        refused = blocksnap("files", "latest", path, "--to", tmp_path)
        assert (refused.code, len(refused.errors)) == (1, 1), refused
        assert why in refused.stderr

    out = tmp_path / "out"
    out.mkdir()
    blocksnap.done("files", "latest", "p4/etc", "--to", out)
    assert _digest(out / "etc" / "fstab") == digests["p4"]["etc/fstab"]
    blocksnap.done("files", "latest", "p1", "--to", out)
    assert _digest(out / "p1" / "data") == digests["p1"]["data"]
    everything = tmp_path / "everything"
    everything.mkdir()
    blocksnap.done("files", "latest", "--to", everything)
    assert {name: _digest(everything / name / "data") for name in digests} == {
        name: files["data"] for name, files in digests.items()
    }

    check = (
        '#!/bin/sh -e\nls "$BLOCKSNAP_DRILL_FOLDER"\ncat $BLOCKSNAP_DRILL_FOLDER/p*/etc/fstab > /dev/null\n'
    )
    check += 'partx --show "$BLOCKSNAP_DRILL_DEVICE" | wc -l\necho x > "$BLOCKSNAP_DRILL_FOLDER/p4/new"\n'
    configure(blocksnap, image, check)
    blocksnap.done("backup", "--job", "images")
    result = drilled(blocksnap, "latest")
    steps = {step["step"]: step["said"] for step in result["steps"]}
    names = ("p1", "p2", "p4")
    assert list(steps) == [
        *("sample", "partitions"),
        *(f"{step} {name}" for name in names for step in ("replay", "fsck")),
        *(f"mount {name}" for name in names),
        "check",
        *(f"unmount {name}" for name in names),
    ]
    assert steps["check"].split() == ["p1", "p2", "p4", "6"]
    assert "p3 (LVM2_member: not shown)" in steps["partitions"]


def test_logical_partitions(blocksnap: CommandLine, tmp_path: Path) -> None:
    image, tree = tmp_path / "disk.img", tmp_path / "tree"
    digests = make_mbr(image)
    assert sorted(digests) == ["p1", "p6"]
    blocksnap.done("backup", image, "-q")
    with shown(blocksnap, str(image), tree):
        folder = tree / "latest" if (tree / "latest").exists() else next(tree.iterdir())
        assert sorted(os.listdir(folder)) == ["image", "p1", "p6", "partitions"]
        for name, files in digests.items():
            found = digests_of(folder / name)
            assert {path: found[path] for path in files} == files
        assert "not shown: it holds swap" in (folder / "partitions").read_text()
    assert drilled(blocksnap, "latest")["good"]


HOSTILE = {
    "overlapping": (
        {0: boot_sector([(0x83, 2048, 8192), (0x83, 4096, 8192)])},
        "p1 (not shown: it overlaps p2)",
    ),
    "beyond": ({0: boot_sector([(0x83, 2048, 1 << 20)])}, "behind the end of the volume"),
    "far beyond": ({0: boot_sector([(0x83, 0xFFFFFFF0, 0xFFFFFFF0)])}, "behind the end of the volume"),
    "upon the table": ({0: boot_sector([(0x83, 0, 8192)])}, "begins in the table"),
    "endless": (
        {
            0: boot_sector([(0x05, 2048, 8192)]),
            2048: boot_sector([(0x83, 64, 100), (0x05, 4096, 100)]),
            2048 + 4096: boot_sector([(0x83, 64, 100), (0x05, 0, 100)]),
        },
        "p5 (nothing known)",
    ),
}


def test_tables_that_cannot_be_right(blocksnap: CommandLine, tmp_path: Path) -> None:
    """They are told, by what lists and what drills, and nothing waits for them."""
    images = {kind: tmp_path / f"{kind}.img" for kind in HOSTILE}
    for kind, image in images.items():
        make_sectors(image, 8 * MIB, HOSTILE[kind][0])
    blocksnap.done("backup", *images.values(), "-q")
    for kind, image in images.items():
        refused = blocksnap("files", f"{image}@latest", "etc")
        assert (refused.code, len(refused.errors)) == (1, 1), refused
        assert HOSTILE[kind][1] in refused.stderr
    for kind in ("overlapping", "endless"):
        last = drilled(blocksnap, f"{images[kind]}@latest", code=1)["steps"][-1]
        assert (last["step"], last["ok"]) == ("partitions", False)


def test_a_table_is_told_from_a_boot_sector(blocksnap: CommandLine, tmp_path: Path) -> None:
    """A filesystem may have one, with rubbish where a table would have its list; and one may be left over."""
    image = tmp_path / "volume.img"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    call("mkfs.ext4", "-q", image)
    with image.open("r+b") as file:
        file.write(boot_sector([(0x83, 4096, 8192)]))
    blocksnap.done("backup", image, "-q")
    entries = blocksnap.done("files", "latest", "--json").document["entries"]
    assert [entry["path"] for entry in entries] == ["lost+found"]
    # A table and a filesystem in its partition, made over a filesystem whose superblock is still there.
    call("mkfs.ext4", "-q", "-F", "-E", f"offset={2 * MIB}", image, "4096k")
    blocksnap.done("backup", image, "-q")
    entries = blocksnap.done("files", "latest", "--json").document["entries"]
    assert [(entry["path"], entry["content"]) for entry in entries] == [("p1", "ext4")]


def test_large_sectors_and_the_second_copy_of_a_table(blocksnap: CommandLine, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    for sector in (512, 4096):
        with loop_device(image, "--sector-size", str(sector)) as device:
            script = b"label: gpt\nsize=8MiB\nsize=24MiB\n"
            subprocess.run(["sfdisk", "--quiet", device], input=script, check=True)
        call("mkfs.ext4", "-q", "-F", "-E", f"offset={9 * MIB}", image, "24m")
        with image.open("r+b") as file:
            for _ in range(2):
                found = look_inside(str(image))
                assert [(part.offset, part.size, part.content) for part in found.partitions] == [
                    (MIB, 8 * MIB, ""),
                    (9 * MIB, 24 * MIB, "ext4"),
                ]
                if sector == 512:
                    # The kernel, too, then takes the copy at the end.
                    file.seek(sector)
                    file.write(bytes(sector))
                    file.flush()


@pytest.mark.parametrize("what", ["mount", "drill"])
def test_nothing_is_left_after_kill(blocksnap: CommandLine, tmp_path: Path, what: str) -> None:
    """No mount, no loop device, no partition: what the fixtures insist upon."""
    image, tree, mark = tmp_path / "disk.img", tmp_path / "tree", tmp_path / "began"
    make_mbr(image)
    configure(blocksnap, image, f"#!/bin/sh\ntouch {mark}\nsleep {long_time()}\n")
    blocksnap.done("backup", "--job", "images")
    tree.mkdir()
    process = blocksnap.start(*(("mount", "latest", tree) if what == "mount" else ("drill", "latest")))
    try:
        if what == "mount":
            wait_for(process, tree)
            assert os.listdir(tree / "p1")
            assert os.listdir(tree / "p6")
        if what == "drill":
            assert wait_until(lambda: mark.exists() or process.poll() is not None, 120)
            assert process.poll() is None, process.communicate()
        (backup,) = blocksnap.done("list", "--json").document["backups"]
        listed = call("losetup", "--list", "--json", "--output", "NAME,OFFSET,BACK-FILE")
        loops = [
            loop for loop in json.loads(listed)["loopdevices"] if backup["id"] in (loop["back-file"] or "")
        ]
        assert len([loop for loop in loops if int(loop["offset"] or 0)]) >= 2
        for pid in [process.pid, *children_of(process.pid)]:
            # The others may have ended by themselves once the first one has.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        if what == "mount":
            unmount(tree)
        assert wait_until(lambda: not is_mounted(tree), 60)
    finally:
        process.kill()
        process.communicate()
        subprocess.run(["umount", "-l", tree], check=False, capture_output=True)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
