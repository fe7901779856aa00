"""The images of backups as files of a FUSE filesystem, one for each, named by the backup's id.

For the eyes of our own processes: what users see is made of it (``restore.showing``).
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Self

from mfusepy import Operations

from blocksnap.errors import BlocksnapError, StorageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.repository import Repository
from blocksnap.restore.fuse import serve
from blocksnap.restore.images import Image, ImageReader
from blocksnap.restore.inside import NoFuseError
from blocksnap.system.namespace import unmount

_END_SECONDS = 2.0
_PATIENCE_SECONDS = 2.0
Described = Mapping[str, tuple[Geometry, MapRoot, float]]
"""For each id how the volume is cut, its map, and the time of the backup in seconds."""


class ServedImages:
    """A context in which the images are files in ``folder``, for other processes, never this one."""

    def __init__(
        self,
        repository: Repository,
        backups: Described,
        folder: str,
        tell: Callable[[BlocksnapError], None],
        *,
        patient: bool = False,
    ) -> None:
        """With ``patient`` reads wait for a repository that is away; else they fail."""
        self._reader = ImageReader(repository)
        self._folder = folder
        self._operations = _Images(self._reader, backups, tell, patient=patient)
        self._failure = ""
        self._thread = threading.Thread(target=self._serve, name="blocksnap-fuse", daemon=True)

    def __enter__(self) -> Self:
        """Serve; raises NoFuseError."""
        self._thread.start()
        while not self._operations.ready.wait(0.05):
            if not self._thread.is_alive():
                raise NoFuseError(self._failure)
        return self

    def give_up(self) -> None:
        """Let reads that wait for the repository fail from now on."""
        self._operations.is_ending.set()

    def __exit__(self, *_: object) -> None:
        self.give_up()
        unmount(self._folder)
        self._thread.join(_END_SECONDS)
        self._reader.close()

    def _serve(self) -> None:
        self._failure = serve(self._operations, self._folder, direct_io=True)


class _Images(Operations):  # type: ignore[misc] # mfusepy has no types
    use_ns = True

    def __init__(
        self,
        reader: ImageReader,
        backups: Described,
        tell: Callable[[BlocksnapError], None],
        *,
        patient: bool,
    ) -> None:
        self._patient = patient
        self.is_ending = threading.Event()
        self._reader = reader
        self._backups = backups
        self._tell = tell
        self._handles: dict[int, Image] = {}
        self._numbers = itertools.count(1)
        self.ready = threading.Event()

    def init(self, path: str) -> None:  # noqa: ARG002
        """The kernel has answered: it is mounted."""
        self.ready.set()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:  # noqa: ARG002
        """Describe the folder or an image."""
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2}
        geometry, _, taken = self._known(path)
        when = int(taken * 1e9)
        return {
            "st_mode": stat.S_IFREG | 0o400,
            "st_nlink": 1,
            "st_size": geometry.size,
            "st_blocks": -(-geometry.size // 512),
            "st_mtime": when,
            "st_ctime": when,
            "st_atime": when,
        }

    def readdir(self, path: str, fh: int) -> Iterator[str]:  # noqa: ARG002
        """List the ids."""
        return iter([".", "..", *self._backups])

    def open(self, path: str, flags: int) -> int:
        """Open an image for reading."""
        geometry, root, _ = self._known(path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        number = next(self._numbers)
        self._handles[number] = Image(geometry, root)
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read; what cannot be had is an I/O error, and never other bytes."""
        while True:
            try:
                return self._reader.read(self._handles[fh], offset, size)
            except BlocksnapError as err:
                self._tell(err)
                waits = self._patient and isinstance(err, StorageError)
                if not waits or self.is_ending.wait(_PATIENCE_SECONDS):
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path) from err

    def release(self, path: str, fh: int) -> int:  # noqa: ARG002
        """Forget a reader."""
        self._handles.pop(fh, None)
        return 0

    def _known(self, path: str) -> tuple[Geometry, MapRoot, float]:
        try:
            return self._backups[path[1:]]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
