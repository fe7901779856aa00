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

from blocksnap.errors import BlocksnapError, StorageError
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.repository import Repository
from blocksnap.restore.fuse import ENDED, FuseThread, Operations, serve
from blocksnap.restore.images import Image, ImageReader
from blocksnap.restore.overlay import Overlay
from blocksnap.restore.tree_mount import SEVERED
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
        writable: bool = False,
        when_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        """With ``patient`` reads wait for a repository that is away; else they fail.

        With ``writable`` each image has an overlay that is thrown away. ``when_lost`` is called, by another
        thread, with the reason when nothing is served any more before this is left.
        """
        self._when_lost = when_lost
        self._reader = ImageReader(repository)
        self._folder = folder
        self._writable = writable
        self._operations = _Images(self._reader, backups, tell, patient=patient, writable=writable)
        self._thread = FuseThread(self._serve, self._operations.ready, self._ended)

    def __enter__(self) -> Self:
        """Serve; raises NoFuseError."""
        self._thread.start()
        return self

    def give_up(self) -> None:
        """Let reads that wait for the repository fail from now on."""
        self._operations.is_ending.set()

    def __exit__(self, *_: object) -> None:
        self.give_up()
        unmount(self._folder)
        self._thread.join(_END_SECONDS)
        self._reader.close()
        self._operations.close()

    def _ended(self, reason: str) -> None:
        # Nobody else reaches what is mounted there.
        if not self._operations.is_ending.is_set():
            self._when_lost(reason if reason != ENDED else SEVERED)

    def _serve(self) -> str:
        return serve(self._operations, self._folder, direct_io=True, writable=self._writable)


class _Images(Operations):  # type: ignore[misc] # mfusepy has no types
    use_ns = True

    def __init__(
        self,
        reader: ImageReader,
        backups: Described,
        tell: Callable[[BlocksnapError], None],
        *,
        patient: bool,
        writable: bool,
    ) -> None:
        self._patient = patient
        self._writable = writable
        self._overlays: dict[str, Overlay] = {}
        self._overlays_lock = threading.Lock()
        self.is_ending = threading.Event()
        self._reader = reader
        self._backups = backups
        self._tell = tell
        self._handles: dict[int, Image] = {}
        self._numbers = itertools.count(1)
        self.ready = threading.Event()

    def close(self) -> None:
        """Throw the overlays away."""
        with self._overlays_lock:
            for overlay in self._overlays.values():
                overlay.close()

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
            "st_mode": stat.S_IFREG | (0o600 if self._writable else 0o400),
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
        """Open an image, for reading if there is no overlay."""
        geometry, root, _ = self._known(path)
        if flags & os.O_ACCMODE != os.O_RDONLY and not self._writable:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        number = next(self._numbers)
        self._handles[number] = Image(geometry, root)
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read; what cannot be had is an I/O error, and never other bytes."""
        if self._writable:
            return self._overlay(path).read(offset, size)
        return self._read_image(self._handles[fh], path, offset, size)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:  # noqa: ARG002
        """Write to the overlay."""
        return self._overlay(path).write(offset, data)

    def _overlay(self, path: str) -> Overlay:
        with self._overlays_lock:
            if path not in self._overlays:
                geometry, root, _ = self._known(path)
                image = Image(geometry, root)
                self._overlays[path] = Overlay(
                    geometry.size, lambda offset, size: self._read_image(image, path, offset, size)
                )
            return self._overlays[path]

    def _read_image(self, image: Image, path: str, offset: int, size: int) -> bytes:
        while True:
            try:
                return self._reader.read(image, offset, size)
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
