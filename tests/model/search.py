"""Every order of events of the protocol's model, tried one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol import (
    COLLECTORS,
    WRITERS,
    Bounds,
    Collector,
    Rules,
    Storage,
    Writer,
    collector_events,
    first_storage,
    forget_events,
    lost_blobs,
    writer_events,
)


@dataclass(frozen=True)
class Found:
    """What a search has seen: the states, and the events that lead to a loss, if there is one."""

    states: int
    loss: tuple[str, ...] | None
    events: frozenset[str]


@dataclass(frozen=True)
class Scene:
    """Where a search begins; processes that are not named have not begun."""

    storage: Storage = field(default_factory=first_storage)
    writers: tuple[Writer, ...] = ()
    collectors: tuple[Collector, ...] = ()


class _Numbers:
    """Gives equal things equal small numbers."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._things: list[object] = []

    def of(self, thing: object) -> int:
        """Return the number of a thing."""
        number = self._numbers.setdefault(thing, len(self._things))
        if number == len(self._things):
            self._things.append(thing)
        return number

    def thing(self, number: int) -> Any:
        """Return the thing of a number."""
        return self._things[number]


class _Steps:
    """What each process can do next, worked out once for each pair of its own state and the storage."""

    def __init__(self, rules: Rules, bounds: Bounds) -> None:
        self._rules, self._bounds = rules, bounds
        self.storages, self.locals = _Numbers(), _Numbers()
        self._known: dict[tuple[int, int, int], list[tuple[str, int, int]]] = {}
        self.lossy: dict[int, bool] = {}

    def of(self, process: int, local: int, storage: int) -> list[tuple[str, int, int]]:
        """Return the events of a process, with its own state and the storage after each."""
        found = self._known.get((process, local, storage))
        if found is None:
            found = [
                (event, self.locals.of(after), self.note(stored))
                for event, after, stored in self._events(
                    process, self.locals.thing(local), self.storages.thing(storage)
                )
            ]
            self._known[process, local, storage] = found
        return found

    def _events(
        self, process: int, local: Any, storage: Storage
    ) -> Iterator[tuple[str, Writer | Collector | None, Storage]]:
        if process == 0:
            yield from forget_events(storage, self._bounds)
        elif process <= self._bounds.writers:
            name = WRITERS[process - 1]
            for event, writer, stored in writer_events(name, local, storage, self._rules):
                yield f"{name} {event}", writer, stored
        else:
            name = COLLECTORS[process - 1 - self._bounds.writers]
            for event, collector, stored in collector_events(name, local, storage, self._rules, self._bounds):
                yield f"{name} {event}", collector, stored

    def note(self, storage: Storage) -> int:
        """Return the number of a storage."""
        number = self.storages.of(storage)
        if number not in self.lossy:
            self.lossy[number] = bool(lost_blobs(storage))
        return number


def search(rules: Rules, bounds: Bounds, scene: Scene | None = None) -> Found:
    """Try every order of events, and stop at the first state in which a backup has lost something."""
    steps = _Steps(rules, bounds)
    scene = scene or Scene()
    first = _first_state(scene, bounds, steps)
    key = _Keys(steps, bounds)
    seen = {key.of(first)}
    events: set[str] = set()
    # The way to the state that is being looked at, and for each state on it what is still to be tried.
    path: list[str] = []
    stack = [_successors(first, steps)]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            if path:
                path.pop()
            continue
        event, state = found
        number = key.of(state)
        if number in seen:
            continue
        seen.add(number)
        events.add(event.split(" ", 1)[1])
        path.append(event)
        if steps.lossy[state[0]]:
            return Found(len(seen), tuple(path), frozenset(events))
        stack.append(_successors(state, steps))
    return Found(len(seen), None, frozenset(events))


def _first_state(scene: Scene, bounds: Bounds, steps: _Steps) -> tuple[int, ...]:
    writers = (*scene.writers, Writer(), Writer())[: bounds.writers]
    collectors = (*scene.collectors, Collector(), Collector())[: bounds.collectors]
    locals_ = (steps.locals.of(each) for each in (None, *writers, *collectors))
    return (steps.note(scene.storage), *locals_)


class _Keys:
    """Gives a state its number, and the same to the state in which the two collectors have changed places.

    Nothing tells collectors apart but their names, so what one of two such states leads to, the other does.
    """

    def __init__(self, steps: _Steps, bounds: Bounds) -> None:
        self._steps = steps
        self._pairs = bounds.collectors == len(COLLECTORS)
        self._twins: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def of(self, state: tuple[int, ...]) -> int:
        """Return the number, which takes a third of the memory that the state does."""
        number = _packed(state)
        if not self._pairs:
            return number
        storage = self._twin(0, state[0], self._steps.storages)
        *others, one, two = (self._twin(1, each, self._steps.locals) for each in state[1:])
        return min(number, _packed((storage, *others, two, one)))

    def _twin(self, kind: int, number: int, numbers: _Numbers) -> int:
        twin = self._twins[kind].get(number)
        if twin is None:
            twin = self._twins[kind][number] = numbers.of(_renamed(numbers.thing(number)))
            self._twins[kind][twin] = number
        return twin


def _renamed(thing: Any) -> Any:
    """Return a state in which each collector's packs bear the other one's name."""
    if isinstance(thing, str):
        name = thing[:2]
        return COLLECTORS[1 - COLLECTORS.index(name)] + thing[2:] if name in COLLECTORS else thing
    if isinstance(thing, frozenset):
        return frozenset(_renamed(each) for each in thing)
    if isinstance(thing, tuple):
        parts = [_renamed(each) for each in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else tuple(parts)
    return thing


def _packed(state: tuple[int, ...]) -> int:
    number = 0
    for each in state:
        number = number << 24 | each
    return number


def _successors(state: tuple[int, ...], steps: _Steps) -> Iterator[tuple[str, tuple[int, ...]]]:
    storage = state[0]
    for process in range(len(state) - 1):
        for event, local, stored in steps.of(process, state[process + 1], storage):
            yield event, (stored, *state[1 : process + 1], local, *state[process + 2 :])
