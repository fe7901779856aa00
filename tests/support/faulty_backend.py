"""A backend that fails, or whose process dies, at a chosen call; or that refuses to delete.

Every call to the backend and to its writers counts. A process that is dead makes no more calls: cleaning
up that happens while the exception passes must not reach the storage, or the test would be kinder than
kill -9.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from blocksnap.backends.base import Backend, Buffer, ObjectInfo, ObjectWriter
from blocksnap.backends.errors import BackendFailedError

_Result = TypeVar("_Result")
Fault = Literal["fail", "die before", "die after"]
FAULTS: tuple[Fault, ...] = ("fail", "die before", "die after")


class Killed(BaseException):
    """The process is gone; nothing may catch this."""


class FaultyBackend(Backend):
    """Hands everything on to another backend until call number ``at``, counted from zero."""

    def __init__(
        self, inner: Backend, *, fault: Fault | None = None, at: int = -1, append_only: bool = False
    ) -> None:
        self._inner = inner
        self._fault = fault
        self._at = at
        self._append_only = append_only
        self._dead = False
        self.calls: list[str] = []

    @property
    def place(self) -> str:
        return self._inner.place

    def create(self) -> None:
        self._call("create", self._inner.create)

    def open_writer(self) -> ObjectWriter:
        return _FaultyWriter(self, self._call("open_writer", self._inner.open_writer))

    def read(self, name: str) -> bytes:
        return self._call(f"read {name}", lambda: self._inner.read(name))

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._call(f"read_range {name}", lambda: self._inner.read_range_into(name, offset, buffer))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(f"list {prefix}", lambda: [*self._inner.list(prefix)]))

    def delete(self, name: str) -> None:
        if self._append_only:
            raise BackendFailedError(f"delete {name}", self.place, OSError(errno.EPERM, "refused"))
        self._call(f"delete {name}", lambda: self._inner.delete(name))

    def flush(self, name: str) -> None:
        self._call(f"flush {name}", lambda: self._inner.flush(name))

    def close(self) -> None:
        self._inner.close()

    def _call(self, what: str, call: Callable[[], _Result]) -> _Result:
        if self._dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(what)
        if number == self._at:
            if self._fault == "fail":
                # Not EIO, which may be a bad sector under that object alone.
                raise BackendFailedError(what, self.place, OSError(errno.EREMOTEIO, "injected"))
            self._dead = True
            if self._fault == "die after":
                call()
            raise Killed
        return call()


class _FaultyWriter(ObjectWriter):
    def __init__(self, backend: FaultyBackend, inner: ObjectWriter) -> None:
        self._backend = backend
        self._inner = inner

    def write(self, data: Buffer) -> None:
        self._backend._call("write", lambda: self._inner.write(data))

    def publish(self, name: str) -> None:
        self._backend._call(f"publish {name}", lambda: self._inner.publish(name))

    def abort(self) -> None:
        # The kernel closes what a dead process had open; that is all that this does.
        self._inner.abort()
