"""debug compare, and what debug fiemap-diff refuses; tests/xfs has the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from blocksnap.cli.main import run

PAGE = 4096


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    for name in ("base", "later"):
        (tmp_path / name).write_bytes(b"a" * 10 * PAGE)
    with (tmp_path / "later").open("r+b") as file:
        file.seek(3 * PAGE + 5)
        file.write(b"b")
    return str(tmp_path / "base"), str(tmp_path / "later")


def test_compare_prints_lines(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["debug", "compare", *pair]) == 0
    assert capsys.readouterr().out == f"{3 * PAGE} {PAGE}\n"
    assert run(["debug", "compare", "--direct", "--block-size", str(4 * PAGE), *pair]) == 0
    assert capsys.readouterr().out == f"0 {4 * PAGE}\n"
    assert run(["debug", "compare", "-q", "-v", *pair]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("compare: ")


def test_compare_prints_json(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["debug", "compare", "--json", *pair]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["engine"] == "compare"
    assert document["extents"] == [[3 * PAGE, PAGE]]
    assert document["base_read_bytes"] == document["read_bytes"] == 10 * PAGE
    assert document["seconds"] >= 0


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("compare", "--block-size", "5", "{base}", "{later}"), "multiple of 4096"),
        (("compare", "{base}", "/"), "regular files or block devices"),
        (("compare", "{base}", "/nowhere"), "cannot open /nowhere: No such file"),
        (("fiemap-diff", "/nowhere", "{later}"), "cannot open /nowhere: No such file"),
        (("fiemap-diff", "{base}", "/"), "is not a regular file|not on XFS"),
        (("fiemap-diff", "/proc/self/status", "{later}"), "/proc/self/status .*not on XFS"),
    ],
)
def test_errors_are_one_line(
    pair: tuple[str, str], capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], error: str
) -> None:
    words = [word.format(base=pair[0], later=pair[1]) for word in argv]
    assert run(["debug", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if not line.startswith("fix:")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(error, lines[0])
