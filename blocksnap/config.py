"""The configuration file: where the repository is, and the jobs a timer runs.

``/etc/blocksnap/blocksnap.toml`` (or ``BLOCKSNAP_CONFIG``), then ``conf.d/*.toml`` beside it, whose keys win.
An unknown key is an error that names the file and the key.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from blocksnap.errors import UsageError
from blocksnap.extents.changes import BasePolicy
from blocksnap.quiesce.settings import QuiesceSettings

DEFAULT_PATH = "/etc/blocksnap/blocksnap.toml"


class ConfigurationError(UsageError):
    """The configuration cannot be used."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}", resolution="docs/configuration.md lists every key")


class Job(BaseModel):
    """Volumes that are backed up together, at one instant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    volumes: tuple[str, ...]
    tags: dict[str, str] = {}
    base: BasePolicy = "none"
    quiesce: QuiesceSettings = QuiesceSettings()


class Configuration(BaseModel):
    """All of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repository: str | None = None
    passphrase_file: str | None = None
    state_directory: str | None = None
    jobs: dict[str, Job] = {}

    def job(self, name: str) -> Job:
        """Return a job; raises UsageError."""
        found = self.jobs.get(name)
        if found is None:
            known = ", ".join(sorted(self.jobs)) or "none"
            raise UsageError(f"there is no job {name!r}", resolution=f"configured jobs: {known}")
        return found


def configuration_path() -> str:
    """Return the path of the main file."""
    return os.environ.get("BLOCKSNAP_CONFIG", DEFAULT_PATH)


def configuration_exists() -> bool:
    """Tell whether there is anything to load."""
    path = Path(configuration_path())
    return any(os.access(place, os.F_OK) for place in (path, path.parent / "conf.d"))


def load_configuration() -> Configuration:
    """Load the file and what lies in conf.d; no file is an empty configuration."""
    main = Path(configuration_path())
    merged: dict[str, object] = {}
    for path in [main, *sorted((main.parent / "conf.d").glob("*.toml"))]:
        loaded = _read(path)
        jobs = {**_table(merged.get("jobs")), **_table(loaded.pop("jobs", {}))}
        merged.update(loaded)
        merged["jobs"] = jobs
        try:
            configuration = Configuration.model_validate(merged)
        except ValidationError as err:
            problem = err.errors()[0]
            raise ConfigurationError(
                str(path), f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            ) from err
    return configuration


def _read(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise ConfigurationError(str(path), str(err)) from err


def _table(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, dict) else {}
