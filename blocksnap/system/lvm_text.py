"""LVM's own text form of a volume group, as ``vgcfgbackup`` writes it (lvm.conf(5) has it), and of sizes.

Sections in braces, ``name = value`` with numbers, strings and lists of them, and comments from ``#`` on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(r'\s+|#[^\n]*|"(?:[^"\\]|\\.)*"|[{}\[\]=,]|[^\s{}\[\]=,#"]+')
Value = str | int | list["Value"] | dict[str, "Value"]
Section = dict[str, Value]
_SECTOR = 512


class LvmTextError(ValueError):
    """It is not what LVM writes of a volume group."""


def parse(text: str) -> Section:
    """Return the sections as dictionaries; raises LvmTextError for what is no such text."""
    tokens = _tokens(text)
    try:
        section, closed = _section(tokens)
    except RecursionError as err:
        raise LvmTextError("sections are too deep in each other") from err
    if closed:
        raise LvmTextError("a brace too many")
    return section


def section_in(section: Section, name: str) -> Section:
    """Return a section in another, an empty one where it is missing; raises LvmTextError."""
    value = section.get(name, {})
    if not isinstance(value, dict):
        raise LvmTextError(f"{name} is no section")
    return value


def number_in(section: Section, name: str) -> int:
    """Return a number; raises LvmTextError."""
    value = section.get(name)
    if not isinstance(value, int):
        raise LvmTextError(f"{name} is no number")
    return value


def text_in(section: Section, name: str) -> str:
    """Return a string; raises LvmTextError."""
    value = section.get(name)
    if not isinstance(value, str):
        raise LvmTextError(f"{name} is no string")
    return value


def strings_in(section: Section, name: str) -> list[str]:
    """Return a list of strings, an empty one where it is missing."""
    value = section.get(name)
    return [str(each) for each in value] if isinstance(value, list) else []


def attachment_in(text: str, vg: str, store: str) -> str:
    """Return the UUID of what joins a classic snapshot to its origin; empty where nothing does.

    It is a volume of its own in LVM's metadata, which no report shows: another one is made when a snapshot
    that was split off (lvconvert --splitsnapshot) is put back, while that keeps its UUID, tags and time.
    Raises LvmTextError. (lvm2: lib/metadata/snapshot_manip.c, vg_add_snapshot)
    """
    volumes = section_in(section_in(parse(text), vg), "logical_volumes")
    for name in volumes:
        segment = section_in(section_in(volumes, name), "segment1")
        if segment.get("type") == "snapshot" and segment.get("cow_store") == store:
            return text_in(section_in(volumes, name), "id")
    return ""


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise LvmTextError(f"no text of LVM at character {at}")
        at = found.end()
        if not found[0].isspace() and not found[0].startswith("#"):
            yield found[0]


def _section(tokens: Iterator[str]) -> tuple[Section, bool]:
    section: Section = {}
    for name in tokens:
        if name == "}":
            return section, True
        following = next(tokens, "")
        if following == "{":
            section[name], closed = _section(tokens)
            if not closed:
                raise LvmTextError(f"section {name} has no end")
        elif following == "=":
            section[name] = _value(tokens)
        else:
            raise LvmTextError(f"{name!r} is followed by {following!r}")
    return section, False


def _value(tokens: Iterator[str]) -> Value:
    word = next(tokens, "")
    if word != "[":
        return _scalar(word)
    values: list[Value] = []
    for word in tokens:
        if word == "]":
            return values
        if word != ",":
            values.append(_scalar(word))
    raise LvmTextError("a list has no end")


def _scalar(word: str) -> Value:
    if word.startswith('"'):
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    try:
        return int(word)
    except ValueError as err:
        raise LvmTextError(f"{word!r} is neither a number nor a string") from err


def sized(size_bytes: int) -> str:
    """Return a size as LVM's commands take it: at least so many bytes, in whole sectors."""
    return f"{-(-size_bytes // _SECTOR) * _SECTOR}b"
