"""Which frames to fetch, in which order: by pack and offset, a bounded window of the map at a time.

A map of any size is walked in windows of a few thousand chunks. Within a window every frame is fetched once,
whatever the number of places it goes to, and neighbours in a pack are fetched together, so that
reading a backup is a few large reads of each pack.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import HOLE, ZERO, Entry
from blocksnap.repository.lookup import Location

WINDOW_CHUNKS = 16384
_FIRST_CHUNKS = 512
_EMPTY_FOR_EACH = 4
MAX_RANGE = 4 << 20
MAX_GAP = 256 << 10


@dataclass(frozen=True, slots=True)
class FrameFetch:
    """One frame of a range and the chunk numbers that want it."""

    id: bytes
    offset: int
    length: int
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RangeFetch:
    """One read of a pack and the frames in it."""

    pack: str
    offset: int
    length: int
    frames: tuple[FrameFetch, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a map: what is empty in it, what to fetch, and which chunks no pack holds."""

    begin: int
    end: int
    holes: tuple[tuple[int, int], ...]
    zeros: tuple[tuple[int, int], ...]
    ranges: tuple[RangeFetch, ...]
    missing: tuple[tuple[tuple[int, ...], DamageError], ...] = ()


def plan_windows(
    runs: Iterator[tuple[int, int, Entry]],
    locate: Callable[[bytes], Location],
    *,
    window: int = WINDOW_CHUNKS,
) -> Iterator[Window]:
    """Turn the runs of a map, in order, into windows; the first are small, so that work begins at once.

    A window has ``window`` chunks to fetch at most, and not many times more empty ranges.
    """
    limit = min(window, _FIRST_CHUNKS)
    empty: dict[Entry, list[tuple[int, int]]] = {HOLE: [], ZERO: []}
    wanted: dict[bytes, list[int]] = {}
    begin = end = chunks = 0
    for number, count, entry in runs:
        if chunks == limit or len(empty[HOLE]) + len(empty[ZERO]) >= _EMPTY_FOR_EACH * limit:
            yield _window(begin, end, empty, wanted, locate)
            limit = min(limit * 2, window)
            empty, wanted, begin, chunks = {HOLE: [], ZERO: []}, {}, number, 0
        end = number + count
        if entry in empty:
            _extend(empty[entry], number, end)
        else:
            wanted.setdefault(entry, []).append(number)
            chunks += 1
    if end > begin:
        yield _window(begin, end, empty, wanted, locate)


def planned_ahead(windows: Iterator[Window]) -> Generator[Window, None, None]:
    """Yield windows, each planned by a thread while the one before it is brought.

    To be closed by whoever ends early. For windows whose making may run beside the writing of those before.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="blocksnap-plan") as planner:
        coming = planner.submit(next, windows, None)
        while (window := coming.result()) is not None:
            coming = planner.submit(next, windows, None)
            yield window


def _extend(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    if ranges and ranges[-1][1] == begin:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((begin, end))


def _window(
    begin: int,
    end: int,
    empty: dict[Entry, list[tuple[int, int]]],
    wanted: dict[bytes, list[int]],
    locate: Callable[[bytes], Location],
) -> Window:
    by_pack: dict[str, list[FrameFetch]] = {}
    missing: list[tuple[tuple[int, ...], DamageError]] = []
    # In the order of the index, which has many of them in each block that it reads.
    for id_, numbers in sorted(wanted.items()):
        try:
            at = locate(id_)
        except DamageError as err:
            missing.append((tuple(numbers), err))
            continue
        by_pack.setdefault(at.pack.name, []).append(FrameFetch(id_, at.offset, at.length, tuple(numbers)))
    # What is first in the volume comes first: so a restore that is interrupted has a beginning.
    in_order = sorted(by_pack.items(), key=lambda item: min(frame.numbers[0] for frame in item[1]))
    ranges = [
        fetch
        for pack, frames in in_order
        for fetch in _coalesce(pack, sorted(frames, key=lambda frame: frame.offset))
    ]
    return Window(begin, end, tuple(empty[HOLE]), tuple(empty[ZERO]), tuple(ranges), tuple(missing))


def _coalesce(pack: str, frames: list[FrameFetch]) -> Iterator[RangeFetch]:
    run: list[FrameFetch] = []
    for frame in frames:
        if run:
            end = run[-1].offset + run[-1].length
            if frame.offset - end > MAX_GAP or frame.offset + frame.length - run[0].offset > MAX_RANGE:
                yield _range(pack, run)
                run = []
        run.append(frame)
    if run:
        yield _range(pack, run)


def _range(pack: str, frames: list[FrameFetch]) -> RangeFetch:
    begin = frames[0].offset
    return RangeFetch(pack, begin, frames[-1].offset + frames[-1].length - begin, tuple(frames))
