"""Where a server of MariaDB or MySQL has its files: what it says itself, and what its directories show.

It says where InnoDB and Aria have theirs. The files of a table that has a DATA DIRECTORY or an INDEX
DIRECTORY are shown by links (MyISAM, Aria) or by ``NAME.isl``, which has the path (InnoDB, not from MySQL 8.0
on). MySQL lists the files of InnoDB, which MariaDB leaves empty. A database may be a link, or be mounted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from blocksnap.system import peers

_FOLDERS = (
    "innodb_data_home_dir",
    "innodb_log_group_home_dir",
    "innodb_undo_directory",
    "aria_log_dir_path",
)
VARIABLES = ("datadir", "innodb_data_file_path", *_FOLDERS)
"""The variables that say where files are."""
# The directories only, each once: there may be a hundred thousand tables. What is temporary is not backed up.
# MySQL manual, "The INFORMATION_SCHEMA FILES Table"; it asks for the right PROCESS.
TABLESPACES = (
    "SELECT DISTINCT "
    "LEFT(FILE_NAME, CHAR_LENGTH(FILE_NAME) - CHAR_LENGTH(SUBSTRING_INDEX(FILE_NAME, '/', -1))) "
    "FROM information_schema.FILES WHERE FILE_NAME IS NOT NULL AND FILE_TYPE <> 'TEMPORARY'"
)
_SHORTCUT = ".isl"


def places_of(pid: int, variables: Mapping[str, str], tablespaces: Iterable[str]) -> list[str]:
    """Return all directories with its files, and the devices that it uses as such; raises OSError.

    ``variables`` are what it says to VARIABLES, ``tablespaces`` what to TABLESPACES. The paths are such as
    process ``pid`` has, without links.
    """
    base = variables["datadir"]
    told = [_place(pid, path) for path in _told(variables, tablespaces)]
    return list(dict.fromkeys(place for place in (*told, *_shown(pid, base)) if place is not None))


def _told(variables: Mapping[str, str], tablespaces: Iterable[str]) -> Iterator[str]:
    """Yield the paths that it says; relative ones are below the data directory."""
    base = variables["datadir"]
    yield base
    yield from (os.path.join(base, folder) for name in _FOLDERS if (folder := variables.get(name)))
    # Where it has a directory, that is put in front of absolute paths too (manual, "InnoDB Startup
    # Configuration").
    home = variables.get("innodb_data_home_dir")
    for file in filter(None, variables.get("innodb_data_file_path", "").split(";")):
        name = file.partition(":")[0]
        yield os.path.join(base, f"{home}/{name}" if home else name)
    yield from (os.path.join(base, folder) for folder in tablespaces)


def _shown(pid: int, base: str) -> Iterator[str | None]:
    """Yield the places of all that its data directory and those of its databases have elsewhere."""
    root = f"/proc/{pid}/root"
    top = peers.real_path(pid, base)
    yield from _scan(pid, root, base, top)
    filesystem = os.stat(root + top).st_dev
    for entry in os.scandir(root + top):
        # No database begins like that, as the server writes their names; snapshots of the filesystem may.
        if entry.name.startswith("."):
            continue
        # One that was dropped meanwhile has no files.
        with suppress(FileNotFoundError):
            folder = peers.real_path(pid, f"{top}/{entry.name}")
            status = os.stat(root + folder)
            if stat.S_ISDIR(status.st_mode):
                if status.st_dev != filesystem:
                    yield folder
                yield from _scan(pid, root, base, folder)


def _scan(pid: int, root: str, base: str, folder: str) -> Iterator[str | None]:
    for entry in os.scandir(root + folder):
        if entry.is_symlink():
            # A link to nothing has no files either.
            with suppress(FileNotFoundError):
                yield _place(pid, f"{folder}/{entry.name}")
        elif entry.name.endswith(_SHORTCUT):
            with (
                suppress(FileNotFoundError),
                open(entry.path, encoding="utf-8", errors="surrogateescape") as file,
            ):
                says = os.path.join(base, file.read().strip())
                yield _place(pid, os.path.dirname(says))


def _place(pid: int, path: str) -> str | None:
    """Return the directory of a path, or the device it is; None for what has no data, such as a socket."""
    place = peers.real_path(pid, path)
    mode = os.stat(f"/proc/{pid}/root{place}").st_mode
    if stat.S_ISREG(mode):
        return os.path.dirname(place)
    return place if stat.S_ISDIR(mode) or stat.S_ISBLK(mode) else None
