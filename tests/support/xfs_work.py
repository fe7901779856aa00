"""An image on XFS that everything happens to, and clones of it: what a diff of clones has to get right."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from support.file_ioctls import (
    COLLAPSE,
    INSERT,
    KEEP_SIZE,
    PUNCH_HOLE,
    UNSHARE,
    ZERO_RANGE,
    clone_file,
    clone_range,
    dedupe_range,
    fallocate,
    opened,
    set_immutable,
)
from support.loops import call, loop_device, mounted

_MEMORY = Path("/dev/shm")  # noqa: S108 - the temporary folder in it has a name of its own
PAGE = 4096
LIMIT = 3 << 20
"""No image grows beyond this by much: every round reads all of it."""
_ATTEMPTS = 50


@contextmanager
def xfs(folder: Path, *options: str, size: int = 400 << 20) -> Iterator[Path]:
    """Make an XFS of ``size`` bytes (at least 300 MiB) and mount it.

    Its image is in memory where that is possible: each clone is flushed, and a disk would be all the time.
    """
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=_MEMORY if _has_memory(2 * size) else folder) as place:
        with loop_device(Path(place) / "xfs.img", size=size) as device:
            call("mkfs.xfs", "-q", *options, device)
            with mounted(device, folder / "mnt") as mount:
                yield mount


def _has_memory(size: int) -> bool:
    """Whether so much fits into memory; a container has a few MiB of it, if any."""
    if not _MEMORY.is_dir():
        return False
    found = os.statvfs(_MEMORY)
    return found.f_bavail * found.f_frsize > size


@dataclass
class Image:
    """A live image, and a donor of the same size that ranges are cloned from."""

    folder: Path
    rng: random.Random
    path: Path = field(init=False)
    donor: Path = field(init=False)
    counted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path, self.donor = self.folder / "live", self.folder / "donor"
        for path in (self.path, self.donor):
            path.write_bytes(self.rng.randbytes(LIMIT // 2))

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def disturb(self) -> None:
        """Do one random thing to the image; what the kernel refuses in this state is not counted."""
        self._try(self.rng.choice(sorted(OPERATIONS)))

    def insist(self, name: str) -> None:
        """Try an operation until it is done once, but not for ever."""
        for _ in range(_ATTEMPTS):
            if name in self.counted:
                return
            self._try(name)

    def _try(self, name: str) -> None:
        try:
            OPERATIONS[name](self)
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EBADE):
                raise
            return
        self.counted[name] = self.counted.get(name, 0) + 1

    def clone(self, name: str) -> Path:
        """Clone it as the product does: under another name first, then immutable under its own."""
        path = self.folder / name
        with opened(self.path) as source, opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as target:
            clone_file(source, target)
            os.fchmod(target, 0o400)
            os.fsync(target)
        set_immutable(path, immutable=True)
        return path

    def some(self, *, aligned: bool = False, inside: bool = False) -> tuple[int, int]:
        """Choose a range, small more often than large."""
        limit = self.size if inside else LIMIT
        length = self.rng.choice([1, PAGE, 5 * PAGE, 40 * PAGE, 200 * PAGE])
        length = self.rng.randint(1, length)
        offset = self.rng.randint(0, max(limit - 1, 0))
        if aligned:
            offset, length = offset // PAGE * PAGE, -(-length // PAGE) * PAGE
        return offset, min(length, max(limit - offset, 0)) if inside else length


def write_buffered(image: Image) -> None:
    offset, length = image.some()
    with opened(image.path, os.O_RDWR) as fd:
        os.pwrite(fd, image.rng.randbytes(length), offset)


def write_same(image: Image) -> None:
    """Write what is there: changes nothing, but moves it."""
    offset, length = image.some(inside=True)
    with opened(image.path, os.O_RDWR) as fd:
        os.pwrite(fd, os.pread(fd, length, offset), offset)


def write_direct(image: Image) -> None:
    offset, length = image.some(aligned=True)
    with mmap.mmap(-1, length) as buffer, opened(image.path, os.O_RDWR | os.O_DIRECT) as fd:
        buffer.write(image.rng.randbytes(length))
        os.pwrite(fd, buffer, offset)


def write_mapped(image: Image) -> None:
    offset, length = image.some(inside=True)
    if length:
        with opened(image.path, os.O_RDWR) as fd, mmap.mmap(fd, image.size) as memory:
            memory[offset : offset + length] = image.rng.randbytes(length)


def write_zeros(image: Image) -> None:
    offset, length = image.some()
    with opened(image.path, os.O_RDWR) as fd:
        os.pwrite(fd, bytes(length), offset)


def synchronise(image: Image) -> None:
    with opened(image.path, os.O_RDWR) as fd:
        os.fsync(fd)


def truncate(image: Image) -> None:
    os.truncate(image.path, image.rng.choice([image.rng.randint(0, LIMIT), image.size + 1, LIMIT // 2]))


def _falls(image: Image, mode: int, *, aligned: bool = False, inside: bool = False) -> None:
    offset, length = image.some(aligned=aligned, inside=inside)
    with opened(image.path, os.O_RDWR) as fd:
        fallocate(fd, mode, offset, length)


def punch(image: Image) -> None:
    _falls(image, PUNCH_HOLE | KEEP_SIZE)


def zero_range(image: Image) -> None:
    _falls(image, ZERO_RANGE)


def zero_range_keeping_size(image: Image) -> None:
    _falls(image, ZERO_RANGE | KEEP_SIZE)


def allocate(image: Image) -> None:
    _falls(image, 0)


def allocate_keeping_size(image: Image) -> None:
    _falls(image, KEEP_SIZE)


def unshare(image: Image) -> None:
    _falls(image, UNSHARE, inside=True)


def collapse(image: Image) -> None:
    _falls(image, COLLAPSE, aligned=True, inside=True)


def insert(image: Image) -> None:
    if image.size < LIMIT:
        _falls(image, INSERT, aligned=True, inside=True)


def clone_within(image: Image) -> None:
    offset, length = image.some(aligned=True, inside=True)
    target = image.rng.randint(0, LIMIT) // PAGE * PAGE
    with opened(image.path, os.O_RDWR) as fd:
        clone_range(fd, fd, offset, length // PAGE * PAGE or PAGE, target)


def clone_from_donor(image: Image) -> None:
    offset, length = image.some(aligned=True)
    with opened(image.donor) as donor, opened(image.path, os.O_RDWR) as fd:
        clone_range(donor, fd, offset, length, image.rng.randint(0, LIMIT) // PAGE * PAGE)


def copy_to_donor(image: Image) -> None:
    offset, length = image.some(inside=True)
    with opened(image.donor, os.O_RDWR) as donor, opened(image.path) as fd:
        os.copy_file_range(fd, donor, length, offset, offset)


def dedupe(image: Image) -> None:
    """Make a range equal to the donor's, and then one with it."""
    offset, length = image.some(aligned=True, inside=True)
    with opened(image.donor, os.O_RDWR) as donor, opened(image.path, os.O_RDWR) as fd:
        os.pwrite(fd, os.pread(donor, length, offset), offset)
        os.fsync(fd)
        dedupe_range(donor, fd, offset, length // PAGE * PAGE or PAGE, offset)


def defragment(image: Image) -> None:
    subprocess.run(["xfs_fsr", image.path], check=False, capture_output=True, cwd=image.folder)


OPERATIONS: dict[str, Callable[[Image], None]] = {
    each.__name__: each
    for each in (
        write_buffered,
        write_same,
        write_direct,
        write_mapped,
        write_zeros,
        synchronise,
        truncate,
        punch,
        zero_range,
        zero_range_keeping_size,
        allocate,
        allocate_keeping_size,
        unshare,
        collapse,
        insert,
        clone_within,
        clone_from_donor,
        copy_to_donor,
        dedupe,
        defragment,
    )
}


def remove(clone: Path) -> None:
    set_immutable(clone, immutable=False)
    clone.unlink()


@contextmanager
def hammered(image: Image, *, seed: int) -> Iterator[None]:
    """Write to the image from another thread meanwhile, as an application that does not stop."""
    stop, failed = threading.Event(), []
    rng = random.Random(seed)

    def write() -> None:
        try:
            with opened(image.path, os.O_RDWR) as fd:
                while not stop.is_set():
                    os.pwrite(fd, rng.randbytes(rng.randint(1, 3 * PAGE)), rng.randint(0, LIMIT))
        except OSError as err:
            failed.append(err)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed
