"""The header of a LUKS container that volumes lie on: a volume of its own, some MiB, read while it is in use.

Who changes a key writes the new slot, then the metadata, then over the old slot, so that the header is whole
after a power cut at any moment. Read twice with the same result it is of one such moment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.errors import VolumeError
from blocksnap.extents.changes import Binding, Changes, Parent
from blocksnap.extents.scan import compare_all
from blocksnap.system import blockdev, devmapper
from blocksnap.system.luks import LuksHeader, read_header
from blocksnap.volumes.base import Ledger, Trace, VolumeKind
from blocksnap.volumes.cold import ColdSnapshot
from blocksnap.volumes.errors import NoSuchVolumeError

_ATTEMPTS = 10
_PAUSE_SECONDS = 0.5


class HeaderChangingError(VolumeError):
    """A header was different each time it was read."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"the LUKS header of {path} is being changed",
            resolution="wait for cryptsetup to end; run it again",
        )


class HeaderUnreadableError(VolumeError):
    """Whether a device begins with a header could not be found out."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(
            f"the LUKS header of {path} cannot be read: {problem}",
            resolution="look in the kernel log (dmesg)",
        )


class LuksHeaderVolume:
    """The header of the container on a device; ``mapping`` is the name under which it is open, or empty."""

    kind: VolumeKind = "luks-header"

    def __init__(self, number: int, header: LuksHeader, mapping: str) -> None:
        self._number = number
        self.header = header
        self.mapping = mapping
        self.path = _path_of(number)

    @property
    def name(self) -> str:
        """``luks:UUID``."""
        return f"luks:{self.header.uuid}"

    @property
    def key(self) -> str:
        """The same: the header goes where its device goes."""
        return self.name

    @property
    def size(self) -> int:
        """Bytes of the header, key slots included."""
        return self.header.size

    @property
    def snapshot_device(self) -> int | None:
        """None: it is read as it is."""
        return None

    def trace(self, run: str) -> Trace | None:  # noqa: ARG002 - protocol
        """Nothing is left behind."""
        return None

    def prepare(self) -> None:
        """Make sure that it is still there."""
        self._require_same()

    def take_snapshot(self, run: str, ledger: Ledger | None = None) -> LuksHeaderSnapshot:  # noqa: ARG002 - protocol
        """Note the time; it is read when nobody has to stand still."""
        return LuksHeaderSnapshot(self)

    def read(self) -> bytes:
        """Return the header as it was at one moment, past the page cache; raises VolumeError."""
        fd = blockdev.open_by_number(self._number)
        try:
            before = self._read_once(fd)
            for _ in range(_ATTEMPTS):
                now = self._read_once(fd)
                if now == before:
                    self._require_same()
                    return now
                before = now
                time.sleep(_PAUSE_SECONDS)
        finally:
            os.close(fd)
        raise HeaderChangingError(self.path)

    def _read_once(self, fd: int) -> bytes:
        with blockdev.aligned_buffer(self.size) as buffer:
            done = 0
            with memoryview(buffer) as view:
                while done < self.size:
                    count = os.preadv(fd, [view[done:]], done)
                    if not count:
                        raise NoSuchVolumeError(self.name, f"{self.path} ends at byte {done}")
                    done += count
            return buffer[: self.size]

    def _require_same(self) -> None:
        found = header_on(self._number)
        if found != self.header:
            raise NoSuchVolumeError(self.name, f"{self.path} has another header, or none")


class LuksHeaderSnapshot(ColdSnapshot):
    """A header, in memory from when it is first looked at, a little after the snapshots of the run."""

    def __init__(self, volume: LuksHeaderVolume) -> None:
        super().__init__()
        self._volume = volume

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._volume.size

    @property
    def binding(self) -> Binding:
        """Where the container is, for people to see."""
        return {
            "source": "luks-header",
            "path": self._volume.path,
            "mapping": self._volume.mapping,
            "version": self._volume.header.version,
        }

    def find_changes(self, parent: Parent | None) -> Changes:
        """All of it is read."""
        return compare_all(self.size, parent, what="a LUKS header")

    @contextmanager
    def open_reader(self) -> Iterator[int]:
        """Yield a descriptor of a copy that no other process can open by a name."""
        if self._fd < 0:
            content = self._volume.read()
            self._fd = os.memfd_create("luks-header", os.MFD_CLOEXEC)
            with os.fdopen(self._fd, "wb", closefd=False) as file:
                file.write(content)
        yield self._fd

    def check(self) -> None:
        """What is in memory stays."""


def header_on(number: int) -> LuksHeader | None:
    """Return the LUKS header that a device begins with, None where there is none.

    Raises HeaderUnreadableError.
    """
    path = blockdev.number_text(number)
    try:
        path = _path_of(number)
        fd = blockdev.open_by_number(number, direct=False, wait_seconds=0.0)
        with os.fdopen(fd, "rb") as file:
            # What was written past the page cache may be newer than what is in it.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return read_header(file)
    except (OSError, blockdev.DeviceError) as err:
        raise HeaderUnreadableError(path, str(err)) from err


def _path_of(number: int) -> str:
    name = devmapper.dm_name(number)
    return f"/dev/mapper/{name}" if name else blockdev.node_of(number)


def headers_below(number: int) -> tuple[list[LuksHeaderVolume], list[HeaderUnreadableError]]:
    """Return the containers that a device lies on, at any depth, each once; itself it is not looked at.

    And of which that are open the header could not be read. One that lies elsewhere (``cryptsetup --header``)
    is not looked for.
    """
    found: dict[str, LuksHeaderVolume] = {}
    unreadable: list[HeaderUnreadableError] = []
    _look_below(number, "", found, unreadable)
    return list(found.values()), unreadable


def _look_below(
    number: int, mapping: str, found: dict[str, LuksHeaderVolume], unreadable: list[HeaderUnreadableError]
) -> bool:
    """Tell whether the header of ``mapping`` was seen, or not read: then it is in one of the two."""
    is_container = (devmapper.dm_uuid(number) or "").startswith("CRYPT-LUKS")
    if is_container:
        mapping = devmapper.dm_name(number) or ""
    seen = False
    for below in blockdev.slaves(number):
        header, problem = None, None
        try:
            header = header_on(below)
        except HeaderUnreadableError as err:
            problem = err
        if header is not None and header.uuid not in found:
            found[header.uuid] = LuksHeaderVolume(below, header, mapping)
        # With dm-integrity between the two it is one further down.
        seen_below = _look_below(below, "" if header else mapping, found, unreadable)
        # Where nothing above is encrypted nobody says that there is one.
        if problem is not None and mapping and not seen_below:
            unreadable.append(problem)
        seen = seen or seen_below or header is not None or problem is not None
    return seen and not is_container
