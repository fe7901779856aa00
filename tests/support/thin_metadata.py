"""An independent reader of dm-thin metadata: slow, plain, and only for comparing.

Written from the layout of the format, not from the C core. It reads a whole image from memory and
believes it; what is damaged may raise anything. ``restore`` makes such images with ``thin_restore``.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE = 4096
NODE_SALT = 121107
SUPERBLOCK_SALT = 160774


@dataclass(frozen=True)
class Run:
    """``length`` chunks from ``origin`` on, mapped to data blocks from ``data`` on at pool time ``time``."""

    origin: int
    length: int
    data: int
    time: int


@dataclass(frozen=True)
class Device:
    """What the pool says about one thin device."""

    root: int
    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of ``data`` as dm computes it: all ones first, no inversion at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc


def table_entry(value: int) -> int:
    """Return the CRC-32C of one byte."""
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = [table_entry(value) for value in range(256)]


def seal(image: bytearray, block: int) -> None:
    """Make the checksum of a block right again."""
    begin = block * BLOCK_SIZE
    salt = NODE_SALT if block else SUPERBLOCK_SALT
    checksum = crc32c(bytes(image[begin + 4 : begin + BLOCK_SIZE])) ^ salt
    struct.pack_into("<I", image, begin, checksum)


class Pool:
    """The metadata of a pool, in memory."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        (self.flags,) = struct.unpack_from("<I", image, 4)
        self.time, self.transaction_id, self.held_root = struct.unpack_from("<IQQ", image, 44)
        (self.metadata_blocks,) = struct.unpack_from("<Q", image, 192)
        self.mapping_root, self.details_root, sectors = struct.unpack_from("<QQI", image, 320)
        self.chunk_size = sectors * 512

    def node(self, block: int) -> tuple[bool, list[int], list[bytes]]:
        """Return whether a btree node is a leaf, its keys, and its values."""
        at = block * BLOCK_SIZE
        _, flags, _, count, room, size = struct.unpack_from("<IIQIII", self.image, at)
        keys = list(struct.unpack_from(f"<{count}Q", self.image, at + 32))
        values = at + 32 + 8 * room
        places = [values + i * size for i in range(count)]
        return flags == 2, keys, [self.image[place : place + size] for place in places]

    def items(self, root: int) -> Iterator[tuple[int, bytes]]:
        """Yield all keys and values of the tree at ``root``, in order."""
        is_leaf, keys, values = self.node(root)
        if is_leaf:
            yield from zip(keys, values, strict=True)
        else:
            for value in values:
                yield from self.items(int.from_bytes(value, "little"))

    def nodes(self, root: int) -> list[int]:
        """Return the blocks of all nodes of the tree at ``root``."""
        is_leaf, _, values = self.node(root)
        if is_leaf:
            return [root]
        return [root] + [n for value in values for n in self.nodes(int.from_bytes(value, "little"))]

    def devices(self) -> dict[int, Device]:
        """Return the pool's devices by id."""
        details = dict(self.items(self.details_root))
        return {
            device_id: Device(int.from_bytes(root, "little"), *struct.unpack("<QQII", details[device_id]))
            for device_id, root in self.items(self.mapping_root)
        }

    def mappings(self, device_id: int) -> dict[int, tuple[int, int]]:
        """Return data block and time of every mapped chunk of a device."""
        return {
            chunk: (int.from_bytes(value, "little") >> 24, int.from_bytes(value, "little") & 0xFFFFFF)
            for chunk, value in self.items(self.devices()[device_id].root)
        }


def restore(
    path: Path,
    devices: Mapping[int, Iterable[Run]],
    *,
    time: int,
    chunk_size: int = 65536,
    blocks: int = 1024,
) -> Pool:
    """Make a metadata image of ``blocks`` blocks at ``path`` with ``thin_restore`` and return it read."""
    runs = {device_id: list(of_device) for device_id, of_device in devices.items()}
    data_blocks = max((run.data + run.length for of in runs.values() for run in of), default=0) + 1
    superblock = (
        f'<superblock uuid="" time="{time}" transaction="{time + 3}" flags="0" version="2" '
        f'data_block_size="{chunk_size // 512}" nr_data_blocks="{data_blocks}">'
    )
    lines = [superblock]
    for device_id, of_device in sorted(runs.items()):
        lines.append(
            f'<device dev_id="{device_id}" mapped_blocks="{sum(run.length for run in of_device)}" '
            f'transaction="{device_id % 7}" creation_time="{device_id % 5}" snap_time="{device_id % 5}">'
        )
        lines.extend(
            f'<range_mapping origin_begin="{run.origin}" data_begin="{run.data}" '
            f'length="{run.length}" time="{run.time}"/>'
            for run in of_device
        )
        lines.append("</device>")
    xml = path.with_suffix(".xml")
    xml.write_text("\n".join([*lines, "</superblock>"]))
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, blocks * BLOCK_SIZE)
    subprocess.run(["thin_restore", "-i", xml, "-o", path], check=True, capture_output=True)
    return Pool(path.read_bytes())
