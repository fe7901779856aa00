from __future__ import annotations

import io
import json
import struct

import pytest

from blocksnap.system.luks import LuksHeader, read_header

UUID = "b9ad0cfd-3a2b-4d4c-9b3c-0123456789ab"
MIB = 1 << 20


def luks1(sectors: int, uuid: str = UUID) -> bytes:
    head = b"LUKS\xba\xbe" + struct.pack(">H96xI60x40s", 1, sectors, uuid.encode())
    return head + bytes(8192)


def luks2(area: int, text: bytes, uuid: str = UUID) -> bytes:
    head = b"LUKS\xba\xbe" + struct.pack(">HQ152x40s", 2, area, uuid.encode())
    return head.ljust(4096, b"\0") + text.ljust(min(area, MIB), b"\0")


def config(size: object) -> bytes:
    return json.dumps({"config": {"json_size": "12288", "keyslots_size": size}}).encode()


def test_where_a_header_ends() -> None:
    assert read_header(io.BytesIO(luks1(4096))) == LuksHeader(1, UUID, 2 * MIB)
    found = read_header(io.BytesIO(luks2(16384, config("16744448"))))
    assert found == LuksHeader(2, UUID, 16 * MIB)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"LUKS\xba\xbe",
        bytes(8192),
        b"LUKS\xba\xbe" + struct.pack(">H", 3) + bytes(8192),
        luks1(0),
        luks1(1 << 31),
        luks1(4096, "../../etc/passwd"),
        luks2(0, b""),
        luks2(1 << 62, config("1")),
        luks2(16384, b"[" * 12000),
        luks2(16384, b"{}"),
        luks2(16384, b"\xff"),
        luks2(16384, config(None)),
        luks2(16384, config("many")),
        luks2(16384, config("-40000")),
        luks2(16384, config("1" + "0" * 30)),
    ],
)
def test_what_makes_no_sense_is_no_header(content: bytes) -> None:
    assert read_header(io.BytesIO(content)) is None
