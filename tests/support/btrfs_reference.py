"""The comparison of two states of a file in plain Python, block by block: what the C core has to agree with.

It is written from docs/design.md, without a look at the C: a state is unpacked into one description per
block, and two files differ where the descriptions do.
"""

from __future__ import annotations

from dataclasses import dataclass

_VERSION = 1
_KINDS = ("inline", "regular", "prealloc")


@dataclass(frozen=True, slots=True)
class Extent:
    """One extent of a file; all numbers are bytes but the generation."""

    kind: str
    begin: int
    length: int
    compression: int
    generation: int = 0
    address: int = 0
    disk_length: int = 0
    offset: int = 0


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def difference(self) -> int:
        coded = self.number()
        return coded // 2 if coded % 2 == 0 else -(coded // 2) - 1


def read_extents(state: bytes) -> list[Extent]:
    """Unpack the state of a regular file."""
    if not state:
        return []
    reader = _Reader(state)
    assert reader.byte() == _VERSION
    block = 1 << reader.byte()
    found = []
    end = generation = address = 0
    while reader.at < len(state):
        head = reader.byte()
        kind, compression = _KINDS[head & 3], head >> 2
        begin = end + reader.number() * block
        length = reader.number() * block
        end = begin + length
        if kind != "regular":
            found.append(Extent(kind, begin, length, compression))
            continue
        generation += reader.difference()
        address += reader.difference()
        disk_length, offset = reader.number(), reader.number()
        found.append(
            Extent(
                kind,
                begin,
                length,
                compression,
                generation,
                address * block,
                disk_length * block,
                offset * block,
            )
        )
        address += disk_length
    return found


def write_extents(extents: list[Extent], block: int = 4096) -> bytes:
    """Pack extents into the state of a regular file."""
    packed = bytearray((_VERSION, block.bit_length() - 1))
    end = generation = address = 0
    for extent in extents:
        packed.append(_KINDS.index(extent.kind) | extent.compression << 2)
        packed += _number((extent.begin - end) // block) + _number(extent.length // block)
        end = extent.begin + extent.length
        if extent.kind == "regular":
            packed += _difference(extent.generation - generation)
            packed += _difference(extent.address // block - address)
            packed += _number(extent.disk_length // block) + _number(extent.offset // block)
            generation = extent.generation
            address = (extent.address + extent.disk_length) // block
    return bytes(packed)


def _number(value: int) -> bytes:
    packed = bytearray()
    while value > 127:
        packed.append(value % 128 + 128)
        value //= 128
    packed.append(value)
    return bytes(packed)


def _difference(value: int) -> bytes:
    return _number(value * 2 if value >= 0 else -value * 2 - 1)


def compare(
    old: list[Extent], old_size: int, present: list[Extent], size: int, block: int = 4096
) -> tuple[set[int], set[int]]:
    """Return the numbers of the blocks that changed, and of those that are holes and held data."""
    before, now = _by_block(old, old_size, block), _by_block(present, size, block)
    edges = {each // block for each in (old_size, size) if each % block} if size != old_size else set()
    changed = {
        number
        for number, what in now.items()
        if what is not None and (number in edges or what[0] == "inline" or before.get(number) != what)
    }
    holes = {
        number
        for number in range(-(-size // block))
        if before.get(number) is not None and now.get(number) is None
    }
    return changed, holes


def _by_block(
    extents: list[Extent], size: int, block: int
) -> dict[int, tuple[str, int, int, int, int, int] | None]:
    """Describe every block of a file that is not a hole; None is for zeros that are allocated."""
    found: dict[int, tuple[str, int, int, int, int, int] | None] = {}
    for extent in extents:
        for at in range(extent.begin, min(extent.begin + extent.length, size), block):
            if extent.kind == "prealloc":
                found[at // block] = None
                continue
            found[at // block] = (
                extent.kind,
                extent.compression,
                extent.generation,
                extent.address,
                extent.disk_length,
                extent.offset + at - extent.begin,
            )
    return found
