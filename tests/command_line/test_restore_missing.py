"""What a repository has lost is named by byte range; the rest is restored when that is asked for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from support.commands import CommandLine

MIB = 1 << 20


@pytest.fixture
def volume(tmp_path: Path, blocksnap: CommandLine) -> Path:
    path = tmp_path / "volume.img"
    path.write_bytes(random.Random(3).randbytes(4 * MIB) + bytes(MIB) + b"end")
    blocksnap.done("backup", path)
    return path


def packs(blocksnap: CommandLine) -> tuple[Path, Path]:
    """Return the pack of data and that of map nodes."""
    found = [path for path in (blocksnap.repository / "packs").rglob("*-*") if path.is_file()]
    data, nodes = sorted(found, key=lambda path: -path.stat().st_size)
    return data, nodes


def require_rest(content: bytes, restored: bytes, missing: list[dict[str, Any]]) -> None:
    expected = bytearray(content)
    for lost in missing:
        begin, end = lost["offset"], lost["offset"] + lost["length"]
        expected[begin:end] = bytes(end - begin)
    assert restored == expected


def break_chunks(blocksnap: CommandLine) -> int:
    data, _ = packs(blocksnap)
    stored = bytearray(data.read_bytes())
    for position in (MIB, MIB + (16 << 10), 3 * MIB):
        stored[position] ^= 1
    data.write_bytes(stored)
    return 3 * (16 << 10)


def cut_pack(blocksnap: CommandLine) -> int:
    data, _ = packs(blocksnap)
    data.write_bytes(data.read_bytes()[: 3 * MIB])
    return MIB


def break_leaf(blocksnap: CommandLine) -> int:
    _, nodes = packs(blocksnap)
    stored = bytearray(nodes.read_bytes())
    stored[64 + 72 + 100] ^= 1
    nodes.write_bytes(stored)
    return MIB


def lose_maps(blocksnap: CommandLine) -> int:
    _, nodes = packs(blocksnap)
    nodes.unlink()
    return 5 * MIB


@pytest.mark.parametrize("harm", [break_chunks, cut_pack, break_leaf, lose_maps])
def test_the_rest_is_restored(blocksnap: CommandLine, volume: Path, tmp_path: Path, harm: Any) -> None:
    lost = harm(blocksnap)
    refused = blocksnap("restore", "latest", tmp_path / "out")
    assert refused.code == 13
    assert not (tmp_path / "out").exists()
    assert f"of {volume}: bytes " in refused.errors[0]
    assert "--missing=zero" in refused.stderr

    told = blocksnap("restore", "latest", tmp_path / "out", "--missing", "zero", "--json")
    assert told.code == 3, told
    done = told.events[-1]
    assert (done["event"], done["complete"]) == ("done", False)
    assert lost <= sum(each["length"] for each in done["missing"]) <= lost + (48 << 10)
    require_rest(volume.read_bytes(), (tmp_path / "out").read_bytes(), done["missing"])

    verified = blocksnap("restore", "latest", tmp_path / "again", "--missing=zero", "--verify")
    assert verified.code == 3, verified
    assert "INCOMPLETE" in verified.stderr
    assert verified.stderr.count("are zeros") == len(done["missing"])
    assert (tmp_path / "again").read_bytes() == (tmp_path / "out").read_bytes()

    piped = blocksnap("restore", "latest", "-", "--missing=zero")
    assert (piped.code, piped.stdout) == (3, (tmp_path / "out").read_bytes())

    problems = blocksnap("verify", "latest", "--json")
    assert problems.code == 13
    assert len(problems.events[-1]["problems"]) >= len(done["missing"])


def test_nothing_missing_is_nothing_special(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    done = blocksnap.done("restore", "latest", tmp_path / "out", "--missing=zero", "--json").events[-1]
    assert (done["complete"], done["missing"]) == (True, [])
    assert (tmp_path / "out").read_bytes() == volume.read_bytes()
