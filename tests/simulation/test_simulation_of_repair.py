"""Backups, collections and repairs at once, in harmed repositories and worlds where everything goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from harm import HARMS, HarmedStory
from simulated_story import Clock, Story, small_world

from blocksnap.errors import BlocksnapError
from blocksnap.operations import repair as repair_module
from blocksnap.repository.writer import Author

SEEDS = int(os.environ.get("BLOCKSNAP_SEEDS", "40"))
FIRST_SEED = int(os.environ.get("BLOCKSNAP_FIRST_SEED", "0"))


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_world(monkeypatch, tmp_path)
    monkeypatch.setattr(repair_module, "this_author", lambda: Author("host", "host"))
    monkeypatch.setattr(repair_module, "datetime", Clock)


def often(work: Callable[[], object], times: int) -> Callable[[], None]:
    """Do something several times. In a harmed repository anything may refuse; nothing may lose."""

    def process() -> None:
        for _ in range(times):
            try:
                work()
            except BlocksnapError:
                continue

    return process


def play(seed: int) -> int:
    """Play one world; return how much was lost for good."""
    story = Story(seed)
    world = story.world
    deaths, troubles, world.deaths, world.troubles = world.deaths, world.troubles, 0, 0
    for volume in "abab":
        story.back_up(volume)
    harmed = HarmedStory(story)
    HARMS[seed % len(HARMS)](harmed)
    harmed.note_losses()
    world.deaths, world.troubles = deaths, troubles
    world.run(
        {
            "repair-1": often(harmed.repair, 3),
            "repair-2": often(harmed.repair, 2),
            "writer-1": often(lambda: harmed.back_up("a"), 2),
            "writer-2": often(lambda: harmed.back_up("b"), 2),
            "prune-1": often(story.prune, 3),
            "prune-2": often(story.prune, 2),
        }
    )
    world.deaths = world.troubles = 0
    world.now += timedelta(days=1)
    harmed.check(repaired=False)
    plan = harmed.repair()
    harmed.check()
    harmed.check_repaired(plan)
    if plan.lost:
        harmed.repair(accept_loss=True)
    story.always_gone = True
    for _ in range(2):
        story.prune()
    harmed.check()
    return len(plan.losses)


@pytest.mark.timeout(0)
def test_nothing_more_is_lost_in_any_world(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = 0
    monkeypatch.setattr(repair_module, "is_gone", lambda _: Clock.world.luck.random() < 0.3)
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        try:
            lost += play(seed)
        except BaseException as err:
            raise AssertionError(f"seed {seed}: {err!r}") from err
    assert lost
