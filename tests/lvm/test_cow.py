"""Classic snapshots on real LVM: what the exception store says is compared with all that there is."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.extents.changes import Changes
from blocksnap.extents.cow import CowStore, Exceptions, read_exceptions
from support.classic_volume import (
    BLOCK,
    ClassicVolume,
    DirectWriter,
    classic_group,
    covered,
    differing,
    open_direct,
    read_device,
    write_blocks,
)
from support.cow_store import read_entries
from support.in_process import InProcess
from support.loops import call, mounted
from support.lvm_lab import tool

SIZE = 24 << 20
BLOCKS = SIZE // BLOCK
NAME = "data-1.x+y"


@pytest.fixture(scope="module")
def group(_lab: None) -> Iterator[str]:
    with classic_group() as made:
        yield made


@pytest.fixture(scope="module")
def made(group: str) -> ClassicVolume:
    """A volume of 24 MiB with random content."""
    return make_volume(group, NAME)


@pytest.fixture
def volume(made: ClassicVolume) -> Iterator[ClassicVolume]:
    """The volume, whose snapshots are removed after each test."""
    yield made
    tool("lvremove", "-y", "--select", f'origin="{made.name}"', made.group)


def make_volume(group: str, name: str) -> ClassicVolume:
    tool("lvcreate", "-y", "-L", f"{SIZE}b", "-n", name, group)
    made = ClassicVolume(group, name)
    with open(made.node, "r+b") as device:
        device.write(random.Random(name).randbytes(SIZE))
        os.fsync(device.fileno())
    return made


def rebuilt(before: bytes, changes: Changes, after: bytes) -> bytes:
    """What a backup would have: the parent's content, and what was read of the new snapshot."""
    made = bytearray(before.ljust(len(after), b"\0"))
    for extent in changes.changed:
        made[extent.offset : extent.end] = after[extent.offset : extent.end]
    return bytes(made)


def require_whole_count(volume: ClassicVolume, name: str) -> Exceptions:
    """With nobody writing, the engine counts exactly what the kernel counts."""
    status = volume.status(name)
    with volume.store(name) as store:
        found = store.scan(0, 0)
    assert (found.allocated, found.metadata) == (status.allocated, status.metadata)
    assert found.count == (status.allocated - status.metadata) // found.chunk_size
    return found


@pytest.mark.parametrize("chunk", ["4k", "64k"])
def test_increments_are_exactly_what_was_written(volume: ClassicVolume, chunk: str) -> None:
    """Random writes, raw and through the page cache, rewrites of the same bytes among them."""
    chance = random.Random(chunk)
    unit = int(chunk[:-1]) << 10
    volume.take("snap-0", chunk=chunk)
    before, parent = read_device(volume.node_of("snap-0")), volume.identity("snap-0")
    # More than one area of 4 KiB chunks in the first round, and nothing at all in the last.
    for number, count in enumerate([420, 3, 0], 1):
        blocks = [chance.randrange(BLOCKS) for _ in range(count)]
        write_blocks(volume.node, blocks[::2], chance)
        with open(volume.node, "r+b") as device:
            for block in blocks[1::2]:
                device.seek(block * BLOCK)
                device.write(before[block * BLOCK :][:BLOCK] if block % 3 == 0 else chance.randbytes(BLOCK))
            os.fsync(device.fileno())
        volume.take(f"snap-{number}", chunk=chunk)
        changes = volume.changed_since(parent, f"snap-{number - 1}", f"snap-{number}")
        after = read_device(volume.node_of(f"snap-{number}"))
        assert (changes.method, changes.inherits) == ("cow", True), changes.reason
        written = {block * BLOCK // unit for block in blocks}
        assert covered(changes, unit) == written
        assert differing(before, after, unit) <= written
        assert all(extent.offset % unit == 0 and extent.length % unit == 0 for extent in changes.changed)
        assert rebuilt(before, changes, after) == after
        found = require_whole_count(volume, f"snap-{number - 1}")
        assert found.areas == len(written) // (unit // 16) + 1
        before, parent = after, volume.identity(f"snap-{number}")


def test_a_file_system_in_use(volume: ClassicVolume, tmp_path: Path) -> None:
    call("mkfs.ext4", "-q", "-F", volume.node)
    with mounted(volume.node, tmp_path / "mounted") as folder:
        for number in range(20):
            (folder / f"file-{number}").write_bytes(os.urandom(50000))
        volume.take("snap-0")
        parent = volume.identity("snap-0")
        for number in range(0, 20, 2):
            (folder / f"file-{number}").unlink()
        (folder / "new").mkdir()
        (folder / "new" / "file").write_bytes(os.urandom(300000))
        with (folder / "file-1").open("r+b") as file:
            file.seek(20000)
            file.write(b"changed")
        # Not even synced: lvcreate freezes the file system, and what that writes is in the list.
        volume.take("snap-1", chunk="64k")
        changes = volume.changed_since(parent, "snap-0", "snap-1")
    before, after = (read_device(volume.node_of(name)) for name in ("snap-0", "snap-1"))
    assert changes.method == "cow", changes.reason
    assert differing(before, after, BLOCK)
    assert rebuilt(before, changes, after) == after


def test_a_full_store_and_one_that_overflowed(volume: ClassicVolume, in_process: InProcess) -> None:
    """A store of 4 MiB has 1,024 chunks: the header, four areas and 1,019 for what was written."""
    volume.take("snap-0", size="4M")
    volume.take("snap-1")
    parent, chance = volume.identity("snap-0"), random.Random(3)
    write_blocks(volume.node, list(range(1018)), chance)
    assert volume.changed_since(parent, "snap-0", "snap-1").method == "cow"
    write_blocks(volume.node, [5000], chance)
    status = volume.status("snap-0")
    assert (status.state, status.allocated) == ("valid", status.total)
    changes = volume.changed_since(parent, "snap-0", "snap-1")
    assert (changes.method, changes.inherits) == ("compare", False)
    assert "full to the last chunk" in changes.reason
    with volume.store("snap-0") as store:
        assert store.scan(SIZE, 3).count == 1019
    write_blocks(volume.node, [5001], chance)
    assert volume.status("snap-0").state == "invalid"
    assert "became invalid" in volume.changed_since(parent, "snap-0", "snap-1").reason
    with volume.store("snap-0") as store, pytest.raises(ValueError, match="has invalidated the snapshot"):
        store.scan(SIZE, 0)
    code, _, err = in_process("debug", "cow-extents", volume.node_of("snap-0", "-cow"))
    assert code == 14
    assert "became invalid" in err
    code, out, _ = in_process("debug", "cow-extents", volume.node_of("snap-1", "-cow"))
    assert code == 0
    assert out.decode().splitlines() == ["0 4169728", f"{5000 * BLOCK} {2 * BLOCK}"]
    assert "is not there any more" not in err


def test_an_origin_that_was_extended(group: str) -> None:
    """Which LVM does only while it is inactive; when it is activated the kernel reads the list again."""
    volume = make_volume(group, "grown")
    volume.take("snap-0")
    parent, before = volume.identity("snap-0"), read_device(volume.node_of("snap-0"))
    chance = random.Random(4)
    write_blocks(volume.node, [*range(300), BLOCKS - 1], chance)
    tool("lvchange", "-an", f"{group}/grown")
    tool("lvextend", "-L", "+8M", f"{group}/grown")
    tool("lvchange", "-ay", f"{group}/grown")
    assert require_whole_count(volume, "snap-0").count == 301
    write_blocks(volume.node, [7, 400, BLOCKS, BLOCKS + 1, BLOCKS + 2047], chance)
    assert require_whole_count(volume, "snap-0").count == 302
    volume.take("snap-1", chunk="64k")
    changes = volume.changed_since(parent, "snap-0", "snap-1")
    after = read_device(volume.node_of("snap-1"))
    assert len(after) == SIZE + (8 << 20)
    assert changes.method == "cow", changes.reason
    assert covered(changes, BLOCK) == {*range(300), 400, *range(BLOCKS - 1, len(after) // BLOCK)}
    assert rebuilt(before, changes, after) == after
    tool("lvremove", "-y", f"{group}/grown")


def test_a_base_that_is_not_what_it_was(volume: ClassicVolume) -> None:
    volume.take("snap-0", permission="rw")
    parent = volume.identity("snap-0")
    volume.take("snap-1")
    assert "can be written to" in volume.changed_since(parent, "snap-0", "snap-1").reason
    # What is written to a snapshot is in its list too, so even then nothing would be missed.
    write_blocks(volume.node_of("snap-0"), [77], random.Random(5))
    with volume.store("snap-0") as store:
        assert store.scan(SIZE, 0).changed.packed == (77 * BLOCK).to_bytes(8, "little") + BLOCK.to_bytes(
            8, "little"
        )
    tool("lvchange", "-pr", f"{volume.group}/snap-0")
    assert volume.changed_since(parent, "snap-0", "snap-1").method == "cow"
    # Removed and made again under its name, as an administrator may.
    volume.remove("snap-0")
    volume.take("snap-0")
    assert "not that of the parent" in volume.changed_since(parent, "snap-0", "snap-1").reason
    assert "are the same" in volume.changed_since(volume.identity("snap-1"), "snap-1", "snap-1").reason


def test_a_snapshot_that_is_to_be_merged(group: str) -> None:
    """While the origin is in use the merge waits for its next activation: only LVM knows of it."""
    volume = make_volume(group, "merged")
    volume.take("snap-0")
    parent = volume.identity("snap-0")
    write_blocks(volume.node, [1, 2, 3], random.Random(6))
    volume.take("snap-1")
    with open_direct(volume.node):
        tool("lvconvert", "--merge", f"{group}/snap-0")
        assert volume.status("snap-0").state == "valid"
        assert "being merged" in volume.changed_since(parent, "snap-0", "snap-1").reason
    tool("lvremove", "-y", f"{group}/merged")


def test_a_buffered_reader_would_see_an_old_list(volume: ClassicVolume) -> None:
    """The kernel writes the list past the page cache: what a reader put there before stays there."""
    volume.take("snap-0")
    cow = volume.node_of("snap-0", "-cow")
    buffered = os.open(cow, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert list(read_entries(buffered)) == []
        write_blocks(volume.node, list(range(100)), random.Random(7))
        stale = len(list(read_entries(buffered)))
        with volume.store("snap-0") as store:
            assert store.scan(SIZE, 0).count == 100
            # A buffered reader is told by the kernel's count, if by nothing else.
            found = read_exceptions(CowStore(buffered, store.status), SIZE, BLOCK)
            assert isinstance(found, Exceptions) == (stale == 100)
    finally:
        os.close(buffered)
    print(f"a buffered reader sees {stale} of 100 exceptions")


class Writer(threading.Thread):
    """Overwrites random blocks, one after the other, and remembers which are done."""

    def __init__(self, path: str, seed: int) -> None:
        super().__init__()
        self.done: list[int] = []
        self.stop = threading.Event()
        self._path = path
        self._chance = random.Random(seed)

    def run(self) -> None:
        with open_direct(self._path, os.O_WRONLY) as fd:
            writer = DirectWriter(fd)
            while not self.stop.is_set():
                block = self._chance.randrange(BLOCKS)
                writer.write(block, self._chance.randbytes(BLOCK))
                self.done.append(block)


def test_every_write_before_the_snapshot_is_in_the_list(volume: ClassicVolume) -> None:
    """Two writers go on all the time, while the list is read again and again and a snapshot is taken."""
    volume.take("snap-0")
    parent, before = volume.identity("snap-0"), read_device(volume.node_of("snap-0"))
    writers = [Writer(volume.node, seed) for seed in (8, 9)]
    for writer in writers:
        writer.start()
    try:
        with volume.store("snap-0") as store:
            scans, done = 0, list[int]()
            while scans < 100 or len(set(done)) <= 256:
                scans += 1
                done = [block for writer in writers for block in writer.done]
                found = store.scan(SIZE, 0)
                assert set(done) <= covered(found, BLOCK)
        volume.take("snap-1", chunk="64k")
        done = [block for writer in writers for block in writer.done]
        changes = volume.changed_since(parent, "snap-0", "snap-1")
    finally:
        for writer in writers:
            writer.stop.set()
        for writer in writers:
            writer.join()
    assert changes.method == "cow", changes.reason
    after = read_device(volume.node_of("snap-1"))
    assert differing(before, after, BLOCK) <= covered(changes, BLOCK)
    assert set(done) <= covered(changes, BLOCK)
    assert rebuilt(before, changes, after) == after


def test_what_is_on_the_origin_is_in_the_list_already(volume: ClassicVolume) -> None:
    """Not only finished writes: the list, read after the origin's own device, has all that differs there."""
    volume.take("snap-0")
    before = read_device(volume.node_of("snap-0"))
    writer = Writer(volume.node, 10)
    writer.start()
    seen = 0
    try:
        with volume.store("snap-0") as store:
            while seen < 400:
                now = differing(before, read_device(volume.node_of(NAME, "-real")), BLOCK)
                found = store.scan(SIZE, 0)
                assert now <= covered(found, BLOCK)
                seen = len(now)
    finally:
        writer.stop.set()
        writer.join()
