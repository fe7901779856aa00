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

DEFAULT_DEADLINE_SECONDS = 10.0
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


AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Command = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_command)]
"""The words of a command, the first an absolute path; no shell reads them."""
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


class QuiesceSettings(_Model):
    """How the applications that use the volumes of a job stand still for its snapshots.

    Everything is begun in the order hooks, units and cgroups, filesystems, and ended in the opposite one. The
    deadline counts from the first of them to the end of the last.
    """

    deadline_seconds: Annotated[float, Field(gt=0, le=600)] = DEFAULT_DEADLINE_SECONDS
    on_failure: FailurePolicy = "fail"
    hooks: Annotated[tuple[HookSettings, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    units: Annotated[tuple[UnitName, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    """Names of systemd units whose processes are frozen."""
    cgroups: Annotated[tuple[AbsolutePath, ...], Field(max_length=MOST_OF_A_KIND)] = ()
    """The same for control groups (version 2) that no unit made: their directories."""
    filesystems: FilesystemPolicy = "auto"

    @property
    def asks_for_nothing(self) -> bool:
        """Whether no application is concerned; filesystems may be."""
        return not (self.hooks or self.units or self.cgroups)
