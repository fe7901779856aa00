"""Damage in a simulated repository, and what it must have cost: no more is allowed to be lost afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable

from simulated_story import CHUNKS, Outside, Story

from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.check import Checker
from blocksnap.repository.frame import FrameType
from blocksnap.repository.map_losses import MapLosses
from blocksnap.repository.pack import PackRow, read_footer
from blocksnap.repository.repair_plan import RepairPlan
from blocksnap.repository.repository import Repository

_BODY = 80
"""An offset within a frame that is behind its header."""


class HarmedStory:
    """A story in whose repository something was destroyed, and what of its backups nothing can bring back."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.world = story.world
        # The story's own look does not know what is lost.
        self.world.after_change = lambda: None
        self.lost: dict[str, set[int]] = {}
        """Chunks of each backup that may be lost; of one that was made since, what its parent may lack."""
        self._dead: set[tuple[str, int]] = set()
        self._gone: frozenset[bytes] = frozenset()
        self.known = frozenset(story.contents)
        self._rows = self._all_rows()

    def outside(self) -> Repository:
        return Repository.open(Outside(self.world), lambda: None)

    def packs_with(self, kind: FrameType) -> list[str]:
        """Return the packs that have frames of a type, the fullest first."""
        counts = {name: sum(row.type == kind for row in rows) for name, rows in self._rows.items()}
        return sorted((name for name in counts if counts[name]), key=lambda name: (-counts[name], name))

    def flip_frame(self, pack: str, number: int) -> None:
        """Flip a bit in the n-th frame of a pack."""
        row = self._rows[pack][number]
        self._flip(pack, row.offset + _BODY)
        self._dead.add((pack, row.offset))

    def delete_pack(self, pack: str) -> None:
        del self.world.objects[pack]
        self._dead.update((pack, row.offset) for row in self._rows[pack])

    def cut_pack(self, pack: str) -> None:
        """Take its table away, and half of its last frame."""
        row = self._rows[pack][-1]
        self.world.objects[pack] = self.world.objects[pack][: row.offset + row.length // 2]
        self._dead.add((pack, row.offset))

    def break_table(self, pack: str) -> None:
        self._flip(pack, -20)

    def segments(self) -> list[str]:
        return sorted(name for name in self.world.objects if name.startswith("index/"))

    def flip_segment(self, name: str) -> None:
        self._flip(name, 40)

    def note_losses(self) -> None:
        """Work out, from what was whole, which chunks nothing holds any more; call when harmed enough."""
        pristine = copy.copy(self.story)
        pristine.world = copy.copy(self.world)
        pristine.world.objects = self._before
        repository = Repository.open(Outside(pristine.world), lambda: None)
        frames = [(row.id, (name, row.offset)) for name, rows in self._rows.items() for row in rows]
        gone = {id_ for id_, _ in frames} - {id_ for id_, place in frames if place not in self._dead}
        self._gone = frozenset(gone)
        losses = MapLosses(MapReader(repository.load_node), gone, gone)
        for stored in repository.backups():
            ranges = losses.ranges(map_root(stored.backup.map), 0, CHUNKS)
            self.lost[stored.backup.id] = {n for begin, end in ranges for n in range(begin, end)}

    def repair(self, *, accept_loss: bool = False) -> RepairPlan:
        suspects = frozenset(name for name in self.world.objects if name.startswith("packs/"))
        return repair(self.story.open(), suspects, RepairOptions(accept_loss=accept_loss), Quiet()).plan

    def back_up(self, volume: str) -> None:
        """Back up; where the parent is too damaged to build on, everything is read, as `backup` does."""
        known = set(self.story.contents)
        self.story.back_up(volume)
        for id_ in self.story.contents.keys() - known:
            self.lost.setdefault(id_, set())

    def check(self, *, repaired: bool = True) -> None:
        """Every backup gives back what went in, but for what may be lost: anything before a repair."""
        repository = self.outside()
        visible = {stored.backup.id: stored.backup for stored in repository.backups()}
        for id_ in self.story.contents.keys() - self.story.forgotten:
            assert id_ in visible, f"{id_} is gone"
        may_lose_all = set[int]().union(*self.lost.values())
        for id_, backup in visible.items():
            content, lost = self._read(repository, id_, repaired=repaired)
            # A later backup has inherited its losses.
            if repaired:
                assert lost <= (self.lost.get(id_) or may_lose_all), id_
            wanted = self.story.contents.get(id_, content)
            assert content == {n: chunk for n, chunk in wanted.items() if n not in lost}, id_
            assert backup.id == id_

    def check_repaired(self, plan: RepairPlan) -> None:
        """What `check --read-data` finds is what the repair has told, and garbage."""
        checker = Checker(self.outside(), map_root, lambda _: None)
        checker.check_structure()
        checker.check_packs()
        checker.name_losses()
        damage = {finding.object for finding in checker.result.findings if finding.severity == "damage"}
        if not plan.lost:
            assert not damage, damage
        told = {loss.backup[:8] for loss in plan.losses}
        assert {name.split()[1] for name in damage if name.startswith("backup ")} <= told
        assert all(name.startswith(("backup ", "map node ")) for name in damage), damage

    def _read(self, repository: Repository, id_: str, *, repaired: bool) -> tuple[dict[int, bytes], set[int]]:
        (backup,) = (stored.backup for stored in repository.backups() if stored.backup.id == id_)
        content: dict[int, bytes] = {}
        lost: set[int] = set()

        def note(begin: int, end: int, _: DamageError) -> None:
            lost.update(range(begin, end))

        for number, _, entry in MapReader(repository.load_node).runs(map_root(backup.map), 0, CHUNKS, note):
            if len(entry) == 32:
                try:
                    content[number] = repository.load(FrameType.DATA, entry)
                except DamageError:
                    lost.add(number)
                    # Also of a backup that was taken before anybody knew of the damage.
                    if repaired and entry in self._gone:
                        self.lost[id_] = self.lost.get(id_, set()) | {number}
        return content, lost

    def _flip(self, name: str, position: int) -> None:
        stored = bytearray(self.world.objects[name])
        stored[position] ^= 1
        self.world.objects[name] = bytes(stored)

    def _all_rows(self) -> dict[str, tuple[PackRow, ...]]:
        self._before = dict(self.world.objects)
        repository = self.outside()
        return {
            name: read_footer(repository.backend, repository.keys, name, len(stored))
            for name, stored in sorted(self._before.items())
            if name.startswith("packs/")
        }


Harm = Callable[[HarmedStory], None]


def lose_the_index(harmed: HarmedStory) -> None:
    for name in harmed.segments():
        del harmed.world.objects[name]


def break_a_segment_and_a_frame(harmed: HarmedStory) -> None:
    harmed.flip_segment(harmed.segments()[0])
    harmed.flip_frame(harmed.packs_with(FrameType.DATA)[0], 1)


def break_a_node_and_a_table(harmed: HarmedStory) -> None:
    harmed.flip_frame(harmed.packs_with(FrameType.NODE)[0], 0)
    harmed.break_table(harmed.packs_with(FrameType.DATA)[0])
    del harmed.world.objects[harmed.segments()[0]]


def lose_and_cut_packs(harmed: HarmedStory) -> None:
    first, second, *_ = harmed.packs_with(FrameType.DATA)
    harmed.delete_pack(first)
    harmed.cut_pack(second)


HARMS: tuple[Harm, ...] = (
    lose_the_index,
    break_a_segment_and_a_frame,
    break_a_node_and_a_table,
    lose_and_cut_packs,
)
