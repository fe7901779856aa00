"""Frames are found by what they are, wherever they lie and whatever is beside them."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.backends.errors import BackendFailedError
from blocksnap.errors import StorageError
from blocksnap.repository.frame import MAGIC, FrameType
from blocksnap.repository.frame_scan import scan_frames
from blocksnap.repository.pack import PackRow, read_footer
from blocksnap.repository.repository import Repository
from blocksnap.repository.scrubbing import check_pack
from support.repositories import CHUNK, make_repository, open_repository, open_writer, store_bytes

SECTOR = 4096


@pytest.fixture(params=[True, False], ids=["encrypted", "plain"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    repository = make_repository(tmp_path / "r", encrypted=request.param)
    with open_writer(repository) as writer:
        store_bytes(writer, random.Random(1).randbytes(CHUNK * 700 + 5), tmp_path)
        writer.flush()
    return tmp_path / "r"


def the_pack(repository: Repository) -> tuple[str, int, tuple[PackRow, ...]]:
    (info,) = repository.backend.list("packs/")
    return info.name, info.size, read_footer(repository.backend, repository.keys, info.name, info.size)


def change(place: Path, how: Callable[[bytearray], None]) -> None:
    (path,) = (each for each in (place / "packs").rglob("*-*") if each.is_file())
    stored = bytearray(path.read_bytes())
    how(stored)
    path.write_bytes(stored)


def test_all_frames_are_found_across_windows(place: Path) -> None:
    repository = open_repository(place)
    name, size, rows = the_pack(repository)
    assert size > 8 << 20
    assert tuple(scan_frames(repository, name, size)) == rows


def test_what_is_harmed_costs_itself(place: Path) -> None:
    name, size, rows = the_pack(open_repository(place))
    luck = random.Random(4)
    harmed = sorted(luck.sample(range(len(rows)), 20))

    def flip(stored: bytearray) -> None:
        for number in harmed:
            stored[rows[number].offset + luck.randrange(rows[number].length)] ^= 1 << luck.randrange(8)

    change(place, flip)
    found = tuple(scan_frames(open_repository(place), name, size))
    assert found == tuple(row for number, row in enumerate(rows) if number not in harmed)


def test_frames_are_found_where_nothing_points_to_them(place: Path) -> None:
    """Bytes are missing in front, a magic lies between frames, and there is no table."""
    name, _, rows = the_pack(open_repository(place))

    def shift(stored: bytearray) -> None:
        del stored[rows[-1].offset + rows[-1].length :]
        stored[rows[5].offset : rows[5].offset] = MAGIC + b"x" * 100 + MAGIC * 3
        del stored[:7]

    change(place, shift)
    repository = open_repository(place)
    (info,) = repository.backend.list("packs/")
    found = list(scan_frames(repository, name, info.size))
    assert [row.id for row in found] == [row.id for row in rows]


def test_a_key_that_cannot_read_proves_no_data(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(place)
    name, size, _ = the_pack(repository)
    monkeypatch.setattr(type(repository.keys), "may", lambda _keys, _right: False)
    assert not [row for row in scan_frames(repository, name, size) if row.type == FrameType.DATA]


def with_a_bad_sector(repository: Repository, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read = repository.backend.read_range_into

    def fail_there(name: str, begin: int, buffer: memoryview) -> None:
        if begin < offset + SECTOR and begin + len(buffer) > offset:
            raise BackendFailedError(f"read {name}", "here", OSError(errno.EIO, "bad sector"))
        read(name, begin, buffer)

    monkeypatch.setattr(repository.backend, "read_range_into", fail_there)


def test_a_bad_sector_costs_the_frames_in_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(place)
    name, size, rows = the_pack(repository)
    victim = rows[300]
    with_a_bad_sector(repository, victim.offset + 2 * SECTOR, monkeypatch)
    found = {row.id for row in scan_frames(repository, name, size)}
    # What lies in the same block of 4 KiB as it is read may go with it.
    gone = [number for number, row in enumerate(rows) if row.id not in found]
    assert 300 in gone
    assert len(gone) <= 2
    verdict = check_pack(repository, name, size, 4)
    assert verdict.is_good is False
    assert victim.id in verdict.bad_ids
    assert all("Input/output error" in finding.message for finding in verdict.findings)


def test_a_storage_that_does_not_answer_is_no_damage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(place)
    name, size, _ = the_pack(repository)

    def refuse(name: str, _offset: int, _buffer: memoryview) -> None:
        raise BackendFailedError(f"read {name}", "here", OSError(errno.ETIMEDOUT, "no answer"))

    monkeypatch.setattr(repository.backend, "read_range_into", refuse)
    with pytest.raises(StorageError):
        check_pack(repository, name, size, 3)
    with pytest.raises(StorageError):
        list(scan_frames(repository, name, size))
