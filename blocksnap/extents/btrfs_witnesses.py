"""Inodes that tell whether a btrfs subvolume still has the history that a parent backup saw.

Transactions are counted on after the disks alone were rolled back, so a number that looks late enough proves
nothing. What an inode was when the parent's snapshot was taken does: the time of its last change is not made
twice. So a backup names a few of its inodes, and the next one looks for them before it inherits anything.
docs/design.md, section 4.5, has the rule and what it does not find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from heapq import nlargest
from typing import Final

from blocksnap.extents.btrfs_changes import RememberedInode, Witness
from blocksnap.extents.changes import Binding, JsonValue
from blocksnap.system.btrfs import InodeStamp

_FIELD = "witnesses"
YOUNGEST: Final = 8
PER_AGE: Final = 3
LARGEST_AGE: Final = 1024
"""How many transactions before the parent's snapshot may hold what the parent did not see."""
_SPREAD, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Hearing:
    """The witnesses that are as they were, and what contradicts the parent's history, if anything does."""

    standing: tuple[Witness, ...]
    contradiction: str | None

    def look_since(self, transaction: int) -> int:
        """Return from when on the new snapshot may have what the parent's, of ``transaction``, never saw.

        Up to the youngest change that both know they have one history.
        """
        known = max((witness.transaction for witness in self.standing), default=0)
        return min(max(known, transaction - LARGEST_AGE, 1), transaction)


def to_binding(witnesses: Sequence[Witness]) -> dict[str, JsonValue]:
    """Return the form that is stored in the manifest."""
    return {_FIELD: [list(astuple(witness)) for witness in witnesses]} if witnesses else {}


def from_binding(binding: Binding) -> tuple[Witness, ...]:
    """Return the witnesses in a manifest; those that make no sense are left out, older ones have none."""
    stored = binding.get(_FIELD)
    found: list[Witness] = []
    for each in stored if isinstance(stored, list) else ():
        numbers = [number for number in each if type(number) is int] if isinstance(each, list) else []
        if isinstance(each, list) and len(numbers) == len(each) == len(Witness.__slots__):
            witness = Witness(*numbers)
            if all(0 < number <= _MASK for number in (witness.inode, witness.directory)):
                found.append(witness)
    return tuple(found)


def choose(inodes: Iterable[tuple[int, int]], transaction: int) -> tuple[int, ...]:
    """Choose of inodes (number, transid) of a snapshot of ``transaction`` the youngest and some older ones.

    The youngest tell most about when the histories part, but are often written all the time, which makes them
    silent; so of each age, which doubles from one to the next, some are taken that chance decides.
    """
    ages: dict[int, list[tuple[int, int]]] = {}
    youngest: list[tuple[int, int]] = []
    for number, changed in inodes:
        rank = ((number ^ transaction) * _SPREAD) & _MASK
        drawn = ages.setdefault(max(transaction - changed, 0).bit_length(), [])
        if len(drawn) < PER_AGE or rank < drawn[-1][0]:
            drawn.append((rank, number))
            drawn.sort()
            del drawn[PER_AGE:]
        if len(youngest) < YOUNGEST or changed > youngest[-1][0]:
            youngest = nlargest(YOUNGEST, [*youngest, (changed, number)])
    chosen = {number for _, number in youngest}
    chosen.update(number for drawn in ages.values() for _, number in drawn)
    return tuple(sorted(chosen))


def hear(witnesses: Sequence[Witness], transaction: int, look: Callable[[int], InodeStamp | None]) -> Hearing:
    """Look for the witnesses of a parent whose snapshot is of ``transaction``.

    ``look`` returns what the new snapshot has of an inode. One that was touched since says nothing, and
    neither does one that is gone from a directory that was touched since.
    """
    standing: list[Witness] = []
    for witness in witnesses:
        now = look(witness.inode)
        if now is None:
            folder = look(witness.directory)
            if folder is not None and folder.transaction < transaction:
                return Hearing((), f"inode {witness.inode} is missing, though nobody removed it since")
        elif now.transaction > transaction or (now.is_directory and now.transaction == transaction):
            continue
        elif _is_as_it_was(witness, now):
            standing.append(witness)
        else:
            return Hearing((), f"inode {witness.inode} is as it never was, or was before that")
    return Hearing(tuple(standing), None)


def unseen(
    stamps: Iterable[tuple[int, InodeStamp | None]], known: Mapping[int, RememberedInode]
) -> str | None:
    """Say what of the inodes that nobody touched since the parent's snapshot the parent did not see."""
    for number, now in stamps:
        before = known.get(number)
        if now is None:
            continue
        if before is None or before.generation != now.generation:
            return f"inode {number} is older than the parent backup, which did not see it"
        if before.changed_at not in (None, now.changed_at):
            return f"inode {number} was changed before the parent backup, which did not see it"
    return None


def newest(inodes: Iterable[tuple[int, int]]) -> list[int]:
    """Return the numbers of the youngest of inodes given as (number, transid)."""
    return [number for number, _ in nlargest(YOUNGEST, inodes, key=lambda each: each[1])]


def _is_as_it_was(witness: Witness, now: InodeStamp) -> bool:
    then = (witness.generation, witness.transaction, witness.changed_at)
    return then == (now.generation, now.transaction, now.changed_at)
