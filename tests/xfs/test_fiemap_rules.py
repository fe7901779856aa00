"""Why the rule of native/fiemap.h is what it is: each trap of FIEMAP, sprung on purpose."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blocksnap import _native
from blocksnap.extents.changes import Parent
from blocksnap.extents.clone_identity import CloneIdentity
from blocksnap.extents.fiemap import find_fiemap_changes
from blocksnap.extents.model import ExtentList
from blocksnap.system.xfs import look_at
from support.commands import CommandLine
from support.file_ioctls import (
    KEEP_SIZE,
    PUNCH_HOLE,
    clone_file,
    clone_range,
    fallocate,
    opened,
    read_map,
    set_immutable,
)
from support.loops import call, loop_device, mounted
from support.xfs_work import PAGE, Image, defragment, remove, xfs

LAST, DELALLOC, UNWRITTEN, SHARED = 1, 4, 0x800, 0x2000


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with xfs(tmp_path_factory.mktemp("rules"), "-m", "reflink=1") as folder:
        yield folder


@pytest.fixture
def image(mount: Path, request: pytest.FixtureRequest) -> Iterator[Image]:
    """An image of 64 pages, and whatever clones a test makes of it."""
    folder = mount / request.node.name.replace("[", "-").strip("]")
    folder.mkdir()
    made = Image(folder, random.Random(7))
    with opened(made.path, os.O_RDWR | os.O_TRUNC) as fd:
        os.pwrite(fd, made.rng.randbytes(64 * PAGE), 0)
        os.fsync(fd)
    yield made
    for path in folder.iterdir():
        set_immutable(path, immutable=False)


def write(image: Image, content: bytes, page: int, *, flush: bool = True) -> None:
    with opened(image.path, os.O_RDWR) as fd:
        os.pwrite(fd, content, page * PAGE)
        if flush:
            os.fsync(fd)


def diff(base: Path, later: Path) -> tuple[ExtentList, ExtentList]:
    with opened(base) as base_fd, opened(later) as fd:
        changed, discarded, _, _ = _native.fiemap_diff(base_fd, fd)
    return ExtentList(changed), ExtentList(discarded)


def places(path: Path) -> list[tuple[int, int, int]]:
    with opened(path) as fd:
        return [record[:3] for record in read_map(fd)]


def wait_until_unshared(path: Path) -> None:
    """A removed file's blocks are given up some time later."""
    deadline = time.monotonic() + 60
    with opened(path) as fd:
        while any(record.flags & SHARED for record in read_map(fd)):
            assert time.monotonic() < deadline
            call("sync", "--file-system", path)
            time.sleep(0.05)


def pages(*numbers: int) -> ExtentList:
    return ExtentList.of((number * PAGE, PAGE) for number in numbers)


def parent_of(clone: Path) -> Parent:
    with opened(clone) as fd:
        file = look_at(fd)
    return Parent(
        file.size, CloneIdentity.of(file, "xfs-clone").to_binding(), known_here=True, load_mapped=lambda: None
    )


def test_a_saved_map_of_a_removed_clone_would_be_wrong(image: Image) -> None:
    """Nobody shares the blocks any more, so they are overwritten in place: same map, other bytes."""
    gone = image.clone("gone")
    saved, content = places(gone), gone.read_bytes()
    remove(gone)
    wait_until_unshared(image.path)
    write(image, b"x" * PAGE, 5)
    later = image.clone("later")
    assert places(later) == saved
    assert later.read_bytes() != content


def test_with_the_clone_kept_the_map_tells(image: Image) -> None:
    base = image.clone("base")
    write(image, b"x" * PAGE, 5)
    later = image.clone("later")
    assert diff(base, later) == (pages(5), ExtentList())
    # Removing the base afterwards is too late to do harm, and another base still tells.
    write(image, b"y" * PAGE, 6)
    remove(base)
    assert diff(later, image.clone("latest")) == (pages(6), ExtentList())


def test_what_is_dirty_is_invisible_without_a_flush(image: Image) -> None:
    base = image.clone("base")
    write(image, b"x" * PAGE, 5, flush=False)
    with opened(base) as base_fd, opened(image.path) as fd:
        before = read_map(base_fd)
        stale = read_map(fd, flags=0)
        assert [record[:3] for record in stale] == [record[:3] for record in before]
        # The engine asks for the flush itself.
        assert ExtentList(_native.fiemap_diff(base_fd, fd)[0]) == pages(5)
        assert [record[:3] for record in read_map(fd, flags=0)] != [record[:3] for record in before]


def test_a_flush_allocates_what_was_delayed(image: Image) -> None:
    write(image, b"x" * PAGE, 100, flush=False)
    with opened(image.path) as fd:
        assert any(record.flags & DELALLOC for record in read_map(fd, flags=0))
        assert not any(record.flags & DELALLOC for record in read_map(fd))


def test_last_is_the_last_of_the_range_that_was_asked_for(image: Image) -> None:
    with opened(image.path, os.O_RDWR) as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 20 * PAGE, PAGE)
        asked = read_map(fd, length=10 * PAGE)
    assert asked[-1].flags & LAST
    assert asked[-1].logical + asked[-1].length < 64 * PAGE


def test_clones_do_not_share_what_is_unwritten(image: Image) -> None:
    base = image.clone("base")
    with opened(image.path, os.O_RDWR) as fd:
        fallocate(fd, 0, 64 * PAGE, 10 * PAGE)
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 3 * PAGE, PAGE)
        fallocate(fd, 0, 3 * PAGE, PAGE)
        os.fsync(fd)
        assert any(record.flags & UNWRITTEN for record in read_map(fd))
    later = image.clone("later")
    with opened(later) as fd:
        assert not any(record.flags & UNWRITTEN for record in read_map(fd))
        assert os.fstat(fd).st_size == 74 * PAGE
    assert diff(base, later) == (ExtentList(), pages(3))


def test_unwritten_extents_of_the_clones_themselves_are_zeros(image: Image) -> None:
    """Nobody should, but somebody may allocate in a clone."""
    with opened(image.path, os.O_RDWR) as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 3 * PAGE, 4 * PAGE)
    paths = image.folder / "one", image.folder / "other"
    for path, pages_from in zip(paths, (3, 4), strict=True):
        with opened(image.path) as source, opened(path, os.O_RDWR | os.O_CREAT) as fd:
            clone_file(source, fd)
            fallocate(fd, 0, pages_from * PAGE, PAGE)
            assert any(record.flags & UNWRITTEN for record in read_map(fd))
    assert diff(*paths) == (ExtentList(), ExtentList())
    with opened(paths[0], os.O_RDWR) as fd:
        os.pwrite(fd, bytes(PAGE), 3 * PAGE)
    assert diff(*paths) == (ExtentList(), pages(3))
    assert diff(paths[1], paths[0]) == (pages(3), ExtentList())


def test_defragmentation_only_widens_the_answer(image: Image) -> None:
    for page in range(0, 64, 2):
        write(image, b"x" * PAGE, page)
    base = image.clone("base")
    defragment(image)
    later = image.clone("later")
    assert later.read_bytes() == base.read_bytes()
    changed, discarded = diff(base, later)
    assert not discarded
    assert changed.clip(64 * PAGE) == changed
    # The base cannot be defragmented, being immutable.
    before = places(base)
    defragment(replace_path(image, base))
    assert places(base) == before


def replace_path(image: Image, path: Path) -> Image:
    other = Image.__new__(Image)
    other.folder, other.path = image.folder, path
    return other


def test_a_block_that_both_lost_and_got_back(image: Image) -> None:
    """A block that the file freed is given away again, but never while the base has it."""
    base = image.clone("base")
    for turn in range(20):
        with opened(image.path, os.O_RDWR) as fd:
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, 64 * PAGE)
            os.pwrite(fd, bytes([turn]) * 64 * PAGE, 0)
            os.fsync(fd)
    later = image.clone("later")
    assert diff(base, later) == (ExtentList.of([(0, 64 * PAGE)]), ExtentList())


def test_only_the_remembered_base_is_believed(image: Image) -> None:
    base = image.clone("base")
    parent = parent_of(base)
    write(image, b"x" * PAGE, 5)
    later = image.clone("later")

    def reason(path: Path) -> str:
        with opened(path) as base_fd, opened(later) as fd:
            found = find_fiemap_changes(base_fd, fd, parent)
        assert found.inherits == (found.method == "fiemap")
        return found.method if found.inherits else found.reason

    assert reason(base) == "fiemap"
    assert "another file" in reason(later)
    set_immutable(base, immutable=False)
    assert "attributes changed" in reason(base)
    set_immutable(base, immutable=True)
    # It looks as before, but for its ctime.
    assert "attributes changed" in reason(base)
    remove(base)
    # Made anew, also with the same inode number.
    again = image.clone("base")
    assert "another file" in reason(again)


def test_an_inode_number_comes_back_with_another_generation(image: Image) -> None:
    """When is up to XFS, which gives numbers back in the background."""
    seen: dict[int, int] = {}
    for number in range(5000):
        path = image.folder / f"short-lived-{number}"
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            file = look_at(fd)
        path.unlink()
        assert seen.get(file.inode) != file.generation
        if file.inode in seen:
            return
        seen[file.inode] = file.generation
    pytest.fail("no inode number came back")


def test_a_written_base_is_found_out(image: Image) -> None:
    base = image.folder / "base"
    with opened(image.path) as source, opened(base, os.O_RDWR | os.O_CREAT) as fd:
        clone_file(source, fd)
    parent = parent_of(base)
    later = image.clone("later")
    with opened(base) as base_fd, opened(later) as fd:
        # It was never immutable, so nobody can tell.
        assert "not immutable" in find_fiemap_changes(base_fd, fd, parent).reason
    with opened(base, os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 0)
    with opened(base) as base_fd, opened(later) as fd:
        assert "written to" in find_fiemap_changes(base_fd, fd, parent).reason
        # Its size and content would not matter then: the clone is read.
        assert find_fiemap_changes(base_fd, fd, replace(parent, size=1)).method == "compare"


def test_immutable_means_that_nobody_writes(image: Image) -> None:
    base = image.clone("base")
    for act in (
        lambda: os.open(base, os.O_RDWR),
        lambda: os.truncate(base, 5),
        lambda: os.rename(base, image.folder / "other"),
        lambda: os.chmod(base, 0o600),
        lambda: os.utime(base),
        base.unlink,
    ):
        with pytest.raises(PermissionError):
            act()


# --- the command line, and other filesystems ---


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def test_the_command(blocksnap: CommandLine, image: Image) -> None:
    base = image.clone("base")
    write(image, b"x" * PAGE, 5)
    with opened(image.path, os.O_RDWR) as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 7 * PAGE, PAGE)
    later = image.clone("later")
    lines = f"{5 * PAGE} {PAGE}\n{7 * PAGE} {PAGE}\n"
    assert blocksnap.done("debug", "fiemap-diff", base, later).text == lines
    document = json.loads(blocksnap.done("debug", "fiemap-diff", "--json", base, later).text)
    assert document["engine"] == "fiemap"
    assert document["extents"] == [[5 * PAGE, PAGE], [7 * PAGE, PAGE]]
    assert (document["written_bytes"], document["discarded_bytes"]) == (PAGE, PAGE)
    assert document["base_records"] >= 1
    assert document["seconds"] >= 0


def test_files_of_two_filesystems(blocksnap: CommandLine, image: Image, tmp_path: Path) -> None:
    with xfs(tmp_path / "second", "-m", "reflink=1") as second:
        (second / "file").write_bytes(bytes(PAGE))
        refused = blocksnap("debug", "fiemap-diff", image.path, second / "file")
        assert refused.code == 2
        assert "different filesystems" in refused.errors[0]
        with opened(image.clone("base")) as base_fd, opened(second / "file") as fd:
            parent = parent_of(image.folder / "base")
            assert "another filesystem" in find_fiemap_changes(base_fd, fd, parent).reason


@pytest.mark.parametrize(("mkfs", "size"), [("mkfs.ext4", 64 << 20), ("mkfs.btrfs", 256 << 20)])
def test_other_filesystems_are_refused(blocksnap: CommandLine, tmp_path: Path, mkfs: str, size: int) -> None:
    with loop_device(tmp_path / "other.img", size=size) as device:
        call(mkfs, "-q", device)
        with mounted(device, tmp_path / "mnt") as folder:
            for name in ("one", "other"):
                (folder / name).write_bytes(b"a" * 10 * PAGE)
            refused = blocksnap("debug", "fiemap-diff", folder / "one", folder / "other")
            assert refused.code == 2
            assert refused.errors == [
                f"error: the map of {folder}/one says nothing about its bytes: it is not on XFS"
            ]
            assert blocksnap.done("debug", "compare", folder / "one", folder / "other").text == ""
            with opened(folder / "one") as one, opened(folder / "other") as other:
                with pytest.raises(ValueError, match="not on XFS"):
                    _native.fiemap_diff(one, other)


def test_on_btrfs_the_same_map_can_be_of_other_bytes(tmp_path: Path) -> None:
    """Why btrfs is refused: the place of a compressed extent leaves out where in it the bytes begin."""
    with loop_device(tmp_path / "btrfs.img", size=256 << 20) as device:
        call("mkfs.btrfs", "-q", device)
        with mounted(device, tmp_path / "mnt", "-o", "compress-force=zstd") as folder:
            whole, one, other = (folder / name for name in ("whole", "one", "other"))
            whole.write_bytes(b"A" * 65536 + b"B" * 65536)
            with opened(whole) as source:
                os.fsync(source)
                for half, path in enumerate((one, other)):
                    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
                        clone_range(source, fd, half * 65536, 65536, 0)
            assert places(one) == places(other)
            assert one.read_bytes() != other.read_bytes()
