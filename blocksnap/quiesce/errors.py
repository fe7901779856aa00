"""What can go wrong when something is to stand still."""

from __future__ import annotations

import shlex
import sys

from blocksnap.errors import QuiesceError

_SHOWN_BYTES = 600


class HookError(QuiesceError):
    """A command of the administrator refused, failed, or did not answer (exit code 15)."""

    def __init__(self, command: str, problem: str, said: str = "") -> None:
        self.command = command
        self.problem = problem
        super().__init__(
            f"the hook {command} {problem}",
            details=said[-_SHOWN_BYTES:].strip() or None,
            resolution="docs/operations.md says what a hook is asked and has to answer",
        )


class HookReleaseError(HookError):
    """The command that ends a standstill failed, after the snapshots were taken.

    ``was_run`` is False when it is still to be run.
    """

    def __init__(self, command: str, problem: str, said: str = "", *, was_run: bool = True) -> None:
        self.was_run = was_run
        super().__init__(command, problem, said)


class GuestThawError(QuiesceError):
    """A guest may still be frozen: to thaw it failed (exit code 15).

    ``by_hand`` is the command that does it. ``was_run`` is False when it is still to be run, by the next run;
    True when the guest does not run here any more, so that nothing here can.
    """

    def __init__(
        self, guest: str, by_hand: str, problem: str, said: str = "", *, was_run: bool = False
    ) -> None:
        self.guest = guest
        self.by_hand = by_hand
        self.problem = problem
        self.was_run = was_run
        told = said.strip().splitlines()[-1:]
        super().__init__(
            f"{guest} may still be frozen: {': '.join((problem, *told))} (run: {by_hand})",
            details=said[-_SHOWN_BYTES:].strip() or None,
            resolution=by_hand,
        )


class UnsafeHookError(QuiesceError):
    """A hook could be changed by others than those it would run as (exit code 15)."""

    def __init__(self, command: str, path: str, problem: str) -> None:
        self.command = command
        self.path = path
        self.problem = problem
        super().__init__(
            f"the hook {command} is not run: {path} {problem}",
            details="the file and every directory above it have to be root's, and writable by nobody else",
            resolution=f"see: namei -l {command}",
        )


class FilesystemFreezeError(QuiesceError):
    """A filesystem could not be frozen (exit code 15)."""

    def __init__(self, point: str, problem: str) -> None:
        self.point = point
        self.problem = problem
        super().__init__(f"the filesystem on {point} cannot be frozen: {problem}")


class DeadlineError(QuiesceError):
    """The standstill took too long, and was ended by the watchdog (exit code 15)."""

    def __init__(self, allowed_seconds: float, took_seconds: float) -> None:
        self.allowed_seconds = allowed_seconds
        self.took_seconds = took_seconds
        super().__init__(
            f"it took longer than {allowed_seconds:g} s: the watchdog ended the standstill",
            details=f"applications and filesystems go on since second {took_seconds:.1f}",
            resolution="raise deadline_seconds (reading_seconds for what has no snapshots) if applications "
            "may wait so long, or find what was slow",
        )


class AgentError(QuiesceError):
    """A database refused, failed, or did not answer (exit code 15)."""

    def __init__(self, server: str, problem: str, said: str = "", *, advice: str | None = None) -> None:
        self.server = server
        self.problem = problem
        super().__init__(
            f"{server} {problem}", details=said[-_SHOWN_BYTES:].strip() or None, resolution=advice
        )


class MisplacedError(QuiesceError):
    """Files of a server are not where the run takes its snapshots (exit code 15)."""

    def __init__(self, server: str, problem: str, advice: str) -> None:
        self.server = server
        self.problem = problem
        super().__init__(f"{server}: {problem}", resolution=advice)


class MissingDriverError(QuiesceError):
    """The library that talks with a database is not installed (exit code 15)."""

    def __init__(self, library: str) -> None:
        self.library = library
        super().__init__(f"{library} is not installed", resolution=how_to_install(library))


def how_to_install(library: str) -> str:
    """Say how the Python that runs this gets a library; in a venv it does not see the distribution's."""
    requirement = shlex.quote({"psycopg": "psycopg[binary]"}.get(library, library))
    return f"install it: {shlex.quote(sys.executable)} -m pip install {requirement}"
