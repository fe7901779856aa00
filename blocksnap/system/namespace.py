"""Mounts that only one process tree sees: the kernel removes them when the last of it dies, however it dies.

A loop device that is set up here clears itself when the mount that uses it goes. So nothing has to be
cleaned up after kill -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct

from blocksnap.errors import BlocksnapError

# linux/sched.h, linux/mount.h, linux/prctl.h
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REC, _MS_SLAVE = 1 << 14, 1 << 19
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
# linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_READ_ONLY, _LO_AUTOCLEAR = 1, 4
_LOOP_CONFIG_BYTES = 304
_LOOP_PLACE_AT, _LOOP_FLAGS_AT = 8 + 24, 8 + 52
"""In struct loop_config: u32 fd, u32 block_size, struct loop_info64 (lo_offset and lo_sizelimit at 24,
lo_flags at 52), u64[8]."""
_LOOP_ATTEMPTS = 16
_LOOP_TAKEN = (errno.EBUSY, errno.ENXIO, errno.ENOENT)
"""Somebody else was given the same one and was faster: has it, lets go of it just now, or has removed it."""

PRIVATE_FOLDER = "/sys/fs/fuse/connections"
"""Exists where FUSE does and holds nothing that is needed here: what is mounted over it is ours alone."""


class NotMountedError(BlocksnapError):
    """The kernel refused to mount something."""

    def __init__(self, what: str, err: OSError) -> None:
        self.what = what
        self.errno = err.errno
        super().__init__(
            f"cannot mount {what}: {os.strerror(err.errno or 0)}", resolution="look in the kernel log (dmesg)"
        )


def leave_mounts(*, passable: bool = False) -> None:
    """Give this process, which has one thread, mounts of its own; what others unmount goes here too.

    With ``passable`` others than root, of our own processes, can reach what they know to be in the private
    folder. Raises NotMountedError, as without the rights of root.
    """
    libc = _libc()
    try:
        _check(libc.unshare(_CLONE_NEWNS))
        _check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None))
        _mount(
            "tmpfs",
            PRIVATE_FOLDER,
            "tmpfs",
            _MS_NOSUID | _MS_NODEV | _MS_NOEXEC,
            f"mode={'0711' if passable else '0700'},size=16m",
        )
    except OSError as err:
        raise NotMountedError("a private folder", err) from err


def part_mounts() -> None:
    """Give this process, which has one thread, a copy of the mounts, whose own die with it and nobody else.

    Whoever mounts something writable of an image has to: when the last process with such a mount dies, that
    process itself writes out what is dirty, and if it serves the image it waits for itself, for ever. Raises
    NotMountedError.
    """
    try:
        _check(_libc().unshare(_CLONE_NEWNS))
    except OSError as err:
        raise NotMountedError("anything apart from others", err) from err


def mount_image(
    image: str, folder: str, filesystem: str, options: str, *, offset: int = 0, size: int = 0
) -> None:
    """Mount the filesystem in an image file, or in a part of it, read-only.

    Its loop device goes with the mount. Raises NotMountedError.
    """
    try:
        loop = _attach(image, offset=offset, size=size)
        try:
            node = os.readlink(f"/proc/self/fd/{loop}")
            _mount(node, folder, filesystem, _MS_RDONLY | _MS_NOSUID | _MS_NODEV, options)
        finally:
            os.close(loop)
    except OSError as err:
        raise NotMountedError(f"the {filesystem} filesystem", err) from err


def attach_image(image: str, *, offset: int = 0, size: int = 0) -> int:
    """Return the descriptor of a loop device over an image, or a part of it, that can be written to.

    It goes when it is closed. Raises NotMountedError.
    """
    try:
        return _attach(image, writable=True, offset=offset, size=size)
    except OSError as err:
        raise NotMountedError("a loop device", err) from err


def mount_device(node: str, folder: str, filesystem: str, options: str) -> None:
    """Mount the filesystem on a device, to be written to; raises NotMountedError."""
    try:
        _mount(node, folder, filesystem, _MS_NOSUID | _MS_NODEV, options)
    except OSError as err:
        raise NotMountedError(f"the {filesystem} filesystem", err) from err


def mount_fuse(folder: str, source: str) -> int:
    """Mount a FUSE filesystem, read-only, and return the connection by which it has to be served.

    ``source`` is what the list of mounts has for its device. Whoever has the connection last ends it: then
    everything in the filesystem is an error until it is unmounted (fuse(4),
    Documentation/filesystems/fuse.rst). Raises NotMountedError.
    """
    try:
        connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            owner = f"user_id={os.geteuid()},group_id={os.getegid()}"
            options = f"fd={connection},rootmode={stat.S_IFDIR:o},{owner}"
            _mount(source, folder, "fuse.blocksnap", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, options)
        except BaseException:
            os.close(connection)
            raise
    except OSError as err:
        raise NotMountedError(f"a tree on {folder}", err) from err
    return connection


def enter_mounts(namespace_fd: int) -> None:
    """Have this thread alone see the mounts of another namespace; raises OSError (setns(2), unshare(2))."""
    libc = _libc()
    # Root and working directory go with the mounts, and threads share them.
    _check(libc.unshare(_CLONE_FS))
    _check(libc.setns(namespace_fd, _CLONE_NEWNS))


def unmount_for_good(folder: str) -> None:
    """Take a mount away, with everything written; raises NotMountedError while somebody uses it."""
    try:
        _check(_libc().umount2(os.fsencode(folder), 0))
    except OSError as err:
        raise NotMountedError(f"{folder} away again", err) from err


def unmount(folder: str) -> None:
    """Take a mount away: at once for whoever looks, in fact when nobody uses it. Gone already is fine."""
    with contextlib.suppress(OSError):
        _check(_libc().umount2(os.fsencode(folder), _MNT_DETACH))


def die_with_parent() -> None:
    """Have this process killed when the one that forked it dies."""
    _check(_libc().prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0))


def _attach(image: str, *, writable: bool = False, offset: int = 0, size: int = 0) -> int:
    """Return the descriptor of a loop device that is gone when nobody uses it.

    Without LO_FLAGS_PARTSCAN: the host would see its partitions, scan them, and activate what is in them.
    """
    access = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    backing = os.open(image, access)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    config = bytearray(_LOOP_CONFIG_BYTES)
    struct.pack_into("<I", config, 0, backing)
    struct.pack_into("<QQ", config, _LOOP_PLACE_AT, offset, size)
    struct.pack_into("<I", config, _LOOP_FLAGS_AT, (0 if writable else _LO_READ_ONLY) | _LO_AUTOCLEAR)
    try:
        return _configure_free(control, access, bytes(config))
    finally:
        os.close(control)
        os.close(backing)


def _configure_free(control: int, access: int, config: bytes) -> int:
    """Return the descriptor of a loop device that was free and is configured now; raises OSError."""
    problem = OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    for _ in range(_LOOP_ATTEMPTS):
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        try:
            loop = os.open(f"/dev/loop{number}", access)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except BaseException:
                os.close(loop)
                raise
        except OSError as err:
            if err.errno not in _LOOP_TAKEN:
                raise
            problem = err
        else:
            return loop
    raise problem


def _mount(source: str, folder: str, filesystem: str, flags: int, options: str) -> None:
    words = [os.fsencode(word) for word in (source, folder, filesystem)]
    _check(_libc().mount(*words, ctypes.c_ulong(flags), os.fsencode(options)))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
