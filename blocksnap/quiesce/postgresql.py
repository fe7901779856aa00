"""PostgreSQL: a checkpoint where one snapshot holds everything, else its low-level backup interface.

"Making a Base Backup Using the Low Level API" (PostgreSQL manual, section 26.3.3 of version 15) is what this
does, on one connection, since the server ends backup mode with the session. docs/design.md, section 5.1.1,
says in which order the snapshots are taken, and why that is enough.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blocksnap.quiesce.base import Guard, Record, Strength, Trace
from blocksnap.quiesce.errors import AgentError, MisplacedError
from blocksnap.quiesce.login import looking_up_files
from blocksnap.quiesce.places import Placement, VolumeKeys
from blocksnap.quiesce.settings import PostgresqlSettings
from blocksnap.system import peers
from blocksnap.system.watchdog import Hangup, Safeguard

if TYPE_CHECKING:
    from blocksnap.quiesce.postgresql_link import PostgresqlLink

_LABEL = "blocksnap"
_LOOK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Words:
    """How a version calls what we ask for."""

    start: str
    stop: str
    log_folder: str
    has_slots: bool
    tells_slot_state: bool


def words_of(version: int) -> Words | None:
    """Return the words of a version (``server_version_num``); None for one without a non-exclusive backup.

    pg_start_backup got its third argument in 9.6; pg_stop_backup its second, by which it does not wait for
    the archive, temporary slots and pg_wal came in 10, the state of a slot in 13, today's names in 15.
    """
    start, stop = "SELECT pg_start_backup($1, true, false)", "pg_stop_backup(false, false)"
    if version < 90600:
        return None
    if version < 100000:
        stop = "pg_stop_backup(false)"
    elif version >= 150000:
        start, stop = "SELECT pg_backup_start($1, true)", "pg_backup_stop(false)"
    return Words(
        start,
        f"SELECT lsn, labelfile, spcmapfile FROM {stop}",  # noqa: S608 - one of three texts of ours
        log_folder="pg_wal" if version >= 100000 else "pg_xlog",
        has_slots=version >= 100000,
        tells_slot_state=version >= 130000,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of the server, and why.

    ``late`` are the volumes of the log, ``early`` the others, ``last`` those of them with the data directory.
    """

    way: Literal["checkpoint", "backup"]
    reason: str
    early: VolumeKeys = frozenset()
    late: VolumeKeys = frozenset()
    last: VolumeKeys = frozenset()


def decide(
    server: str,
    data: tuple[str, VolumeKeys],
    spaces: Mapping[str, VolumeKeys],
    log: tuple[str, VolumeKeys],
    *,
    frozen: bool,
    whole: bool,
) -> Plan:
    """Decide from where its data directory, its tablespaces and its log lie.

    ``frozen`` says that the server itself stands still for all snapshots, ``whole`` that the filesystems of
    all these places do. Raises MisplacedError.
    """
    everything = [data, *spaces.items(), log]
    for path, devices in everything:
        if not devices:
            raise MisplacedError(
                server,
                f"its directory {path} lies on no volume of this run",
                "back all its volumes up together: add this one to the job",
            )
    sets = {devices for _, devices in everything}
    union = frozenset().union(*sets)
    if len(union) == 1:
        return Plan("checkpoint", "one volume holds all of it")
    if frozen:
        return Plan("checkpoint", "its processes are frozen for the instant of all snapshots")
    if len(sets) == 1 and whole:
        return Plan("checkpoint", "one filesystem holds all of it, frozen over all its volumes")
    late = log[1]
    for path, devices in everything:
        if len(devices) > 1 and not devices <= late and devices & late:
            raise MisplacedError(
                server,
                f"the filesystem of {path} spans a volume of its log and others",
                "freeze the unit of the server instead: units = [...]",
            )
    if late == union:
        raise MisplacedError(
            server,
            f"{log[0]} lies on all its volumes, whose filesystem is not frozen",
            "freeze the unit of the server: units = [...]; the filesystem itself is frozen with "
            'filesystems = "auto", unless this host needs it, as it does /var',
        )
    # The control file of a standby says how far its pages have come, so none of them may be newer.
    return Plan(
        "backup",
        "its log lies on another volume than other parts of it",
        early=union - late,
        late=late,
        last=data[1] - late,
    )


class PostgresqlAgent:
    """One server, asked on a connection that is held from before the first snapshot to after the last."""

    strength: Strength = "application"

    def __init__(self, settings: PostgresqlSettings, placement: Placement, frozen: Sequence[str]) -> None:
        """Connect, and find out what it has where.

        ``frozen`` are the control groups that the run freezes. Raises AgentError, MisplacedError.
        """
        from blocksnap.quiesce.postgresql_link import PostgresqlLink

        self._name = f"PostgreSQL on {settings.socket}, port {settings.port}"
        self._settings = settings
        self._link: PostgresqlLink = PostgresqlLink(self._name, settings, time.monotonic() + _LOOK_SECONDS)
        self._guard: Guard | None = None
        self._armed = False
        self._slot: str | None = None
        self._start = ""
        self._facts: dict[str, str] = {}
        try:
            self._look(placement, frozen)
        except BaseException:
            self._link.close()
            raise

    @property
    def name(self) -> str:
        """``PostgreSQL on SOCKET, port PORT``."""
        return self._name

    @property
    def late(self) -> VolumeKeys:
        """The volumes of its log."""
        return self._plan.late

    @property
    def early(self) -> VolumeKeys:
        """Those of everything else."""
        return self._plan.early

    @property
    def last(self) -> VolumeKeys:
        """That of its data directory."""
        return self._plan.last

    def safeguards(self) -> Sequence[Safeguard]:
        """Return the end of the connection, which is the end of backup mode."""
        return [Hangup(self._link.fileno())]

    def trace(self) -> Trace | None:
        """Nothing outlives the connection."""
        return None

    def attend(self, guard: Guard) -> None:
        """Have it write a checkpoint, which takes its time and in which nobody stands still."""
        self._guard = guard
        deadline = time.monotonic() + self._settings.checkpoint_seconds
        self._link.limit(deadline)
        if self._plan.way == "checkpoint":
            self._link.ask("CHECKPOINT", deadline=deadline, while_="writing a checkpoint")
            return
        self._hold_log(deadline)
        # It answers with the place in the log from which on everything is needed.
        (row,) = self._link.ask(
            self._words.start, _LABEL, deadline=deadline, while_="beginning a backup, with a checkpoint"
        )
        self._start = row[0]

    def begin(self, deadline: float) -> None:
        """From here on the watchdog ends the connection; raises AgentError if the server already has."""
        if self._guard is None:
            return
        self._guard.arm(0)
        self._armed = True
        self._link.ask("SELECT 1", deadline=deadline, while_="waiting for the snapshots")

    def advance(self, deadline: float) -> None:
        """End backup mode: all of the log that the early snapshots need is then written and flushed."""
        if self._plan.way == "checkpoint":
            return
        doing = "ending the backup"
        self._link.limit(deadline, while_=doing)
        (row,) = self._link.ask(self._words.stop, deadline=deadline, while_=doing)
        self._facts |= {"stop": row[0], "label": row[1], "tablespace_map": row[2]}

    def end(self, deadline: float) -> None:
        """Make sure that it kept the log until it was in a snapshot, and hang up."""
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        try:
            if self._armed and "label" in self._facts:
                self._require_log(deadline)
        finally:
            self._link.close()
            guard.disarm(0)

    def record(self) -> Record:
        """Return what it said of itself, and its label."""
        return Record("postgresql", self._name, dict(self._facts))

    def close(self) -> None:
        """Hang up."""
        self._link.close()

    def _look(self, placement: Placement, frozen: Sequence[str]) -> None:
        deadline = time.monotonic() + _LOOK_SECONDS
        self._link.limit(deadline)
        ((number, version, folder, recovering, system),) = self._link.ask(
            "SELECT current_setting('server_version_num'), current_setting('server_version'), "
            "current_setting('data_directory'), pg_is_in_recovery(), "
            "(SELECT system_identifier FROM pg_control_system())",
            deadline=deadline,
        )
        words = words_of(int(number))
        if words is None:
            raise AgentError(
                self._name,
                f"is version {version}, and 9.6 is the first that can be asked",
                advice="use a hook",
            )
        self._words = words
        spaces = self._link.ask(
            "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE pg_tablespace_location(oid) <> ''",
            deadline=deadline,
        )
        # What lies within the data directory (allow_in_place_tablespaces) is told by a relative path.
        folders = [space for (space,) in spaces if space.startswith("/")]
        log = f"{folder}/{words.log_folder}"
        pid = self._link.process()
        with looking_up_files(self._name):
            data = (folder, placement.of_directory(pid, folder))
            elsewhere = {path: placement.of_directory(pid, path) for path in folders}
            log_place = (peers.real_path(pid, log), placement.of_directory(pid, log))
            whole = all(placement.is_frozen(pid, path) for path in (folder, *folders, log))
        in_frozen = peers.is_in_group(pid, frozen)
        self._plan = decide(self._name, data, elsewhere, log_place, frozen=in_frozen, whole=whole)
        self._facts = {
            "version": version,
            "system_identifier": system,
            "data_directory": folder,
            "role": "standby" if recovering == "t" else "primary",
            "way": self._plan.way,
            "reason": self._plan.reason,
        }

    def _hold_log(self, deadline: float) -> None:
        """Have the server keep its log, as far as it can: by a slot that goes with the connection."""
        if not self._words.has_slots:
            return
        name = f"blocksnap_{secrets.token_hex(8)}"
        # It may have none to give, or we no right to one. Then we look in the end if a checkpoint passed.
        with contextlib.suppress(AgentError):
            self._link.ask(
                "SELECT pg_create_physical_replication_slot($1, true, true)",
                name,
                deadline=deadline,
            )
            self._slot = name

    def _require_log(self, deadline: float) -> None:
        """Raise AgentError when the server may have removed what the label begins with."""
        if self._slot is not None:
            state = "wal_status IN ('reserved', 'extended')" if self._words.tells_slot_state else "true"
            rows = self._link.ask(
                f"SELECT {state} FROM pg_replication_slots "  # noqa: S608 - one of two texts of ours
                "WHERE slot_name = $1 AND restart_lsn IS NOT NULL",
                self._slot,
                deadline=deadline,
            )
        else:
            rows = self._link.ask(
                "SELECT redo_lsn = $1::pg_lsn FROM pg_control_checkpoint()", self._start, deadline=deadline
            )
        if rows != [("t",)]:
            raise AgentError(
                self._name,
                "may have removed log that the backup needs, before its snapshot was taken",
                advice="let its user make replication slots (max_replication_slots, REPLICATION)",
            )
