"""Images: what is particular to them; the rest is in the conformance suite."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from blocksnap.controller.journal import Journal
from blocksnap.errors import VolumeError
from blocksnap.system.clones import CloneFolderError, can_clone
from blocksnap.system.files import is_being_written
from blocksnap.volumes.image import FOLDER
from blocksnap.volumes.resolve import resolve_volume, resolve_volumes
from support.file_ioctls import set_immutable
from support.forks import exit_code_of
from support.in_process import InProcess
from support.loops import call, loop_device, mounted

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CHUNK = 128 * KIB
IMAGE_BYTES = int(os.environ.get("BLOCKSNAP_IMAGE_BYTES", str(256 * MIB)))
"""4 GiB in `make soak-images`."""


@pytest.fixture(params=["on_xfs", "on_btrfs"])
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a filesystem with reflinks."""
    folder: Path = request.getfixturevalue(request.param) / "images"
    folder.mkdir()
    yield folder
    for clone in folder.glob(f"{FOLDER}/clone-*"):
        set_immutable(clone, immutable=False)
    shutil.rmtree(folder)


def clones(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(f"{FOLDER}/clone-*") if path.suffix != ".base"]


def method_on(folder: Path) -> str:
    return "fiemap" if "xfs" in str(folder) else "btrfs-tree"


def test_a_clone_is_found_where_its_directory_was_renamed(place: Path, blocksnap: InProcess) -> None:
    """After a crash, by what its journal knows, and at the end of a run."""
    folder = place / "before"
    folder.mkdir()
    (folder / "image").write_bytes(random.Random(1).randbytes(MIB))
    volume = resolve_volume(str(folder / "image"))
    dead = f"dead{uuid4().hex}"

    def die_with_a_snapshot() -> int:
        journal = Journal(blocksnap.folder / "state", dead)
        journal.append("snapshot", volume=volume.key, name=volume.name, trace=volume.trace(dead))
        volume.prepare()
        volume.take_snapshot(dead, lambda _step, _facts: None)
        return 0

    assert exit_code_of(die_with_a_snapshot) == 0
    snapshot = volume.take_snapshot("alive", lambda _step, _facts: None)
    folder.rename(place / "after")
    assert len(clones(place / "after")) == 2
    snapshot.remove()
    assert len(clones(place / "after")) == 1
    # Only what is said of this run: the tests beside this one leave and clean up snapshots too.
    assert f"{dead}: the run died".encode() in blocksnap("doctor")[1]
    assert b"removed the clone" in blocksnap("doctor", "--fix")[1]
    assert os.listdir(place / "after") == ["image"]
    assert dead.encode() not in blocksnap("doctor")[1]


def test_a_folder_of_images_is_one_group(place: Path, blocksnap: InProcess) -> None:
    names = [place / f"{number}.img" for number in range(3)]
    for number, path in enumerate(names):
        path.write_bytes(random.Random(number).randbytes(MIB + number))
    (place / ".hidden.img").write_bytes(b"x")
    (place / "other.txt").write_bytes(b"x")
    (blocksnap.folder / "blocksnap.toml").write_text(
        f'[jobs.images]\nvolumes = ["{place}/*.img"]\nbase = "auto"\n'
    )
    out = blocksnap.done("backup", "--job", "images", "--json")
    taken = json.loads(out.splitlines()[-1])["backups"]
    assert [each["volume"] for each in taken] == [str(path) for path in names]
    assert {each["source"]["base_reason"] for each in taken} == {"without it the whole image would be read"}
    assert len(clones(place)) == 3
    # What came and went is seen the next time, and the bases of each are its own.
    names[1].unlink()
    (place / "3.img").write_bytes(random.Random(3).randbytes(MIB))
    with names[2].open("r+b") as file:
        file.write(b"changed")
    out = blocksnap.done("backup", "--job", "images", "--json")
    taken = json.loads(out.splitlines()[-1])["backups"]
    assert [(Path(each["volume"]).name, each["method"], each["read_bytes"]) for each in taken] == [
        ("0.img", method_on(place), 0),
        ("2.img", method_on(place), CHUNK),
        ("3.img", "compare", MIB),
    ]
    for each in taken:
        assert blocksnap.done("restore", each["id"], "-", "-q") == Path(each["volume"]).read_bytes()
    assert blocksnap("backup", str(place / "*.none"))[0] == 14
    assert len(resolve_volumes(str(place / "[02].img"))) == 2


def test_nothing_stays_where_nothing_is_to(place: Path, blocksnap: InProcess) -> None:
    path = place / "disk.qcow2"
    # Whatever is in it: a qcow2 file is the bytes that it is, of no whole number of blocks.
    path.write_bytes(b"QFI\xfb" + random.Random(1).randbytes(3 * MIB + 77))
    told = blocksnap.backup(str(path))
    assert (told["volume_kind"], told["source"]["base_kept"]) == ("image", False)
    assert told["consistency"] == "crash"
    assert os.listdir(place) == ["disk.qcow2"]
    told = blocksnap.backup(str(path), "--base", "keep")
    assert (told["method"], told["reason"]) == (
        "compare",
        "the parent's clone is not on this host any more",
    )
    assert len(clones(place)) == 1
    # Another repository has bases of its own.
    blocksnap.done("init", "--no-encryption", "--repo", blocksnap.folder / "other")
    blocksnap.backup(str(path), "--base", "keep", "--repo", str(blocksnap.folder / "other"))
    assert len(clones(place)) == 2
    told = blocksnap.backup(str(path))
    assert (told["method"], told["read_bytes"]) == (method_on(place), 0)
    assert len(clones(place)) == 1
    assert blocksnap.done("restore", "latest", "-", "-q") == path.read_bytes()


def test_a_base_that_somebody_replaced_is_none(place: Path, blocksnap: InProcess) -> None:
    path = place / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB))
    blocksnap.backup(str(path), "--base", "keep")
    (name,) = clones(place)
    clone = place / FOLDER / name
    set_immutable(clone, immutable=False)
    content = clone.read_bytes()
    clone.unlink()
    clone.write_bytes(content)
    set_immutable(clone, immutable=True)
    told = blocksnap.backup(str(path), "--base", "keep")
    assert (told["method"], told["reason"]) == ("compare", "the base is another file than the parent's clone")


def test_a_file_without_copy_on_write(on_btrfs: Path, blocksnap: InProcess) -> None:
    """Btrfs shares no blocks between a file with checksums and one without."""
    folder = on_btrfs / "nocow"
    folder.mkdir()
    call("chattr", "+C", folder)
    path = folder / "disk.img"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    blocksnap.backup(str(path), "--base", "keep")
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed in place")
        file.flush()
        os.fsync(file.fileno())
    told = blocksnap.backup(str(path))
    assert (told["method"], told["read_bytes"]) == ("btrfs-tree", CHUNK)
    assert blocksnap.done("restore", "latest", "-", "-q") == path.read_bytes()
    shutil.rmtree(folder)


def test_a_folder_that_others_can_write_to_is_not_used(place: Path, blocksnap: InProcess) -> None:
    path = place / "disk.img"
    path.write_bytes(b"x" * MIB)
    (place / FOLDER).mkdir()
    (place / FOLDER).chmod(0o777)
    code, _, err = blocksnap("backup", str(path))
    assert (code, "others can write to it" in err) == (14, True)
    (place / FOLDER).rmdir()
    (place / FOLDER).symlink_to("/")
    with pytest.raises(CloneFolderError):
        resolve_volume(str(path)).prepare()
    (place / FOLDER).unlink()


def test_a_file_that_is_open_for_writing_where_there_are_no_clones(
    on_ext4: Path, blocksnap: InProcess
) -> None:
    path = on_ext4 / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB))
    assert not can_clone(str(path))
    assert blocksnap.backup(str(path))["consistency"] == "cold"
    with path.open("r+b"):
        assert is_being_written(str(path))
        code, _, err = blocksnap("backup", str(path))
        assert (code, f"somebody has {path} open for writing" in err) == (14, True)
        assert "--quiet-files" in err
        assert blocksnap.backup(str(path), "--quiet-files")["kind"] == "incremental"
        text = f'[jobs.quiet]\nvolumes = ["{path}"]\nquiet_files = true\n'
        (blocksnap.folder / "blocksnap.toml").write_text(text)
        blocksnap.backup("--job", "quiet")
    with loop_device(path):
        assert blocksnap("backup", str(path))[0] == 14
    with path.open("rb"):
        assert not is_being_written(str(path))
        blocksnap.backup(str(path))
    with pytest.raises(VolumeError, match="there is no volume"):
        resolve_volume(str(on_ext4 / "none"))
    assert not is_being_written(str(on_ext4 / "none"))
    path.unlink()


@pytest.mark.timeout(3600)
def test_random_writes_of_a_mounted_filesystem(place: Path, blocksnap: InProcess, tmp_path: Path) -> None:
    """The disk of a virtual machine at work: no more is read than twice what was written, in chunks."""
    path = place / "disk.img"
    with loop_device(path, size=IMAGE_BYTES) as device:
        call("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", device)
        with mounted(device, tmp_path / "guest") as guest:
            data = guest / "data"
            data.write_bytes(random.Random(1).randbytes(16 * MIB))
            call("sync", "-f", guest)
            blocksnap.backup(str(path), "--base", "keep")
            for number in range(3):
                written = write_randomly(data, random.Random(number))
                before = Path(device).name
                told = blocksnap.backup(str(path), "--base", "keep")
                assert told["method"] == method_on(place), told["reason"]
                # The inode, its bitmaps and the superblock of the filesystem inside are written too.
                assert told["read_bytes"] <= 2 * (written + 6) * CHUNK, (number, written, before)
                assert told["consistency"] == "crash"
        out = tmp_path / "restored.img"
        blocksnap.done("restore", "latest", out)
        call("e2fsck", "-fn", out)
    content = subprocess.run(["debugfs", "-R", "cat /data", out], check=True, capture_output=True).stdout
    assert content == expected(16 * MIB)


def write_randomly(path: Path, chance: random.Random) -> int:
    """Write to 40 places of a file; return in how many chunks of 128 KiB they are."""
    chunks = set()
    with path.open("r+b") as file:
        for _ in range(40):
            offset = chance.randrange(0, 16 * MIB - 4 * KIB) // (4 * KIB) * 4 * KIB
            file.seek(offset)
            file.write(chance.randbytes(4 * KIB))
            chunks.add(offset // CHUNK)
        file.flush()
        os.fsync(file.fileno())
    return len(chunks)


def expected(size: int) -> bytes:
    """What the file holds after all rounds."""
    content = bytearray(random.Random(1).randbytes(size))
    for number in range(3):
        chance = random.Random(number)
        for _ in range(40):
            offset = chance.randrange(0, 16 * MIB - 4 * KIB) // (4 * KIB) * 4 * KIB
            content[offset : offset + 4 * KIB] = chance.randbytes(4 * KIB)
    return bytes(content)
