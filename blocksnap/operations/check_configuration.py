"""What a valid configuration would run into on this host: tonight's surprises, told today."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from blocksnap.backends import open_backend
from blocksnap.config import Configuration, Job, RepositorySettings
from blocksnap.controller.parts import find_parts
from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.quiesce.errors import how_to_install
from blocksnap.quiesce.settings import LoginSettings, QuiesceSettings
from blocksnap.system.command import CommandError, has_program, run
from blocksnap.volumes.base import Volume
from blocksnap.volumes.resolve import resolve_volumes


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
        found += [*_databases(("jobs", name, "quiesce"), job.quiesce)]
        found += [*_volumes(("jobs", name, "volumes"), configuration, job)]
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
        (("jobs", name, "drill", "schedule"), job.drill.schedule)
        for name, job in configuration.jobs.items()
        if job.drill
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
    if repository.passphrase_file:
        yield from _secret((*key, "passphrase_file"), repository.passphrase_file)
    command = repository.passphrase_command
    if command and not os.access(command[0], os.X_OK):
        yield Surprise((*key, "passphrase_command"), f"{command[0]} cannot be run")


def _secret(key: tuple[str | int, ...], path: str) -> Iterator[Surprise]:
    try:
        mode = os.stat(path).st_mode
        with open(path, "rb"):
            pass
    except OSError as err:
        yield Surprise(key, f"{path}: {err.strerror}")
        return
    if mode & 0o077:
        shown = f"{stat.S_IMODE(mode):04o}"
        yield Surprise(key, f"{path} can be read by others (mode {shown})", f"chmod 600 {path}")


def _volumes(key: tuple[str | int, ...], configuration: Configuration, job: Job) -> Iterator[Surprise]:
    resolved: list[Volume] = []
    for number, text in enumerate(job.volumes):
        try:
            resolved += resolve_volumes(configuration.volume(text, job)[0])
        except BlocksnapError as err:
            yield Surprise((*key, number), err.brief, err.resolution)
    for group in [resolved] if job.group else [[volume] for volume in resolved]:
        for part in find_parts(group):
            yield Surprise(key, part.brief, part.resolution)


def _databases(key: tuple[str | int, ...], quiesce: QuiesceSettings) -> Iterator[Surprise]:
    logins: tuple[tuple[str, str, Sequence[LoginSettings]], ...] = (
        ("postgresql", "psycopg", quiesce.postgresql),
        ("mariadb", "PyMySQL", quiesce.mariadb),
    )
    for kind, driver, servers in logins:
        if servers and find_spec(driver.lower()) is None:
            yield Surprise((*key, kind), f"{driver} is not installed", how_to_install(driver))
        for number, server in enumerate(servers):
            if server.password_file:
                yield from _secret((*key, kind, number, "password_file"), server.password_file)
    if quiesce.guests == "auto" and not has_program("virsh"):
        yield Surprise((*key, "guests"), "virsh is not installed", "install it: apt install libvirt-clients")
