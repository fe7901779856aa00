"""Which limits a restore is under: those of the job that made the backup, as the backup was."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from blocksnap.config import JOB_TAG, Configuration
from blocksnap.controller.settings import LimitSettings
from blocksnap.repository.stored import StoredBackup
from blocksnap.restore.pool_watch import USUAL_LIMITS, RestoreLimits

LimitsOf = Callable[[StoredBackup], RestoreLimits]


def restore_limits(configuration: Configuration | None, stored: StoredBackup) -> RestoreLimits:
    """Return the limits for restoring a backup on this host, wherever it goes.

    They are those of its volume in its job, by its tag, if this host has that in its configuration; else
    those of [defaults].
    """
    if configuration is None:
        return USUAL_LIMITS
    job = configuration.jobs.get(stored.manifest.tags.get(JOB_TAG, ""))
    name = stored.backup.volume.name
    if job is None:
        job = configuration.job_for((name,))
    for text in job.volumes:
        path, limits = configuration.volume(text, job)
        # As volumes are named in the configuration: by patterns too, logical volumes also by their nodes.
        if fnmatchcase(name, path) or fnmatchcase(name, path.removeprefix("/dev/")):
            return _of(limits)
    return _of(job.limits)


def _of(limits: LimitSettings) -> RestoreLimits:
    return RestoreLimits(
        limits.restore_data_percent, limits.restore_metadata_percent, limits.restore_wait_seconds
    )
