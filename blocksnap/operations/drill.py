"""Prove that a backup restores: an overlay over its image, fsck, a mount, the job's own check command.

That of a subvolume is restored to a scratch filesystem instead (``operations.drill_tree``). Nothing is
written to the volume or the repository but the result. All of it dies with this process.
"""

from __future__ import annotations

import random
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from blocksnap.config import JOB_TAG, Configuration, DrillSettings
from blocksnap.errors import BlocksnapError, DamageError, StorageError, UsageError
from blocksnap.operations.catalogue import find_backup, is_luks_header, map_root
from blocksnap.operations.images import OpenRepository, require_fuse, served_images
from blocksnap.operations.reporting import Reporter
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import HOLE, ZERO, MapReader
from blocksnap.repository.documents import Backup, Drilled, DrillStep
from blocksnap.repository.drills import store_drilled
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.restore.drilling import answers
from blocksnap.restore.inside import InsideError, ask, fork_inner
from blocksnap.system import namespace
from blocksnap.system.host import host_name

_LOOK_INTO_IMAGE = "blocksnap mount, or serve --writable"
_LOOK = {"subvolume": "restore it to a new directory"}
_END_SECONDS = 1.0
_ATTEMPTS = 4
"""For each chunk of the sample: holes are passed over."""


class DrillFailedError(BlocksnapError):
    """A backup is not of the use that it should be (exit code 1)."""

    def __init__(self, failed: Sequence[Drilled]) -> None:
        first = failed[0]
        step = next((step for step in first.steps if not step.ok), None)
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        super().__init__(
            f"the drill of backup {first.backup[:8]} of {first.volume.name} failed"
            f"{f' at {step.step}' if step else ''}{more}",
            details=step.said if step else None,
            resolution=f"look into it: {_LOOK.get(first.volume.kind, _LOOK_INTO_IMAGE)}; "
            "where the repository is damaged: blocksnap repair",
        )


@dataclass(frozen=True, slots=True)
class DrillPlan:
    """What is drilled, and how."""

    backup: Backup
    settings: DrillSettings


def plan_drill(
    repository: Repository, configuration: Configuration | None, name: str, job: str | None
) -> list[DrillPlan]:
    """Return what is to be drilled: one backup, or the newest of each volume that a job backs up.

    The settings are those of the job of a backup, by its tag, if this host knows it, else the defaults.
    """
    backups = repository.backups()
    if job is None:
        stored = find_backup(repository, name)
        return [DrillPlan(stored.backup, drill_settings(stored, configuration))]
    of_job = [
        stored
        for stored in backups
        if stored.manifest.tags.get(JOB_TAG) == job and not is_luks_header(stored.backup)
    ]
    newest = {stored.lineage: stored for stored in of_job}
    if not newest:
        raise UsageError(f"there is no backup of job {job!r}", resolution=f"blocksnap backup --job {job}")
    return [DrillPlan(stored.backup, drill_settings(stored, configuration)) for stored in newest.values()]


def run_drills(
    open_repository: OpenRepository,
    plan: Callable[[Repository], list[DrillPlan]],
    report: Reporter,
    done: Callable[[Drilled], None],
) -> None:
    """Drill, record what comes of it, and tell ``done``.

    Raises DrillFailedError when all are done and not all are good, MissingRightError, NoFuseError, and what
    opening the repository raises.
    """
    require_fuse()
    namespace.leave_mounts(passable=True)
    inner = fork_inner(answers(), namespace.PRIVATE_FOLDER)
    repository = open_repository()
    repository.keys.require(Right.READ)
    plans = plan(repository)
    failed = []
    images = [each.backup for each in plans if each.backup.inodes is None]
    # What an interrupted drill is in the middle of is not worth waiting for.
    end = partial(inner.end, _END_SECONDS)
    with served_images(repository, images, report, end_users=end, writable=True):
        for each in plans:
            result = _drill(repository, each, inner.questions, report)
            try:
                store_drilled(repository, result)
            except StorageError as err:
                # A storage that takes nothing now can be drilled nevertheless.
                report.event("unrecorded", message=err.brief)
            done(result)
            if not result.good:
                failed.append(result)
    if failed:
        raise DrillFailedError(failed)


def _drill(repository: Repository, plan: DrillPlan, inner: socket.socket, report: Reporter) -> Drilled:
    backup = plan.backup
    began = time.monotonic()
    if backup.inodes is None:
        chunks, sampled, steps = _drill_image(repository, plan, inner, report)
    else:
        from blocksnap.operations.drill_tree import drill_tree

        tree = drill_tree(repository, backup, plan.settings, report)
        chunks, sampled, steps = tree.chunks, tree.read_bytes, tree.steps
    return Drilled(
        run=secrets.token_hex(16),
        time=datetime.now(UTC),
        hostname=host_name(),
        backup=backup.id,
        volume=backup.volume,
        good=all(step.ok for step in steps),
        seconds=round(time.monotonic() - began, 3),
        chunks=chunks,
        sampled_bytes=sampled,
        steps=tuple(steps),
    )


def _drill_image(
    repository: Repository, plan: DrillPlan, inner: socket.socket, report: Reporter
) -> tuple[int, int, list[DrillStep]]:
    """Return how many chunks were read again, their bytes, and the steps."""
    backup, settings = plan.backup, plan.settings
    chunks, sampled, sample = _sample(repository, backup, settings.sample)
    steps = [sample]
    if sample.ok:
        request = {
            "do": "drill",
            "backup": backup.id,
            "command": list(settings.command or ()),
            "seconds": settings.seconds,
        }
        try:
            for answer in ask(inner, request):
                steps.append(DrillStep.model_validate(answer))
                report.event("drill-step", backup=backup.id, **answer)
        except InsideError as err:
            steps.append(DrillStep(step="attach", seconds=0.0, ok=False, said=err.brief))
    return chunks, sampled, steps


def _sample(repository: Repository, backup: Backup, wanted: int) -> tuple[int, int, DrillStep]:
    """Read chunks again that are chosen by chance; return how many, their bytes, and what came of it."""
    began = time.monotonic()
    chunks = sampled = 0
    said = ""
    try:
        for entry in _some_entries(repository, backup, wanted):
            sampled += len(repository.load(FrameType.DATA, entry))
            chunks += 1
    except DamageError as err:
        said = err.brief
    seconds = round(time.monotonic() - began, 3)
    return chunks, sampled, DrillStep(step="sample", seconds=seconds, ok=not said, said=said)


def _some_entries(repository: Repository, backup: Backup, wanted: int) -> Iterator[bytes]:
    count = Geometry(backup.size, backup.chunk_size).count
    reader, root = MapReader(repository.load_node), map_root(backup.map)
    luck = random.Random()  # noqa: S311 - only a choice
    numbers = range(count) if count <= wanted * _ATTEMPTS else luck.sample(range(count), wanted * _ATTEMPTS)
    found = 0
    for number in luck.sample(list(numbers), len(numbers)):
        for _, _, entry in reader.runs(root, number, number + 1):
            if found < wanted and entry not in (HOLE, ZERO):
                found += 1
                yield entry


def drill_settings(stored: StoredBackup, configuration: Configuration | None) -> DrillSettings:
    """Return how a backup is to be drilled."""
    job = stored.manifest.tags.get(JOB_TAG)
    if configuration is None:
        return DrillSettings()
    known = configuration.jobs.get(job) if job else None
    return (known or configuration.defaults).drill or DrillSettings()
