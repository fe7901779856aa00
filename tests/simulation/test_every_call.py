"""Each call to the storage fails, is the last one, or waits for others: in backups and collections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_story import Clock, Story, small_world
from trap import Trap

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import DamageError, StorageError
from blocksnap.repository.errors import FencedError
from support.simulated_world import Died


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_world(monkeypatch, tmp_path)


def prepared() -> tuple[Story, Trap]:
    trap = Clock.world = Trap()
    story = Story(0, trap)
    story.always_gone = True
    for volume in "abab":
        story.back_up(volume)
    story.forget()
    return story, trap


def interrupt(act: Callable[[Story], None], number: int, way: str) -> tuple[Story, bool]:
    """Do something with one call going wrong; tell whether there were as many."""
    story, trap = prepared()

    def others() -> None:
        story.back_up("b")
        story.prune()

    trap.set(number, way, others)
    try:
        act(story)
        reached = trap.sprung
    except (Died, StorageError):
        reached = True
    except (FencedError, ObjectMissingError, DamageError):
        # The others have shut it out while it waited, and may have collected what it had just made, or a
        # parent that was forgotten and the forgetting with it.
        assert way == "waits"
        reached = True
    trap.disarm()
    return story, reached


@pytest.mark.parametrize("way", ["fails", "dies before", "dies after", "waits"])
@pytest.mark.parametrize("name", ["back_up", "forget", "prune"])
def test_whichever_call_goes_wrong(name: str, way: str) -> None:
    acts: dict[str, Callable[[Story], None]] = {
        "back_up": lambda story: story.back_up("a"),
        "forget": Story.forget,
        "prune": Story.prune,
    }
    number = 0
    while True:
        story, reached = interrupt(acts[name], number, way)
        if not reached:
            break
        story.check()
        # Whatever was left behind, the next runs succeed, and in the end no garbage is left.
        story.back_up("a")
        story.prune()
        story.prune()
        story.check()
        number += 1
    assert number > 10 or name == "forget"
