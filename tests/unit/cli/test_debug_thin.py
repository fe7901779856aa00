"""debug thin-diff and thin-extents: what they print, and how they say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blocksnap.cli.main import run
from support.thin_builder import CHUNK_SIZE, ThinBuilder

Out = pytest.CaptureFixture[str]


@pytest.fixture
def image(tmp_path: Path) -> str:
    """Device 2 maps 0 to 599; in 3 chunk 7 is elsewhere, 100 to 199 are gone, 600 to 602 are new."""
    path = tmp_path / "meta"
    with ThinBuilder(path) as pool:
        pool.create_thin(1)
        pool.write(1, range(600))
        pool.create_snap(2, 1)
        pool.write(1, [7, 600, 601, 602])
        pool.discard(1, range(100, 200))
        pool.create_snap(3, 1)
        pool.commit()
    return str(path)


def lines(*extents: tuple[int, int]) -> str:
    return "".join(f"{first * CHUNK_SIZE} {length * CHUNK_SIZE}\n" for first, length in extents)


def document(capsys: Out, *arguments: str) -> dict[str, Any]:
    assert run(["debug", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_lines(image: str, capsys: Out) -> None:
    assert run(["debug", "thin-diff", image, "2", "3"]) == 0
    assert capsys.readouterr().out == lines((7, 1), (100, 100), (600, 3))
    assert run(["debug", "thin-diff", image, "2", "3", "--size", str(601 * CHUNK_SIZE - 5)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{600 * CHUNK_SIZE} {CHUNK_SIZE - 5}"
    assert run(["debug", "thin-extents", image, "3"]) == 0
    assert capsys.readouterr().out == lines((0, 100), (200, 403))


def test_json(image: str, capsys: Out) -> None:
    found = document(capsys, "thin-diff", image, "2", "3")
    seconds = found.pop("seconds")
    assert 0 <= seconds < 60
    assert found == {
        "engine": "thin-tree",
        "reason": "the trees of the devices 2 and 3 compared",
        "changed_bytes": 104 * CHUNK_SIZE,
        "count": 3,
        "chunk_size": CHUNK_SIZE,
        "nodes": found["nodes"],
        "written_bytes": 4 * CHUNK_SIZE,
        "discarded_bytes": 100 * CHUNK_SIZE,
        "discarded_count": 1,
        "extents": [
            [first * CHUNK_SIZE, count * CHUNK_SIZE] for first, count in ((7, 1), (100, 100), (600, 3))
        ],
    }
    assert 2 <= found["nodes"] <= 8


def test_since_a_time(image: str, capsys: Out) -> None:
    found = document(capsys, "thin-extents", image, "3", "--since", "1", "--size", str(700 * CHUNK_SIZE))
    assert found["engine"] == "thin-time"
    assert found["extents"] == [[7 * CHUNK_SIZE, CHUNK_SIZE], [600 * CHUNK_SIZE, 3 * CHUNK_SIZE]]


def test_metadata_snapshot(tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "meta"
    with ThinBuilder(path) as pool:
        pool.create_thin(1)
        pool.write(1, range(9))
        pool.create_snap(2, 1)
        pool.create_snap(3, 1)
        pool.hold()
        pool.write(1, [4])
        pool.delete(3)
        pool.commit()
    assert document(capsys, "thin-diff", str(path), "2", "1")["count"] == 1
    assert document(capsys, "thin-diff", str(path), "2", "1", "--metadata-snap")["count"] == 0
    # What has been removed since is still to be seen there.
    assert document(capsys, "thin-diff", str(path), "2", "3", "--metadata-snap")["count"] == 0
    assert run(["debug", "thin-diff", str(path), "2", "3"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("thin-diff", "{image}", "2", "77"), 2, "the pool has no device 77"),
        (("thin-diff", "{image}", "77", "2"), 2, "the pool has no device 77"),
        (("thin-diff", "{image}", "2", "3", "--metadata-snap"), 2, "the pool holds no metadata snapshot"),
        (("thin-diff", "{image}", "2", "16777216"), 2, "not in the range"),
        (("thin-diff", "{folder}/none", "2", "3"), 2, "cannot open"),
        (("thin-diff", "{folder}", "2", "3"), 14, "cannot read the metadata"),
        (("thin-diff", "{folder}/text", "2", "3"), 14, "no consistent metadata of a thin pool"),
        (("thin-extents", "{image}", "2", "--since", "1"), 2, "--since needs --size"),
        (("thin-extents", "{image}", "2", "--since", "9", "--size", "5"), 14, "not the same pool"),
        (("thin-extents", "{image}", "2", "--since", str(1 << 70), "--size", "5"), 2, "too large"),
    ],
)
def test_errors_are_one_line_with_what_to_do(
    image: str, tmp_path: Path, capsys: Out, arguments: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "text").write_text("no metadata " * 1000)
    words = [word.format(image=image, folder=tmp_path) for word in arguments]
    assert run(["debug", *words]) == code
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True)
    if "Usage:" not in err:
        assert len(err.splitlines()) <= 2


def test_verbose_and_quiet(image: str, capsys: Out) -> None:
    assert run(["debug", "thin-diff", image, "2", "3", "-v", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("thin-tree: the trees of the devices 2 and 3 compared; ")
