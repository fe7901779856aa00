"""A disk image for virtual machines, made from the raw one by qemu-img.

The raw image is complete before it is converted, and removed after; so it needs room for both, and an
interrupted restore goes on as that of any file.
"""

from __future__ import annotations

import contextlib
import os

from blocksnap.errors import BlocksnapError, TargetError
from blocksnap.restore.file_target import FileTarget
from blocksnap.restore.naming import hidden_name
from blocksnap.restore.record import RestoreRecord
from blocksnap.system.command import MissingProgramError, has_program, run

_CONVERT_SECONDS = 7 * 86400.0


class ImageNotMadeError(TargetError):
    """qemu-img failed."""

    def __init__(self, path: str, err: BlocksnapError) -> None:
        self.path = path
        super().__init__(
            f"cannot make {path} with qemu-img: {err.brief}",
            details=err.details,
            resolution="restore to a raw file without --format, and convert that",
        )


class DiskImageTarget(FileTarget):
    """A new file in a format of qemu-img; compared with the raw image before that goes if ``compare``."""

    def __init__(self, path: str, size: int, record: RestoreRecord, image: str, *, compare: bool) -> None:
        if not has_program("qemu-img"):
            raise MissingProgramError("qemu-img")
        self._image = image
        self._compare = compare
        super().__init__(path, size, record)

    def convert(self, hidden: str) -> str:
        """Make the image beside the raw file, which is removed then."""
        made = hidden_name(self.name, f"{self.wanted.backup[:8]}-{self._image}")
        try:
            # The raw file is locked, so one that is there was left by a restore that was killed.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made)
            os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            run(
                *("qemu-img", "convert", "-f", "raw", "-O", self._image, "-t", "writeback"),
                *(hidden, made),
                timeout_seconds=_CONVERT_SECONDS,
            )
            if self._compare:
                run(
                    *("qemu-img", "compare", "-f", "raw", "-F", self._image, hidden, made),
                    timeout_seconds=_CONVERT_SECONDS,
                )
            _flush(made)
        except BaseException as err:
            with contextlib.suppress(OSError):
                os.unlink(made)
            if isinstance(err, OSError):
                raise self.failed(err) from err
            if isinstance(err, BlocksnapError):
                raise ImageNotMadeError(self.name, err) from err
            raise
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        return made


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
