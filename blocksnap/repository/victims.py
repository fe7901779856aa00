"""Which packs a garbage collection takes apart, and why: pure.

A pack without a needed frame costs nothing to drop. One that is mostly dead is copied, the emptiest first, as
far as the budget goes; small packs are put together when they fill one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from blocksnap.repository.pack import pack_target

Fate = Literal["drop", "copy", "keep"]


@dataclass(frozen=True, slots=True)
class PackUse:
    """A pack, what of it is needed, and whether it may be touched.

    ``settled`` is False for a pack of a run that may still be at work. ``data`` tells data from metadata.
    """

    name: str
    size: int
    frame_bytes: int
    """Of the frames alone: what a pack has beside them would be there again after copying."""
    needed_bytes: int
    data: bool
    settled: bool
    indexed: bool
    aside: bool = False
    """Damaged: what is unharmed in it was copied, and the rest may be of use to somebody yet."""

    @property
    def dead_bytes(self) -> int:
        """What would be gained by dropping it, or by copying the rest of it."""
        return self.frame_bytes - self.needed_bytes if self.needed_bytes else self.size

    @property
    def dead_percent(self) -> float:
        """How much of its frames nobody needs."""
        return 100 * (1 - self.needed_bytes / self.frame_bytes) if self.needed_bytes else 100.0


@dataclass(frozen=True, slots=True)
class Limits:
    """How much work a garbage collection may do.

    A pack is copied when more than ``dead_percent`` of it is dead, and no more than ``copy_bytes`` in all.
    """

    dead_percent: float = 25.0
    copy_bytes: int = 64 << 30


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one pack."""

    pack: PackUse
    fate: Fate
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """All decisions, in the order of the names."""

    decisions: tuple[Decision, ...] = field(default=())

    def of(self, fate: Fate) -> tuple[PackUse, ...]:
        """Return the packs that share a fate."""
        return tuple(decision.pack for decision in self.decisions if decision.fate == fate)

    @property
    def freed_bytes(self) -> int:
        """Bytes that the repository loses by it."""
        return sum(pack.dead_bytes for pack in (*self.of("drop"), *self.of("copy")))

    @property
    def copied_bytes(self) -> int:
        """Bytes that are read and written again."""
        return sum(pack.needed_bytes for pack in self.of("copy"))


def choose_victims(packs: Iterable[PackUse], limits: Limits) -> Choice:
    """Decide the fate of every pack."""
    packs = sorted(packs, key=lambda pack: pack.name)
    small = {pack.name for pack in _small_packs(packs)}
    budget = limits.copy_bytes
    decided: dict[str, Decision] = {}
    for pack in sorted(packs, key=lambda pack: -pack.dead_percent):
        dead_percent = pack.dead_percent
        if not pack.settled:
            decided[pack.name] = Decision(pack, "keep", "its run may still be at work")
        elif not pack.needed_bytes:
            why = "no backup needs anything of it" if pack.indexed else "an interrupted run left it"
            decided[pack.name] = Decision(pack, "drop", why)
        elif pack.aside:
            decided[pack.name] = Decision(
                pack, "keep", "damaged, and nothing else has what backups need of it"
            )
        elif dead_percent <= limits.dead_percent and pack.name not in small:
            decided[pack.name] = Decision(pack, "keep", f"{dead_percent:.0f} % of it is dead")
        elif pack.needed_bytes > budget:
            decided[pack.name] = Decision(pack, "keep", "the budget for copying is spent")
        else:
            budget -= pack.needed_bytes
            why = f"{dead_percent:.0f} % of it is dead"
            decided[pack.name] = Decision(pack, "copy", why if pack.name not in small else "many small packs")
    return Choice(tuple(decided[pack.name] for pack in packs))


def _small_packs(packs: list[PackUse]) -> list[PackUse]:
    """Return the packs that are worth putting together: enough of them to fill one."""
    target = pack_target(len(packs))
    found: list[PackUse] = []
    for data in (False, True):
        small = [
            pack
            for pack in packs
            if pack.settled
            and not pack.aside
            and pack.data == data
            and pack.needed_bytes > 0
            and pack.size < target // 4
        ]
        if sum(pack.needed_bytes for pack in small) >= target:
            found += small
    return found
