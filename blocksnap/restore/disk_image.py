"""A disk image for virtual machines, made from the raw one by qemu-img.

The raw image is complete before it is converted, and removed when the other one has its name; so there has
to be room for both. An interrupted restore goes on as that of any file. A raw image that is complete has a
hidden name that says so, and is only converted when the restore is run again, whatever interrupted it or
made it fail.
"""

from __future__ import annotations

import contextlib
import errno
import os

from blocksnap.errors import BlocksnapError, TargetError
from blocksnap.restore.file_target import FileTarget, is_called
from blocksnap.restore.naming import flush_open_folder, hidden_name
from blocksnap.restore.record import RestoreRecord
from blocksnap.restore.targets import NameFailedError, NameTakenError
from blocksnap.system.command import MissingProgramError, has_program, run

_CONVERT_SECONDS = 7 * 86400.0


class ImageNotMadeError(TargetError):
    """qemu-img failed."""

    def __init__(self, path: str, raw: str | None, err: BlocksnapError) -> None:
        """``raw`` is where the complete raw image waits, if it does."""
        self.path, self.raw = path, raw
        super().__init__(
            f"cannot make {path} with qemu-img: {err.brief}",
            details=err.details,
            resolution=f"mend that (make room), and run the same command again, or convert {raw} yourself"
            if raw
            else "restore to a raw file without --format, and convert that",
        )


class DiskImageTarget(FileTarget):
    """A new file in a format of qemu-img; compared with the raw image before that goes if ``compare``."""

    def __init__(self, path: str, size: int, record: RestoreRecord, image: str, *, compare: bool) -> None:
        if not has_program("qemu-img"):
            raise MissingProgramError("qemu-img")
        self._image = image
        self._compare = compare
        # What was lost would not be known after an interruption, so a restore with losses begins anew.
        whole = record.mode == "whole"
        self._raw = (
            hidden_name(os.path.basename(os.path.abspath(path)), f"{record.backup}-raw") if whole else None
        )
        self._is_raw_complete = False
        self._is_to_be_converted = False
        super().__init__(path, size, record)

    @property
    def what_stays(self) -> str:
        """What is left when it is not finished."""
        if self._raw is None or not self._is_called_complete():
            return super().what_stays
        waits = self.show(self._raw)
        return f"is not made yet; the raw image is complete, and waits as {waits} to be converted"

    def begin(self) -> int:
        """Write the record, unless the raw image is complete: then only its beginning is brought again."""
        return self._size if self._is_raw_complete else super().begin()

    def keep_record(self) -> bool:
        """Write down how far the raw image has come; a complete one has its name for that."""
        return self._is_called_complete() or super().keep_record()

    def finish(self) -> None:
        """Flush, convert, and give the image its name; then the raw one goes."""
        try:
            super().finish()
        except (NameTakenError, NameFailedError):
            self._remove_raw()
            raise
        self._remove_raw()

    def convert(self, hidden: str) -> str:
        """Make the image beside the raw file."""
        hidden = self._call_complete(hidden)
        name = hidden_name(self._final, f"{self.wanted.backup[:8]}-{self._image}")
        made = self.reach(name)
        try:
            # The raw file is locked, so one that is there was left by a restore that was killed.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made)
            fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._make_image(fd)
                if not is_called(os.fstat(fd), made):
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), made)
            finally:
                os.close(fd)
        except BaseException as err:
            with contextlib.suppress(OSError):
                os.unlink(made)
            self._is_to_be_converted = self._raw is not None
            if isinstance(err, OSError):
                raise self.failed(err) from err
            if isinstance(err, BlocksnapError):
                waits = self._raw and self.show(self._raw)
                raise ImageNotMadeError(self.name, waits, err) from err
            raise
        if self._raw is None:
            with contextlib.suppress(OSError):
                os.unlink(self.reach(hidden))
        return name

    def _make_image(self, fd: int) -> None:
        """Have qemu-img write to a file that is open here, durably, and compare it.

        Raises BlocksnapError, OSError. Both files by descriptor: who owns the directory may
        put a link in the place of either.
        """
        raw, made = (f"/proc/{os.getpid()}/fd/{each}" for each in (self._fd, fd))
        commands: list[tuple[str, ...]] = [
            ("qemu-img", "convert", "-f", "raw", "-O", self._image, "-t", "writeback", raw, made)
        ]
        if self._compare:
            commands.append(("qemu-img", "compare", "-f", "raw", "-F", self._image, raw, made))
        for command in commands:
            run(*command, timeout_seconds=_CONVERT_SECONDS, killable=True)
        os.fsync(fd)

    def close(self, *, keep: bool = False) -> bool:
        """Close; a raw image that is complete stays to be converted, whatever has failed."""
        return super().close(keep=keep or self._is_to_be_converted)

    def _remove_raw(self) -> None:
        if self._raw is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.reach(self._raw))

    def _is_called_complete(self) -> bool:
        return self._raw is not None and self._temporary == self._raw

    def _call_complete(self, hidden: str) -> str:
        """Give the raw image, which is durable, the name by which another restore finds it complete."""
        if self._raw is None:
            return hidden
        try:
            os.rename(self.reach(hidden), self.reach(self._raw))
            flush_open_folder(self._folder)
        except OSError as err:
            raise self.failed(err) from err
        self._temporary = self._raw
        return self._raw

    def _open(self) -> int:
        """Open the complete raw image of an earlier restore, else as for any file."""
        if self._raw is None:
            return super()._open()
        hidden, self._temporary = self._temporary, self._raw
        try:
            fd = self._take(0)
        except FileNotFoundError:
            self._temporary = hidden
            return super()._open()
        self._is_raw_complete = True
        return fd
