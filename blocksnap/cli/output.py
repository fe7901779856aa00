"""How results look: sizes, times and tables as text, or one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

import click

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(count: int) -> str:
    """Return a size as people read it, in binary units."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1000 or unit == _UNITS[-1]:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{count} B"


def format_age(seconds: float) -> str:
    """Return an age for people: ``3 h``, of the largest unit of which there are two, rounded down."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(int(seconds), 0)} s"


def format_time(time: datetime) -> str:
    """Return a time in the local zone, with its offset."""
    return time.astimezone().isoformat(sep=" ", timespec="seconds")


def printable(text: str, *, kept: str = "\n\t") -> str:
    """Return a text as a terminal may have it, with everything escaped that would command it.

    Names come out of a repository, and were written by whoever had a key to it, or by the storage itself.
    """
    if text.isprintable():
        return text
    from unicodedata import category

    return "".join(
        letter
        if letter.isprintable() or letter in kept or category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[int] = (),
    without: Sequence[int] = (),
) -> None:
    """Print aligned columns; those numbered in ``right`` to the right, those in ``without`` not at all."""
    lines = [[printable(cell, kept="") for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            if column not in without
        ]
        click.echo("  ".join(cells).rstrip())


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print one fact a line, with the names aligned."""
    listed = list(facts)
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        click.echo(f"{name.ljust(width)}  {printable(value)}")


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they are."""
    for line in lines:
        click.echo(line)


def print_json(document: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(document, indent=2, default=_encode))


def print_json_streaming(document: Mapping[str, object]) -> None:
    """Print one JSON document whose long lists are iterators: an item a line, and none of them kept."""
    out = sys.stdout
    begin = "{"
    for name, value in document.items():
        out.write(f"{begin}\n  {json.dumps(name)}: ")
        begin = ","
        if not isinstance(value, Iterator):
            out.write(json.dumps(value, default=_encode))
            continue
        between = "["
        for item in value:
            out.write(f"{between}\n    {json.dumps(item, default=_encode)}")
            between = ","
        out.write("[]" if between == "[" else "\n  ]")
    out.write("\n}\n")


def print_json_line(document: object) -> None:
    """Print one JSON event on a line of its own, at once."""
    click.echo(json.dumps(document, default=_encode))


def _encode(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no JSON form")
