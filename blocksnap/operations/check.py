"""Check a repository, all of it or as much as there is time for, and remember what was read."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from blocksnap.backends.base import Backend
from blocksnap.errors import StorageError
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.check_memory import CheckMemory
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.repository.check import Checker
from blocksnap.repository.checked import load_states, store_checked
from blocksnap.repository.documents import Checked
from blocksnap.repository.findings import CheckResult
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository, load_config
from blocksnap.repository.scrubbing import (
    ALL,
    CONTENTS,
    HASHES,
    Budget,
    PackState,
    PackVerdict,
    choose_packs,
    hash_without_key,
    read_packs,
)
from blocksnap.system.host import host_name

_LOCAL_SECONDS, _STORED_SECONDS = 10.0, 600.0
"""How often what was read is written down: a check that is killed has read no more than that in vain."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How deep a check goes, and how far; packs found good after ``good_since`` are not read again."""

    level: int = 2
    budget: Budget = ALL
    good_since: datetime | None = None


def check_repository(
    repository: Repository, state_directory: str, options: CheckOptions, report: Reporter
) -> CheckResult:
    """Look at the structure and, from level 3 on, at what is stored; all that is wrong is told.

    Raises MissingRightError, before anything is read, where the key may not read what the level needs.
    """
    if options.level >= CONTENTS:
        repository.keys.require(Right.READ)
    checker = Checker(repository, map_root, report.advance, level=options.level)
    checker.check_structure()
    if options.level >= HASHES:
        memory = CheckMemory(state_directory, repository.config.id)
        memory.keep_only(checker.sizes)
        states = memory.merged_with(load_states(repository))
        # What was set aside is known to be damaged, and what it was replaced by is looked at.
        aside = repository.aside().packs
        sizes = {name: size for name, size in checker.sizes.items() if name not in aside}
        names = _choose(sizes, states, options)
        with (
            phase(report, "reading packs", sum(sizes[name] for name in names)),
            _notes(options.level, memory, repository, report) as notes,
        ):
            checker.check_packs(names, options.budget, notes.add)
    checker.name_losses()
    _tell(checker.result, report)
    return checker.result


def scrub(
    repository: Repository, sizes: Mapping[str, int], memory: CheckMemory, report: Reporter
) -> dict[str, PackState]:
    """Compare packs with the hashes in their names; return what is known of each now."""
    with (
        phase(report, "reading packs", sum(sizes.values())),
        _notes(HASHES, memory, repository, report) as notes,
    ):
        for verdict in read_packs(
            sorted(sizes), ALL, sizes, lambda name: hash_without_key(repository.backend, name, sizes[name])
        ):
            notes.add(verdict)
            report.advance(verdict.size)
    return memory.states


def check_without_key(
    backend: Backend, state_directory: str, options: CheckOptions, report: Reporter
) -> CheckResult:
    """Compare every pack with the hash in its name, which takes no passphrase; nothing else is looked at."""
    config, _ = load_config(backend)
    result = CheckResult(level=HASHES)
    sizes = {info.name: info.size for info in backend.list("packs/")}
    memory = CheckMemory(state_directory, config.id)
    names = _choose(sizes, memory.states, options)
    result.packs, result.packs_left = len(sizes), len(names)
    with (
        phase(report, "reading packs", sum(sizes[name] for name in names)),
        _notes(HASHES, memory, None, report) as notes,
    ):
        for verdict in read_packs(
            names, options.budget, sizes, lambda name: hash_without_key(backend, name, sizes[name])
        ):
            result.packs_left -= 1
            result.packs_read += 1
            result.read_bytes += verdict.size
            result.findings += verdict.findings
            report.advance(verdict.size)
            notes.add(verdict)
    _tell(result, report)
    return result


def _choose(sizes: Mapping[str, int], states: Mapping[str, PackState], options: CheckOptions) -> list[str]:
    return choose_packs(
        sizes,
        states,
        level=options.level,
        good_since=options.good_since,
        luck=random.Random(),  # noqa: S311 - only an order
    )


def _tell(result: CheckResult, report: Reporter) -> None:
    for finding in result.findings:
        report.event("finding", severity=finding.severity, object=finding.object, message=finding.message)


class _Notes:
    """Writes down what was read, now and then and at the end: on this host, and in the repository."""

    def __init__(
        self, level: int, memory: CheckMemory, repository: Repository | None, report: Reporter
    ) -> None:
        self._level, self._memory = level, memory
        self._repository, self._report = repository, report
        self._good: list[str] = []
        self._bad: list[str] = []
        self._kept = self._stored = time.monotonic()

    def add(self, verdict: PackVerdict) -> None:
        """Note what was found in one pack."""
        if verdict.is_good is not None:
            (self._good if verdict.is_good else self._bad).append(verdict.name)
        now = time.monotonic()
        if now - self._stored >= _STORED_SECONDS:
            self.write()
        elif now - self._kept >= _LOCAL_SECONDS:
            self._memory.note([self._document()])
            self._kept = now

    def write(self) -> None:
        """Write everything down that is not yet."""
        if not self._good and not self._bad:
            return
        document = self._document()
        self._memory.note([document])
        if self._repository is not None:
            try:
                store_checked(self._repository, document)
            except StorageError as err:
                # A storage that takes nothing now can be checked nevertheless.
                self._report.event("unrecorded", message=err.brief)
        self._good, self._bad = [], []
        self._kept = self._stored = time.monotonic()

    def _document(self) -> Checked:
        return Checked(
            run=secrets.token_hex(16),
            time=datetime.now(UTC),
            hostname=host_name(),
            level=4 if self._level >= CONTENTS else 3,
            good=tuple(self._good),
            bad=tuple(self._bad),
        )


@contextmanager
def _notes(
    level: int, memory: CheckMemory, repository: Repository | None, report: Reporter
) -> Iterator[_Notes]:
    notes = _Notes(level, memory, repository, report)
    try:
        yield notes
    finally:
        notes.write()
