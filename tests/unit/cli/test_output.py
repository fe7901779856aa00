"""Sizes and tables as people see them; sizes as people type them; reporters."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from blocksnap.cli.main import run
from blocksnap.cli.output import format_size, print_facts, print_json, print_json_streaming, print_table
from blocksnap.cli.reporting import JsonReporter, TextReporter
from blocksnap.errors import UsageError
from blocksnap.quantities import parse_size


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (131072, "128 KiB"), (1 << 40, "1 TiB")],
)
def test_sizes_are_binary(size: int, text: str) -> None:
    assert format_size(size) == text


def test_sizes_are_understood() -> None:
    assert [parse_size(text) for text in ("16384", "16K", "16 KiB", "1m", "4MB")] == [
        16384,
        16384,
        16384,
        1 << 20,
        4 << 20,
    ]
    for text in ("", "K", "1.5M", "-1", "12P"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME", "SIZE"), [("a", "1 B"), ("longer", "10 B")], right=(1,))
    assert capsys.readouterr().out.splitlines() == ["NAME    SIZE", "a        1 B", "longer  10 B"]
    print_facts([("a", "1"), ("bcd", "2")])
    assert capsys.readouterr().out.splitlines() == ["a    1", "bcd  2"]


def test_times_become_text_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"time": datetime(2026, 11, 22, tzinfo=UTC)})
    assert json.loads(capsys.readouterr().out) == {"time": "2026-11-22T00:00:00+00:00"}
    with pytest.raises(TypeError):
        print_json({"what": object()})


PLAN = {
    "volume": "vg0/a",
    "kind": "full",
    "method": "compare",
    "reason": "first",
    "read_bytes": 1,
    "volume_bytes": 2,
}


def test_text_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = TextReporter(verbosity=0)
    reporter.event("plan", **PLAN)
    reporter.event("other", x=1)
    reporter.begin("phase", 10)
    reporter.advance(5)
    reporter.end()
    reporter.warn("careful", resolution="do this")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "vg0/a: full, compare: 1 B of 2 B to read (first)",
        "warning: careful",
        "fix:     do this",
    ]
    assert reporter.warnings == ["careful"]
    quiet = TextReporter(verbosity=-1)
    quiet.event("plan", **PLAN)
    assert capsys.readouterr().err == ""


def test_json_is_a_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = JsonReporter()
    reporter.event("plan", **PLAN)
    reporter.warn("careful")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["plan", "warning"]


def test_long_lists_are_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    print_json_streaming({"engine": "compare", "none": iter(()), "some": iter([[0, 1], [5, 2]]), "n": 2})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"engine": "compare", "none": [], "some": [[0, 1], [5, 2]], "n": 2}
    assert "\n    [0, 1],\n    [5, 2]\n" in printed


HOSTILE = "v\x1b]0;owned\x07\x9b31m\rx\u202ey\udc80"


def test_what_comes_out_of_a_repository_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME",), [(HOSTILE,), ("two\nlines",)])
    print_facts([("volume", HOSTILE), ("label", "two\nlines, 3\u00a0kB, \u00fc")])
    reporter = TextReporter(verbosity=1)
    reporter.event("finding", severity="damage", object=HOSTILE, message=HOSTILE)
    reporter.event("unknown", volume=HOSTILE)
    reporter.warn(HOSTILE, resolution=HOSTILE)
    seen = capsys.readouterr()
    out = seen.out + seen.err
    assert not {letter for letter in out if not letter.isprintable()} - {"\n", "\u00a0"}
    assert out.count(r"v\x1b]0;owned\x07\x9b31m\rx\u202ey\udc80") == 7
    assert r"two\nlines" in seen.out
    assert "two\nlines, 3\u00a0kB, \u00fc" in seen.out


def test_an_error_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "--repo", "/nowhere/\x1b[31m"]) != 0
    seen = capsys.readouterr()
    assert "\x1b" not in seen.out + seen.err
    assert r"/nowhere/\x1b[31m" in seen.err
