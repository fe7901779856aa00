"""What cannot be read is named to the block: btrfs refuses a block whose checksum is wrong, and no other."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support.commands import CommandLine
from support.file_ioctls import opened
from support.loops import call, loop_device, mounted
from support.require import require

PAGE = 4096
DAMAGED = 777
PAGES = 2000


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two equal files, but for the first page, of which one has a damaged block."""
    ready = os.geteuid() == 0 and shutil.which("mkfs.btrfs") is not None
    require("btrfs", ready and "btrfs" in Path("/proc/filesystems").read_text(), "no btrfs, or not root")
    folder = tmp_path_factory.mktemp("unreadable")
    image = folder / "btrfs.img"
    content = os.urandom(PAGES * PAGE)
    marked = content[DAMAGED * PAGE : (DAMAGED + 1) * PAGE]
    with loop_device(image, size=256 << 20) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, folder / "mnt") as mount:
            (mount / "base").write_bytes(content)
            (mount / "later").write_bytes(bytes(PAGE) + content[PAGE:])
    damage(image, marked)
    with loop_device(image) as device, mounted(device, folder / "mnt") as mount:
        yield mount / "base", mount / "later"


def damage(image: Path, marked: bytes) -> None:
    """Flip a bit of one of the two copies of a block."""
    data = image.read_bytes()
    at = data.rindex(marked)
    assert data.count(marked) == 2
    with image.open("r+b") as file:
        file.seek(at)
        file.write(bytes([marked[0] ^ 1]))


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_the_block_is_named(pair: tuple[Path, Path], flags: int) -> None:
    with opened(pair[0], flags) as base, opened(pair[1], flags) as later:
        bad = [at for at in (base, later) if not readable(at)]
        assert len(bad) == 1
        for descriptors in ((base, later), (later, base)):
            which = "the base" if descriptors[0] == bad[0] else "the later file"
            with pytest.raises(OSError, match=f"pread of {which} at byte {DAMAGED * PAGE}: ") as caught:
                _native.compare_files(*descriptors, PAGE)
            assert caught.value.errno == errno.EIO


def readable(fd: int) -> bool:
    duplicate = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        os.pread(duplicate, PAGE, DAMAGED * PAGE)
    except OSError:
        return False
    finally:
        os.close(duplicate)
    return True


def test_the_command_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    failed = CommandLine(tmp_path)("debug", "compare", *pair)
    assert failed.code == 1
    assert len(failed.errors) == 1
    assert f"at byte {DAMAGED * PAGE}: Input/output error" in failed.errors[0]
    assert failed.stdout == b""


def test_devices_are_compared_as_a_whole(tmp_path: Path) -> None:
    """A block device has no holes, and its end need not be that of a page."""
    require("root", os.geteuid() == 0 and os.path.exists("/dev/loop-control"), "needs root and loop devices")
    contents = [bytearray(os.urandom(3 << 20)) + b"tail" * 128 for _ in range(2)]
    contents[1][:] = contents[0]
    contents[1][-1] ^= 1
    contents[1][5 * PAGE] ^= 1
    for name, content in zip(("one", "other"), contents, strict=True):
        (tmp_path / name).write_bytes(content)
    with loop_device(tmp_path / "one") as one, loop_device(tmp_path / "other") as other:
        for flags in (0, os.O_DIRECT):
            with opened(Path(one), flags) as base, opened(Path(other), flags) as later:
                changed, base_bytes, bytes_ = _native.compare_files(base, later, PAGE)
                assert ExtentList(changed) == ExtentList.of([(5 * PAGE, PAGE), (3 << 20, 512)])
                assert base_bytes == bytes_ == len(contents[0])
                assert ExtentList(_native.data_extents(later, 0, 1 << 20)) == ExtentList.whole(1 << 20)
