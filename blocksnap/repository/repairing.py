"""Do what a plan of repair says: copy, list, and only then set aside. Nothing is deleted.

The run is a writer like any other, so that a collection that began without knowing of it waits for it;
at its end it settles itself by a fence. Killed anywhere it has done no harm, and the next run finds the rest
to do (docs/design.md, 3.14).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from blocksnap.errors import DamageError
from blocksnap.repository.documents import LostRange, SetAside
from blocksnap.repository.epochs import create_set_aside
from blocksnap.repository.errors import FencedError
from blocksnap.repository.fencing import fence
from blocksnap.repository.frame import FrameHeader, FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.pack import PackRow
from blocksnap.repository.repair_plan import Planner, RepairPlan
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter

_MOST_RANGES = 100_000
"""What one record holds. Of backups with more, the last of its share covers all that comes behind."""
_MOST_LOST = 500_000
"""Of more, the next repair writes down the rest."""


NO_RUN = "0" * 32
"""Stands for the run where it is only asked whether there is anything to write down."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done. ``complete`` is False when something vanished meanwhile: then look again."""

    copied_bytes: int = 0
    copied_frames: int = 0
    listed_packs: int = 0
    complete: bool = True


def execute_repair(
    repository: Repository,
    writer: RepositoryWriter,
    planner: Planner,
    plan: RepairPlan,
    *,
    accept_loss: bool,
    now: datetime,
    advance: Callable[[int], None],
) -> Repaired:
    """Make durable what replaces the damaged, then set the damaged aside; raises StorageError."""
    copied_bytes = copied_frames = 0
    complete = True
    for pack, rows in plan.rescued.items():
        for row in rows:
            try:
                _copy(repository, writer, pack, row)
            except DamageError:
                complete = False
                continue
            copied_bytes, copied_frames = copied_bytes + row.length, copied_frames + 1
            advance(row.length)
    writer.flush()
    writer.adopt(filter(None, map(planner.sealed_pack, plan.listed)))
    for run in plan.gone if complete and accept_loss else ():
        # What stands in its place says that somebody knows; should the manifest be there by now, it stays.
        fence(repository, run, now)
    record = compose_record(repository, plan, writer.id.hex(), accept_loss=accept_loss, now=now)
    if complete and record is not None:
        create_set_aside(repository, record)
    return Repaired(copied_bytes, copied_frames, len(plan.listed), complete)


def settle(repository: Repository, writer: RepositoryWriter, now: datetime) -> None:
    """End the run; raises FencedError when somebody else has, who may have deleted what it relied on."""
    if not fence(repository, writer.id.hex(), now):
        raise FencedError(writer.id.hex())


def _copy(repository: Repository, writer: RepositoryWriter, pack: str, row: PackRow) -> None:
    frame = memoryview(bytearray(row.length))
    repository.read_range(pack, row.offset, frame)
    where = f"frame at {row.offset} of {pack}"
    header = FrameHeader.parse(frame, where=where)
    if row.type != FrameType.DATA or repository.keys.may(Right.READ):
        # Proven once more: a harmed frame in a new pack would be found by nothing but opening it.
        repository.opener().open(frame, where=where, kind=row.type, id_=row.id)
    elif header.id != row.id or header.frame_length != row.length:
        raise DamageError(f"another {where} than was there")
    writer.store(FrameType(row.type), row.id, frame, header.plain_length)


def compose_record(
    repository: Repository, plan: RepairPlan, run: str, *, accept_loss: bool, now: datetime
) -> SetAside | None:
    """Return what is to be set aside, and written down as lost; None when all that is known already."""
    objects = [bad.name for bad in plan.segments]
    lost: list[str] = []
    if accept_loss:
        objects += [bad.name for bad in (*plan.manifests, *plan.documents) if not bad.is_gone]
        lost = sorted(id_.hex() for id_ in plan.lost - plan.given_up)[:_MOST_LOST]
    known = {
        (backup, *each)
        for backup in {each.backup for each in plan.harmed}
        for each in repository.known_losses(backup)
    }
    share = max(_MOST_RANGES // max(len(plan.harmed), 1), 1)
    losses = [loss for each in plan.harmed for loss in each.at_most(share)]
    ranges = [loss for loss in losses if (loss.backup, loss.offset, loss.length, loss.inode) not in known]
    if not (objects or lost or plan.packs or ranges):
        return None
    if lost:
        # So that this record, which lets go of them, stays as long as any of the backups.
        ranges = losses
    return SetAside(
        run=run,
        time=now,
        packs=tuple(bad.name for bad in plan.packs),
        objects=tuple(sorted(objects)),
        lost=tuple(lost),
        ranges=tuple(
            LostRange(backup=loss.backup, offset=loss.offset, length=loss.length, inode=loss.inode)
            for loss in ranges
        ),
    )
