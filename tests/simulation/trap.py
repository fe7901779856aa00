"""A world in which exactly one call goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from support.simulated_world import Died, TroubleError, World


class Trap(World):
    """Lets calls through until number ``left`` has come; that one goes wrong in one way.

    It fails, or the process dies before it or after it; or it *waits*, and meanwhile others do something.
    """

    def __init__(self, *, seconds: int = 0) -> None:
        """Let a call take so long: with none, calls that only read leave equal states behind."""
        super().__init__(0)
        self._seconds = seconds
        self.deaths = self.troubles = 0
        self._began = self.now
        self.left = -1
        self.way = ""
        self.sprung = False
        self._others: Callable[[], None] = lambda: None

    def set(self, number: int, way: str, others: Callable[[], None] = lambda: None) -> None:
        """Let call ``number``, counted from now, go wrong."""
        self.left, self.way, self.sprung, self._others = number, way, False, others

    def disarm(self) -> None:
        """Let everything through."""
        self.left = -1

    def reset(self) -> None:
        """Begin again with the same luck."""
        self.luck.seed(0)
        self.now = self._began
        self.story.clear()
        self.disarm()

    def step(self, what: str) -> bool:
        """Let the call through, unless its number has come."""
        self.story.append(what)
        self.now += timedelta(seconds=self._seconds)
        if self.left < 0:
            return False
        self.left -= 1
        if self.left >= 0:
            return False
        self.sprung = True
        if self.way == "fails":
            raise TroubleError
        if self.way == "dies before":
            raise Died
        if self.way == "waits":
            self._others()
            return False
        return True
