"""Each call that a repair makes fails, is the last one, or waits while others come and go."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from harm import HARMS, Harm, HarmedStory
from simulated_story import CHUNK, Clock, Story, small_world
from trap import Trap

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError, StorageError
from blocksnap.operations import repair as repair_module
from blocksnap.repository.errors import FencedError
from blocksnap.repository.repair_plan import RepairPlan
from blocksnap.repository.writer import Author
from support.simulated_world import Died

PLAYED = HARMS if os.environ.get("BLOCKSNAP_SOAK") else HARMS[1:2]
WAYS = ("fails", "dies before", "dies after", "waits")


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_world(monkeypatch, tmp_path)
    monkeypatch.setattr(repair_module, "this_author", lambda: Author("host", "host"))
    monkeypatch.setattr(repair_module, "is_gone", lambda _: True)
    monkeypatch.setattr(repair_module, "datetime", Clock)


class Stage:
    """A harmed repository that is made once, and played from the same beginning again and again."""

    def __init__(self, harm: Harm) -> None:
        self.trap = Clock.world = Trap()
        story = Story(0, self.trap)
        story.always_gone = True
        for volume in "abab":
            story.back_up(volume)
        harmed = HarmedStory(story)
        harm(harmed)
        harmed.note_losses()
        self._harmed = harmed
        self._objects = dict(self.trap.objects)
        self._contents, self._lost = dict(story.contents), dict(harmed.lost)

    def begin(self) -> HarmedStory:
        self.trap.reset()
        # What is made anew has the names of before, and other content.
        shutil.rmtree(Story.cache, ignore_errors=True)
        self.trap.objects.clear()
        self.trap.objects.update(self._objects)
        story = self._harmed.story
        story.contents, story.forgotten = dict(self._contents), set()
        self._harmed.lost = dict(self._lost)
        return self._harmed


def others(harmed: HarmedStory) -> Callable[[], None]:
    """A backup, and a collection that shuts everybody out; in a damaged repository either may refuse."""

    def come_and_go() -> None:
        # The same each time, so that all calls between two that write lead to one state.
        lucks = (harmed.world.luck, harmed.story.luck)
        before = [luck.getstate() for luck in lucks]
        for luck in lucks:
            luck.seed(7)
        for work in (lambda: harmed.back_up("a"), harmed.story.prune):
            with suppress(BlocksnapError):
                work()
        for luck, state in zip(lucks, before, strict=True):
            luck.setstate(state)

    return come_and_go


@pytest.mark.timeout(0)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("harm", PLAYED, ids=lambda harm: harm.__name__)
def test_whichever_call_of_a_repair_goes_wrong(harm: Harm, way: str) -> None:
    stage = Stage(harm)
    expected = lost_chunks(stage.begin().repair())
    number = -1
    seen: set[frozenset[tuple[str, bytes]]] = set()
    while True:
        number += 1
        harmed = stage.begin()
        stage.trap.set(number, way, others(harmed))
        reached = play(harmed, stage.trap)
        stage.trap.disarm()
        if not reached:
            break
        # Calls that only read leave what the last one that wrote has left.
        state = frozenset(harmed.world.objects.items())
        if state in seen:
            continue
        seen.add(state)
        harmed.check(repaired=False)
        # Whatever was left behind, the next repair finishes it, and loses no more than an undisturbed one.
        plan = harmed.repair()
        assert {(id_, chunk) for id_, chunk in lost_chunks(plan) if id_ in harmed.known} <= expected, number
        harmed.check()
        harmed.check_repaired(plan)
        assert not harmed.repair().acts
        if plan.lost:
            harmed.repair(accept_loss=True)
        harmed.story.prune()
        harmed.story.prune()
        harmed.check()
    assert number > 50
    assert len(seen) > 2


def lost_chunks(plan: RepairPlan) -> set[tuple[str, int]]:
    return {
        (loss.backup, chunk)
        for loss in plan.losses
        for chunk in range(loss.offset // CHUNK, -(-(loss.offset + loss.length) // CHUNK))
    }


def play(harmed: HarmedStory, trap: Trap) -> bool:
    """Repair with one call going wrong; tell whether there were as many."""
    try:
        harmed.repair()
    except (Died, StorageError):
        return True
    except (FencedError, ObjectMissingError):
        # The others have shut it out while it waited, and may have collected what it had just made.
        assert trap.way == "waits"
    return trap.sprung


def test_nothing_of_it_depends_on_how_the_stage_is_set() -> None:
    stage = Stage(HARMS[0])
    before = copy.deepcopy(stage.begin().world.objects)
    stage.begin().repair()
    assert stage.begin().world.objects == before
