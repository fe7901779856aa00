"""A storage that lets a writer list, read and create, and nothing else; it writes down what it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from blocksnap.backends.base import Backend, Buffer, ObjectInfo, ObjectWriter
from blocksnap.backends.errors import ObjectExistsError
from blocksnap.errors import StorageError


class RefusedError(StorageError):
    """The credentials do not allow it."""

    def __init__(self, action: str, name: str) -> None:
        super().__init__(f"not permitted: {action} {name}")


@dataclass
class Asked:
    """What was asked of a storage: each action, and the names of what was created and refused."""

    actions: set[str] = field(default_factory=set)
    created: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


class _Writer(ObjectWriter):
    def __init__(self, inner: ObjectWriter, asked: Asked) -> None:
        self._inner, self._asked = inner, asked

    def write(self, data: Buffer) -> None:
        self._inner.write(data)

    def publish(self, name: str) -> None:
        try:
            self._inner.publish(name)
        except ObjectExistsError:
            self._asked.overwritten.append(name)
            raise
        self._asked.created.append(name)

    def abort(self) -> None:
        self._inner.abort()


class AppendOnly(Backend):
    """Another backend, with the rights of a writer that may neither delete nor overwrite."""

    def __init__(self, inner: Backend, asked: Asked) -> None:
        self._inner, self._asked = inner, asked

    @property
    def place(self) -> str:
        return self._inner.place

    def create(self) -> None:
        self._asked.actions.add("make the place")
        self._inner.create()

    def open_writer(self) -> ObjectWriter:
        self._asked.actions.add("put if absent")
        return _Writer(self._inner.open_writer(), self._asked)

    def read(self, name: str) -> bytes:
        self._asked.actions.add("get")
        return self._inner.read(name)

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._asked.actions.add("get")
        self._inner.read_range_into(name, offset, buffer)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._asked.actions.add("list")
        return self._inner.list(prefix)

    def delete(self, name: str) -> None:
        self._asked.deleted.append(name)
        raise RefusedError("delete", name)

    def close(self) -> None:
        self._inner.close()
