"""Guests of libvirt whose disk is a volume of the run: their own agent freezes and thaws their filesystems.

Which they are is asked through ``virsh`` while everything runs. Freezing and thawing are commands of the
watchdog, as a pair of hooks is, so a guest is thawed whatever becomes of us: when the freeze fails or takes
too long, when the controller is killed, and by the next run when the watchdog was killed too.

A freeze cannot be called back: an agent that hangs, or waits for a hook in the guest, does it when it goes
on, however long ago virsh was killed. libvirt lets the thaw wait for that, but for half a minute only
(QEMU_JOB_WAIT_TIME), so it is tried again, for minutes. Everything else goes on at the deadline. And an agent
that does not answer while all is looked up is not asked to freeze at all.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import cast

from blocksnap.errors import QuiesceError
from blocksnap.quiesce.base import Trace
from blocksnap.quiesce.errors import AgentError, GuestThawError, HookError, HookReleaseError
from blocksnap.quiesce.hook import PairHook, check_command, run_after
from blocksnap.quiesce.places import Placement
from blocksnap.system import command, mounts

_LOOK_SECONDS = 30.0
_ANSWER_SECONDS = 10.0
_THAW_SECONDS = 300.0
_MOMENT_SECONDS = 0.5
_PAUSE_SECONDS = 0.02
_VIRSH = "virsh"
_SHELL = "/bin/sh"
# What virsh says of a guest that was stopped, or went to another host.
_NOT_HERE = ("omain is not running", "ailed to get domain")
# What virsh says while a thaw may still succeed: libvirt or the agent is busy, or is being started again.
# It has no codes for that, and commands of the watchdog have LC_ALL=C.
_THAW = r"""
until said=$("$@" 2>&1); do
    case $said in
        *"state change lock"* | *"not available for now"* | *"timed out"*) sleep 1 ;;
        *"ailed to connect"* | *"isconnected from"* | *disappeared* | *"not connected"*) sleep 1 ;;
        *) printf '%s\n' "$said" >&2; exit 1 ;;
    esac
done
"""


class Guest(PairHook):
    """One guest that runs."""

    def __init__(self, path: str, uri: str, uuid: str, called: str, disks: tuple[str, ...]) -> None:
        asked = (path, "--connect", uri)
        thaw = (_SHELL, "-c", _THAW, "thaw", *asked, "domfsthaw", uuid)
        super().__init__((*asked, "domfsfreeze", uuid), thaw, after_seconds=_THAW_SECONDS)
        check_command(path)
        self._called = called
        self._disks = disks
        self._by_hand = shlex.join((_VIRSH, "--connect", uri, "domfsthaw", called))

    @property
    def name(self) -> str:
        """``guest NAME (DISK, ...)``."""
        return f"guest {self._called} ({', '.join(self._disks)})"

    def trace(self) -> Trace | None:
        """Return the command that thaws it."""
        found = super().trace()
        return {**found, "name": f"guest {self._called}", "by_hand": self._by_hand} if found else None

    def begin(self, deadline: float) -> None:
        """Have its agent freeze what is mounted in it; raises AgentError."""
        try:
            super().begin(deadline)
        except HookError as err:
            raise AgentError(
                f"guest {self._called}",
                f"does not freeze its filesystems: virsh domfsfreeze {err.problem}",
                err.details or "",
                advice=f"see whether its agent answers: virsh domfsinfo {shlex.quote(self._called)}",
            ) from err

    def end(self, deadline: float) -> None:
        """Have it thaw them; raises GuestThawError, and leaves it to the next run."""
        try:
            super().end(deadline)
        except HookReleaseError as err:
            raise _not_thawed(f"guest {self._called}", self._by_hand, err) from err


def thaw_leftover(trace: Trace, environment: Mapping[str, str]) -> None:
    """Thaw a guest that a dead run may have left frozen; raises GuestThawError."""
    argv = tuple(str(word) for word in cast("list[object]", trace["argv"]))
    try:
        run_after(argv, environment, _THAW_SECONDS)
    except QuiesceError as err:
        raise _not_thawed(str(trace["name"]), str(trace.get("by_hand", shlex.join(argv))), err) from err


def _not_thawed(guest: str, by_hand: str, err: QuiesceError) -> GuestThawError:
    problem, said = err.brief, err.details or ""
    if isinstance(err, HookError):
        problem = f"its thaw {err.problem}"
    return GuestThawError(guest, by_hand, problem, said, was_run=any(words in said for words in _NOT_HERE))


def guests_on(placement: Placement, uri: str) -> Iterator[Guest]:
    """Yield the guests that run and have a disk on a volume of the run.

    Raises AgentError, UnsafeHookError.
    """
    try:
        path = command.path_of(_VIRSH)
        running = _ask(uri, "list", "--state-running", "--uuid", "--name")
        for line in running.splitlines():
            uuid, _, called = line.strip().partition(" ")
            if not uuid:
                continue
            try:
                listed = parse_disks(_ask(uri, "domblklist", uuid, "--details"))
                disks = tuple(target for target, source in listed if _is_on(placement, source))
                if disks:
                    _ask_agent(uri, uuid, called.strip())
            except (command.CommandError, AgentError):
                # What virsh says of a guest that went meanwhile it says of some failures too.
                if _is_running(uri, uuid):
                    raise
                continue
            if disks:
                yield Guest(path, uri, uuid, called.strip(), disks)
    except (command.CommandError, command.CommandTimeoutError, command.MissingProgramError) as err:
        raise AgentError(
            f"libvirt ({uri})", f"does not say which guests run: {err.brief}", advice=err.resolution
        ) from err


def parse_disks(text: str) -> list[tuple[str, str]]:
    """Return target and source of the disks that ``virsh domblklist --details`` lists.

    The columns are type, device, target and source, the last one with whatever is in a path. Disks on another
    host (network) and without a medium (``-``) are none of ours.
    """
    found = []
    for line in text.splitlines():
        columns = line.strip().split(None, 3)
        if len(columns) == 4 and columns[0] in ("block", "file") and columns[1] in ("disk", "lun"):
            found += [(columns[2], columns[3])] if columns[3].startswith("/") else []
    return found


def _is_on(placement: Placement, source: str) -> bool:
    """Tell whether a disk is on a volume of the run; raises AgentError where that cannot be found out."""
    until = time.monotonic() + _MOMENT_SECONDS
    while True:
        try:
            return bool(placement.of_disk(source))
        except (FileNotFoundError, NotADirectoryError):
            # The guest has it open, and somebody has removed the name: then it is no volume that has one.
            # udev takes the link to a device away for a moment at times.
            if not source.startswith("/dev/") or time.monotonic() > until:
                return False
        except OSError as err:
            if _is_served_by_others(source):
                return False
            raise AgentError(
                f"the disk {source} of a guest", f"cannot be looked at: {os.strerror(err.errno or 0)}"
            ) from err
        time.sleep(_PAUSE_SECONDS)


def _is_served_by_others(path: str) -> bool:
    """Tell whether a path lies on no device of this host: root need not get at it, and no volume is there."""
    mount = mounts.mount_under(path)
    return mount is not None and mounts.device_of(mount) is None


def _is_running(uri: str, uuid: str) -> bool:
    return uuid in _ask(uri, "list", "--state-running", "--uuid").split()


def _ask_agent(uri: str, uuid: str, called: str) -> None:
    """Make sure that the agent of a guest answers; raises AgentError."""
    try:
        # It has to answer to tell the time. Time enough for a guest that is busy.
        command.run(_VIRSH, "--connect", uri, "domtime", uuid, timeout_seconds=_ANSWER_SECONDS)
    except (command.CommandError, command.CommandTimeoutError) as err:
        raise AgentError(
            f"guest {called}",
            "does not freeze its filesystems: its agent does not answer",
            err.details or "",
            advice=f"see whether it does: virsh domfsinfo {shlex.quote(called)}",
        ) from err


def _ask(uri: str, *words: str) -> str:
    return command.run(_VIRSH, "--connect", uri, *words, timeout_seconds=_LOOK_SECONDS)
