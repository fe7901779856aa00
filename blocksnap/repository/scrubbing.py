"""Read packs whole: do their bytes have the hash in their name, and does every frame open?

Of the four levels of a check this is the third, for which no key is needed, and the fourth. Both read all
that is stored, which takes hours where there is much; so there is a budget, what was read last is read last
again, and equals come in an order of chance, that no pack is for ever behind another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime

from blocksnap.backends.base import Backend
from blocksnap.errors import DamageError
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.findings import Finding, finding_of
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.pack import (
    HEADER,
    PackId,
    PackRow,
    check_header,
    frame_at,
    hash_pack,
    read_footer,
    read_pack_range,
)
from blocksnap.repository.repository import Repository

HASHES, CONTENTS = 3, 4
"""The levels of a check that read packs."""
_THREADS = 2
_BLOCK = 5 << 20
"""Larger than the frame of the largest chunk."""


@dataclass(frozen=True, slots=True)
class PackState:
    """When a pack was last found good, by level, and whether the last look found it bad."""

    hashed: datetime | None = None
    opened: datetime | None = None
    is_bad: bool = False

    def good_at(self, level: int) -> datetime | None:
        """Return when it was last found good at a level, or a higher one."""
        times = [when for when in (self.opened, self.hashed if level <= HASHES else None) if when]
        return None if self.is_bad else max(times, default=None)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may be read in one go: bytes, seconds, or all."""

    size_bytes: int | None = None
    seconds: float | None = None

    def is_spent(self, read_bytes: int, began: float) -> bool:
        """Tell whether no further pack is to be begun; the first one always is."""
        over_size = self.size_bytes is not None and read_bytes >= self.size_bytes
        return over_size or (self.seconds is not None and time.monotonic() - began >= self.seconds)


ALL = Budget()


@dataclass(slots=True)
class PackVerdict:
    """What was found in one pack; ``is_good`` is None when it was removed meanwhile, or is no pack."""

    name: str
    size: int
    is_good: bool | None = True
    findings: list[Finding] = field(default_factory=list)
    bad_ids: set[bytes] = field(default_factory=set)
    """Ids of frames in it that do not open."""


def choose_packs(
    names: Iterable[str],
    states: Mapping[str, PackState],
    *,
    level: int,
    good_since: datetime | None,
    luck: random.Random,
) -> list[str]:
    """Return the packs to read, in order: known bad ones, those never read, then the longest unread.

    Those found good at this level or a higher one after ``good_since`` are left out.
    """
    ranked = []
    for name in names:
        state = states.get(name, PackState())
        good = state.good_at(level)
        if good_since is not None and good is not None and good > good_since:
            continue
        ranked.append((not state.is_bad, good.timestamp() if good else 0.0, luck.random(), name))
    return [name for *_, name in sorted(ranked)]


def read_packs(
    names: Iterable[str], budget: Budget, sizes: Mapping[str, int], read: Callable[[str], PackVerdict]
) -> Iterator[PackVerdict]:
    """Read packs, two at a time, as far as the budget goes; yield what was found as it comes."""
    began, begun_bytes = time.monotonic(), 0
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="blocksnap-check") as pool:
        pending: set[Future[PackVerdict]] = set()
        try:
            for name in names:
                if begun_bytes and budget.is_spent(begun_bytes, began):
                    break
                begun_bytes += sizes[name]
                pending.add(pool.submit(read, name))
                if len(pending) >= _THREADS:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def hash_without_key(backend: Backend, name: str, size: int) -> PackVerdict:
    """Check one pack at level 3, for which nothing but its name has to be known."""

    def read(pack: str, offset: int, buffer: memoryview) -> None:
        read_pack_range(backend, pack, offset, buffer)

    verdict = PackVerdict(name, size)
    try:
        PackId.parse(name)
        if not hash_pack(read, name, size):
            _call_bad(verdict, "its bytes do not have the hash in its name")
    except ValueError:
        verdict.findings.append(Finding("garbage", name, "its name is not that of a pack"))
        verdict.is_good = None
    except DamageError as err:
        _call_bad(verdict, err.brief)
    return _unless_removed(backend, verdict)


def check_pack(repository: Repository, name: str, size: int, level: int) -> PackVerdict:
    """Check one pack; of one without its hash every frame is opened that the keys can open."""
    verdict = hash_without_key(repository.backend, name, size)
    if verdict.is_good is None or (verdict.is_good and level < CONTENTS):
        return verdict
    whole = verdict.is_good
    try:
        _open_frames(repository, verdict)
    except (DamageError, NewerFormatError) as err:
        # What does not have its hash is not believed to be of a later version.
        verdict.findings.append(finding_of(name, err) if whole else Finding("damage", name, err.brief))
        verdict.is_good = whole and isinstance(err, NewerFormatError)
    return _unless_removed(repository.backend, verdict)


def _unless_removed(backend: Backend, verdict: PackVerdict) -> PackVerdict:
    """What is gone since the packs were listed was removed by a garbage collection."""
    if verdict.is_good is False and not backend.exists(verdict.name):
        return PackVerdict(verdict.name, verdict.size, is_good=None)
    return verdict


def _call_bad(verdict: PackVerdict, message: str) -> None:
    verdict.is_good = False
    verdict.findings.append(Finding("damage", verdict.name, message))


def _open_frames(repository: Repository, verdict: PackVerdict) -> None:
    name, size = verdict.name, verdict.size
    buffer = memoryview(bytearray(_BLOCK))
    if size < HEADER.size:
        raise DamagedObjectError(name, "cut short")
    repository.read_range(name, 0, buffer[: HEADER.size])
    check_header(bytes(buffer[: HEADER.size]), PackId.parse(name), repository.keys.repository_id)
    may_read = repository.keys.may(Right.READ)
    for row in read_footer(repository.backend, repository.keys, name, size):
        if row.type != FrameType.DATA or may_read:
            _open_frame(repository, row, buffer, verdict)


def _open_frame(repository: Repository, row: PackRow, buffer: memoryview, verdict: PackVerdict) -> None:
    name = verdict.name
    try:
        if row.length > len(buffer):
            raise DamagedObjectError(name, "a frame is longer than any may be")
        frame = buffer[: row.length]
        repository.read_range(name, row.offset, frame)
        frame_at(frame, row, name)
        repository.opener().open(frame, where=f"frame at {row.offset} of {name}", kind=row.type, id_=row.id)
    except DamageError as err:
        verdict.findings.append(finding_of(name, err))
        verdict.is_good = False
        verdict.bad_ids.add(row.id)
    except NewerFormatError as err:
        verdict.findings.append(finding_of(name, err))
