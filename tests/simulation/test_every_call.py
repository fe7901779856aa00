"""Each call to the storage fails, or is the last one, in turn: all of them, in backups and in collections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from simulated_story import Clock, Story, small_world

from blocksnap.errors import StorageError
from support.simulated_world import Died, TroubleError, World


class Trap(World):
    """A world in which exactly one call goes wrong."""

    def __init__(self) -> None:
        super().__init__(0)
        self.deaths = self.troubles = 0
        self.left = -1
        self.way = ""
        self.calls = 0

    def step(self, what: str) -> bool:
        """Let the call through, unless its number has come."""
        self.calls += 1
        self.story.append(what)
        if self.left < 0:
            return False
        self.left -= 1
        if self.left >= 0:
            return False
        if self.way == "fails":
            raise TroubleError
        if self.way == "dies before":
            raise Died
        return True


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
    trap.left, trap.way = number, way
    try:
        act(story)
        reached = trap.left < 0
    except (Died, StorageError):
        reached = True
    trap.left = -1
    return story, reached


@pytest.mark.parametrize("way", ["fails", "dies before", "dies after"])
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
