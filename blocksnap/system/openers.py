"""Which processes have a file or a block device open for writing, as far as /proc tells.

proc(5): ``fd``, ``fdinfo`` and ``maps``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from blocksnap.system import sysfs


def device_writers(numbers: Collection[int]) -> dict[int, str]:
    """Return the other processes that have one of some block devices open for writing, and their names.

    Virtual machines have their disks open so, and nothing keeps others from them: neither O_EXCL nor what
    sysfs knows of users. Of processes that our rights do not let us look at nothing is said.
    """
    found = {}
    for pid in sorted(os.listdir("/proc")):
        if not pid.isdecimal() or int(pid) == os.getpid():
            continue
        try:
            writes = any(_may_write_by(pid, fd) for fd in _open_devices(pid, numbers))
        except OSError as err:
            # It has ended meanwhile, or is none of ours to look at.
            sysfs.raise_lack(err)
            continue
        if writes:
            name = sysfs.text_of(Path(f"/proc/{pid}/comm")) or "?"
            found[int(pid)] = f"open for writing by process {pid} ({name})"
    return found


def file_writers(fd: int) -> Iterator[int]:
    """Yield the processes that have an open file open for writing, or map it, as far as /proc shows it."""
    file = os.fstat(fd)
    devices = _devices_in_maps(fd, file)
    for name in os.listdir("/proc"):
        if name.isdecimal() and (_has_open(int(name), file) or _has_mapped(int(name), file.st_ino, devices)):
            yield int(name)


def _open_devices(pid: str, numbers: Collection[int]) -> Iterator[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        # One that is closed meanwhile does not matter.
        with contextlib.suppress(FileNotFoundError):
            # Only of devices: to ask for the status of a file may wait for a file server that is gone.
            if os.readlink(path).startswith("/dev/"):
                status = os.stat(path)
                if stat.S_ISBLK(status.st_mode) and status.st_rdev in numbers:
                    yield fd


def _may_write_by(pid: str, fd: str) -> bool:
    try:
        return _may_write(_facts(pid, fd))
    except OSError as err:
        # It is closed meanwhile; others may stay open.
        sysfs.raise_lack(err)
        return False


def _has_open(pid: int, file: os.stat_result) -> bool:
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError as err:
        sysfs.raise_lack(err)
        return False
    return any(_is_writable(pid, name, file) for name in names)


def _is_writable(pid: int, name: str, file: os.stat_result) -> bool:
    try:
        facts = _facts(pid, name)
        # The status of any other file may be waited for, from a server that is gone (``ino``: Linux 5.14).
        if not _may_write(facts) or facts.get("ino", str(file.st_ino)) != str(file.st_ino):
            return False
        return os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), file)
    except OSError as err:
        sysfs.raise_lack(err)
        return False


def _devices_in_maps(fd: int, file: os.stat_result) -> frozenset[str] | None:
    """Return what the kernel calls the device of an open file in mappings; None where that is not found out.

    On btrfs it is not what stat calls it. So it is mapped, to be read, and looked up among our own mappings.
    """
    try:
        with mmap.mmap(fd, min(file.st_size, mmap.PAGESIZE), flags=mmap.MAP_SHARED, prot=mmap.PROT_READ):
            return frozenset(device for device, inode in _shared_maps("self") if inode == file.st_ino) or None
    except (OSError, ValueError):
        # It is empty, or of a filesystem that maps nothing: then any file of that number is taken for it.
        return None


def _has_mapped(pid: int, inode: int, devices: frozenset[str] | None) -> bool:
    try:
        return any(
            inode == number and (devices is None or device in devices) for device, number in _shared_maps(pid)
        )
    except OSError as err:
        sysfs.raise_lack(err)
        return False


def _shared_maps(pid: int | str) -> Iterator[tuple[str, int]]:
    """Yield device and inode of all that a process maps and shares with others; raises OSError."""
    # A name may have a CR, which is no end of a line.
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape", newline="\n") as maps:
        for line in maps:
            # address perms offset dev inode path (proc(5))
            words = line.split(None, 5)
            if len(words) > 4 and words[1].endswith("s"):
                yield words[3], int(words[4])


def _facts(pid: int | str, fd: str) -> dict[str, str]:
    """Return what the kernel tells of a descriptor, by the words that are one each; raises OSError."""
    with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as info:
        words = (line.split() for line in info)
        return {each[0].rstrip(":"): each[1] for each in words if len(each) == 2}


def _may_write(facts: dict[str, str]) -> bool:
    return int(facts.get("flags", "0"), 8) & os.O_ACCMODE != os.O_RDONLY
