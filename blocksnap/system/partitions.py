"""The table of partitions in a file or device, as libblkid reads it, and what lies in a part of one.

partx(8) and blkid(8) are in util-linux. They only read, and take a boot sector of a filesystem for no table.
Their positions are in units of 512 bytes, whatever the sectors of the disk are. Where an MBR's list of
logical partitions leads back into itself partx(8) stops without a word, so that is looked for here.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blocksnap.system.command import CommandError, run

UNIT = 512
_LARGE_SECTOR = 4096
_BOOT_MARK = b"\x55\xaa"
_BOOT_MARK_AT = 510
_GPT_MARK = b"EFI PART"
# UEFI specification 2.10, table 5.1, and block/partitions/msdos.c of the kernel.
_ENTRIES_AT, _ENTRY = 446, struct.Struct("<4xB3xII")
_EXTENDED = (0x05, 0x0F, 0x85)
_EXTENDED_WORDS = tuple(f"{kind:#x}" for kind in _EXTENDED)
_SCHEMES = ("gpt", "dos")
_LOGICAL_MOST = 256
_NOTHING_FOUND = 2
_PAIR = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A partition as the table has it: its number, its place in bytes, and its type in the table's words."""

    number: int
    offset: int
    size: int
    kind: str
    is_container: bool
    """It is an extended partition: room for logical ones, which are entries of their own."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of partitions (``gpt`` or ``dos``)."""

    scheme: str
    entries: tuple[TableEntry, ...]
    is_endless: bool
    """The list of logical partitions leads back into itself, or is longer than a kernel follows it."""


def read_table(path: str) -> Table | None:
    """Return the table at the beginning of a file or device; None where there is none with a partition.

    Raises OSError, MissingProgramError, CommandTimeoutError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(fd, _LARGE_SECTOR + UNIT, 0)
        # A GPT without the MBR that protects it is none to the kernel either.
        if head[_BOOT_MARK_AT:UNIT] != _BOOT_MARK:
            return None
        is_large = head[_LARGE_SECTOR:].startswith(_GPT_MARK) and not head[UNIT:].startswith(_GPT_MARK)
        sector = str(_LARGE_SECTOR if is_large else UNIT)
        columns = "NR,START,SECTORS,TYPE,SCHEME"
        try:
            text = run("partx", "--pairs", "--sector-size", sector, "--output", columns, path)
        except CommandError:
            return None
        scheme, entries = parse_table(text)
        starts = [entry.offset for entry in entries if entry.is_container]
        is_endless = any(_is_endless(fd, start) for start in starts)
    finally:
        os.close(fd)
    return Table(scheme, entries, is_endless) if entries else None


def parse_table(text: str) -> tuple[str, tuple[TableEntry, ...]]:
    """Return the scheme and the partitions of what partx(8) printed as pairs.

    Tables inside partitions, as BSD and Solaris have them, are not followed.
    """
    rows = [dict(_PAIR.findall(line)) for line in text.splitlines()]
    scheme = next((row["SCHEME"] for row in rows if row.get("SCHEME") in _SCHEMES), "")
    entries = tuple(
        TableEntry(
            number=int(row["NR"]),
            offset=int(row["START"]) * UNIT,
            size=int(row["SECTORS"]) * UNIT,
            kind=row["TYPE"],
            is_container=scheme == "dos" and row["TYPE"] in _EXTENDED_WORDS,
        )
        for row in rows
        if scheme and row["SCHEME"] == scheme
    )
    return scheme, entries


def name_content(path: str, *, offset: int, size: int) -> str:
    """Return blkid's name for what lies in a part of a file or device; nothing where it knows it not.

    Raises MissingProgramError, CommandTimeoutError.
    """
    part = ("--offset", str(offset), "--size", str(size))
    try:
        text = run("blkid", "--probe", *part, "--match-tag", "TYPE", "--output", "value", path)
    except CommandError as err:
        return "" if err.status == _NOTHING_FOUND else "several things at once"
    return text.strip()


def _is_endless(fd: int, start: int) -> bool:
    at, seen = start, set[int]()
    while at not in seen and len(seen) < _LOGICAL_MOST:
        seen.add(at)
        sector = os.pread(fd, UNIT, at)
        after = next(_followers(sector), None)
        if after is None:
            return False
        at = start + after
    return True


def _followers(sector: bytes) -> Iterator[int]:
    """Yield where the list goes on, in bytes from the beginning of the extended partition."""
    if sector[_BOOT_MARK_AT:] != _BOOT_MARK:
        return
    for kind, begin, length in _ENTRY.iter_unpack(sector[_ENTRIES_AT:_BOOT_MARK_AT]):
        if kind in _EXTENDED and length:
            yield begin * UNIT
