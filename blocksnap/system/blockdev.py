"""Block devices by descriptor: open, measure, flush, discard, zero; who sits on top.

A path is used once, to open; everything after that is asked of the descriptor, or of sysfs by the
device's number, so a node that is renamed or reused in between is never mistaken.
"""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blocksnap.errors import BlocksnapError
from blocksnap.system import sysfs
from blocksnap.system.openers import device_writers

# linux/fs.h
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKFLSBUF = 0x1261
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_BLKGETSIZE64 = 0x80081272
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_SYSFS = Path("/sys/dev/block")
_MOMENT_SECONDS = 0.5
_PAUSE_SECONDS = 0.02
_ZEROS_BYTES = 1 << 20
_COUNTED_ZEROS_BYTES = 1 << 20
PIECE_BYTES = 256 << 20
"""What the kernel clears in one call: nothing ends that, and a disk may need seconds for so much."""
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})


class DeviceError(BlocksnapError):
    """A block device cannot be used (exit code 1)."""


class NoDeviceError(DeviceError):
    """There is no such block device."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(
            f"no block device {name}: {reason}", resolution="blocksnap volumes shows what there is"
        )


class DeviceBusyError(DeviceError):
    """Something uses the device that has to be ours alone."""

    def __init__(self, name: str, users: list[str]) -> None:
        self.name = name
        self.users = users
        super().__init__(
            f"{name} is in use: {', '.join(users) or 'somebody holds it open exclusively'}",
            resolution="unmount it, or stop what uses it, and try again",
        )


def number_text(number: int) -> str:
    """Return a device number as sysfs writes it, ``MAJOR:MINOR``."""
    return f"{os.major(number)}:{os.minor(number)}"


def sysfs_folder(number: int) -> Path:
    """Return the device's folder in sysfs."""
    return _SYSFS / number_text(number)


def node_of(number: int) -> str:
    """Return the kernel's own node of a device, ``/dev/dm-3``; raises NoDeviceError."""
    try:
        text = sysfs.exact_text(sysfs_folder(number) / "uevent")
    except OSError as err:
        sysfs.raise_lack(err)
        raise NoDeviceError(number_text(number), "it is not there") from err
    for line in text.splitlines():
        if line.startswith("DEVNAME="):
            return "/dev/" + line.removeprefix("DEVNAME=")
    raise NoDeviceError(number_text(number), "the kernel gives it no name")


def open_by_number(number: int, *, direct: bool = True, wait_seconds: float = 5.0) -> int:
    """Open a device for reading by its number and make sure that it is the one.

    A node appears a moment after its device: udev, or devtmpfs, is given ``wait_seconds``.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    deadline = time.monotonic() + wait_seconds
    while True:
        node = node_of(number)
        try:
            fd = os.open(node, flags)
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENXIO) or time.monotonic() > deadline:
                raise NoDeviceError(node, os.strerror(err.errno or 0)) from err
        else:
            if device_number(fd) == number:
                return fd
            os.close(fd)
            if time.monotonic() > deadline:
                raise NoDeviceError(number_text(number), f"{node} is another device")
        time.sleep(0.01)


def open_exclusive(path: str, *, writable: bool = True, direct: bool = False) -> int:
    """Open a device that nobody uses, and keep others from mounting or holding it meanwhile.

    One that is to be written is also refused while a process has it, its disk or a partition of it open for
    writing, as a virtual machine has; that nobody opens it so afterwards cannot be helped.
    Raises DeviceBusyError naming who uses it, NoDeviceError.
    """
    access = os.O_RDWR if writable else os.O_RDONLY
    fd = _open_alone(path, access | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        number = device_number(fd)
        if writable and (writers := lasting_writers(number)):
            raise DeviceBusyError(path, list(writers.values()))
        if writable and is_read_only(fd):
            raise DeviceError(
                f"{path} is read-only", resolution="make it writable (blockdev --setrw, lvchange -prw)"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_alone(path: str, flags: int) -> int:
    from blocksnap.system.mounts import users_of_device

    deadline = time.monotonic() + _MOMENT_SECONDS
    while True:
        number = 0
        try:
            number = os.stat(path).st_rdev
            return os.open(path, flags)
        except OSError as err:
            if err.errno != errno.EBUSY:
                raise NoDeviceError(path, os.strerror(err.errno or 0)) from err
            # Programs that look after devices hold one for a moment.
            if (users := users_of_device(number)) or time.monotonic() > deadline:
                raise DeviceBusyError(path, users) from err
        time.sleep(_PAUSE_SECONDS)


def lasting_writers(number: int) -> dict[int, str]:
    """Return the other processes that keep a device, its disk or a partition of it open for writing.

    By their numbers, with what to call each. Takes half a second if there is any.
    """
    disks = [disk for disk in slaves(number) if number in partitions(disk)]
    numbers = {number, *partitions(number), *disks}
    writers = device_writers(numbers)
    if writers:
        # Programs that look after devices open one for a moment.
        time.sleep(_MOMENT_SECONDS)
        lasting = device_writers(numbers)
        writers = {pid: told for pid, told in lasting.items() if pid in writers}
    return writers


def device_number(fd: int) -> int:
    """Return the number of an open block device; raises NoDeviceError for anything else."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        raise NoDeviceError(f"on descriptor {fd}", "it is something else")
    return status.st_rdev


def size_of(fd: int) -> int:
    """Return the size of a device in bytes."""
    return int(struct.unpack("<Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])


def logical_block_size(fd: int) -> int:
    """Return the smallest unit that can be read or written with O_DIRECT, in bytes."""
    return int(struct.unpack("<i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def physical_block_size(fd: int) -> int:
    """Return the unit that the device writes without reading first, in bytes."""
    return int(struct.unpack("<I", fcntl.ioctl(fd, _BLKPBSZGET, bytes(4)))[0])


def is_read_only(fd: int) -> bool:
    """Tell whether the device refuses writes."""
    return bool(struct.unpack("<i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def drop_cache(fd: int) -> None:
    """Write the page cache of a device or file back and forget it: the next read comes from the medium."""
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in (errno.EROFS, errno.EINVAL):
            raise
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        fcntl.ioctl(fd, _BLKFLSBUF, 0)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def discard_range(fd: int, offset: int, length: int) -> bool:
    """Give a range back to the device; False when it cannot.

    Says nothing about what the range reads as afterwards.
    """
    return _range_ioctl(fd, _BLKDISCARD, offset, length)


def allocate(fd: int, offset: int, length: int) -> bool:
    """Give a range of a file its room, reading as zeros where it had none; False where that is not known.

    Raises OSError when there is no room.
    """
    try:
        _fallocate(fd, 0, offset, length)
    except OSError as err:
        if err.errno in _CANNOT:
            return False
        raise
    return True


def clear(
    fd: int,
    offset: int,
    length: int,
    *,
    discard: bool,
    before_zeros: Callable[[int], None] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Make a range of a device read as zeros; unallocated if ``discard`` asks for it and the device can.

    The parts of blocks at both ends, which the device's commands do not reach, are written: there ``fd``
    must not be open with O_DIRECT. ``before_zeros`` is called with how many bytes of zeros, 8 MiB at most,
    are written next; ``progress`` with how many bytes more are done, ``PIECE_BYTES`` at a time or less.
    """
    block = logical_block_size(fd)
    begin, end = -(-offset // block) * block, (offset + length) // block * block
    if begin >= end:
        parts = [(offset, offset + length)]
    else:
        told = begin
        for done in _clear_blocks(fd, begin, end, discard=discard, before_zeros=before_zeros):
            progress(done - told)
            told = done
        parts = [(offset, begin), (end, offset + length)]
    for begin, end in parts:
        if before_zeros is not None and begin < end:
            before_zeros(end - begin)
        write_zeros(fd, begin, end)
        progress(end - begin)


def _clear_blocks(
    fd: int, offset: int, last: int, *, discard: bool, before_zeros: Callable[[int], None] | None
) -> Iterator[int]:
    """Clear whole blocks; yield again and again up to where that is done."""
    while discard and offset < last and punch_hole(fd, offset, min(PIECE_BYTES, last - offset)):
        offset = min(offset + PIECE_BYTES, last)
        yield offset
    left = _unmap_thin(fd, offset, last - offset) if discard else iter([(offset, last)])
    for begin, end in left:
        step = PIECE_BYTES if before_zeros is None else _COUNTED_ZEROS_BYTES
        for at in range(begin, end, step):
            part = min(step, end - at)
            if before_zeros is not None:
                before_zeros(part)
            # The kernel writes zeros itself where the device has no command for it.
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("<QQ", at, part))
            yield at + part
        yield end


def holders(number: int) -> list[int]:
    """Return the numbers of the devices stacked directly on a device and on its partitions."""
    folder = sysfs_folder(number)
    found = sysfs.numbers_of(sysfs.find(folder, "holders/*/dev"))
    for partition in partitions(number):
        found += holders(partition)
    return found


def partitions(number: int) -> list[int]:
    """Return the numbers of a disk's partitions."""
    found = sysfs.find(sysfs_folder(number), "*/partition")
    return sysfs.numbers_of(path.parent / "dev" for path in found)


def slaves(number: int) -> list[int]:
    """Return the numbers of the devices that a device is directly stacked on; a partition's is its disk."""
    folder = sysfs_folder(number)
    if (folder / "partition").exists():
        return sysfs.numbers_of([folder.resolve().parent / "dev"])
    return sysfs.numbers_of(sysfs.find(folder, "slaves/*/dev"))


def aligned_buffer(length: int) -> mmap.mmap:
    """Return a buffer of whole pages, as O_DIRECT wants it."""
    return mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE)


def write_zeros(fd: int, begin: int, end: int) -> None:
    """Write zeros from one byte to before another, for what a command of the device cannot reach."""
    zeros = memoryview(bytes(min(end - begin, _ZEROS_BYTES))) if begin < end else memoryview(b"")
    while begin < end:
        begin += os.pwrite(fd, zeros[: end - begin], begin)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Unmap a range of a file or device so that it reads as zeros, or return False.

    fallocate promises that, BLKDISCARD not.
    """
    try:
        _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as err:
        if err.errno in _CANNOT:
            return False
        raise
    return True


def preallocate(fd: int, offset: int, length: int) -> bool:
    """Give a range of a file its room, also beyond its end, which stays where it is; or return False."""
    try:
        _fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as err:
        if err.errno in _CANNOT:
            return False
        raise
    return True


def _unmap_thin(fd: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Discard the whole chunks of a range of a thin volume, and yield the parts that may not be zeros then.

    They come in order; an empty one tells up to where all was looked at.

    BLKDISCARD promises nothing about what is read afterwards; dm-thin does: an unmapped chunk is zeros.
    Parts of chunks it ignores, so only whole ones are asked for. Where their size is no power of two the
    kernel cuts the range so that some of them become parts (docs/kernel-facts.md, dm-thin): then it is read.
    """
    from blocksnap.system.devmapper import is_plain_thin

    number, end = device_number(fd), offset + length
    unit = int(sysfs.exact_text(sysfs_folder(number) / "queue/discard_granularity"))
    first, last = (-(-offset // unit) * unit, end // unit * unit) if unit else (end, end)
    if first >= last or not is_plain_thin(number):
        yield offset, end
        return
    yield offset, first
    step = max(PIECE_BYTES // unit, 1) * unit
    for at in range(first, last, step):
        part = min(step, last - at)
        if not _range_ioctl(fd, _BLKDISCARD, at, part):
            yield at, at + part
        elif unit & (unit - 1):
            yield from _not_zeros(fd, at, at + part, math.gcd(unit, _ZEROS_BYTES))
        yield at + part, at + part
    yield last, end


def _not_zeros(fd: int, begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield which pieces of a range hold anything else; its length is a multiple of ``step``."""
    found, zeros = bytearray(step), bytes(step)
    for at in range(begin, end, step):
        if os.preadv(fd, [found], at) != step or found != zeros:
            yield at, at + step
    os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _range_ioctl(fd: int, request: int, offset: int, length: int) -> bool:
    try:
        fcntl.ioctl(fd, request, struct.pack("<QQ", offset, length))
    except OSError as err:
        if err.errno in _CANNOT:
            return False
        raise
    return True


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    # os has only posix_fallocate, which cannot punch.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate64(fd, ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(length))
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
