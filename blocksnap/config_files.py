"""Read the configuration: one file, then a directory of further ones, whose keys win.

``/etc/blocksnap/blocksnap.toml``, then ``blocksnap.d/*.toml`` beside it in the order of their names. Tables
are merged, anything else is replaced. Whatever is wrong is told with file, line and key, all of it at once.

The files may name commands, and who runs them is root: so nobody else may be able to write them.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from blocksnap.config import Configuration, Job, RepositorySettings, RetentionSettings, VolumeSettings
from blocksnap.controller.settings import LimitSettings, PaceSettings
from blocksnap.errors import UsageError
from blocksnap.quiesce.settings import (
    HookSettings,
    MariadbSettings,
    PostgresqlSettings,
    QuiesceSettings,
)

_MODELS: tuple[type[BaseModel], ...] = (
    Configuration,
    Job,
    RepositorySettings,
    RetentionSettings,
    VolumeSettings,
    LimitSettings,
    PaceSettings,
    QuiesceSettings,
    HookSettings,
    PostgresqlSettings,
    MariadbSettings,
)
_MERGED_INTO_JOBS = ("limits", "tags")
"""Tables of [defaults] that are merged with those of a job; another one a job has instead."""

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is said: file and line, 0 for the file as a whole."""

    path: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong."""

    place: Place
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}" if self.key else f"{self.place}: {self.message}"


class ConfigurationError(UsageError):
    """The configuration cannot be used."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        others = "\n".join(map(str, problems[1:]))
        super().__init__(
            str(problems[0]), details=others or None, resolution="docs/configuration.md lists every key"
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration, the files it was read from, and where everything is said."""

    configuration: Configuration
    files: tuple[str, ...]
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def place_of(self, path: KeyPath) -> Place | None:
        """Return where a key is said, or a default for it; None when nowhere."""
        found = self.places.get(path) or self.places.get((*path, 0))
        if found is None and path[0] == "jobs" and len(path) > 2:
            return self.places.get(("defaults", *path[2:]))
        return found


def drop_in_folder(path: str) -> Path:
    """Return the directory of the further files: ``blocksnap.d`` beside ``blocksnap.toml``."""
    return Path(path).with_suffix(".d")


def load(path: str, *, required: bool) -> Loaded:
    """Load the file ``path``, which has to be there if it is ``required``; raises ConfigurationError."""
    main = Path(path)
    if not main.name:
        raise ConfigurationError([Problem(Place(path), "", os.strerror(errno.EISDIR))])
    files = [main] if required or main.exists() else []
    files += sorted(drop_in_folder(path).glob("*.toml"))
    merged: dict[str, Any] = {}
    places: dict[KeyPath, Place] = {}
    for file in files:
        text = _read(file)
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as err:
            raise ConfigurationError([_syntax_problem(file, text, err)]) from err
        _merge(merged, table)
        places.update({key: Place(str(file), line) for key, line in locate_keys(text).items()})
    return Loaded(_validate(merged, places, main), tuple(map(str, files)), places)


def locate_keys(text: str) -> dict[KeyPath, int]:
    """Return the line of every key and table of a TOML document, which has to be a valid one.

    A statement ends with the first line with which it is a document of its own (TOML 1.0: whatever goes on in
    the next line is not closed yet), so the parser itself is asked where.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    prefix: KeyPath = ()
    statement, began = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        began = began if statement else number
        statement += line.removesuffix("\r") + "\n"
        try:
            table = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            prefix = _header(table, counts)
            lines.setdefault(prefix, began)
        else:
            for path in _paths(table):
                lines.setdefault((*prefix, *path), began)
        statement = ""
    return lines


def _header(table: dict[str, Any], counts: dict[KeyPath, int]) -> KeyPath:
    """Return the path of a table's header, with numbers for the tables of an array."""
    path: KeyPath = ()
    node: Any = table
    while node:
        name, node = next(iter(node.items()))
        path = (*path, name)
        if isinstance(node, list):
            counts[path] = counts.get(path, 0) + 1
            node = node[0]
        if path in counts:
            path = (*path, counts[path] - 1)
    return path


def _paths(table: dict[str, Any]) -> Iterator[KeyPath]:
    for name, value in table.items():
        yield (name,)
        inner: dict[str, Any] = value if isinstance(value, dict) else {}
        for path in _paths(inner):
            yield (name, *path)


def _read(path: Path) -> str:
    """Return the text of a file that nobody but root and this user can have written."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
        folder = os.stat(path.parent)
        text = data.decode()
    except OSError as err:
        raise ConfigurationError([Problem(Place(str(path)), "", os.strerror(err.errno or 0))]) from err
    except UnicodeDecodeError as err:
        raise ConfigurationError([Problem(Place(str(path)), "", "is not UTF-8")]) from err
    for what, found in (("it", status), ("its directory", folder)):
        trouble = writable_by_others(found)
        if trouble:
            raise ConfigurationError([Problem(Place(str(path)), "", f"{what} {trouble}")])
    return text


def writable_by_others(status: os.stat_result) -> str | None:
    """Say who else could have written something that root is to obey; None when nobody."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}, who could have any command run"
    shared = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_mode & 0o022 and not shared:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        return f"can be written by others (mode {mode}), who could have any command run"
    return None


def _syntax_problem(path: Path, text: str, err: tomllib.TOMLDecodeError) -> Problem:
    said = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(err))
    if said is None:
        return Problem(Place(str(path)), "", str(err))
    return Problem(Place(str(path), int(said[2] or text.count("\n") + 1)), "", said[1])


def _merge(into: dict[str, Any], table: dict[str, Any]) -> None:
    for name, value in table.items():
        known = into.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            _merge(known, value)
        else:
            into[name] = value


def _validate(merged: dict[str, Any], places: dict[KeyPath, Place], main: Path) -> Configuration:
    try:
        configuration = Configuration.model_validate(_with_defaults(merged))
    except ValidationError as err:
        problems = [
            Problem(_find_place(each["loc"], places, main), _key_text(each["loc"]), _message(each))
            for each in err.errors()
        ]
    else:
        problems = [
            Problem(_find_place(path, places, main), _key_text(path), message)
            for path, message in _dangling(configuration)
        ]
    # What is wrong in [defaults] is wrong in every job.
    unique = {(problem.place, problem.message): problem for problem in reversed(problems)}
    if unique:
        raise ConfigurationError(sorted(unique.values(), key=lambda one: (one.place.path, one.place.line)))
    return configuration


def _with_defaults(merged: dict[str, Any]) -> dict[str, Any]:
    defaults, jobs = merged.get("defaults"), merged.get("jobs")
    if not isinstance(defaults, dict) or not isinstance(jobs, dict):
        return merged
    filled: dict[str, Any] = {}
    for name, job in jobs.items():
        filled[name] = {**defaults, **job} if isinstance(job, dict) else job
        for table in _MERGED_INTO_JOBS if isinstance(job, dict) else ():
            general, own = defaults.get(table), job.get(table)
            if isinstance(general, dict) and isinstance(own, dict):
                filled[name][table] = {**general, **own}
    return {**merged, "jobs": filled}


def _dangling(configuration: Configuration) -> Iterator[tuple[KeyPath, str]]:
    """Find names of repositories and volumes that nothing stands for."""
    named: list[tuple[KeyPath, str | None]] = [(("repository",), configuration.repository)]
    named += [(("defaults", "repository"), configuration.defaults.repository)]
    named += [(("jobs", name, "repository"), job.repository) for name, job in configuration.jobs.items()]
    for path, text in named:
        if text is not None and "/" not in text and text not in configuration.repositories:
            yield path, f"there is no repository {text}; a directory is written with a slash"
    for name, job in configuration.jobs.items():
        for number, volume in enumerate(job.volumes):
            if "/" not in volume and volume not in configuration.volumes:
                yield ("jobs", name, "volumes", number), f"there is no {volume} in [volumes]"
        paths = [configuration.volume(volume, job)[0] for volume in job.volumes]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            yield ("jobs", name, "volumes"), f"{', '.join(twice)} is named twice"


def _find_place(path: KeyPath, places: dict[KeyPath, Place], main: Path) -> Place:
    """Return where the longest known part of a path is said, in a job or in the defaults."""
    candidates = [(path, 0)]
    if path[:1] == ("jobs",) and len(path) > 2:
        candidates.append((("defaults", *path[2:]), 1))
    best, length = Place(str(main)), 0
    for candidate, shorter in candidates:
        for end in range(len(candidate), 0, -1):
            place = places.get(candidate[:end])
            if place is not None:
                if end + shorter > length:
                    best, length = place, end + shorter
                break
    return best


def _key_text(path: KeyPath) -> str:
    return ".".join(str(part) for part in path if part != "[key]")


def _message(error: Any) -> str:  # noqa: ANN401 - pydantic's own type is private
    kind, said = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        if key in _known_keys():
            return "this key does not belong here"
        near = difflib.get_close_matches(key, _known_keys(), 1)
        return "there is no such key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return "is missing"
    return said.removeprefix("Value error, ")


@cache
def _known_keys() -> tuple[str, ...]:
    return tuple(sorted({name for model in _MODELS for name in model.model_fields}))
