"""The contract of a backend: named byte strings that are created once and never change.

A backend makes an object visible under its name completely or not at all, and durable before the
call returns. Creation is put-if-absent: of two creators of one name exactly one succeeds. Listing and
reading see every object whose creation has returned. Nothing more is asked of a storage, so that a
local directory, an object store and an SFTP server can all hold a repository.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

Buffer = bytes | bytearray | memoryview

# Lower case only, because some storages fold case; no dot in front, because listings hide such names.
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*(/[a-z0-9][a-z0-9.-]*)*")


def is_name(name: str) -> bool:
    """Tell whether an object may have this name."""
    return len(name) <= 255 and _NAME.fullmatch(name) is not None


def validate_name(name: str) -> str:
    """Return ``name`` if it is one an object may have, else raise ValueError."""
    if not is_name(name):
        raise ValueError(f"not an object name: {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Name and size in bytes of one object, and when it arrived by the storage's own clock, if it has one."""

    name: str
    size: int
    received: datetime | None = None


class ObjectWriter(ABC):
    """An object that is being written and gets its name when it is complete."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Append bytes."""

    @abstractmethod
    def publish(self, name: str) -> None:
        """Make the object durable and visible; raises ObjectExistsError when the name is taken."""

    @abstractmethod
    def abort(self) -> None:
        """Drop the object; a no-op after publish()."""


class Backend(ABC):
    """Where objects live."""

    @property
    @abstractmethod
    def place(self) -> str:
        """How people name it."""

    @abstractmethod
    def create(self) -> None:
        """Make the place itself, empty; an existing empty one is taken over."""

    @abstractmethod
    def open_writer(self) -> ObjectWriter:
        """Start an object whose name is not known yet."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a whole object; raises ObjectMissingError, BackendAwayError (see ``read_range_into``)."""

    @abstractmethod
    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of an object; raises EOFError when the object is too short.

        Raises BackendAwayError when nothing can be read, not of this object and not of any other.
        """

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List the objects whose name begins with ``prefix`` (a folder, with its slash), in no order."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; only garbage collection does that. Raises ObjectMissingError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of descriptors and connections."""

    def flush(self, name: str) -> None:  # noqa: B027 - few storages have anything to do
        """Make an object durable that was listed, and whose creation may never have returned."""

    def free_bytes(self) -> int | None:
        """Return the room that is left for objects; None where nobody can tell."""
        return None

    def put(self, name: str, data: Buffer) -> None:
        """Create an object; raises ObjectExistsError when the name is taken."""
        writer = self.open_writer()
        try:
            writer.write(data)
            writer.publish(name)
        finally:
            writer.abort()

    def exists(self, name: str) -> bool:
        """Tell whether an object has this name."""
        folder = name.rpartition("/")[0]
        return any(info.name == name for info in self.list(folder + "/" if folder else ""))
