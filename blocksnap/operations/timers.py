"""Units of systemd for the configured jobs: plan them, print them, or put them in place.

Each job with a ``schedule`` gets ``blocksnap-backup-JOB``, a service and a timer, and with one in ``drill``
``blocksnap-drill-JOB``; each repository with a ``prune_schedule`` gets ``blocksnap-prune-REPOSITORY``. Only
files that begin with our line are ever replaced or removed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from blocksnap.config import Configuration
from blocksnap.errors import BlocksnapError
from blocksnap.system.command import run

UNIT_FOLDER = "/etc/systemd/system"
MARK = "# Made by `blocksnap timers --install`, which will replace it: put changes into drop-ins.\n"
_SERVICE = """\
[Unit]
Description={description}
Documentation=man:systemd.time(7)
Wants=network-online.target
After=local-fs.target network-online.target

[Service]
Type=oneshot
{commands}
# Done with warnings: the journal has them, and the backup is there.
SuccessExitStatus=3
# Only blocksnap itself is told to end, and ends its own commands. An LVM command that is killed halfway can
# leave a suspended volume behind, and the watchdog has to outlive what it watches.
KillMode=process
TimeoutStopSec=10min
UMask=0077
"""
_TIMER = """\
[Unit]
Description={description}

[Timer]
OnCalendar={calendar}
# One that was missed, because the host was off, is made up for.
Persistent=true

[Install]
WantedBy=timers.target
"""


class ForeignUnitError(BlocksnapError):
    """A file that somebody else wrote has the name of a unit of ours (exit code 1)."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            f"{path} was not made by blocksnap",
            resolution="move it away, or install into another --directory",
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """A file for systemd."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Installed:
    """What was done with the units in a directory, by their names."""

    written: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]


def plan_units(configuration: Configuration, program: str, configuration_path: str) -> tuple[Unit, ...]:
    """Return the units of everything that has a schedule; ``program`` is the path of blocksnap."""
    base = [program]
    tail = ["--config", configuration_path]
    units: list[Unit] = []
    for name, job in configuration.jobs.items():
        if job.schedule:
            what = f"blocksnap: back up job {name}"
            commands = [[*base, "backup", "--job", name, *tail]]
            units += _pair(f"blocksnap-backup-{name}", what, commands, job.schedule)
        if job.drill and job.drill.schedule:
            what = f"blocksnap: drill the backups of job {name}"
            commands = [[*base, "drill", "--job", name, *tail]]
            units += _pair(f"blocksnap-drill-{name}", what, commands, job.drill.schedule)
    for name, repository in configuration.repositories.items():
        if repository.prune_schedule:
            kept = [
                job_name
                for job_name, job in configuration.jobs.items()
                if job.retention
                and configuration.find_repository(configuration.repository_of(job) or "") is repository
            ]
            commands = [[*base, "forget", "--job", job_name, *tail] for job_name in kept]
            commands.append([*base, "prune", "--repo", name, "--wait", "3600", *tail])
            what = f"blocksnap: forget and prune in repository {name}"
            units += _pair(f"blocksnap-prune-{name}", what, commands, repository.prune_schedule)
    return tuple(units)


def install_units(units: tuple[Unit, ...], folder: str, *, activate: bool) -> Installed:
    """Make a directory hold just these units of ours; with ``activate`` systemd is told at once.

    Raises ForeignUnitError before anything is changed, CommandError, OSError.
    """
    wanted = {unit.name: unit.text for unit in units}
    ours: dict[str, str] = {}
    for path in sorted(Path(folder).glob("blocksnap-*")):
        if path.suffix not in (".service", ".timer"):
            # Drop-ins of the administrator, in folders.
            continue
        text = path.read_text(errors="replace") if path.is_file() else ""
        if text.startswith(MARK):
            ours[path.name] = text
        elif path.name in wanted:
            raise ForeignUnitError(str(path))
    gone = tuple(name for name in ours if name not in wanted)
    changed = tuple(name for name, text in wanted.items() if ours.get(name) != text)
    if activate and (timers := [name for name in gone if name.endswith(".timer")]):
        run("systemctl", "disable", "--now", *timers)
    for name in gone:
        (Path(folder) / name).unlink()
    for name in changed:
        _write(Path(folder) / name, wanted[name])
    if activate and (gone or changed):
        run("systemctl", "daemon-reload")
    if activate and (timers := [name for name in changed if name.endswith(".timer")]):
        run("systemctl", "enable", *timers)
        run("systemctl", "restart", *timers)
    return Installed(changed, gone, tuple(name for name in wanted if name not in changed))


def _pair(name: str, description: str, commands: list[list[str]], calendar: str) -> list[Unit]:
    lines = "\n".join("ExecStart=" + " ".join(map(_quoted, words)) for words in commands)
    service = _SERVICE.format(description=description, commands=lines)
    timer = _TIMER.format(description=description, calendar=calendar)
    return [Unit(f"{name}.service", MARK + service), Unit(f"{name}.timer", MARK + timer)]


def _quoted(word: str) -> str:
    """Write a word so that systemd takes it as it is (systemd.service(5), COMMAND LINES)."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = all(letter.isalnum() or letter in "/-_.,:=+@%$" for letter in word)
    return word if word and plain else f'"{word}"'


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.write_text(text)
        beside.chmod(0o644)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
