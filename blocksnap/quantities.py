"""Sizes and rates as people write them."""

from __future__ import annotations

import re

from blocksnap.errors import UsageError

_SIZE = re.compile(r"(\d+)\s*(|[kKmMgGtT])(i?[bB])?")
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size like ``128K``; raises UsageError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size", resolution="write it like 128K or 1M")
    return int(match[1]) * _FACTORS[match[2].lower()]
