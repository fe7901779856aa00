"""What a server of PostgreSQL has to find in its restored data directory before it starts.

Its manual, "Making a Base Backup Using the Low Level API": the label has to be there byte for byte, because
the control file of a data directory that was copied while it was written to may name a later checkpoint than
the one that recovery has to begin with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from blocksnap.errors import TargetError, UsageError
from blocksnap.operations.reporting import Reporter
from blocksnap.repository.documents import ApplicationRecord, Backup
from blocksnap.restore.naming import give_name, hidden_name
from blocksnap.system import sysfs

_PROC = Path("/proc")
_ROOM = 1 << 20
_SERVERS = ("postgres", "postmaster")


@dataclass(frozen=True, slots=True)
class Label:
    """The label of one server, and what tells that a directory is its."""

    server: str
    text: str
    tablespace_map: str
    version: str
    system_identifier: str


class NotItsDirectoryError(TargetError):
    """A directory is not the restored data directory of the server (exit code 1)."""

    def __init__(self, directory: str, problem: str, resolution: str | None = None) -> None:
        self.directory = directory
        self.problem = problem
        super().__init__(f"{directory} {problem}, and nothing was written", resolution=resolution)


def needs_label(backup: Backup) -> list[str]:
    """Return the servers that do not start rightly from a backup without their label."""
    return [record.name for record in _labelled(backup)]


def tell_of_labels(backup: Backup, report: Reporter) -> None:
    """Tell whoever has restored a backup what has to be done before a server is started on it."""
    for server in needs_label(backup):
        report.event("needs_label", backup=backup.id, server=server)


def find_label(backup: Backup, server: str | None) -> Label:
    """Return the label of a server; raises UsageError when there is none, or more than one to choose from."""
    records = [record for record in _labelled(backup) if server is None or record.name == server]
    if not records:
        raise UsageError(
            f"backup {backup.id[:8]} has no label" + (f" of {server}" if server else ""),
            resolution="a server whose files were all in one snapshot needs none: start it",
        )
    if len(records) > 1:
        names = ", ".join(repr(record.name) for record in records)
        raise UsageError(f"backup {backup.id[:8]} is of several servers", resolution=f"--server: {names}")
    facts = records[0].facts
    return Label(
        records[0].name,
        facts["label"],
        facts.get("tablespace_map", ""),
        facts.get("version", ""),
        facts.get("system_identifier", ""),
    )


def write_label(label: Label, directory: str) -> list[str]:
    """Write it to a data directory, durably and as its owner; return the paths of what was written.

    Raises NotItsDirectoryError when the directory is another server's, is in use, has a label, or cannot be
    written to: then nothing is there that was not before.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise NotItsDirectoryError(directory, f"cannot be opened ({err.strerror})") from err
    try:
        owner = _require_its(label, directory, folder)
        texts = {"tablespace_map": _current_map(label.tablespace_map, folder), "backup_label": label.text}
        # The label is the last: with it there, everything is.
        written = _write_all(folder, {name: text for name, text in texts.items() if text}, owner)
    except OSError as err:
        raise NotItsDirectoryError(
            directory, f"cannot be written to ({err.filename or 'a file in it'}: {err.strerror})"
        ) from err
    finally:
        os.close(folder)
    return [os.path.join(directory, name) for name in written]


def _labelled(backup: Backup) -> list[ApplicationRecord]:
    records = backup.quiesced.records if backup.quiesced else ()
    return [record for record in records if record.kind == "postgresql" and record.facts.get("label")]


def _require_its(label: Label, directory: str, folder: int) -> os.stat_result:
    """Return the status of PG_VERSION, whose owner is the server's."""
    try:
        control = _read(folder, "global/pg_control")
        version = _read(folder, "PG_VERSION").decode(errors="replace").strip()
        owner = os.stat("PG_VERSION", dir_fd=folder)
    except FileNotFoundError as err:
        raise NotItsDirectoryError(
            directory,
            f"is no data directory: it has no {err.filename}",
            "name the one with PG_VERSION in it, on the restored volume, mounted",
        ) from err
    # ControlFileData begins with it (src/include/catalog/pg_control.h), in the byte order of the machine.
    orders = {str(int.from_bytes(control[:8], "little")), str(int.from_bytes(control[:8], "big"))}
    if label.system_identifier not in orders or not re.match(rf"{re.escape(version)}\b", label.version):
        raise NotItsDirectoryError(directory, f"is of another server than {label.server}")
    if _exists(folder, "backup_label"):
        raise NotItsDirectoryError(
            directory,
            "has a backup_label already",
            "start the server, if it is this one's; else restore the volume again",
        )
    pid = _running(folder)
    if pid:
        raise NotItsDirectoryError(directory, f"is in use: process {pid} is a server on it")
    return owner


def _running(folder: int) -> int | None:
    """Return a server that runs on the directory, in which all its processes are.

    The pid file of a snapshot tells of one long gone, and that of a container has a number of its own.
    """
    its, told = os.fstat(folder), ""
    with contextlib.suppress(OSError):
        told = _read(folder, "postmaster.pid").split(b"\n", 1)[0].decode(errors="replace")
    for process in sysfs.find(_PROC, "[0-9]*"):
        is_server = process.name == told or (sysfs.text_of(process / "comm") or "").startswith(_SERVERS)
        # It may end meanwhile, and those of the kernel have no directory.
        with contextlib.suppress(OSError):
            if is_server and os.path.samestat(os.stat(process / "cwd"), its):
                return int(process.name)
    return None


def _current_map(stored: str, folder: int) -> str:
    """Return the map with the links that are there now, since whoever restores may have led them elsewhere.

    A line is an OID, a space and the path, in which a backslash stands before line feeds and backslashes.
    """
    lines = []
    for oid, path in re.findall(r"(\d+) ((?:\\.|[^\\\n])*)\n?", stored, re.DOTALL):
        try:
            target = os.readlink(f"pg_tblspc/{oid}", dir_fd=folder)
        except OSError:
            target = None
        lines.append(f"{oid} {path if target is None else _escape(target)}\n")
    return "".join(lines)


def _escape(path: str) -> str:
    return re.sub(r"([\\\n\r])", r"\\\1", path)


def _read(folder: int, name: str) -> bytes:
    """Return what a file begins with; raises OSError, also for what is no file, which is not opened."""
    place = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", name)
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        return os.read(fd, _ROOM)
    finally:
        os.close(fd)


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _write_all(folder: int, texts: dict[str, str], owner: os.stat_result) -> list[str]:
    """Give files their names, in this order, when all are durable; remove them when that fails."""
    made: list[str] = []
    try:
        hidden = {name: hidden_name(name) for name in texts}
        for name, text in texts.items():
            made.append(hidden[name])
            _write(folder, hidden[name], text, owner)
        for name, text in texts.items():
            _replace_same(folder, name, text)
            try:
                give_name(f"/proc/self/fd/{folder}/{hidden[name]}", f"/proc/self/fd/{folder}/{name}")
            except OSError as err:
                raise OSError(err.errno, err.strerror, name) from err
            made.append(name)
            os.fsync(folder)
    except BaseException:
        for name in made:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
        raise
    return list(texts)


def _replace_same(folder: int, name: str, text: str) -> None:
    """Make way where the very same is there already: one who was killed before the label has left it."""
    if _exists(folder, name) and _read(folder, name) == text.encode():
        os.unlink(name, dir_fd=folder)


def _write(folder: int, name: str, text: str, owner: os.stat_result) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.fchown(fd, owner.st_uid, owner.st_gid)
        left = text.encode()
        while left:
            left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
