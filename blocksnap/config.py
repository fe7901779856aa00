"""What can be configured: repositories, volumes, and the jobs a timer runs.

The models only; ``config_files`` reads them and says in which line of which file something is wrong.
docs/configuration.md describes every key, docs/blocksnap.toml is an example with all of them.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from blocksnap.controller.settings import LimitSettings, PaceSettings
from blocksnap.errors import UsageError
from blocksnap.extents.changes import BasePolicy
from blocksnap.quiesce.settings import AbsolutePath, Command, QuiesceSettings
from blocksnap.retention import Keep, PolicyError, parse_zone

JOB_TAG = "job"
"""The tag that names the job of a backup; its retention goes by it."""
_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}"
_WORDS = "minutely|hourly|daily|weekly|monthly|quarterly|semiannually|yearly|annually"
_DAY = "(?i:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
_DAYS = rf"{_DAY}(?:(?:,|\.\.){_DAY})*,?"
_PART = r"(?:\*|\d+(?:\.\.\d+)?)(?:/\d+)?"
_PARTS = rf"{_PART}(?:,{_PART})*"
_CALENDAR = (
    rf"(?:(?i:{_WORDS})|(?:{_DAYS}(?: |$))?(?:(?:{_PARTS}-)?{_PARTS}[-~]{_PARTS}(?: |$))?"
    rf"(?:{_PARTS}:{_PARTS}(?::{_PARTS})?)?)(?: ?(?:UTC|[A-Z][A-Za-z_]+(?:/[A-Za-z_+-]+)+))?"
)


def _calendar(text: str) -> str:
    """Accept what looks like a calendar event of systemd.time(7); ``config check`` asks systemd as well."""
    if not text.strip() or not re.fullmatch(_CALENDAR, text):
        raise ValueError("is no calendar event of systemd.time(7), such as daily or Mon..Fri 02:30")
    return text


def _volume(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("is the name of no volume")
    if text.startswith("/") or re.fullmatch(_NAME, text) or re.fullmatch(r"[^/]+/[^/]+", text):
        return text
    raise ValueError("write VG/LV, an absolute path, or a name from [volumes]")


def _place(url: str) -> str:
    """Return a URL in one of the ways in which that of a local directory can be written."""
    path = url.removeprefix("file://") if url.startswith("file:///") else url
    # Two dots behind a symbolic link lead elsewhere than they seem to.
    if not path or "://" in path or ".." in path.split("/"):
        return path
    return os.path.normpath(path)


def _tags(tags: dict[str, str]) -> dict[str, str]:
    if JOB_TAG in tags:
        # It would put the backups under the retention of another job.
        raise ValueError(f"the tag {JOB_TAG} is set by blocksnap, to the name of the job")
    return tags


Name = Annotated[str, Field(pattern=f"^{_NAME}$")]
Calendar = Annotated[str, AfterValidator(_calendar)]
VolumeText = Annotated[str, AfterValidator(_volume)]
Tags = Annotated[dict[str, str], AfterValidator(_tags)]


class _Model(BaseModel):
    # Built when something is read: a backup of a volume that is named needs none of it.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RepositorySettings(_Model):
    """A repository, and where its passphrase comes from."""

    url: Annotated[str, Field(min_length=1)]
    passphrase_file: AbsolutePath | None = None
    """Its first line is the passphrase."""
    passphrase_command: Command | None = None
    """What it prints first is the passphrase."""
    passphrase_credential: Name | None = None
    """A credential of systemd (systemd-creds(1))."""
    key: str | None = None
    """The key to try it on, instead of one after the other."""
    prune_schedule: Calendar | None = None
    """When a timer applies the retention of the jobs and prunes."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.passphrase_file, self.passphrase_command, self.passphrase_credential)
        if sum(source is not None for source in sources) > 1:
            raise ValueError("the passphrase comes from a file, a command or a credential: name one")
        return self


class VolumeSettings(_Model):
    """A volume under a name of its own, for jobs."""

    path: VolumeText
    limits: LimitSettings | None = None
    """Instead of those of the job."""


class RetentionSettings(_Model):
    """Which backups of a job ``forget --job`` keeps: the words of ``forget --keep-...``."""

    last: int | str | None = None
    hourly: int | str | None = None
    daily: int | str | None = None
    weekly: int | str | None = None
    monthly: int | str | None = None
    yearly: int | str | None = None
    within: str | None = None
    zone: str = "UTC"

    @model_validator(mode="after")
    def _understood(self) -> Self:
        try:
            parse_zone(self.zone)
            _ = self.keep
        except PolicyError as err:
            raise ValueError(f"{err.key or 'retention'}: {err.problem}") from err
        return self

    @property
    def keep(self) -> Keep:
        """What is kept; raises PolicyError."""
        return Keep.parse(self.model_dump(exclude={"zone"}, exclude_none=True))


class DrillSettings(_Model):
    """How it is proven that the backups of a job restore."""

    schedule: Calendar | None = None
    """When a timer drills the newest backup of each volume."""
    command: Command | None = None
    """What looks at the data itself; it finds where that is in its environment."""
    seconds: Annotated[float, Field(gt=0)] = 3600.0
    """How long the command may take."""
    sample: Annotated[int, Field(ge=0, le=1_000_000)] = 256
    """Chunks that are read again, chosen by chance."""


class JobSettings(_Model):
    """What a job may say, and [defaults] for all of them."""

    repository: str | None = None
    """Name or URL; the one of the file itself where it is not said."""
    group: bool = True
    """Whether the volumes are snapshotted at one instant and committed together, or each by itself."""
    base: BasePolicy = "none"
    quiet_files: bool = False
    """Whether files that are open for writing may be read where they are: nobody writes to them meanwhile."""
    luks_headers: bool = False
    """Whether the headers of the LUKS containers below are stored too: with one, an old passphrase opens."""
    tags: Tags = {}
    quiesce: QuiesceSettings = Field(default_factory=QuiesceSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    pace: PaceSettings = Field(default_factory=PaceSettings)
    retention: RetentionSettings | None = None
    schedule: Calendar | None = None
    drill: DrillSettings | None = None


class Job(JobSettings):
    """Volumes that are backed up together."""

    volumes: Annotated[tuple[VolumeText, ...], Field(min_length=1)]


class Configuration(_Model):
    """All of it."""

    repository: str | None = None
    """Name or URL of the repository, where neither the command line nor a job names one."""
    state_directory: AbsolutePath | None = None
    cache_directory: AbsolutePath | None = None
    repositories: dict[Name, RepositorySettings] = {}
    volumes: dict[Name, VolumeSettings] = {}
    defaults: JobSettings = Field(default_factory=JobSettings)
    jobs: dict[Name, Job] = {}

    def job(self, name: str) -> Job:
        """Return a job; raises UsageError."""
        found = self.jobs.get(name)
        if found is None:
            known = ", ".join(sorted(self.jobs)) or "none"
            raise UsageError(f"there is no job {name!r}", resolution=f"configured jobs: {known}")
        return found

    def job_for(self, volumes: tuple[str, ...]) -> Job:
        """Return the defaults as a job for volumes that somebody named."""
        facts = {name: getattr(self.defaults, name) for name in JobSettings.model_fields}
        return Job.model_construct(**facts, volumes=volumes)

    def find_repository(self, name: str) -> RepositorySettings | None:
        """Return what is said of a repository, by its name or its URL, which may be written differently."""
        place = _place(name)
        by_url = (each for each in self.repositories.values() if _place(each.url) == place)
        return self.repositories.get(name) or next(by_url, None)

    def repository_of(self, job: Job) -> str | None:
        """Return the name or URL of the repository of a job."""
        return job.repository or self.repository

    def volume(self, text: str, job: Job) -> tuple[str, LimitSettings]:
        """Return what a job's volume is called on the host, and its limits."""
        named = self.volumes.get(text)
        return (named.path, named.limits or job.limits) if named else (text, job.limits)
