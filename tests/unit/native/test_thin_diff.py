"""thin_diff and thin_scan find what differs between any two snapshots of any history, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support import thin_model
from support.require import require
from support.thin_builder import CHUNK_SIZE, LEAST, MOST, Node, ThinBuilder
from support.thin_metadata import Pool

ORIGIN, OTHER, FIRST_SNAPSHOT = 1, 2, 3
EXAMPLES = int(os.environ.get("BLOCKSNAP_EXAMPLES", "15"))
AS_THE_KERNEL = (LEAST, MOST)
OTHER_SHAPES = ((2, 6), (1, 4), (3, 9), (20, 60))


@pytest.fixture(autouse=True)
def _needs_thin_tools() -> None:
    require("lvm", shutil.which("thin_check") is not None, "thin-provisioning-tools is not installed")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def chunks_of(packed: bytes) -> set[int]:
    """Return the chunks of packed extents, which have to be what an ExtentList is."""
    extents = ExtentList(packed)
    assert ExtentList.of(extents.pairs()) == extents
    return {
        chunk
        for offset, length in extents.pairs()
        for chunk in range(offset // CHUNK_SIZE, (offset + length) // CHUNK_SIZE)
    }


@dataclass(frozen=True)
class Taken:
    """A snapshot as it was when it was taken: its pool time, and a token for what each mapped chunk held."""

    device_id: int
    time: int
    content: dict[int, int]


class History:
    """A pool with a volume, another one, and snapshots; and what really is in the data blocks."""

    def __init__(self, path: Path, entries: tuple[int, int]) -> None:
        self.pool = ThinBuilder(path, blocks=6000, data_blocks=32_000, entries=entries)
        self.taken: list[Taken] = []
        self._blocks: dict[int, int] = {}
        self._tokens = count()
        self._ids = count(FIRST_SNAPSHOT)
        for volume in (ORIGIN, OTHER):
            self.pool.create_thin(volume)

    def write(self, device_id: int, chunks: range) -> None:
        for block in self.pool.write(device_id, chunks).values():
            self._blocks[block] = next(self._tokens)

    def snapshot(self) -> None:
        device_id = next(self._ids)
        self.pool.create_snap(device_id, ORIGIN)
        self.taken.append(Taken(device_id, self.pool.time, self.content(device_id)))

    def content(self, device_id: int) -> dict[int, int]:
        root = self.pool.devices[device_id].root
        return {c: self._blocks[value >> 24] for c, value in self._mappings(root)}

    def _mappings(self, root: int) -> Iterator[tuple[int, int]]:
        node = self.pool.read(root)
        for key, value in zip(node.keys, node.values, strict=True):
            if node.leaf:
                yield key, value
            else:
                yield from self._mappings(value)

    def live(self) -> list[Taken]:
        return [one for one in self.taken if one.device_id in self.pool.devices]


@st.composite
def ranges(draw: st.DrawFn, most: int) -> range:
    begin = draw(st.integers(0, most))
    length = draw(st.integers(1, 8) | st.integers(1, most))
    return range(begin, begin + length, draw(st.sampled_from([1, 1, 2, 17])))


STEPS = st.sampled_from(["write", "write", "discard", "snapshot", "other", "delete", "reclaim"])


def play(data: st.DataObject, history: History, most: int) -> None:
    """Let a random history happen; it ends with two snapshots that are there."""
    history.write(ORIGIN, data.draw(ranges(most)))
    history.snapshot()
    for step in data.draw(st.lists(STEPS, max_size=12)):
        live = history.live()
        if step == "write":
            history.write(ORIGIN, data.draw(ranges(most)))
        elif step == "discard":
            history.pool.discard(ORIGIN, data.draw(ranges(most)))
        elif step == "snapshot":
            history.snapshot()
        elif step == "other":
            history.write(OTHER, data.draw(ranges(most)))
        elif step == "delete" and len(live) > 1:
            history.pool.delete(data.draw(st.sampled_from(live)).device_id)
        elif step == "reclaim":
            history.pool.reclaim()
    history.write(ORIGIN, data.draw(ranges(most)))
    history.snapshot()
    history.pool.commit()


def check_pair(fd: int, pool: Pool, base: Taken, device: Taken, end: int) -> None:
    """What differs is what the model says, both ways, and leads from one snapshot to the other."""
    for one, other in ((base, device), (device, base)):
        before, after = pool.mappings(one.device_id), pool.mappings(other.device_id)
        packed, gone, _ = _native.thin_diff(fd, one.device_id, other.device_id, 0, 1 << 40, 0)
        assert chunks_of(packed) == thin_model.changed_by_tree(before, after)
        assert chunks_of(gone) == thin_model.discarded(before, after)
        applied = thin_model.apply(one.content, chunks_of(packed), chunks_of(gone), other.content)
        assert applied == other.content
        part, part_gone, _ = _native.thin_diff(fd, one.device_id, other.device_id, end // 3, end, 0)
        wanted = set(range(end // 3, end))
        assert chunks_of(part) == chunks_of(packed) & wanted
        assert chunks_of(part_gone) == chunks_of(gone) & wanted


def check_by_time(fd: int, pool: Pool, base: Taken, device: Taken) -> None:
    """With nothing but the time and the mapped chunks of a snapshot, perhaps long gone, the same holds."""
    mappings = pool.mappings(device.device_id)
    packed, mapped, _, _ = _native.thin_scan(fd, device.device_id, base.time, 0, 1 << 16, False, 0)
    assert chunks_of(packed) == thin_model.changed_by_time(mappings, base.time)
    assert chunks_of(_native.bitmap_extents(mapped, CHUNK_SIZE)) == set(mappings)
    gone = thin_model.discarded(base.content, mappings)
    assert thin_model.apply(base.content, chunks_of(packed), gone, device.content) == device.content


def check_alone(fd: int, pool: Pool, device_id: int) -> None:
    none = _native.THIN_NO_DEVICE
    packed, gone, nodes = _native.thin_diff(fd, none, device_id, 0, 1 << 40, 0)
    assert (chunks_of(packed), gone) == (set(pool.mappings(device_id)), b"")
    assert nodes >= len(pool.nodes(pool.devices()[device_id].root))


def delta(path: Path, base: int, device: int) -> dict[str, set[int]]:
    """Return what thin_delta says, by the name of the element."""
    command = ["thin_delta", "--snap1", str(base), "--snap2", str(device), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, set[int]] = {"different": set(), "left_only": set(), "right_only": set()}
    for element in ET.fromstring(done.stdout).iter():  # noqa: S314 - our own tool's output
        if element.tag in found:
            begin = int(element.attrib["begin"])
            found[element.tag] |= set(range(begin, begin + int(element.attrib["length"])))
    return found


def check_tools(path: Path, fd: int, pool: Pool, base: Taken, device: Taken) -> None:
    checked = subprocess.run(["thin_check", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    if not (pool.mappings(base.device_id) and pool.mappings(device.device_id)):
        # thin_delta 0.9 reads past the end of an empty list.
        return
    said = delta(path, base.device_id, device.device_id)
    changed, gone, _ = _native.thin_diff(fd, base.device_id, device.device_id, 0, 1 << 40, 0)
    assert chunks_of(changed) == said["different"] | said["right_only"]
    assert chunks_of(gone) == said["left_only"]


def check_history(path: Path, history: History, *, tools: bool) -> None:
    pool = Pool(path.read_bytes())
    live = history.live()
    last = live[-1]
    assert history.content(last.device_id) == last.content
    with opened(path) as fd:
        for base, device in [*pairwise(live), (live[0], last)]:
            check_pair(fd, pool, base, device, max(last.content, default=0) * 2 // 3)
        for base in history.taken:
            check_by_time(fd, pool, base, last)
        for device in live:
            check_alone(fd, pool, device.device_id)
        if tools:
            check_tools(path, fd, pool, live[0], last)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_history(tmp_path: Path, data: st.DataObject) -> None:
    image = tmp_path / "meta"
    history = History(image, AS_THE_KERNEL)
    with history.pool:
        play(data, history, 1500)
        check_history(image, history, tools=True)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), entries=st.sampled_from(OTHER_SHAPES))
def test_any_history_in_trees_of_any_shape(
    tmp_path: Path, data: st.DataObject, entries: tuple[int, int]
) -> None:
    """Small nodes make deep trees, whose roots split and whose only children are lifted."""
    image = tmp_path / "meta"
    history = History(image, entries)
    with history.pool:
        play(data, history, 250)
        check_history(image, history, tools=False)


def test_only_what_differs_is_read(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    with ThinBuilder(image, entries=(4, 8)) as pool:
        pool.create_thin(1)
        pool.fill(1, range(4096), scattered_data=True, scattered_nodes=True)
        pool.create_snap(2, 1)
        pool.write(1, [1000, 1001])
        pool.create_snap(3, 1)
        pool.create_snap(4, 3)
        pool.commit()
    depth = 4
    with opened(image) as fd:
        changed, gone, nodes = _native.thin_diff(fd, 2, 3, 0, 4096, 0)
        assert (chunks_of(changed), gone, nodes) == ({1000, 1001}, b"", 2 * depth)
        assert _native.thin_diff(fd, 3, 4, 0, 4096, 0) == (b"", b"", 0)
        assert _native.thin_diff(fd, _native.THIN_NO_DEVICE, 2, 1000, 1001, 0)[2] == depth


def test_metadata_snapshot(tmp_path: Path) -> None:
    """What the pool holds stays as it was while the live metadata goes on."""
    image = tmp_path / "meta"
    with ThinBuilder(image) as pool:
        pool.create_thin(1)
        pool.write(1, range(600))
        pool.create_snap(2, 1)
        pool.write(1, [7])
        pool.create_snap(3, 1)
        held = pool.hold()
        pool.delete(2)
        pool.write(1, range(300))
        pool.reclaim()
        pool.write(1, range(600, 900))
        pool.commit()
    subprocess.run(["thin_check", image], check=True, capture_output=True)
    with opened(image) as fd:
        assert chunks_of(_native.thin_diff(fd, 2, 3, 0, 1 << 20, held)[0]) == {7}
        with pytest.raises(KeyError):
            _native.thin_diff(fd, 2, 3, 0, 1 << 20, 0)
        assert chunks_of(_native.thin_diff(fd, 3, 1, 0, 1 << 20, 0)[0]) == set(range(300)) | set(
            range(600, 900)
        )


def test_a_mapping_beyond_64_bits_of_bytes(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    last = (1 << 48) - 1
    with ThinBuilder(image) as pool:
        pool.create_thin(1)
        pool.graft(
            1, pool.save(Node(leaf=True, keys=[5, last, (1 << 64) - 1], values=[0, 1 << 24, 2 << 24])), 3
        )
        pool.commit()
    with opened(image) as fd:
        changed = _native.thin_diff(fd, _native.THIN_NO_DEVICE, 1, 0, last, 0)[0]
        assert chunks_of(changed) == {5}
        with pytest.raises(ValueError, match="larger than 2\\^64 bytes"):
            _native.thin_diff(fd, _native.THIN_NO_DEVICE, 1, 0, last + 1, 0)
