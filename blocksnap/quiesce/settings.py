"""What a job says about standing still: models for the configuration file, embedded in those of the jobs.

[jobs.shop.quiesce]
deadline_seconds = 5
on_failure = "crash-consistent"
units = ["shop.service"]

[[jobs.shop.quiesce.hooks]]
session = ["/etc/blocksnap/hooks/lock-tables"]
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

FailurePolicy = Literal["fail", "crash-consistent"]
"""What becomes of a backup whose quiescing was refused, failed, or took longer than its deadline."""
FilesystemPolicy = Literal["auto", "never"]
"""Whether filesystems are frozen that the snapshot itself would not freeze."""
GuestPolicy = Literal["auto", "never"]
"""Whether guests of libvirt that run freeze their filesystems when a disk of theirs is backed up."""

DEFAULT_DEADLINE_SECONDS = 10.0
DEFAULT_READING_SECONDS = 600.0
MOST_OF_A_KIND = 16
"""Of hooks, units or groups: the watchdog has room for 128 things."""


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("has to be an absolute path")
    if "\0" in path or "/../" in path + "/":
        raise ValueError("is no plain path")
    return path


def _command(argv: tuple[str, ...]) -> tuple[str, ...]:
    _absolute(argv[0])
    if any("\0" in word for word in argv):
        raise ValueError("has a zero byte in it")
    return argv


def _unit(name: str) -> str:
    if name.startswith("-") or "/" in name or not name.isprintable() or " " in name:
        raise ValueError("is no name of a systemd unit")
    return name


def _account(name: str) -> str:
    if not name.isprintable() or any(letter in name for letter in " :/"):
        raise ValueError("is no name of a user of this host")
    return name


def _uri(text: str) -> str:
    if not text.isprintable() or ":" not in text or " " in text or text.startswith("-"):
        raise ValueError("is no URI of libvirt, such as qemu:///system")
    return text


AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Command = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_command)]
"""The words of a command, the first an absolute path; no shell reads them."""
AccountName = Annotated[str, Field(min_length=1, max_length=32), AfterValidator(_account)]
UnitName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_unit)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HookSettings(_Model):
    """Commands of the administrator around the snapshot: one ``session``, or ``before`` and ``after``.

    A session is started before the snapshot and told on its standard input to ``begin``; it answers
    ``ready``, and is told to ``end`` when the snapshot is taken. ``after`` runs whatever happened, once
    ``before`` was started.
    """

    session: Command | None = None
    before: Command | None = None
    after: Command | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.session is not None and (self.before is not None or self.after is not None):
            raise ValueError("a hook is a session, or before and after, not both")
        if self.session is None and self.before is None and self.after is None:
            raise ValueError("a hook needs a session, or before or after")
        return self


class LoginSettings(_Model):
    """How a database server on this host is reached: through a Unix socket, never over a network.

    Its volumes are here, so it is here; and whoever listens on the socket is a process of this host, whose
    view of the filesystems tells where the server's files are.
    """

    user: Annotated[str, Field(min_length=1, max_length=63)]
    """The user of the database."""
    account: AccountName | None = None
    """The user of this host as whom root connects, for servers that ask the kernel who it is (peer)."""
    password_file: AbsolutePath | None = None
    """Its first line is the password, where the server wants one."""


class PostgresqlSettings(LoginSettings):
    """A PostgreSQL server, 9.6 or newer."""

    socket: AbsolutePath = "/var/run/postgresql"
    """The directory of its socket."""
    port: Annotated[int, Field(ge=1, le=65535)] = 5432
    """The number in the socket's name."""
    user: Annotated[str, Field(min_length=1, max_length=63)] = "postgres"
    database: Annotated[str, Field(min_length=1, max_length=63)] = "postgres"
    """Any one to connect to; what is backed up is the whole server."""
    checkpoint_seconds: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """How long its checkpoint may take, before anything stands still."""


class MariadbSettings(LoginSettings):
    """A server of MariaDB or MySQL."""

    socket: AbsolutePath = "/run/mysqld/mysqld.sock"
    user: Annotated[str, Field(min_length=1, max_length=80)] = "root"
    lock_wait_seconds: Annotated[int, Field(ge=1, le=600)] = 3
    """How long it may wait for statements in its way, while those that come after wait for it."""


class QuiesceSettings(_Model):
    """How the applications that use the volumes of a job stand still for its snapshots.

    Everything is begun in the order hooks, databases, guests, units and cgroups, filesystems, and ended in
    the opposite one. The deadline counts from the first of them to the end of the last; where files are read
    that have no snapshots, only until all stand still, and ``reading_seconds`` are added for the reading.
    """

    deadline_seconds: Annotated[float, Field(gt=0, le=600)] = DEFAULT_DEADLINE_SECONDS
    reading_seconds: Annotated[float, Field(gt=0, le=86400)] = DEFAULT_READING_SECONDS
    on_failure: FailurePolicy = "fail"
    hooks: Annotated[tuple[HookSettings, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    units: Annotated[tuple[UnitName, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    """Names of systemd units whose processes are frozen."""
    cgroups: Annotated[tuple[AbsolutePath, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    """The same for control groups (version 2) that no unit made: their directories."""
    filesystems: FilesystemPolicy = "auto"
    postgresql: Annotated[tuple[PostgresqlSettings, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    mariadb: Annotated[tuple[MariadbSettings, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    guests: GuestPolicy = "never"
    libvirt_uri: Annotated[str, AfterValidator(_uri)] = "qemu:///system"
    """Whose guests: what virsh calls a connection."""

    @property
    def asks_for_nothing(self) -> bool:
        """Whether no application is concerned; filesystems may be."""
        return not (self.hooks or self.units or self.cgroups or self.asks_for_an_instant)

    @property
    def asks_for_an_instant(self) -> bool:
        """Whether something is to stand still that is never held for longer than snapshots take."""
        return bool(self.postgresql or self.mariadb or self.guests == "auto")
