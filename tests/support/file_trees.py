"""Trees of files: one with everything that a subvolume can hold, and what is to be seen of any."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

from support import btrfs_calls as calls

NODUMP, NOATIME, SYNC, APPEND, IMMUTABLE, NOCOW = 0x40, 0x80, 0x8, 0x20, 0x10, 0x800000
KEEP_SIZE, PUNCH = 1, 2
FLAGS = NODUMP | NOATIME | SYNC | APPEND | IMMUTABLE | NOCOW | 0x4 | 0x400 | 0x10000
ACL = bytes.fromhex(
    "0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000000ffffffff"
)
STUB = 2
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def make_everything(root: Path) -> None:
    """Fill an empty directory of btrfs with one of each: kinds, names, attributes, layouts."""
    (root / "plain").write_bytes(noise(1, 300_000))
    (root / "empty").touch()
    (root / "small").write_text("inline\n")
    (root / os.fsdecode(b"not \xff\xfe text\nnor one line")).write_bytes(b"x")
    (root / ("n" * 255)).write_bytes(b"longest")
    deep = root.joinpath(*["deep"] * 30)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(noise(2, 5000))
    many = root / "many"
    many.mkdir()
    for number in range(300):
        (many / f"{number:040}").write_bytes(b"%d" % number)
    (root / "link").symlink_to("plain")
    (root / "dangling").symlink_to("../" * 100 + "nowhere/" * 300)
    os.link(root / "plain", root / "deep" / "hard")
    os.link(root / "plain", many / "hard")
    os.mkfifo(root / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    os.mknod(root / "character", stat.S_IFCHR | 0o620, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    os.link(root / "fifo", root / "fifo-too")
    _attributes(root)
    _layouts(root)


def _attributes(root: Path) -> None:
    target = root / "attributes"
    target.write_bytes(b"#!/bin/true\n")
    os.chown(target, 12345, 54321)
    os.setxattr(target, "security.capability", CAPABILITY)
    os.chmod(target, 0o4711)  # noqa: S103
    # A mode takes no capability away; a new owner does.
    os.setxattr(target, "user.large", noise(3, 3000))
    os.setxattr(target, "user.empty", b"")
    os.setxattr(target, "trusted.one", b"1")
    folder = root / "acl"
    folder.mkdir(mode=0o2775)
    os.setxattr(folder, "system.posix_acl_access", ACL)
    os.setxattr(folder, "system.posix_acl_default", ACL)
    os.setxattr(root / "small", "system.posix_acl_access", ACL)
    os.setxattr(root / "link", "trusted.of_link", b"yes", follow_symlinks=False)
    os.chown(root / "link", 77, 78, follow_symlinks=False)
    for name, flags in {"nodump": NODUMP, "noatime": NOATIME | SYNC}.items():
        (root / name).write_bytes(name.encode())
        set_flags(root / name, flags)
    for name in ("old", "new"):
        (root / name).write_bytes(b"")
    os.utime(root / "old", ns=(-(10**18) - 1, -(10**18) - 999_999_999))
    os.utime(root / "new", ns=(1, 4 * 10**18 + 123_456_789))
    os.utime(root / "link", ns=(5, 6), follow_symlinks=False)
    os.utime(root / "many", ns=(10**18, 10**18 + 7))


def make_of_btrfs(root: Path) -> None:
    """Add what only btrfs can keep."""
    nocow = root / "nocow"
    nocow.touch()
    set_flags(nocow, NOCOW)
    nocow.write_bytes(noise(4, 100_000))
    compressed = root / "compressed"
    compressed.touch()
    os.setxattr(compressed, "btrfs.compression", b"zstd")
    compressed.write_bytes(b"compress me " * 30_000)
    folder = root / "folder of nocow"
    folder.mkdir()
    set_flags(folder, NOCOW)
    (folder / "inherits").write_bytes(noise(5, 10_000))
    (root / "shared").touch()
    _clone(root / "layout", root / "shared")


def make_final(root: Path) -> None:
    """Add what forbids changes: it has to be taken away before the tree can be removed."""
    for name, flag in {"immutable": IMMUTABLE, "append": APPEND}.items():
        (root / name).write_bytes(name.encode())
        os.link(root / name, root / f"{name}-too")
        set_flags(root / name, flag)
    folder = root / "immutable folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"in it")
    set_flags(folder, IMMUTABLE)


def allow_changes(root: Path) -> None:
    for name in ("immutable", "append", "immutable folder"):
        set_flags(root / name, 0)


def _layouts(root: Path) -> None:
    with (root / "layout").open("wb") as file:
        file.write(noise(6, 40_960))
        file.seek(1 << 20)
        file.write(noise(7, 10_000))
        file.truncate(3 << 20)
    with (root / "punched").open("r+b" if (root / "punched").exists() else "w+b") as file:
        file.write(noise(8, 600_000))
        file.flush()
        os.fsync(file.fileno())
        calls.fallocate(file.fileno(), PUNCH | KEEP_SIZE, 8192, 4096)
        calls.fallocate(file.fileno(), PUNCH | KEEP_SIZE, 131_072, 262_144)
    with (root / "preallocated").open("wb") as file:
        file.write(noise(9, 20_480))
        file.flush()
        os.fsync(file.fileno())
        calls.fallocate(file.fileno(), 0, 20_480, 1 << 20)
    with (root / "zeros").open("wb") as file:
        file.write(bytes(400_000))
    with (root / "sparse").open("wb") as file:
        file.truncate(1 << 28)


def _clone(source: Path, target: Path) -> None:
    with source.open("rb") as one, target.open("r+b") as other:
        calls.clone(one.fileno(), other.fileno())


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        calls.set_inode_flags(fd, flags)
    finally:
        os.close(fd)


def describe(root: Path, *, layouts: bool = True, flags: bool = True) -> dict[str, dict[str, Any]]:
    """Return what there is to see of every path: whatever has to be the same after a restore."""
    found: dict[str, dict[str, Any]] = {}
    inodes: dict[int, str] = {}
    for folder, folders, files in os.walk(root):
        for name in sorted((*folders, *files)):
            path = Path(folder, name)
            _add(found, inodes, str(path.relative_to(root)), path, layouts=layouts, flags=flags)
        folders[:] = [name for name in folders if not Path(folder, name).is_symlink()]
    _add(found, inodes, ".", root, layouts=layouts, flags=flags)
    return found


def _add(
    found: dict[str, dict[str, Any]],
    inodes: dict[int, str],
    name: str,
    path: Path,
    *,
    layouts: bool,
    flags: bool,
) -> None:
    status = os.lstat(path)
    is_file, is_folder = stat.S_ISREG(status.st_mode), stat.S_ISDIR(status.st_mode)
    seen: dict[str, Any] = {
        "mode": oct(status.st_mode),
        "owner": (status.st_uid, status.st_gid),
        "mtime": status.st_mtime_ns,
        "xattrs": {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            # XFS shows ACLs to root a second time.
            if not key.startswith("trusted.SGI_ACL")
        },
    }
    if not is_folder:
        first = inodes.setdefault(status.st_ino, name)
        seen |= {"links": status.st_nlink, "same as": first, "device": status.st_rdev}
    if stat.S_ISLNK(status.st_mode):
        seen["target"] = os.readlink(path)
    if is_file or is_folder:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            # The empty directory in the place of a nested subvolume has none.
            if flags and status.st_ino != STUB:
                seen["flags"] = hex(calls.inode_flags(fd) & FLAGS)
            if is_file:
                seen |= {"size": status.st_size, "content": _content(fd, status.st_size)}
                if layouts:
                    seen["data"] = _data(fd, status.st_size)
        finally:
            os.close(fd)
    found[name] = seen


def _content(fd: int, size: int) -> str:
    """Hash what is not zeros, with its places: a file may be larger than anybody wants to read."""
    digest = hashlib.sha256()
    for begin, end in _data(fd, size):
        for at in range(begin, end, 1 << 20):
            block = os.pread(fd, min(1 << 20, end - at), at)
            for place in range(0, len(block), 4096):
                part = block[place : place + 4096]
                if any(part):
                    digest.update(b"%d:" % (at + place) + part)
    return digest.hexdigest()


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    found, at = [], 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as err:
            assert err.errno == errno.ENXIO
            break
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        found.append((begin, at))
    return found


def differences(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    """Say in what two trees differ."""
    lines = [f"{name}: only in the first" for name in sorted(one.keys() - other.keys())]
    lines += [f"{name}: only in the second" for name in sorted(other.keys() - one.keys())]
    for name in sorted(one.keys() & other.keys()):
        lines += [
            f"{name}: {key}: {_without_equal(one[name].get(key), other[name].get(key))}"
            for key in sorted(one[name].keys() | other[name].keys())
            if one[name].get(key) != other[name].get(key)
        ]
    return lines


def _without_equal(one: object, other: object) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        left = {key: value for key, value in one.items() if other.get(key) != value}
        right = {key: value for key, value in other.items() if one.get(key) != value}
        return f"{left} and {right}"
    return f"{one} and {other}"


def rsync_differences(one: Path, other: Path) -> str:
    """Say what rsync would do to make them the same; nothing when they are."""
    done = subprocess.run(
        ["rsync", "-aHAXni", "--checksum", "--delete", f"{one}/", f"{other}/"],
        check=False, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
