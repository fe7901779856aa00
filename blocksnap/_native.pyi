# ruff: noqa: PYI021 - the documentation of the extension is here and nowhere else
"""Contract of the C extension built from ``native/``.

Extents cross the boundary packed: little-endian pairs of u64 ``(offset, length)`` in bytes, sorted,
disjoint, neighbours merged. Every scan releases the GIL and can be interrupted by a signal. A
failing system call raises ``OSError`` with the errno and names the call; metadata that does not
make sense raises ``ValueError`` with the block and the reason. Integers are unsigned 64 bit:
others raise ``OverflowError``.
"""

from typing import Final

THIN_BLOCK_SIZE: Final[int]
"""Bytes of one thin-pool metadata block (4096)."""

THIN_NO_DEVICE: Final[int]
"""In place of a base device: an empty one."""

STEP_CREATE: Final[int]
STEP_CREATE_DIRECTORY: Final[int]
STEP_RENAME: Final[int]
STEP_LINK: Final[int]
STEP_REMOVE: Final[int]
STEP_DATA: Final[int]
STEP_HOLE: Final[int]
STEP_RESIZE: Final[int]
STEP_TOUCH: Final[int]
"""The kinds of steps that btrfs_send tells."""

def btrfs_send(
    subvolume: int, parent_tree: int, version: int, /
) -> list[tuple[int, bytes, bytes, int, bytes | None]]:
    """Let the kernel compare two read-only btrfs snapshots (BTRFS_IOC_SEND without the data of files).

    ``subvolume`` is a descriptor of the later one's top directory, ``parent_tree`` the id of the earlier
    one's tree, or 0 to take all of the later one as new; ``version`` is that of the stream, 1 or 2.

    Returns what makes the later one of the earlier one, as steps to be followed in their order: ``(kind,
    path, other, number, ranges)``. Paths are relative to the subvolume and those of the moment: new inodes
    are made under temporary names, and they as well as directories are renamed. Kinds:

    * STEP_CREATE: ``path`` is a new inode, no directory; ``number`` is its number.
    * STEP_CREATE_DIRECTORY: the same for a directory.
    * STEP_RENAME: ``path`` is called ``other`` from now on, with all that is below it.
    * STEP_LINK: ``path`` is a new name of what ``other`` names.
    * STEP_REMOVE: the name ``path`` is gone; a directory is empty by then.
    * STEP_DATA: ``ranges`` of ``path`` may have other bytes: u64 pairs as for extents, but in any order.
    * STEP_HOLE: ``ranges`` of ``path`` read as zeros.
    * STEP_RESIZE: ``path`` has ``number`` bytes; what was behind them is gone.
    * STEP_TOUCH: attributes, extended attributes or times of ``path`` differ.

    A step other than STEP_TOUCH can mean that the attributes differ too.

    A thread of its own is in the ioctl meanwhile; it has ended when this returns or raises. After a signal
    that is as soon as the kernel writes something. Raises OSError as the ioctl fails (EPERM: not
    privileged, or a snapshot is not read-only; EAGAIN: a file of one is being deduplicated; ENOENT: no such
    tree), and ValueError when the stream makes no sense or holds what is not known.
    """

def btrfs_send_steps(
    stream: bytes | bytearray | memoryview, /
) -> list[tuple[int, bytes, bytes, int, bytes | None]]:
    """Tell the steps, as btrfs_send does, of a send stream that is there already.

    Raises ValueError with the position in the stream when it makes no sense or does not end.
    """

def thin_device(
    fd: int, device_id: int, held_root: int, /
) -> tuple[int, int, int, int, int, int, int, int, int, int, int, int]:
    """Read what identifies one thin device of a pool.

    ``fd`` is the pool's metadata device (or an image of it), opened by the caller, with O_DIRECT when
    the pool is live. Block 0 caught in mid-write is read again, and the look-up starts over when the
    pool commits meanwhile, so that all values belong to one transaction. With a ``held_root`` other than 0
    the device is looked up in the pool's metadata snapshot, whose block that is.

    Returns ``(pool_time, transaction_id, flags, held_root, data_block_size_bytes, metadata_blocks,
    mapping_root, details_root, device_root, mapped_blocks, device_transaction_id, creation_time)``: the
    superblock's fields first, then the device's bottom-level root and its details. ``metadata_blocks`` is
    what the metadata space map covers; the superblock's own field of that name is not kept up to date
    by the kernel.

    Raises KeyError when the pool has no such device, and BlockingIOError when it commits faster than
    a device can be looked up, hundreds of times in a row; so do all functions that look one up.
    """

def thin_scan(
    fd: int, device_id: int, since: int, first: int, nr_chunks: int, more: bool, held_root: int, /
) -> tuple[bytes, bytes, int, int]:
    """Look at a window of the mapping tree of one thin device that nobody writes to: a snapshot.

    Returns ``(changed, mapped, mappings, nodes)``: packed extents, in bytes of the volume, of the chunks
    whose mapping time is ``since`` or later (``since`` 0: all mapped chunks); a bitmap, one bit a pool chunk,
    least significant bit first and beginning with the chunk ``first``, of the mapped ones among
    ``nr_chunks`` chunks, ``ceil(nr_chunks / 8)`` bytes; the number of mappings of the window; and the number
    of nodes, which is the number of metadata blocks of the tree that had to be read. Without ``more`` windows
    to come, mappings beyond this one are counted, but are in neither of the first two. The last extent is
    clipped by the caller.

    An answer is never too small: damage, a device that changes while it is read, a number of mappings
    other than the pool has on record (the caller adds up those of several windows), and a ``since`` that the
    pool's time has not reached (another pool, or an older state of this one) all raise ValueError, and the
    caller compares in full. Raises KeyError when the pool has no such device.
    """

def thin_diff(
    fd: int, base_id: int, device_id: int, first_chunk: int, end_chunk: int, held_root: int, /
) -> tuple[bytes, bytes, int]:
    """Compare the mapping trees of two snapshots of one pool; nobody writes to either.

    Subtrees that both share are not read, so the time is that of the change, not of the volume.

    Returns ``(changed, discarded, nodes)``: packed extents, in bytes of the volume, of the chunks among
    ``[first_chunk, end_chunk)`` that the later device maps, and the base not or to another block; of
    those that only the base maps; and the number of metadata blocks read. With ``THIN_NO_DEVICE`` as base,
    ``changed`` is what the device maps. ``held_root`` as in ``thin_device``.

    Raises KeyError with the id of a device that the pool does not have, ValueError when the metadata makes
    no sense or a device changed while it was read.
    """

def cow_scan(fd: int, origin_size: int, settled_areas: int, /) -> tuple[bytes, int, int, int, int]:
    """Read which chunks of an origin were written since a classic LVM snapshot of it was made.

    ``fd`` is the snapshot's ``-cow`` device (or an image of it), opened by the caller, with O_DIRECT when
    the snapshot is active: the kernel writes the list past the page cache. ``origin_size`` is the size that
    the origin had when the snapshot was made, in bytes, 0 when not known; then the extents are not clipped.
    The first ``settled_areas`` areas of the list are known to be full, as ``dmsetup status`` can tell: they
    are read many at a time, and have to be full. Format: kernel, drivers/md/dm-snap-persistent.c.

    Returns ``(changed, chunk_size_bytes, exceptions, areas, allocated_chunks)``: packed extents, in bytes
    of the origin; the number of entries in the list, which is that of changed chunks; the number of areas of
    the list; and the chunks of the device that are no longer free, header and areas included. The last two
    are what the kernel counts: its status has ``allocated_chunks`` and ``areas + 1`` chunks, in sectors.

    Whatever was written to the origin before the call is in the answer; what is written meanwhile may be. A
    list that cannot be trusted raises ValueError with its own reason: never initialised, another thing than
    an exception store, invalidated by the kernel, unknown version, impossible chunk size, device too short,
    entries out of range or twice, an area written in part, or one not full that was said to be. A snapshot
    that is being merged loses entries without a trace: ask device-mapper before and after.
    """

def bitmap_extents(bitmap: bytes | bytearray | memoryview, unit: int, first: int = 0, /) -> bytes:
    """Return the set bits of a bitmap as packed extents of ``unit`` bytes a bit; bit 0 is the unit ``first``.

    Raises OverflowError when the bitmap covers more than 2**64 bytes.
    """

def bitmap_subtract(a: bytes | bytearray | memoryview, b: bytes | bytearray | memoryview, /) -> bytes:
    """Return ``a & ~b``, as long as ``a``; where ``b`` is shorter its bits count as 0."""

def bitmap_update(
    bitmap: bytes | bytearray | memoryview, bits: int, unit: int, set_: bytes, clear: bytes, /
) -> bytes:
    """Return a bitmap of ``bits`` bits: the old one, cut or filled up with 0, brought up to date.

    A bit stands for ``unit`` bytes. First every bit that an extent of ``clear`` touches becomes 0, then every
    bit that one of ``set_`` touches becomes 1; what lies beyond ``bits`` is left out.
    """

def btrfs_diff(
    fd: int, base_fd: int, numbers: bytes, memory: bytes, block: int, remember: bool, limit: int, /
) -> tuple[bytes, int]:
    """Compare inodes of a read-only btrfs snapshot with what they were in an earlier one of the subvolume.

    ``fd`` is open on the later snapshot and ``base_fd`` on the earlier one; with a ``base_fd`` of -1
    ``memory`` holds what was remembered of it. ``numbers`` are the inodes to compare, u64 each, ascending.
    ``block`` is the filesystem's sector size. With ``remember`` what to remember of each inode is written
    too.

    Returns ``(records, done)``: a record of all that is known of each inode that the snapshot has
    (native/btrfs_diff.h), and how many of ``numbers`` were looked at. It stops after the inode with which
    the records have ``limit`` bytes.

    Raises ValueError with the inode when items or memory make no sense; those of a snapshot that is
    balanced or deduplicated meanwhile may, so it is worth another try. Needs CAP_SYS_ADMIN.
    """

def btrfs_diff_file(
    base_fd: int, base_inode: int, fd: int, inode: int, block: int, /
) -> tuple[bytes, bytes, bytes, int]:
    """Compare two files that nobody writes to: one in two snapshots of a subvolume, or two clones.

    Each descriptor is open on the file itself, or on anything else in its subvolume; both files have to have
    existed from when the first was made until now.

    Returns ``(changed, holes, state, size)``: packed extents of what holds data and may differ, and of what
    reads as zeros and held data, both within ``size``, the size of the later one; and what to remember of
    it, empty when its extents were moved while they were read.

    Raises ValueError as ``btrfs_diff``, and FileNotFoundError when there is no such inode.
    """

def btrfs_touched(fd: int, since: int, /) -> tuple[bytes, bytes, bytes, int]:
    """List the inodes of a btrfs subvolume that may have changed since a snapshot of transaction ``since``.

    These are the inodes of later transactions, and directories of the same one, because a snapshot can get
    its name in its own source after it was made; 0 lists all. Inodes without a name are left out. What was
    removed leaves no trace here.

    Returns ``(numbers, transactions, modes, items)``: little-endian u64, u64 (transid) and u32 of each, in
    the order of the numbers, and how many items the kernel returned. Needs CAP_SYS_ADMIN.
    """

def data_extents(fd: int, offset: int, length: int, /) -> bytes:
    """Return the packed extents of ``[offset, offset + length)`` of a file that hold data.

    They are found with SEEK_DATA and SEEK_HOLE. What lies beyond the end of the file is no data. A file
    or device that cannot tell (EINVAL, EOPNOTSUPP) counts as all data. Moves the file position of ``fd``.
    """

def compare_files(base_fd: int, fd: int, block_size: int, /) -> tuple[bytes, int, int]:
    """Read two files or block devices and tell in which blocks the second differs from the first.

    ``block_size`` is a multiple of 4096, at most 64 MiB. Holes (SEEK_DATA) are not read and equal zeros.
    What lies beyond the end of the first reads as zeros, what lies beyond the end of the second is not
    looked at: so the answer is what has to be written over the first, cut or filled up to the size of the
    second. With O_DIRECT the page cache is left alone; without, the kernel is asked to read ahead.

    Returns ``(changed, base_bytes, bytes)``: packed extents in whole blocks, the last one cut at the end of
    the second; and how much was read of either. Moves the file positions.

    Raises OSError that names the file and the byte of the first 4096 that cannot be read, also (ENODATA)
    when one is shrunk meanwhile; ValueError for a block size that will not do.
    """

def fiemap_diff(base_fd: int, fd: int, /) -> tuple[bytes, bytes, int, int]:
    """Compare where the bytes of two clones lie (FS_IOC_FIEMAP): regular files of one XFS.

    Nobody may write to either, and both have to exist now; native/fiemap.h has the rule and its traps.
    What is dirty is written out first (FIEMAP_FLAG_SYNC).

    Returns ``(changed, discarded, base_records, records)``: packed extents, below the later file's size, of
    the bytes that are data in it and not at the same place in the base; of those that are data in the base
    and a hole, or allocated but unwritten, in the later file; and how many extents the kernel told of each.

    Raises ValueError when the files are not two of one XFS, or when a map makes no sense or has extents that
    are not just a place on the device (delayed, inline, compressed, encrypted): the caller compares in full.
    """

def fiemap_diff_records(
    base: bytes, base_size: int, later: bytes, size: int, at_once: int, /
) -> tuple[bytes, bytes, int, int]:
    """Do what ``fiemap_diff`` does with two maps from memory instead of files.

    A map is records of 56 bytes, ``struct fiemap_extent`` of linux/fiemap.h; ``at_once`` is how many of them
    an answer has at most. For trying out what a map leads to, without a filesystem that would have it.
    """

def retain_memory(limit: int, /) -> None:
    """Keep the allocator from giving memory back for blocks up to ``limit`` bytes, at most 32 MiB (mallopt).

    For the whole process and from now on. A wish: an allocator other than glibc's may not know it.
    Page faults on fresh allocations, not algorithms, decide the throughput of the pipeline.
    """

def act_as(uid: int, /) -> None:
    """Make ``uid`` the effective user of this thread alone (setresuid(2)); the real one stays: the way back.

    Capabilities stay too; others know this thread by ``uid`` (SO_PEERCRED). Raises OSError.
    """
