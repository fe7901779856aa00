"""The stream of btrfs send in plain Python: a reader, a writer, and what a stream does, step by step.

The format is that of fs/btrfs/send.h; native/btrfs_stream.h tells it in a few lines. The reader is the
reference for the C core: it is strict in the same way, and slow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COMMANDS = {
    1: "SUBVOL", 2: "SNAPSHOT", 3: "MKFILE", 4: "MKDIR", 5: "MKNOD", 6: "MKFIFO", 7: "MKSOCK", 8: "SYMLINK",
    9: "RENAME", 10: "LINK", 11: "UNLINK", 12: "RMDIR", 13: "SET_XATTR", 14: "REMOVE_XATTR", 15: "WRITE",
    16: "CLONE", 17: "TRUNCATE", 18: "CHMOD", 19: "CHOWN", 20: "UTIMES", 21: "END", 22: "UPDATE_EXTENT",
    23: "FALLOCATE", 24: "FILEATTR", 25: "ENCODED_WRITE",
}  # fmt: skip
ATTRIBUTES = {
    1: "UUID", 2: "CTRANSID", 3: "INO", 4: "SIZE", 5: "MODE", 6: "UID", 7: "GID", 8: "RDEV", 9: "CTIME",
    10: "MTIME", 11: "ATIME", 12: "OTIME", 13: "XATTR_NAME", 14: "XATTR_DATA", 15: "PATH", 16: "PATH_TO",
    17: "PATH_LINK", 18: "FILE_OFFSET", 19: "DATA", 20: "CLONE_UUID", 21: "CLONE_CTRANSID", 22: "CLONE_PATH",
    23: "CLONE_OFFSET", 24: "CLONE_LEN", 25: "FALLOCATE_MODE", 26: "FILE_FLAGS", 27: "UNENCODED_FILE_LEN",
    28: "UNENCODED_LEN", 29: "UNENCODED_OFFSET", 30: "COMPRESSION", 31: "ENCRYPTION",
}  # fmt: skip
COMMAND_NUMBERS = {name: number for number, name in COMMANDS.items()}
ATTRIBUTE_NUMBERS = {name: number for number, name in ATTRIBUTES.items()}
SIZES = {
    **dict.fromkeys(("UUID", "CLONE_UUID"), 16),
    **dict.fromkeys(("CTIME", "MTIME", "ATIME", "OTIME"), 12),
    **dict.fromkeys(("XATTR_NAME", "XATTR_DATA", "PATH", "PATH_TO", "PATH_LINK", "DATA", "CLONE_PATH"), None),
    **dict.fromkeys(("FALLOCATE_MODE", "COMPRESSION", "ENCRYPTION"), 4),
}
"""Bytes of an attribute that is not 8; None: any number of them."""

_CREATE = "PATH INO"
_RULES: dict[str, tuple[str, str]] = {
    "SUBVOL": ("PATH UUID CTRANSID", ""),
    "SNAPSHOT": ("PATH UUID CTRANSID CLONE_UUID CLONE_CTRANSID", ""),
    "MKFILE": (_CREATE, ""),
    "MKDIR": (_CREATE, ""),
    "MKNOD": (f"{_CREATE} RDEV MODE", ""),
    "MKFIFO": (_CREATE, "RDEV MODE"),
    "MKSOCK": (_CREATE, "RDEV MODE"),
    "SYMLINK": (f"{_CREATE} PATH_LINK", ""),
    "RENAME": ("PATH PATH_TO", ""),
    "LINK": ("PATH PATH_LINK", ""),
    "UNLINK": ("PATH", ""),
    "RMDIR": ("PATH", ""),
    "SET_XATTR": ("PATH XATTR_NAME XATTR_DATA", ""),
    "REMOVE_XATTR": ("PATH XATTR_NAME", ""),
    "WRITE": ("PATH FILE_OFFSET DATA", ""),
    "CLONE": ("PATH FILE_OFFSET CLONE_LEN CLONE_UUID CLONE_CTRANSID CLONE_PATH CLONE_OFFSET", ""),
    "TRUNCATE": ("PATH SIZE", ""),
    "CHMOD": ("PATH MODE", ""),
    "CHOWN": ("PATH UID GID", ""),
    "UTIMES": ("PATH ATIME MTIME CTIME", "OTIME"),
    "END": ("", ""),
    "UPDATE_EXTENT": ("PATH FILE_OFFSET SIZE", ""),
    "FALLOCATE": ("PATH FILE_OFFSET SIZE FALLOCATE_MODE", ""),
    "FILEATTR": ("PATH FILE_FLAGS", ""),
    "ENCODED_WRITE": (
        "PATH FILE_OFFSET UNENCODED_FILE_LEN UNENCODED_LEN UNENCODED_OFFSET DATA",
        "COMPRESSION ENCRYPTION",
    ),
}
RULES = {name: (frozenset(must.split()), frozenset(may.split())) for name, (must, may) in _RULES.items()}
"""Which attributes a command must have, and which it may have beside."""

MAGIC = b"btrfs-stream\0"
LONGEST = {1: 64 << 10, 2: 192 << 10}
_COMMAND = struct.Struct("<IHI")


class StreamError(Exception):
    """The stream makes no sense."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command; numbers are in ``attributes`` as their bytes."""

    name: str
    attributes: Mapping[str, bytes]

    def number(self, attribute: str) -> int:
        """Return an attribute that is a number."""
        return int.from_bytes(self.attributes[attribute], "little")

    @property
    def path(self) -> bytes:
        """What the command is about."""
        return self.attributes["PATH"]


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C from 0, without inversion."""
    crc = 0
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc


# --- reading ---


def read(stream: bytes) -> list[Command]:
    """Return all commands of a stream but END; StreamError when it makes no sense."""
    if len(stream) < len(MAGIC) + 4 or not stream.startswith(MAGIC):
        raise StreamError("no header")
    version = int.from_bytes(stream[len(MAGIC) : len(MAGIC) + 4], "little")
    if version not in LONGEST:
        raise StreamError("unknown version")
    commands = list(_commands(stream[len(MAGIC) + 4 :], version))
    names = [command.name for command in commands]
    if names[-1:] != ["END"] or "END" in names[:-1]:
        raise StreamError("no end, or something behind it")
    if [name in ("SUBVOL", "SNAPSHOT") for name in names] != [True] + [False] * (len(names) - 1):
        raise StreamError("not one snapshot")
    return commands[:-1]


def _commands(left: bytes, version: int) -> Iterator[Command]:
    while left:
        if len(left) < _COMMAND.size:
            raise StreamError("cut short")
        length, number, crc = _COMMAND.unpack_from(left)
        if length + _COMMAND.size > min(len(left), LONGEST[version]):
            raise StreamError("too long, or cut short")
        whole, left = left[: _COMMAND.size + length], left[_COMMAND.size + length :]
        if crc32c(whole[:6] + bytes(4) + whole[10:]) != crc:
            raise StreamError("wrong checksum")
        if number not in COMMANDS or (version == 1 and number > 22):
            raise StreamError("unknown command")
        command = Command(COMMANDS[number], dict(_attributes(whole[10:], version)))
        _check(command)
        yield command


def _attributes(left: bytes, version: int) -> Iterator[tuple[str, bytes]]:
    seen = set()
    while left:
        number = int.from_bytes(left[:2], "little")
        if version == 2 and number == ATTRIBUTE_NUMBERS["DATA"] and len(left) >= 2:
            data, left = left[2:], b""
        else:
            length = int.from_bytes(left[2:4], "little")
            if len(left) < 4 + length:
                raise StreamError("attribute cut short")
            data, left = left[4 : 4 + length], left[4 + length :]
        if number not in ATTRIBUTES or number in seen:
            raise StreamError("unknown attribute, or twice")
        seen.add(number)
        name = ATTRIBUTES[number]
        if SIZES.get(name, 8) not in (None, len(data)):
            raise StreamError("wrong size")
        yield name, data


def _check(command: Command) -> None:
    must, may = RULES[command.name]
    if not must <= command.attributes.keys() <= must | may:
        raise StreamError("wrong attributes")
    paths = ["PATH", "PATH_TO", "CLONE_PATH", *(["PATH_LINK"] if command.name == "LINK" else [])]
    for path in (command.attributes[name] for name in paths if name in command.attributes):
        parts = path.split(b"/") if path else []
        bad = any(part in (b"", b".", b"..") or len(part) > 255 for part in parts)
        if bad or b"\0" in path or len(path) > 4096:
            raise StreamError("bad path")
    name = command.attributes.get("XATTR_NAME", b"x")
    if not name or len(name) > 255 or b"\0" in name:
        raise StreamError("bad name")
    if sum(byte_range(command)) >= 1 << 63:
        raise StreamError("bad range")


def byte_range(command: Command) -> tuple[int, int]:
    """Return (offset, length) of what a command does to data; a truncation's offset is the new size."""
    if command.name == "TRUNCATE":
        return command.number("SIZE"), 0
    if command.name == "WRITE":
        return command.number("FILE_OFFSET"), len(command.attributes["DATA"])
    lengths = {
        "ENCODED_WRITE": "UNENCODED_FILE_LEN",
        "CLONE": "CLONE_LEN",
        "UPDATE_EXTENT": "SIZE",
        "FALLOCATE": "SIZE",
    }
    if command.name not in lengths:
        return 0, 0
    return command.number("FILE_OFFSET"), command.number(lengths[command.name])


# --- steps, as blocksnap._native tells them ---

Step = tuple[str, bytes, bytes, int, bytes | None]
_DATA = ("WRITE", "CLONE", "UPDATE_EXTENT", "ENCODED_WRITE")


def steps(commands: list[Command]) -> list[Step]:
    """Return what commands do, as docstrings of _native.btrfs_send say; kinds are lower-case words."""
    found: list[Step] = []
    for command in commands:
        kind = _kind(command)
        last = found[-1] if found else ("", b"", b"", 0, None)
        same = last[1] == command.path
        if kind == "touch" and same and last[0] not in ("", "rename", "remove"):
            continue
        if kind in ("data", "hole"):
            ranges = _ranges(last[4] if same and last[0] == kind else None, *byte_range(command))
            if same and last[0] == kind:
                found.pop()
            found.append((kind, command.path, b"", 0, ranges))
        elif kind:
            found.append((kind, command.path, *_rest(command), None))
    return found


def _kind(command: Command) -> str:
    if command.name in _DATA:
        return "data"
    if command.name == "FALLOCATE":
        return "hole" if command.number("FALLOCATE_MODE") & 2 else "data"
    named = {
        "MKDIR": "create directory",
        "RENAME": "rename",
        "LINK": "link",
        "UNLINK": "remove",
        "RMDIR": "remove",
        "TRUNCATE": "resize",
    }
    if command.name in ("SUBVOL", "SNAPSHOT"):
        return ""
    return named.get(command.name) or ("create" if "INO" in command.attributes else "touch")


def _rest(command: Command) -> tuple[bytes, int]:
    if "INO" in command.attributes:
        return b"", command.number("INO")
    other = command.attributes.get("PATH_TO") or command.attributes.get("PATH_LINK") or b""
    return other, byte_range(command)[0]


def _ranges(before: bytes | None, offset: int, length: int) -> bytes:
    pairs = list(struct.iter_unpack("<QQ", before or b""))
    if pairs and sum(pairs[-1]) == offset:
        pairs[-1] = pairs[-1][0], pairs[-1][1] + length
    else:
        pairs.append((offset, length))
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


# --- writing ---


class Writer:
    """Writes a stream, right or (with ``raw``) wrong."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._parts = [MAGIC + struct.pack("<I", version)]

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def raw(self, data: bytes) -> Writer:
        """Add bytes as they are."""
        self._parts.append(data)
        return self

    def add(self, name: str, **attributes: bytes | int) -> Writer:
        """Add a command."""
        body = b"".join(self._attribute(attribute, value) for attribute, value in attributes.items())
        number = COMMAND_NUMBERS[name]
        crc = crc32c(_COMMAND.pack(len(body), number, 0) + body)
        return self.raw(_COMMAND.pack(len(body), number, crc) + body)

    def _attribute(self, name: str, value: bytes | int) -> bytes:
        number = ATTRIBUTE_NUMBERS[name]
        data = value.to_bytes(SIZES.get(name, 8) or 8, "little") if isinstance(value, int) else value
        if self._version == 2 and name == "DATA":
            return struct.pack("<H", number) + data
        return struct.pack("<HH", number, len(data)) + data

    def snapshot(self) -> Writer:
        """Begin as an incremental stream does."""
        return self.add(
            "SNAPSHOT", PATH=b"s2", UUID=b"2" * 16, CTRANSID=20, CLONE_UUID=b"1" * 16, CLONE_CTRANSID=10
        )

    def everything(self) -> Writer:
        """Add one of each kind of step, from the beginning to the end."""
        self.snapshot()
        self.add("MKFILE", PATH=b"o257-8-0", INO=257)
        self.add("MKDIR", PATH=b"a", INO=258)
        self.add("RENAME", PATH=b"o257-8-0", PATH_TO=b"a/file")
        self.add("LINK", PATH=b"b", PATH_LINK=b"a/file")
        self.add("UPDATE_EXTENT", PATH=b"b", FILE_OFFSET=4096, SIZE=8192)
        if self._version == 2:
            self.add("FALLOCATE", PATH=b"b", FILE_OFFSET=0, SIZE=4096, FALLOCATE_MODE=3)
        self.add("TRUNCATE", PATH=b"b", SIZE=12345)
        self.add("CHMOD", PATH=b"c", MODE=0o644)
        self.add("UNLINK", PATH=b"a/gone")
        return self.add("END")
