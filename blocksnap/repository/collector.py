"""Garbage collection: give back the space of what no backup needs, while backups go on.

``plan`` looks and decides, and can be printed; ``collect`` acts. A collection that was interrupted is taken
up by the next one, and any number may run at once: what has to be agreed on is an object that exists once
(docs/design.md, 3.9, and the model in tests/model).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal

from blocksnap.backends.base import ObjectInfo
from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.documents import Backup, Condemned, Manifest, Root, Sweep
from blocksnap.repository.epochs import Epoch, create_part, read_epoch
from blocksnap.repository.fencing import IsGone, Run, fence, is_silent, read_runs, settled_runs
from blocksnap.repository.frame import FrameType
from blocksnap.repository.marking import (
    LAST_RESORT,
    TRUSTED,
    UNUSABLE,
    Marker,
    maps_of,
    mark_backups,
    raise_mistaken,
    require_nothing_lost,
)
from blocksnap.repository.missing import MissingManifestsError, missing_manifests
from blocksnap.repository.moving import copy_needed
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex
from blocksnap.repository.pack import PackId
from blocksnap.repository.repository import Aside, Repository
from blocksnap.repository.sweeping import execute_sweep, tidy
from blocksnap.repository.table import TornTableError
from blocksnap.repository.victims import Choice, Limits, PackUse, choose_victims
from blocksnap.repository.writer import RepositoryWriter

Roots = Callable[[Root], MapRoot]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a collection would begin with: marks, and the fate of every pack."""

    choice: Choice
    marked: tuple[str, ...]
    forgotten: tuple[str, ...]
    aside: tuple[str, ...]
    manifests: tuple[str, ...]
    backups: int
    nodes: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.manifests and not self.choice.of("drop") and not self.choice.of("copy")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a collection has done: all, nothing as there was nothing, or its part until a run ends."""

    state: Literal["nothing", "done", "waiting"]
    plan: Plan | None
    sweep: Sweep | None = None
    waiting: tuple[Run, ...] = ()
    problems: tuple[DamageError, ...] = ()


class Collector:
    """One collection.

    ``roots`` turns a stored root into one, ``advance`` is told of bytes that were copied.
    """

    def __init__(
        self,
        repository: Repository,
        roots: Roots,
        limits: Limits,
        *,
        now: Callable[[], datetime],
        advance: Callable[[int], None],
    ) -> None:
        self._repository = repository
        self._roots = roots
        self._limits = limits
        self._now = now
        self._advance = advance
        self._loader = NodeLoader(repository)
        self._index: NumberedIndex | None = None
        self._marker: Marker | None = None

    def plan(self) -> Plan:
        """Mark, and choose what is to go.

        Raises DamageError when anything that would have to be marked cannot be read: then nothing may go.
        """
        while True:
            try:
                return self._plan()
            except TornTableError as err:
                self._repository.index.distrust(err)

    def _plan(self) -> Plan:
        repository = self._repository
        # Forgotten first, then manifests, then the index: what is seen of one is complete in the next. What
        # is set aside after this is not known to the epoch, and then nothing is deleted in it.
        aside = repository.aside()
        forgotten = {id_ for each in repository.forgotten().values() for id_ in each.backups}
        manifests = [manifest for manifest, _ in repository.manifests()]
        repository.refresh_index()
        _require_sound(repository)
        packs = list(repository.backend.list("packs/"))
        self._require_manifests(packs, any_manifest=bool(manifests))
        sizes = {info.name: info.size for info in packs}
        index = self._index = NumberedIndex(repository.index.views)
        marker = self._marker = self._new_marker(index, sizes, aside)
        needed = [each for manifest in manifests for each in manifest.backups if each.id not in forgotten]
        mark_backups(marker, needed, self._roots)
        if marker.mistaken:
            fresh = partial(self._new_marker, index, sizes, aside)
            raise_mistaken(needed, fresh, self._roots)
        require_nothing_lost(marker)
        return Plan(
            choice=choose_victims(self._uses(index, marker, sizes, aside), self._limits),
            marked=tuple(sorted(manifest.writer for manifest in manifests)),
            forgotten=tuple(sorted(forgotten)),
            aside=tuple(sorted(aside.runs)),
            manifests=tuple(sorted(each.writer for each in manifests if _is_given_up(each, forgotten))),
            backups=len(needed),
            nodes=marker.nodes,
        )

    def collect(self, writer: RepositoryWriter, is_gone: IsGone) -> Outcome:
        """Collect as far as it goes now: a run that is at work may have to be waited for."""
        while True:
            try:
                return self._collect(writer, is_gone)
            except TornTableError as err:
                # It goes on where it was, as after any interruption.
                self._repository.index.distrust(err)

    def _collect(self, writer: RepositoryWriter, is_gone: IsGone) -> Outcome:
        epoch, plan = read_epoch(self._repository), None
        problems: tuple[DamageError, ...] = ()
        # Before any run without a manifest is shut out, as that would take the name of one that is gone.
        self._require_manifests(self._repository.backend.list("packs/"))
        self._shut_out_silent(writer, is_gone)
        if not epoch.is_open:
            plan = self.plan()
            if plan.is_empty:
                self._finish(writer, epoch.number)
                return Outcome("nothing", plan)
            epoch, problems = self._condemn(writer, epoch.number + 1, plan)
            if not epoch.is_open:
                # Another collector has been here before us, and is through with it.
                self._finish(writer, epoch.number)
                return Outcome("done", plan, epoch.sweep, problems=problems)
        condemned = epoch.condemned
        if condemned is None:
            raise DamageError(f"epoch {epoch.number} of garbage collection has no beginning")
        waiting = self._settle(epoch.number, is_gone) if epoch.sweep is None else ()
        if waiting:
            fence(self._repository, writer.id.hex(), self._now())
            return Outcome("waiting", plan, waiting=waiting, problems=problems)
        sweep = epoch.sweep or self._decide(writer, condemned)
        self._loader.forget()
        self._index = self._marker = None
        execute_sweep(self._repository, writer, sweep, self._now())
        self._finish(writer, epoch.number)
        return Outcome("done", plan, sweep, problems=problems)

    def _finish(self, writer: RepositoryWriter, epoch: int) -> None:
        fence(self._repository, writer.id.hex(), self._now())
        tidy(self._repository, epoch, self._now())

    def _condemn(
        self, writer: RepositoryWriter, number: int, plan: Plan
    ) -> tuple[Epoch, tuple[DamageError, ...]]:
        if self._index is None or self._marker is None:
            raise ValueError("nothing was planned")
        moved = copy_needed(
            self._repository, writer, self._index, self._marker, plan.choice.of("copy"), self._advance
        )
        writer.require_young()
        create_part(
            self._repository,
            "condemned",
            Condemned(
                epoch=number,
                run=writer.id.hex(),
                time=self._now(),
                packs=tuple(
                    sorted(
                        pack.name
                        for pack in (*plan.choice.of("drop"), *moved.packs)
                        if pack.name not in moved.precious
                    )
                ),
                marked=plan.marked,
                forgotten=plan.forgotten,
                aside=plan.aside,
            ),
        )
        # Ours, or that of a collector who was first, who may be further already.
        return read_epoch(self._repository), moved.problems

    def _shut_out_silent(self, writer: RepositoryWriter, is_gone: IsGone) -> None:
        """Shut out the silent runs, so that what they left is garbage; one that has committed stays."""
        for run in self._unsettled():
            if run.writer != writer.id.hex() and is_silent(run, self._now(), is_gone):
                fence(self._repository, run.writer, self._now())

    def _settle(self, number: int, is_gone: IsGone) -> tuple[Run, ...]:
        """Shut out the silent runs, and return those that have to be waited for."""
        waiting = []
        for run in self._unsettled():
            if run.epoch >= number or (run.record and run.record.collects):
                continue
            if is_silent(run, self._now(), is_gone):
                # If it has just committed, its manifest is marked like any other.
                fence(self._repository, run.writer, self._now())
            else:
                waiting.append(run)
        return tuple(waiting)

    def _unsettled(self) -> list[Run]:
        # Runs first: what is settled when its record is read is settled when manifests are listed.
        runs = read_runs(self._repository)
        settled = settled_runs(self._repository)
        return [run for run in runs.values() if run.writer not in settled]

    def _decide(self, writer: RepositoryWriter, condemned: Condemned) -> Sweep:
        """Mark what was committed since, keep what has the only copy of it, and fix the rest as the sweep."""
        repository = self._repository
        manifests = {manifest.writer: manifest for manifest, _ in repository.manifests()}
        repository.refresh_index()
        aside = repository.aside()
        _require_sound(repository)
        self._require_manifests(repository.backend.list("packs/"), any_manifest=bool(manifests))
        if aside.runs <= set(condemned.aside):
            kept = self._needed_since(condemned, manifests, aside)
        else:
            # What was marked may be what has turned out damaged since, and its twin condemned.
            kept = set(condemned.packs)
        forgotten, marked = set(condemned.forgotten), set(condemned.marked)
        # One that slept until the objects of the epoch had gone would decide it once more.
        writer.require_young()
        return create_part(
            repository,
            "sweep",
            Sweep(
                epoch=condemned.epoch,
                run=writer.id.hex(),
                time=self._now(),
                packs=tuple(name for name in condemned.packs if name not in kept),
                manifests=tuple(
                    sorted(
                        run
                        for run, manifest in manifests.items()
                        if run in marked and _is_given_up(manifest, forgotten)
                    )
                ),
            ),
        )

    def _require_manifests(self, packs: Iterable[ObjectInfo], *, any_manifest: bool = True) -> None:
        gone = missing_manifests(self._repository, packs, self._now(), any_manifest=any_manifest)
        if gone:
            raise MissingManifestsError(gone)

    def _needed_since(self, condemned: Condemned, manifests: dict[str, Manifest], aside: Aside) -> set[str]:
        """Return the condemned packs that have the only copy of something that new backups need."""
        marked, forgotten = set(condemned.marked), set(condemned.forgotten)
        doomed = set(condemned.packs)
        known = {
            backup.id: backup
            for run, manifest in manifests.items()
            if run in marked
            for backup in manifest.backups
            if backup.id not in forgotten
        }
        sizes = {info.name: info.size for info in self._repository.backend.list("packs/")}
        index = NumberedIndex(self._repository.index.views)
        # What is condemned comes behind the rest. What was set aside does not count beside it, as that may be
        # a harmed copy, nor does it count that it was once given up.
        there = {name: size for name, size in sizes.items() if name not in aside.packs}
        marker = self._new_marker(index, there, aside, last_resort=doomed - aside.packs)
        for run in sorted(manifests.keys() - marked):
            for backup in manifests[run].backups:
                if backup.id not in forgotten:
                    self._mark_new(marker, backup, known.get(backup.parent or ""))
        names = [pack.name for pack in index.packs]
        chosen = {number for number, name in enumerate(names) if name in doomed}
        rows = index.entries() if marker.nodes + marker.leaves else ()
        kept = {names[row[2]] for row in rows if row[2] in chosen and marker.is_marked(row[1])}
        for id_ in sorted(marker.lost | marker.mistaken):
            homes = {names[row.pack] for row in index.find(id_)} & sizes.keys()
            if homes:
                kept |= homes
                marker.lost.discard(id_)
        require_nothing_lost(marker)
        return kept

    def _mark_new(self, marker: Marker, backup: Backup, parent: Backup | None) -> None:
        # What it shares with a parent that was marked needs no second look.
        known = self._roots_of(parent) if parent else {}
        for leaf, root in self._roots_of(backup).items():
            if leaf in known:
                marker.mark_difference(root, known[leaf], leaf)
            else:
                marker.mark([root], leaf)

    def _roots_of(self, backup: Backup) -> dict[FrameType, MapRoot]:
        """Return the maps of a backup by what their leaves lead to."""
        return {leaf: self._roots(root) for leaf, root in maps_of(backup).items()}

    def _new_marker(
        self,
        index: NumberedIndex,
        sizes: Mapping[str, int],
        aside: Aside,
        last_resort: Container[str] | None = None,
    ) -> Marker:
        """Return a marker that believes what is there; ``last_resort``, or what is set aside, last."""
        last_resort = aside.packs if last_resort is None else last_resort
        trust = [
            (LAST_RESORT if sizes.get(pack.name) else UNUSABLE)
            if pack.name in last_resort
            else (TRUSTED if sizes.get(pack.name) == size else UNUSABLE)
            for pack, size in zip(index.packs, index.sizes, strict=True)
        ]
        return Marker(index, trust, self._loader, gives_up=aside.lost.__contains__)

    def _uses(
        self, index: NumberedIndex, marker: Marker, sizes: dict[str, int], aside: Aside
    ) -> Sequence[PackUse]:
        needed, frames = [0] * len(index.packs), [0] * len(index.packs)
        data = [True] * len(index.packs)
        for _, number, pack, _, length, kind in index.entries():
            if kind != FrameType.DATA:
                data[pack] = False
            frames[pack] += length
            if marker.is_marked(number):
                needed[pack] += length
        # Runs after packs: a pack whose run is not announced here is older than the records that were kept.
        runs, settled = read_runs(self._repository), settled_runs(self._repository)
        places = {pack.name: number for number, pack in enumerate(index.packs)}
        uses = []
        for name, size in sizes.items():
            place = places.get(name)
            try:
                owner = PackId.parse(name).writer.hex()
            except ValueError:
                continue
            uses.append(
                PackUse(
                    name=name,
                    size=size,
                    frame_bytes=0 if place is None else frames[place],
                    needed_bytes=0 if place is None else needed[place],
                    data=place is not None and data[place],
                    settled=owner in settled or owner not in runs,
                    indexed=place is not None,
                    aside=name in aside.packs,
                )
            )
        return uses


def _is_given_up(manifest: Manifest, forgotten: set[str]) -> bool:
    return all(backup.id in forgotten for backup in manifest.backups)


def _require_sound(repository: Repository) -> None:
    """What cannot be read cannot be marked, and whatever it needs would go."""
    if repository.damage:
        problem = repository.damage[0]
        raise DamageError(
            f"{problem.brief}; so it cannot be told what is needed, and nothing was deleted",
            resolution="run: blocksnap check, and repair what it names; then prune again",
        ) from problem
