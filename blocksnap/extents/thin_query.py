"""One question to a pool's metadata, asked once: for people who look at it, not for backups.

Unlike ``thin_metadata`` nothing is tried again and nothing is held: what is wrong is said.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from blocksnap.errors import UsageError, VolumeError
from blocksnap.extents.model import ExtentList
from blocksnap.extents.thin_metadata import scan_windows

_LIMIT = (1 << 64) - 1
_BLOCK_SIZE = 4096
_HELD_ROOT_OFFSET = 56
"""In the superblock (kernel: drivers/md/dm-thin-metadata.c, struct thin_disk_superblock)."""


@dataclass(frozen=True, slots=True)
class ThinAnswer:
    """What a walk found; ``nodes`` is the number of metadata blocks it read."""

    changed: ExtentList
    discarded: ExtentList
    nodes: int


class ThinQuery:
    """The metadata device of a pool, or an image of it, opened by the caller.

    ``metadata_snapshot`` asks the metadata snapshot that the pool holds, instead of the live metadata.
    ``size`` is that of the volume, which the pool does not know: without it everything that is mapped
    counts. Every method raises UsageError when there is no such device or metadata snapshot, and
    VolumeError when the metadata makes no sense.
    """

    def __init__(self, fd: int, device_id: int, size: int | None, *, metadata_snapshot: bool) -> None:
        from blocksnap._native import thin_device

        self._fd = fd
        self._device_id = device_id
        self._size = size
        with _converted():
            self._held_root = _read_held_root(fd) if metadata_snapshot else 0
            facts = thin_device(fd, device_id, self._held_root)
        if metadata_snapshot and not self._held_root:
            raise UsageError(
                "the pool holds no metadata snapshot",
                resolution="dmsetup message POOL 0 reserve_metadata_snap, or leave --metadata-snap out",
            )
        self.chunk_size = facts[4]

    def compare(self, base_id: int | None) -> ThinAnswer:
        """Return what differs from a base to the device; without a base, what the device maps."""
        from blocksnap._native import THIN_NO_DEVICE, thin_diff

        base = THIN_NO_DEVICE if base_id is None else base_id
        with _converted():
            changed, discarded, nodes = thin_diff(
                self._fd, base, self._device_id, 0, self._end_chunk(), self._held_root
            )
        return ThinAnswer(ExtentList(changed), ExtentList(discarded), nodes)

    def scan(self, since: int) -> ThinAnswer:
        """Return what the device maps since a time of the pool; needs the volume's size."""
        from blocksnap._native import thin_scan

        changed, nodes = ExtentList(), 0
        for window in scan_windows(self._end_chunk()):
            with _converted():
                found, _, _, looked_at = thin_scan(self._fd, self._device_id, since, *window, self._held_root)
            changed = changed.union(ExtentList(found))
            nodes += looked_at
        return ThinAnswer(changed, ExtentList(), nodes)

    def clip(self, extents: ExtentList) -> ExtentList:
        """Cut off what lies beyond the size of the volume."""
        return extents if self._size is None else extents.clip(self._size)

    def _end_chunk(self) -> int:
        if self._size is None:
            return _LIMIT // self.chunk_size
        return -(-self._size // self.chunk_size)


def _read_held_root(fd: int) -> int:
    """Return what block 0 names; whoever uses it has the C core make sure that it is right."""
    # A map of its own is aligned for O_DIRECT.
    with mmap.mmap(-1, _BLOCK_SIZE) as block:
        os.preadv(fd, [block], 0)
        (held_root,) = struct.unpack_from("<Q", block, _HELD_ROOT_OFFSET)
    return int(held_root)


@contextmanager
def _converted() -> Iterator[None]:
    """Turn what the C core raises into errors of ours."""
    try:
        yield
    except KeyError as err:
        raise UsageError(
            f"the pool has no device {err.args[0]}",
            resolution="lvs -o name,thin_id shows the ids of thin volumes and their snapshots",
        ) from err
    except ValueError as err:
        raise VolumeError(
            f"this is no consistent metadata of a thin pool: {err}",
            resolution="give a pool's _tmeta device or an image of it, and devices that nobody writes to",
        ) from err
    except OverflowError as err:
        raise UsageError(f"a number is too large: {err}") from err
    except BlockingIOError as err:
        raise VolumeError(
            "the pool commits faster than its metadata can be read",
            resolution="run it again, or take a metadata snapshot and use --metadata-snap",
        ) from err
    except OSError as err:
        raise VolumeError(f"cannot read the metadata of the thin pool: {err.strerror}") from err
