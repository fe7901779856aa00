"""What a valid configuration would run into on this host: tonight's surprises, told today."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from blocksnap.backends import open_backend
from blocksnap.config import Configuration, RepositorySettings
from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.system.command import CommandError, has_program, run
from blocksnap.volumes.resolve import resolve_volume


@dataclass(frozen=True, slots=True)
class Surprise:
    """Something configured that this host cannot do, and what to do about it."""

    key: tuple[str | int, ...]
    message: str
    advice: str | None = None


def find_surprises(configuration: Configuration) -> list[Surprise]:
    """Look at everything that is named: schedules, repositories, passphrases, volumes. Changes nothing."""
    found = [*_schedules(configuration)]
    for name, repository in configuration.repositories.items():
        found += _repository(("repositories", name), repository)
    for name, job in configuration.jobs.items():
        if configuration.repository_of(job) is None:
            found.append(Surprise(("jobs", name), "no repository is configured for it"))
        for number, text in enumerate(job.volumes):
            try:
                resolve_volume(configuration.volume(text, job)[0])
            except BlocksnapError as err:
                found.append(Surprise(("jobs", name, "volumes", number), err.brief, err.resolution))
    return found


def check_calendar(text: str) -> str | None:
    """Ask systemd what it thinks of a calendar event; None when it takes it, or is not there to be asked."""
    if not has_program("systemd-analyze"):
        return None
    try:
        run("systemd-analyze", "calendar", "--", text)
    except CommandError as err:
        return f"systemd does not take {text!r}: {err.message.strip().splitlines()[-1]}"
    return None


def _schedules(configuration: Configuration) -> Iterator[Surprise]:
    named: list[tuple[tuple[str | int, ...], str | None]] = [
        (("jobs", name, "schedule"), job.schedule) for name, job in configuration.jobs.items()
    ]
    named += [
        (("repositories", name, "prune_schedule"), repository.prune_schedule)
        for name, repository in configuration.repositories.items()
    ]
    for key, text in named:
        trouble = check_calendar(text) if text else None
        if trouble:
            yield Surprise(key, trouble, "see systemd.time(7), CALENDAR EVENTS")


def _repository(key: tuple[str | int, ...], repository: RepositorySettings) -> Iterator[Surprise]:
    try:
        open_backend(repository.url).close()
    except UsageError as err:
        yield Surprise((*key, "url"), err.brief, err.resolution)
    secret = repository.passphrase_file
    if secret:
        try:
            mode = os.stat(secret).st_mode
            with open(secret, "rb"):
                pass
        except OSError as err:
            yield Surprise((*key, "passphrase_file"), f"{secret}: {err.strerror}")
        else:
            if mode & 0o077:
                shown = f"{stat.S_IMODE(mode):04o}"
                yield Surprise(
                    (*key, "passphrase_file"),
                    f"{secret} can be read by others (mode {shown})",
                    f"chmod 600 {secret}",
                )
    command = repository.passphrase_command
    if command and not os.access(command[0], os.X_OK):
        yield Surprise((*key, "passphrase_command"), f"{command[0]} cannot be run")
