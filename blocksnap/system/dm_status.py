"""Ask device-mapper for the status of a device without running a program: cheap enough to do it all the time.

The request is DM_TABLE_STATUS on ``/dev/mapper/control`` (kernel: include/uapi/linux/dm-ioctl.h), by the UUID
of the device, so that one that takes a number over is never mistaken for it, and without a flush: a pool
would otherwise commit its metadata for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from types import TracebackType
from typing import Self

from blocksnap.errors import BlocksnapError

_CONTROL = "/dev/mapper/control"
_DM_TABLE_STATUS = 0xC138FD0C
_NOFLUSH_FLAG = 1 << 11
_BUFFER_FULL_FLAG = 1 << 8
# struct dm_ioctl: version (3 numbers); sizes of it all and of the header, number of targets; openers; flags,
# events, padding; device, name, UUID.
_HEADER = struct.Struct("<3I3IiIIIQ128s129s7x")
_TARGET = struct.Struct("<QQiI16s")
_BUFFER_BYTES = 4096


class StatusError(BlocksnapError):
    """Device-mapper does not say how a device is (exit code 1)."""

    def __init__(self, name: str, err: OSError) -> None:
        self.name = name
        super().__init__(
            f"device-mapper does not tell the status of {name}: {os.strerror(err.errno or 0)}",
            resolution="is this run as root, and is the module dm_mod loaded?",
        )


class StatusReader:
    """An open control device; a context manager."""

    def __init__(self) -> None:
        try:
            self._fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as err:
            raise StatusError(_CONTROL, err) from err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def read(self, uuid: str) -> str | None:
        """Return the status of a device of one target as ``dmsetup status`` has it; None when it is gone."""
        buffer = bytearray(_BUFFER_BYTES)
        sizes = (_BUFFER_BYTES, _HEADER.size, 0)
        _HEADER.pack_into(buffer, 0, 4, 0, 0, *sizes, 0, _NOFLUSH_FLAG, 0, 0, 0, b"", uuid.encode())
        try:
            fcntl.ioctl(self._fd, _DM_TABLE_STATUS, buffer)
        except OSError as err:
            if err.errno == errno.ENXIO:
                return None
            raise StatusError(uuid, err) from err
        answer = _HEADER.unpack_from(buffer)
        start, flags = answer[4], answer[7]
        if flags & _BUFFER_FULL_FLAG:
            raise StatusError(uuid, OSError(errno.ENOSPC, ""))
        sector, length, _, _, kind = _TARGET.unpack_from(buffer, start)
        text = buffer[start + _TARGET.size :].split(b"\0", 1)[0].decode()
        return f"{sector} {length} {kind.rstrip(bytes(1)).decode()} {text}"


def lvm_uuid(vg_uuid: str, lv_uuid: str, layer: str = "") -> str:
    """Return the UUID that LVM gives a device: both without hyphens, and the layer (``tpool``, ``cow``)."""
    text = f"LVM-{vg_uuid.replace('-', '')}{lv_uuid.replace('-', '')}"
    return f"{text}-{layer}" if layer else text
