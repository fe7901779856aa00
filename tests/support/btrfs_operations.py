"""The operations of btrfs_work on files: their data, their names, and what describes them."""

from __future__ import annotations

import mmap
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from support import btrfs_calls as calls
from support.btrfs_work import MAX_SIZE, NothingToWorkOnError, Operation, Workload

OPERATIONS: dict[str, tuple[float, Operation]] = {}
"""Every operation by its name, with the weight of its being chosen."""


def operation(weight: float) -> Callable[[Operation], Operation]:
    def add(function: Operation) -> Operation:
        OPERATIONS[function.__name__] = (weight, function)
        return function

    return add


@contextmanager
def opened(work: Workload, name: str, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(work.path(name), flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def make_file(work: Workload, folder: str | None = None) -> str:
    name = work.new_name(folder)
    with opened(work, name, os.O_RDWR | os.O_CREAT | os.O_EXCL):
        pass
    work.files.append(name)
    return name


# --- data ---


@operation(6)
def create_with_data(work: Workload) -> None:
    if work.crowded():
        remove_something(work)
    name = make_file(work)
    length = work.random.choice((0, 1, 300, 2047, 4096, 5000, 30000, 131072, 200000))
    with opened(work, name) as fd:
        os.write(fd, work.content(length))


@operation(14)
def write(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        os.pwrite(fd, work.content(length), offset)


@operation(4)
def append(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_WRONLY | os.O_APPEND) as fd:
        if work.size(fd) < MAX_SIZE:
            os.write(fd, work.content(work.random.randrange(1, 9000)))


@operation(2)
def write_the_same_again(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        os.pwrite(fd, os.pread(fd, length, offset), offset)


@operation(2)
def write_and_flush(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        os.pwrite(fd, work.content(length), offset)
        os.fsync(fd)


@operation(6)
def write_mapped(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        size = work.size(fd)
        if size == 0:
            raise NothingToWorkOnError
        with mmap.mmap(fd, size) as mapped:
            offset = work.random.randrange(size)
            length = work.random.randrange(1, min(size - offset, 20000) + 1)
            mapped[offset : offset + length] = work.content(length)


@operation(6)
def write_direct(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_RDWR | os.O_DIRECT) as fd:
        offset, length = (part & -4096 for part in work.place(work.size(fd)))
        length = max(4096, length)
        # Anonymous memory begins at a page, as O_DIRECT wants it.
        with mmap.mmap(-1, length) as aligned:
            aligned[:] = work.content(length)
            os.pwrite(fd, aligned, offset)


@operation(4)
def punch_hole(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        calls.fallocate(fd, calls.FALLOC_PUNCH_HOLE | calls.FALLOC_KEEP_SIZE, offset, length)


@operation(3)
def zero_range(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        keep = work.random.choice((0, calls.FALLOC_KEEP_SIZE))
        calls.fallocate(fd, calls.FALLOC_ZERO_RANGE | keep, offset, length)


@operation(3)
def preallocate(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        offset, length = work.place(work.size(fd))
        calls.fallocate(fd, work.random.choice((0, calls.FALLOC_KEEP_SIZE)), offset, length)


@operation(2)
def write_into_preallocated(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        begin = min(work.size(fd), MAX_SIZE) & -4096
        calls.fallocate(fd, work.random.choice((0, calls.FALLOC_KEEP_SIZE)), begin, 65536)
        os.pwrite(fd, work.content(5000), begin + work.random.randrange(0, 50000))


@operation(3)
def truncate_down(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        size = work.size(fd)
        os.ftruncate(fd, work.random.choice((0, size // 2, size & -4096, work.random.randrange(size + 1))))


@operation(4)
def truncate_inside_a_block(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        size = work.size(fd)
        shorter = max(size - work.random.randrange(1, 4096), size - 1 & -4096, 0)
        os.ftruncate(fd, shorter)
        if work.random.random() < 0.4:
            os.ftruncate(fd, size)


@operation(3)
def truncate_up(work: Workload) -> None:
    with opened(work, work.some_file()) as fd:
        os.ftruncate(fd, min(work.size(fd) + work.random.choice((1, 100, 4096, 50000)), MAX_SIZE))


@operation(3)
def clone_file(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_RDONLY) as source, opened(work, work.some_file()) as target:
        calls.clone(source, target)


@operation(2)
def clone_to_new_file(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_RDONLY) as source, opened(work, make_file(work)) as target:
        calls.clone(source, target)


@operation(5)
def clone_range(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_RDONLY) as source, opened(work, work.some_file()) as target:
        size = work.size(source)
        offset = work.random.randrange(size + 1) & -4096
        length = min(work.random.choice((4096, 8192, 65536)), size - offset & -4096)
        # Length 0 is up to the end, which needs not be a whole block when it becomes the target's end.
        calls.clone_range(
            source, offset, length, target, work.random.randrange(work.size(target) + 1) & -4096
        )


@operation(4)
def dedupe(work: Workload) -> None:
    with opened(work, work.some_file()) as source, opened(work, work.some_file()) as target:
        offset, length = (part & -4096 for part in work.place(work.size(source)))
        length = max(4096, length)
        data = work.content(length)
        at = work.random.randrange(work.size(target) + 1) & -4096
        if os.fstat(source).st_ino == os.fstat(target).st_ino and abs(at - offset) < length:
            at = offset + length
        os.pwrite(source, data, offset)
        os.pwrite(target, data, at)
        if calls.dedupe_range(source, offset, length, target, at) != 0:
            raise NothingToWorkOnError


@operation(2)
def read(work: Workload) -> None:
    with opened(work, work.some_file(), os.O_RDONLY) as fd:
        os.read(fd, 5000)


# --- names ---


@operation(3)
def make_folder(work: Workload) -> None:
    name = work.new_name()
    os.mkdir(work.path(name))
    work.folders.append(name)


@operation(1)
def make_folders(work: Workload) -> None:
    name = work.some_folder()
    for _ in range(work.random.randrange(2, 5)):
        name = work.new_name(name)
        os.mkdir(work.path(name))
        work.folders.append(name)
    make_file(work, name)


@operation(2)
def make_symlink(work: Workload) -> None:
    name = work.new_name()
    target = work.random.choice(("nowhere", "../" * 5, "x" * 200, work.some_folder() or "."))
    os.symlink(target, work.path(name))
    work.others.append(name)


@operation(2)
def make_special(work: Workload) -> None:
    name = work.new_name()
    kind = work.random.choice((stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK))
    os.mknod(
        work.path(name), kind | 0o600, os.makedev(work.random.randrange(300), work.random.randrange(300))
    )
    work.others.append(name)


@operation(3)
def link(work: Workload) -> None:
    old, new = work.random.choice((work.some_file, work.something))(), work.new_name()
    if old in work.folders:
        raise NothingToWorkOnError
    os.link(work.path(old), work.path(new), follow_symlinks=False)
    (work.files if old in work.files else work.others).append(new)


@operation(1)
def many_links(work: Workload) -> None:
    """So many that they do not fit one item of references (INODE_EXTREF)."""
    old, folder = work.some_file(), work.some_folder()
    for _ in range(work.random.randrange(1, 30)):
        new = work.new_name(folder)[:200] + "-" + "many" * 12
        os.link(work.path(old), work.path(new))
        work.files.append(new)


@operation(4)
def unlink(work: Workload) -> None:
    name = work.random.choice((work.some_file, work.something))()
    if name in work.folders:
        raise NothingToWorkOnError
    os.unlink(work.path(name))
    work.gone(name)


@operation(1)
def unlink_while_open(work: Workload) -> None:
    """Keep the file open, so that a snapshot finds it without a name."""
    name = work.some_file()
    fd = os.open(work.path(name), os.O_RDWR | os.O_CLOEXEC)
    work.held.append(fd)
    os.unlink(work.path(name))
    work.gone(name)
    os.pwrite(fd, work.content(5000), 0)
    if len(work.held) > 3:
        os.close(work.held.pop(0))


@operation(1)
def make_file_without_a_name_first(work: Workload) -> None:
    fd = os.open(work.path(work.some_folder()), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, work.content(9000))
        name = work.new_name()
        # Only with a descriptor does Python call linkat, which follows the symbolic link of /proc.
        os.link(f"/proc/self/fd/{fd}", work.path(name), src_dir_fd=fd, follow_symlinks=True)
        work.files.append(name)
    finally:
        os.close(fd)


@operation(2)
def replace_by_new(work: Workload) -> None:
    """What editors and package managers do: a new file under the old name."""
    name = work.some_file()
    fresh = make_file(work)
    with opened(work, fresh) as fd:
        os.write(fd, work.content(work.random.randrange(20000)))
    os.rename(work.path(fresh), work.path(name))
    work.moved(fresh, name)


@operation(1)
def unlink_and_make_again(work: Workload) -> None:
    name = work.some_file()
    os.unlink(work.path(name))
    work.gone(name)
    with opened(work, name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        os.write(fd, work.content(5000))
    work.files.append(name)


@operation(1)
def another_kind_of_the_same_name(work: Workload) -> None:
    name = work.some_file()
    os.unlink(work.path(name))
    work.gone(name)
    os.mkdir(work.path(name))
    work.folders.append(name)
    make_file(work, name)


@operation(5)
def rename(work: Workload) -> None:
    old, new = work.something(), work.new_name()
    os.rename(work.path(old), work.path(new))
    work.moved(old, new)


@operation(4)
def rename_over_another(work: Workload) -> None:
    old, new = work.something(), work.something()
    inode = os.lstat(work.path(old)).st_ino, os.lstat(work.path(new)).st_ino
    os.rename(work.path(old), work.path(new))
    # rename(2) of one name of a file onto another of the same file does nothing.
    if inode[0] != inode[1]:
        work.moved(old, new)


@operation(3)
def rename_folder(work: Workload) -> None:
    old, new = work.some_folder(root=False), work.new_name()
    os.rename(work.path(old), work.path(new))
    work.moved(old, new)


@operation(2)
def exchange(work: Workload) -> None:
    one, other = work.something(), work.something()
    calls.rename_with(calls.RENAME_EXCHANGE, work.path(one), work.path(other))
    if one != other:
        work.exchanged(one, other)


@operation(1)
def exchange_with_parent(work: Workload) -> None:
    """Turn a/b into b/a."""
    inner = work.some_folder(root=False)
    outer, _, last = inner.rpartition("/")
    if not outer:
        raise NothingToWorkOnError
    aside = work.new_name(os.path.dirname(outer))
    os.rename(work.path(inner), work.path(aside))
    work.moved(inner, aside)
    os.rename(work.path(outer), work.path(f"{aside}/{last}"))
    work.moved(outer, f"{aside}/{last}")


@operation(1)
def rename_leaving_a_whiteout(work: Workload) -> None:
    old, new = work.something(), work.new_name()
    calls.rename_with(calls.RENAME_WHITEOUT | calls.RENAME_NOREPLACE, work.path(old), work.path(new))
    work.moved(old, new)
    work.others.append(old)


@operation(2)
def remove_folder(work: Workload) -> None:
    name = work.some_folder(root=False)
    os.rmdir(work.path(name))
    work.gone(name)


@operation(0.5)
def remove_something(work: Workload) -> None:
    """A directory and all in it, else a file; immutable files are let go first."""
    name = work.some_folder(root=False) if work.random.random() < 0.5 else work.something()
    if name not in work.folders:
        os.unlink(work.path(name))
        work.gone(name)
        return
    for entry in (entry for entry in work.files + work.folders if f"{entry}/".startswith(f"{name}/")):
        set_flags_of(work.path(entry), 0, calls.FLAG_IMMUTABLE | calls.FLAG_APPEND)
    try:
        shutil.rmtree(work.path(name))
    finally:
        # A snapshot somewhere below cannot be removed like this.
        work.relist()


# --- what describes a file ---


def with_a_mode(work: Workload) -> str:
    """Choose anything but a symbolic link: a change through one could end outside, where nothing is ours."""
    path = work.path(work.something())
    if os.path.islink(path):
        raise NothingToWorkOnError
    return path


@operation(3)
def chmod(work: Workload) -> None:
    os.chmod(with_a_mode(work), work.random.choice((0o600, 0o644, 0o755, 0o4755, 0o2755, 0o1777, 0)))


@operation(2)
def chown(work: Workload) -> None:
    os.chown(
        work.path(work.something()), work.random.randrange(3), work.random.randrange(3), follow_symlinks=False
    )


@operation(3)
def set_times(work: Workload) -> None:
    times = work.random.randrange(-(10**18), 10**18), work.random.randrange(2 * 10**18)
    os.utime(work.path(work.something()), ns=times, follow_symlinks=False)


@operation(4)
def set_xattr(work: Workload) -> None:
    space = work.random.choice(("user", "user", "trusted", "security"))
    name = f"{space}.{work.random.choice('abcde')}{'x' * work.random.choice((0, 0, 200))}"
    value = work.content(work.random.choice((0, 1, 20, 500, 3000)))
    os.setxattr(work.path(work.something()), name, value, follow_symlinks=False)


@operation(2)
def remove_xattr(work: Workload) -> None:
    path = work.path(work.something())
    present = os.listxattr(path, follow_symlinks=False)
    if not present:
        raise NothingToWorkOnError
    os.removexattr(path, work.random.choice(present), follow_symlinks=False)


def access_list(work: Workload) -> bytes:
    """Make a POSIX ACL as the kernel takes it (include/uapi/linux/posix_acl_xattr.h)."""
    nobody = 0xFFFFFFFF
    user = work.random.randrange(1, 5)
    entries = [
        (0x01, 7, nobody), (0x02, work.random.randrange(8), user), (0x04, 5, nobody), (0x10, 7, nobody),
        (0x20, work.random.randrange(8), nobody),
    ]  # fmt: skip
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@operation(2)
def set_acl(work: Workload) -> None:
    os.setxattr(with_a_mode(work), "system.posix_acl_access", access_list(work), follow_symlinks=False)


@operation(1)
def set_default_acl(work: Workload) -> None:
    os.setxattr(work.path(work.some_folder()), "system.posix_acl_default", access_list(work))


@operation(1)
def set_capability(work: Workload) -> None:
    """The layout is that of struct vfs_cap_data, revision 2 (include/uapi/linux/capability.h)."""
    value = struct.pack("<IIIII", 0x02000001, work.random.randrange(1 << 20), 0, 0, 0)
    os.setxattr(work.path(work.some_file()), "security.capability", value)


@operation(1)
def set_compression(work: Workload) -> None:
    path = work.path(work.random.choice((work.some_file, work.some_folder))())
    os.setxattr(path, "btrfs.compression", work.random.choice((b"zstd", b"lzo", b"zlib", b"none", b"")))


def set_flags_of(path: str, add: int, remove: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = calls.inode_flags(fd)
        if (flags | add) & ~remove != flags:
            calls.set_inode_flags(fd, (flags | add) & ~remove)
    finally:
        os.close(fd)


@operation(2)
def change_flags(work: Workload) -> None:
    name = work.random.choice((work.some_file, work.some_folder))()
    flag = work.random.choice((calls.FLAG_NODUMP, calls.FLAG_NOATIME, calls.FLAG_SYNC, calls.FLAG_DIRSYNC))
    add, remove = work.random.choice(((flag, 0), (0, flag)))
    set_flags_of(work.path(name), add, remove)


@operation(1)
def change_compression_flags(work: Workload) -> None:
    name = work.random.choice((work.some_file, work.some_folder))()
    add = work.random.choice((calls.FLAG_COMPRESS, calls.FLAG_NOCOMPRESS, 0))
    set_flags_of(work.path(name), add, (calls.FLAG_COMPRESS | calls.FLAG_NOCOMPRESS) & ~add)


@operation(1.5)
def make_file_without_cow(work: Workload) -> None:
    name = make_file(work)
    set_flags_of(work.path(name), calls.FLAG_NODATACOW, 0)
    with opened(work, name) as fd:
        os.write(fd, work.content(work.random.choice((300, 5000, 100000))))


@operation(0.5)
def make_folder_without_cow(work: Workload) -> None:
    make_folder(work)
    set_flags_of(work.path(work.folders[-1]), calls.FLAG_NODATACOW, 0)


@operation(0.7)
def protect(work: Workload) -> None:
    name = work.random.choice((work.some_file, lambda: work.some_folder(root=False)))()
    set_flags_of(work.path(name), work.random.choice((calls.FLAG_IMMUTABLE, calls.FLAG_APPEND)), 0)


@operation(2.5)
def unprotect(work: Workload) -> None:
    for name in (*work.random.sample(work.files, min(8, len(work.files))), *work.folders[1:]):
        set_flags_of(work.path(name), 0, calls.FLAG_IMMUTABLE | calls.FLAG_APPEND)
