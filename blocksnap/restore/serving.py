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

from mfusepy import Operations

from blocksnap.errors import BlocksnapError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.repository import Repository
from blocksnap.restore.fuse import serve
from blocksnap.restore.images import Image, ImageReader
from blocksnap.restore.inside import NoFuseError
from blocksnap.system.namespace import unmount

_END_SECONDS = 2.0
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
    ) -> None:
        self._reader = ImageReader(repository)
        self._folder = folder
        self._operations = _Images(self._reader, backups, tell)
        self._failure = ""
        self._thread = threading.Thread(target=self._serve, name="blocksnap-fuse", daemon=True)

    def __enter__(self) -> None:
        """Serve; raises NoFuseError."""
        self._thread.start()
        while not self._operations.ready.wait(0.05):
            if not self._thread.is_alive():
                raise NoFuseError(self._failure)

    def __exit__(self, *_: object) -> None:
        unmount(self._folder)
        self._thread.join(_END_SECONDS)
        self._reader.close()

    def _serve(self) -> None:
        self._failure = serve(self._operations, self._folder, direct_io=True)


class _Images(Operations):  # type: ignore[misc] # mfusepy has no types
    use_ns = True

    def __init__(
        self, reader: ImageReader, backups: Described, tell: Callable[[BlocksnapError], None]
    ) -> None:
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
        try:
            return self._reader.read(self._handles[fh], offset, size)
        except BlocksnapError as err:
            self._tell(err)
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
