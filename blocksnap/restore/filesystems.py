"""Which filesystem a volume holds, told by its first bytes, and how it is mounted without being written to.

Offsets and magics: fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, fs/btrfs/fs.h of the kernel. The journal is
not replayed: that would be writing, and the backup is what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES = 0x10000 + 4096


@dataclass(frozen=True, slots=True)
class Inside:
    """A filesystem, the options to mount it with, without and with a replay, and what finds fault with it."""

    filesystem: str
    options: str
    replaying: str
    check: tuple[str, ...]


_MAGICS = (
    (1024 + 0x38, b"\x53\xef", Inside("ext4", "noload", "", ("e2fsck", "-f", "-n"))),
    (0, b"XFSB", Inside("xfs", "norecovery,nouuid", "nouuid", ("xfs_repair", "-n"))),
    (
        0x10000 + 0x40,
        b"_BHRfS_M",
        Inside("btrfs", "rescue=nologreplay", "", ("btrfs", "check", "--readonly")),
    ),
)


def recognise(head: bytes) -> Inside | None:
    """Return what can be mounted of a volume that begins with these bytes; None when nothing can."""
    for offset, magic, inside in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return inside
    return None
