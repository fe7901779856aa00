"""A repository in a simulated world: storage, clock, scheduler and luck, all driven by one seed.

The code under test is the real one. Every call to the storage is a point at which the world decides what
happens next: another process goes on, the call fails, the process dies before it or after it, or nothing.
Only one process runs at a time, so a seed always tells the same story.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from greenlet import greenlet

from blocksnap.backends.base import Backend, ObjectInfo, ObjectWriter, validate_name
from blocksnap.backends.errors import ObjectExistsError, ObjectMissingError
from blocksnap.errors import StorageError


class Died(BaseException):
    """The process was killed."""


class TroubleError(StorageError):
    """The storage did not answer."""

    def __init__(self) -> None:
        super().__init__("the storage did not answer")


class World:
    """The scheduler: lets one process at a time do one thing at a time.

    Processes are greenlets: to hand the turn on costs a microsecond, and nothing but the seed can do it.
    """

    def __init__(self, seed: int) -> None:
        self.luck = random.Random(seed)
        self.objects: dict[str, bytes] = {}
        self.now = datetime(2026, 11, 26, tzinfo=UTC)
        self.story: list[str] = []
        self.after_change: Callable[[], None] = lambda: None
        self.deaths, self.troubles = 0.01, 0.01
        self._processes: dict[str, greenlet] = {}
        self._name: str | None = None

    def run(self, processes: dict[str, Callable[[], None]]) -> None:
        """Run processes to their ends, in an order that the seed decides."""
        self._processes = {name: greenlet(self._live) for name in sorted(processes)}
        names = list(self._processes)
        try:
            while names:
                self._name = self.luck.choice(names)
                process = self._processes[self._name]
                process.switch(*() if process else (processes[self._name],))
                if process.dead:
                    names.remove(self._name)
        finally:
            self._name = None

    def step(self, what: str) -> bool:
        """Wait for a turn; tell whether the process is to die after the call that follows."""
        name = self._name
        if name is None:
            return False
        self._processes[name].parent.switch()
        self.now += timedelta(seconds=self.luck.choice((0, 1, 60, 600)))
        self.story.append(f"{name}: {what}")
        if self.luck.random() < self.deaths:
            self.story.append(f"{name} dies before")
            raise Died
        if self.luck.random() < self.troubles:
            self.story.append(f"{name} gets no answer")
            raise TroubleError
        return self.luck.random() < self.deaths

    def _live(self, work: Callable[[], None]) -> None:
        with suppress(Died, StorageError):
            self.step("begins")
            work()


class SimulatedBackend(Backend):
    """Objects in memory. Every call takes its turn, unless it is made from outside the simulation."""

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def place(self) -> str:
        return "the simulation"

    def create(self) -> None:
        """It is there."""

    def open_writer(self) -> ObjectWriter:
        return _Draft(self._world)

    def read(self, name: str) -> bytes:
        self._world.step(f"read {name}")
        return self._object(name)

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._world.step(f"read {name} at {offset}")
        data = self._object(name)[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise EOFError
        buffer[:] = data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._world.step(f"list {prefix}")
        # Half of it at one instant and half at another: a listing is no instant.
        names = sorted(name for name in self._world.objects if name.startswith(prefix))
        self._world.luck.shuffle(names)
        first = names[: len(names) // 2]
        yield from [ObjectInfo(name, len(self._world.objects[name])) for name in first]
        self._world.step(f"list the rest of {prefix}")
        half = frozenset(first)
        rest = sorted(n for n in self._world.objects if n.startswith(prefix) and n not in half)
        yield from [ObjectInfo(name, len(self._world.objects[name])) for name in rest]

    def delete(self, name: str) -> None:
        dies = self._world.step(f"delete {name}")
        self._object(name)
        del self._world.objects[name]
        self._world.after_change()
        if dies:
            raise Died

    def close(self) -> None:
        """Nothing is open."""

    def _object(self, name: str) -> bytes:
        try:
            return self._world.objects[validate_name(name)]
        except KeyError:
            raise ObjectMissingError(name) from None


class _Draft(ObjectWriter):
    def __init__(self, world: World) -> None:
        self._world = world
        self._data = bytearray()

    def write(self, data: Any) -> None:
        self._data += data

    def publish(self, name: str) -> None:
        dies = self._world.step(f"create {name}")
        if name in self._world.objects:
            raise ObjectExistsError(name)
        self._world.objects[validate_name(name)] = bytes(self._data)
        self._world.after_change()
        if dies:
            raise Died

    def abort(self) -> None:
        """There is nothing to drop."""


class InlineExecutor:
    """Does at once what a thread of its own would do."""

    def __init__(self, *_: object, **__: object) -> None:
        """Take what ThreadPoolExecutor takes."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments))
        except Died:
            raise
        except BaseException as err:  # noqa: BLE001 - a future keeps it
            future.set_exception(err)
        return future

    def shutdown(self, **_: object) -> None:
        """There is no thread."""
