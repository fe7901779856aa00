"""thin_device and thin_scan give what an independent reader finds, or refuse."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support.require import require
from support.thin_metadata import BLOCK_SIZE, Pool, Run, crc32c, restore, seal

POOL_TIME = 9
CHUNKS = 3000


@pytest.fixture(autouse=True)
def _needs_thin_restore() -> None:
    require("lvm", shutil.which("thin_restore") is not None, "thin-provisioning-tools is not installed")


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def bitmap_of(chunks: set[int], nr_chunks: int) -> bytes:
    bitmap = bytearray(-(-nr_chunks // 8))
    for chunk in chunks:
        bitmap[chunk // 8] |= 1 << chunk % 8
    return bytes(bitmap)


def expected(pool: Pool, device_id: int, since: int, nr_chunks: int) -> tuple[ExtentList, bytes, int]:
    size = pool.chunk_size
    mappings = {c: time for c, (_, time) in pool.mappings(device_id).items() if c < nr_chunks}
    changed = ExtentList.of((c * size, size) for c, time in mappings.items() if time >= since)
    return changed, bitmap_of(set(mappings), nr_chunks), len(pool.nodes(pool.devices()[device_id].root))


def check_against_model(path: Path, pool: Pool, device_id: int, since: int, nr_chunks: int) -> None:
    with opened(path) as fd:
        changed, mapped, _, nodes = _native.thin_scan(fd, device_id, since, 0, nr_chunks, False, 0)
    assert (ExtentList(changed), mapped, nodes) == expected(pool, device_id, since, nr_chunks)


def check_windows(path: Path, pool: Pool, device_id: int, since: int, windows: list[int]) -> None:
    """Windows beside one another hold together what one does, and their mappings add up."""
    all_changed, everything, found, first = ExtentList(), 0, 0, 0
    with opened(path) as fd:
        for number, count in enumerate(windows, 1):
            more = number < len(windows)
            changed, mapped, mappings, _ = _native.thin_scan(fd, device_id, since, first, count, more, 0)
            all_changed = all_changed.union(ExtentList(changed))
            everything |= int.from_bytes(mapped, "little") << first
            found += mappings
            first += count
    wanted, bitmap, _ = expected(pool, device_id, since, first)
    assert (all_changed, everything) == (wanted, int.from_bytes(bitmap, "little"))
    assert found == pool.devices()[device_id].mapped_blocks


@st.composite
def device_runs(draw: st.DrawFn) -> list[Run]:
    """Mappings of one device: runs and gaps of any length, with any times."""
    runs, chunk, data = [], 0, 0
    shape = st.tuples(st.integers(0, 40), st.integers(1, 400) | st.just(1), st.integers(0, POOL_TIME))
    for gap, length, time in draw(st.lists(shape, max_size=40)):
        chunk += gap
        runs.append(Run(chunk, length, data, time))
        chunk += length
        data += length + gap % 2
    return runs


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    devices=st.dictionaries(st.integers(0, 0xFFFFFF), device_runs(), min_size=1, max_size=4),
    chunk_size=st.sampled_from([65536, 196608, 1 << 30]),
    since=st.integers(0, POOL_TIME),
    nr_chunks=st.integers(0, 6000),
    windows=st.lists(st.integers(1, 2000), min_size=1, max_size=5),
)
def test_any_mappings_equal_the_model(
    tmp_path: Path,
    devices: dict[int, list[Run]],
    chunk_size: int,
    since: int,
    nr_chunks: int,
    windows: list[int],
) -> None:
    image = tmp_path / "meta"
    pool = restore(image, devices, time=POOL_TIME, chunk_size=chunk_size)
    for device_id, runs in devices.items():
        assert len(pool.mappings(device_id)) == sum(run.length for run in runs)
        check_against_model(image, pool, device_id, since, nr_chunks)
        check_windows(image, pool, device_id, since, windows)


def many_devices(path: Path, count: int) -> Pool:
    return restore(path, {n * 3 + 1: [Run(n, 1, n, 1)] for n in range(count)}, time=POOL_TIME)


def test_device_equals_the_model_in_a_deep_tree(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    pool = many_devices(image, 600)
    assert not pool.node(pool.mapping_root)[0]
    with opened(image) as fd:
        for device_id, device in pool.devices().items():
            assert _native.thin_device(fd, device_id, 0) == (
                pool.time,
                pool.transaction_id,
                pool.flags,
                pool.held_root,
                pool.chunk_size,
                pool.metadata_blocks,
                pool.mapping_root,
                pool.details_root,
                device.root,
                device.mapped_blocks,
                device.transaction_id,
                device.creation_time,
            )


@pytest.mark.parametrize("device_id", [0, 2, 1801, 0xFFFFFF, 1 << 24, (1 << 64) - 1])
def test_a_device_that_is_not_there(tmp_path: Path, device_id: int) -> None:
    image = tmp_path / "meta"
    many_devices(image, 600)
    with opened(image) as fd:
        with pytest.raises(KeyError) as caught:
            _native.thin_device(fd, device_id, 0)
        assert caught.value.args == (device_id,)
        with pytest.raises(KeyError):
            _native.thin_scan(fd, device_id, 0, 0, 8, False, 0)


def small_pool(path: Path) -> Pool:
    runs = [Run(0, 200, 0, 1), Run(300, 150, 200, 2), Run(500, 1, 400, 3)]
    return restore(path, {1: runs, 2: [Run(7, 2, 600, 3)]}, time=3, blocks=24)


def test_direct_io_gives_the_same(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    small_pool(image)
    with opened(image) as fd:
        buffered = _native.thin_scan(fd, 1, 2, 0, 600, False, 0)
    try:
        fd = os.open(image, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        require("direct-io", available=False, reason="the filesystem of the temporary folder has no O_DIRECT")
    try:
        assert _native.thin_scan(fd, 1, 2, 0, 600, False, 0) == buffered
    finally:
        os.close(fd)


Answer = tuple[bytes, bytes, int, int] | str


def answer_or_refusal(path: Path, device_id: int) -> Answer:
    with opened(path) as fd:
        try:
            return _native.thin_scan(fd, device_id, 2, 0, 600, False, 0)
        except ValueError as error:
            return str(error)
        except KeyError:
            return "no such device"


def used_blocks(pool: Pool, device_id: int) -> list[int]:
    device = pool.devices()[device_id]
    return [0, *pool.nodes(pool.mapping_root), *pool.nodes(pool.details_root), *pool.nodes(device.root)]


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """A block that the scan needs and a bit of which is wrong is never believed."""
    image, broken = tmp_path / "meta", tmp_path / "broken"
    pool = small_pool(image)
    before = answer_or_refusal(image, 1)
    assert not isinstance(before, str)
    for block in used_blocks(pool, 1):
        # Closely at header and first entries, then a sample: a bad superblock is read many times over.
        bits = [*range(0, 64 * 8, 11), *range(64 * 8, BLOCK_SIZE * 8, 1777)]
        for bit in bits:
            damaged = bytearray(pool.image)
            damaged[block * BLOCK_SIZE + bit // 8] ^= 1 << bit % 8
            broken.write_bytes(damaged)
            assert f"block {block}: " in str(answer_or_refusal(broken, 1)), f"bit {bit} of block {block}"


def test_flipped_bits_elsewhere_change_nothing(tmp_path: Path) -> None:
    image, broken = tmp_path / "meta", tmp_path / "broken"
    pool = small_pool(image)
    before = answer_or_refusal(image, 1)
    for block in sorted(set(range(pool.metadata_blocks)) - set(used_blocks(pool, 1))):
        damaged = bytearray(pool.image)
        damaged[block * BLOCK_SIZE + 100] ^= 4
        broken.write_bytes(damaged)
        assert answer_or_refusal(broken, 1) == before


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_lies_with_right_checksums_never_shrink_the_answer(tmp_path: Path, data: st.DataObject) -> None:
    """Whoever rewrites a node's structure, checksum included, gets a refusal or the same answer."""
    image, broken = tmp_path / "meta", tmp_path / "broken"
    # All examples share the folder, and thin_restore is slow.
    pool = Pool(image.read_bytes()) if image.exists() else small_pool(image)
    before = answer_or_refusal(image, 1)
    root = pool.devices()[1].root
    block = data.draw(st.sampled_from(pool.nodes(root)))
    # Of a leaf only kind, number, count and value size: another key or value is another truth that no
    # reader can see through, and room for more keys would move the values.
    anywhere = st.integers(4, BLOCK_SIZE - 1)
    at = data.draw(st.integers(4, 19) | st.integers(24, 31) if pool.node(block)[0] else anywhere)
    damaged = bytearray(pool.image)
    damaged[block * BLOCK_SIZE + at] ^= data.draw(st.integers(1, 255))
    seal(damaged, block)
    broken.write_bytes(damaged)
    after = answer_or_refusal(broken, 1)
    assert isinstance(after, str) or after == before


def write_patched(path: Path, pool: Pool, block: int, *, offset: int, layout: str, value: int) -> None:
    image = bytearray(pool.image)
    struct.pack_into(layout, image, block * BLOCK_SIZE + offset, value)
    seal(image, block)
    path.write_bytes(image)


SuperblockCase = tuple[int, str, int, str]


@pytest.mark.parametrize(
    ("offset", "layout", "value", "reason"),
    [
        (8, "<Q", 5, "another block's number"),
        (32, "<Q", 27022011, "not a thin-pool superblock"),
        (40, "<I", 3, "unknown metadata version"),
        (192, "<Q", 25, "smaller than the pool expects"),
        (336, "<I", 100, "impossible chunk size"),
        (340, "<I", 16, "not 4096 bytes"),
        (360, "<I", 2, "incompatible features"),
    ],
)
def test_superblocks_that_make_no_sense(
    tmp_path: Path, offset: int, layout: str, value: int, reason: str
) -> None:
    image = tmp_path / "meta"
    pool = small_pool(image)
    write_patched(image, pool, 0, offset=offset, layout=layout, value=value)
    with opened(image) as fd, pytest.raises(ValueError, match=f"block 0: .*{reason}"):
        _native.thin_device(fd, 1, 0)


def test_size_left_behind_in_the_superblock_is_not_believed(tmp_path: Path) -> None:
    """The kernel does not update metadata_nr_blocks when the metadata device is extended."""
    image = tmp_path / "meta"
    pool = small_pool(image)
    before = answer_or_refusal(image, 1)
    write_patched(image, pool, 0, offset=344, layout="<Q", value=3)
    assert answer_or_refusal(image, 1) == before


def test_cut_metadata(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    small_pool(image)
    for size in (24 * BLOCK_SIZE - 1, 12 * BLOCK_SIZE, BLOCK_SIZE, 100, 0):
        os.truncate(image, size)
        assert "smaller" in str(answer_or_refusal(image, 1))


def test_since_must_be_of_this_pool(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    pool = small_pool(image)
    check_against_model(image, pool, 1, 3, 600)
    with opened(image) as fd:
        for since in (4, 1 << 24, (1 << 64) - 1):
            with pytest.raises(ValueError, match="not the same pool"):
                _native.thin_scan(fd, 1, since, 0, 600, False, 0)


def test_times_of_24_bits(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    last = 0xFFFFFF
    pool = restore(image, {1: [Run(0, 5, 0, last), Run(5, 5, 5, last - 1)]}, time=last)
    check_against_model(image, pool, 1, last, 16)
    write_patched(image, pool, 0, offset=44, layout="<I", value=last + 1)
    with opened(image) as fd, pytest.raises(ValueError, match="outgrown"):
        _native.thin_scan(fd, 1, last, 0, 16, False, 0)


def test_mapped_blocks_must_be_as_many_as_found(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    pool = small_pool(image)
    write_patched(image, pool, pool.details_root, offset=32 + 8 * 126, layout="<Q", value=352)
    assert "as many mappings" in str(answer_or_refusal(image, 1))


Call = Callable[[int], object]


@pytest.mark.parametrize(
    "call",
    [lambda fd: _native.thin_device(fd, 1, 0), lambda fd: _native.thin_scan(fd, 1, 0, 0, 8, False, 0)],
    ids=["thin_device", "thin_scan"],
)
def test_errors_name_the_call(tmp_path: Path, call: Call) -> None:
    with pytest.raises(OSError, match="fstat: Bad file descriptor"):
        call(-1)
    with opened(Path("/dev/null")) as fd, pytest.raises(OSError, match="fstat: Block device required"):
        call(fd)
    image = tmp_path / "meta"
    small_pool(image)
    fd = os.open(image, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="pread: Bad file descriptor"):
            call(fd)
    finally:
        os.close(fd)


def test_impossible_arguments(tmp_path: Path) -> None:
    image = tmp_path / "meta"
    small_pool(image)
    with opened(image) as fd:
        for place in range(4):
            for number in (-1, 1 << 64):
                arguments = [1, 0, 0, 8]
                arguments[place] = number
                with pytest.raises(OverflowError):
                    _native.thin_scan(fd, *arguments, False, 0)
        with pytest.raises(ValueError, match="a window of no chunks"):
            _native.thin_scan(fd, 1, 0, 8, 0, True, 0)
        with pytest.raises(ValueError, match="the volume is larger than"):
            _native.thin_scan(fd, 1, 0, (1 << 64) - 8, 8, True, 0)
        with pytest.raises(TypeError):
            _native.thin_scan(fd, "1", 0, 0, 8, False, 0)  # type: ignore[arg-type]
        with pytest.raises(MemoryError):
            _native.thin_scan(fd, 1, 0, 0, (1 << 64) - 1, False, 0)


def test_the_model_knows_crc32c() -> None:
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283
