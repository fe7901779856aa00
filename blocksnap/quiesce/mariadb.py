"""MariaDB and MySQL: no commit between the first snapshot and the last, and the place in the binary log.

MariaDB from 10.4.1 has BACKUP STAGE for it (its manual, "BACKUP STAGE", storage snapshots), everything else
FLUSH TABLES WITH READ LOCK. Both end with the connection, and both wait for statements that are at work,
while those that come after wait for them: lock_wait_timeout is how long. docs/design.md, section 5.1.1.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocksnap.quiesce import mariadb_files
from blocksnap.quiesce.base import Guard, Record, Strength, Trace
from blocksnap.quiesce.errors import MisplacedError
from blocksnap.quiesce.login import looking_up_files
from blocksnap.quiesce.places import Placement, VolumeKeys
from blocksnap.quiesce.settings import MariadbSettings
from blocksnap.system import peers
from blocksnap.system.watchdog import Hangup, Safeguard

if TYPE_CHECKING:
    from blocksnap.quiesce.mariadb_link import MariadbLink

_VARIABLES = ("version", *mariadb_files.VARIABLES, "log_bin", "server_id")


@dataclass(frozen=True, slots=True)
class Words:
    """How a server is told to let nobody commit and to go on, and where its binary log is."""

    lock: tuple[str, ...]
    unlock: str
    position: str
    gtid: str


def words_of(version: str) -> Words:
    """Return the words of a version, as the variable of that name has it (``10.11.6-MariaDB-0+deb12u1``)."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, numbers.groups())) if numbers else (0, 0, 0)
    lock: tuple[str, ...] = ("FLUSH TABLES WITH READ LOCK",)
    unlock, position, gtid = "UNLOCK TABLES", "SHOW MASTER STATUS", "SELECT @@GLOBAL.gtid_executed"
    if "mariadb" in version.lower():
        gtid = "SELECT @@GLOBAL.gtid_binlog_pos"
        if number >= (10, 4, 1):
            lock, unlock = ("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"), "BACKUP STAGE END"
    elif number >= (8, 2, 0):
        position = "SHOW BINARY LOG STATUS"
    return Words(lock, unlock, position, gtid)


def decide(server: str, folders: Mapping[str, VolumeKeys], *, frozen: bool, whole: bool) -> str:
    """Return why one lock is enough, from where its tables and their log lie; raises MisplacedError.

    InnoDB writes pages and its log whether or not anybody may commit. So where these are on several volumes
    their snapshots fit together only if the server itself stands still (``frozen``), or what is one
    filesystem over all of them (``whole``: all these places are in one that the run freezes).
    """
    for path, devices in folders.items():
        if not devices:
            raise MisplacedError(
                server,
                f"its directory {path} lies on no volume of this run",
                "back all its volumes up together: add this one to the job",
            )
    sets = set(folders.values())
    if len(frozenset().union(*sets)) == 1:
        return "one volume holds all its tables and their log"
    if frozen:
        return "its processes are frozen for the instant of all snapshots"
    if len(sets) == 1 and whole:
        return "one filesystem holds all its tables and their log, frozen over all its volumes"
    raise MisplacedError(
        server,
        f"{' and '.join(folders)} lie on several volumes, and InnoDB writes to them while nobody commits",
        'freeze the unit of the server as well: units = ["mariadb.service"]',
    )


class MariadbAgent:
    """One server, on a connection that holds the lock."""

    strength: Strength = "application"
    late: VolumeKeys = frozenset()
    early: VolumeKeys = frozenset()
    last: VolumeKeys = frozenset()

    def __init__(self, settings: MariadbSettings, placement: Placement, frozen: Sequence[str]) -> None:
        """Connect, and find out what it has where.

        ``frozen`` are the control groups that the run freezes. Raises AgentError, MisplacedError.
        """
        from blocksnap.quiesce.mariadb_link import MariadbLink

        self._name = f"MariaDB on {settings.socket}"
        self._settings = settings
        self._link: MariadbLink = MariadbLink(self._name, settings)
        self._guard: Guard | None = None
        self._began = False
        self._logs = False
        self._facts: dict[str, str] = {}
        try:
            self._look(placement, frozen)
        except BaseException:
            self._link.close()
            raise

    @property
    def name(self) -> str:
        """``MariaDB on SOCKET``, or ``MySQL on SOCKET``."""
        return self._name

    def safeguards(self) -> Sequence[Safeguard]:
        """Return the end of the connection, which is the end of the lock."""
        return [Hangup(self._link.fileno())]

    def trace(self) -> Trace | None:
        """Nothing outlives the connection."""
        return None

    def attend(self, guard: Guard) -> None:
        """There is nothing to be done yet."""
        self._guard = guard

    def begin(self, deadline: float) -> None:
        """Let nobody commit, and ask for the place in the binary log."""
        if self._guard is None:
            return
        self._guard.arm(0)
        self._began = True
        left = max(1, int(deadline - time.monotonic()))
        wait = min(self._settings.lock_wait_seconds, left)
        self._link.ask(f"SET SESSION lock_wait_timeout = {wait}")
        for statement in self._words.lock:
            self._link.ask(statement)
        self._note_position()

    def advance(self, deadline: float) -> None:
        """It holds its lock over both stages."""

    def end(self, deadline: float) -> None:  # noqa: ARG002 - the watchdog keeps it
        """Let it go on; raises AgentError when the lock was lost before."""
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        try:
            if self._began:
                self._link.ask(self._words.unlock)
        finally:
            self._link.close()
            guard.disarm(0)

    def record(self) -> Record:
        """Return what it said of itself, and its place in the binary log."""
        return Record("mariadb", self._name, dict(self._facts))

    def close(self) -> None:
        """Hang up."""
        self._link.close()

    def _look(self, placement: Placement, frozen: Sequence[str]) -> None:
        names = ", ".join(f"'{name}'" for name in _VARIABLES)
        rows = self._link.ask(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({names})")
        variables = {row[0]: row[1] for row in rows}
        version = variables["version"]
        self._words = words_of(version)
        if "mariadb" not in version.lower():
            self._name = f"MySQL on {self._settings.socket}"
        self._logs = variables.get("log_bin", "OFF") == "ON"
        pid = self._link.process()
        tablespaces = [folder for (folder,) in self._link.ask(mariadb_files.TABLESPACES)]
        with looking_up_files(self._name):
            paths = mariadb_files.places_of(pid, variables, tablespaces)
            places = {path: placement.of_directory(pid, path) for path in paths}
            whole = all(placement.is_frozen(pid, path) for path in places)
        reason = decide(self._name, places, frozen=peers.is_in_group(pid, frozen), whole=whole)
        self._facts = {
            "version": version,
            "server_id": variables.get("server_id", ""),
            "data_directory": variables["datadir"].rstrip("/"),
            "way": "; ".join(self._words.lock),
            "reason": reason,
        }

    def _note_position(self) -> None:
        if not self._logs:
            self._facts["binary_log"] = "off"
            return
        for row in self._link.ask(self._words.position)[:1]:
            self._facts |= {"binary_log_file": row[0], "binary_log_position": row[1]}
        for row in self._link.ask(self._words.gtid):
            self._facts["gtid"] = row[0].replace("\n", "")
