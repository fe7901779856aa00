"""Numbers in as few bytes as they need (LEB128), as inode records and listings have them."""

from __future__ import annotations


def write_number(value: int) -> bytes:
    """Return a number, at least 0, in groups of seven bits, the lowest first."""
    coded = bytearray()
    while value > 0x7F:
        coded.append(value & 0x7F | 0x80)
        value >>= 7
    coded.append(value)
    return bytes(coded)


def read_number(data: bytes, at: int, bits: int = 64) -> tuple[int, int]:
    """Return the number at a position, and the position behind it.

    Raises ValueError for one that is cut short or needs more than ``bits``.
    """
    value = shift = 0
    while at < len(data) and shift < bits + 6:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >> bits:
                break
            return value, at
    raise ValueError(f"it is no number of at most {bits} bits")


def fold(value: int) -> int:
    """Return a difference as a number, with the sign in the lowest bit."""
    return value << 1 if value >= 0 else (-value << 1) - 1


def unfold(value: int) -> int:
    """Return the difference that was folded."""
    return value >> 1 ^ -(value & 1)
