"""What the inner process answers about the files in an image: mount it, list, copy out.

A path is followed inside the image only: a symbolic link on the way is refused, because it would lead out of
it, to files of this host. Where the image has partitions a path begins with the name of one.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator

from blocksnap.restore.copied_attributes import note_lost
from blocksnap.restore.inside import Answering, Inner, InsideError, Request
from blocksnap.restore.naming import flush_open_folder
from blocksnap.restore.partitions import Contents, Partition
from blocksnap.restore.private_folder import PrivateFolder, private_folder
from blocksnap.restore.unkept import Unkept
from blocksnap.system.command import CommandError, run
from blocksnap.system.files import flush_filesystem_of

PARTITIONS = "partitions"
"""The name of a file that says which partitions there are."""
_COPY_SECONDS = 30 * 86400.0
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "link",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def answers() -> dict[str, Answering]:
    """Return what can be asked, by name."""
    return {"look": _look, "mount": _mount, "list": _list, "copy": _copy}


def _look(inner: Inner, request: Request) -> Iterator[object]:
    """Yield the names of the partitions that can be mounted, if there are any, and of what tells of all.

    That is a file in the image's own folder.
    """
    contents = inner.contents(request["backup"])
    if contents.partitions:
        with open(f"{inner.own_folder(request['backup'])}/{PARTITIONS}", "w", encoding="utf-8") as file:
            file.write(contents.describe())
        yield from [*(partition.name for partition in contents.shown()), PARTITIONS]


def _mount(inner: Inner, request: Request) -> Iterator[object]:
    inner.folder(request["backup"], request["partition"])
    return iter(())


def _list(inner: Inner, request: Request) -> Iterator[object]:
    """Yield the entries of a folder, or the one a path names; all below it if asked, and only some names.

    Where only the backup of a disk is named these are its partitions.
    """
    contents = inner.contents(request["backup"])
    named, rest = _split(contents, request["path"])
    pattern, recursive = request["find"], request["recursive"] or bool(request["find"])
    if not contents.partitions or named:
        yield from _list_below(
            inner.folder(request["backup"], named), named, rest, pattern, recursive=recursive
        )
        return
    if not pattern:
        yield from map(_partition_entry, contents.partitions)
    if recursive:
        for partition in contents.shown():
            folder = inner.folder(request["backup"], partition.name)
            yield from _list_below(folder, partition.name, "", pattern, recursive=True)


def _list_below(
    folder: str, prefix: str, rest: str, pattern: str | None, *, recursive: bool
) -> Iterator[dict[str, object]]:
    path, name = _follow(folder, rest)
    name = _joined(prefix, name)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        yield _entry(name, path, status)
        return
    waiting = [(path, name)]
    while waiting:
        above, shown = waiting.pop()
        with os.scandir(above) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        below = []
        for entry in entries:
            here = _joined(shown, entry.name)
            status = entry.stat(follow_symlinks=False)
            if not pattern or fnmatch.fnmatchcase(entry.name, pattern):
                yield _entry(here, entry.path, status)
            if recursive and stat.S_ISDIR(status.st_mode):
                below.append((entry.path, here))
        waiting += reversed(below)


def _copy(inner: Inner, request: Request) -> Iterator[object]:
    """Copy a file, or a folder with all in it, into a folder: owners, times, modes, links, xattrs, holes.

    It gets its name when all of it is there and durable. Until then it is where nobody else can put anything
    in the way, such as a link that would be followed. Yields what was made, and what it could not be given.
    """
    backup, target = request["backup"], request["to"]
    contents = inner.contents(backup)
    named, rest = _split(contents, request["path"])
    if contents.partitions and not named:
        sources = {partition.name: inner.folder(backup, partition.name) for partition in contents.shown()}
    else:
        path, name = _follow(inner.folder(backup, named), rest)
        last = _joined(named, name).rpartition("/")[2]
        names = sorted(os.listdir(path)) if not last else []
        sources = {last: path} if last else {each: os.path.join(path, each) for each in names}
    for each in sources:
        if os.path.lexists(os.path.join(target, each)):
            raise InsideError(f"{os.path.join(target, each)} exists already")
    unkept = Unkept()
    try:
        with private_folder(target) as private:
            for each, source in sources.items():
                _copy_one(source, private, each)
                note_lost(source, os.path.join(private.path_for_programs, each), each, unkept)
            # By what was open before the first write: it is told of one that was lost.
            flush_filesystem_of(private.fd)
            for each in sources:
                made = os.path.join(target, each)
                try:
                    private.take_out(each)
                except FileExistsError as err:
                    raise InsideError(f"{made} exists already") from err
                yield {"made": made}
            flush_open_folder(private.parent)
            yield from ({"not_kept": line} for line in unkept.lines())
    except OSError as err:
        raise InsideError(f"cannot copy to {target}: {err.strerror or err}") from err


def _copy_one(source: str, private: PrivateFolder, name: str) -> None:
    """Copy to a private folder; raises CommandError, MissingProgramError."""
    folder = private.path_for_programs
    options = ("--archive", "--no-target-directory", "--")
    try:
        run("cp", *options, source, os.path.join(folder, name), timeout_seconds=_COPY_SECONDS)
    except CommandError as err:
        message = err.message.replace(folder, private.path)
        raise CommandError(err.program, err.status, message) from err


def _split(contents: Contents, path: str) -> tuple[str, str]:
    """Return the partition that a path begins with, nothing where there is none, and the rest of it."""
    if not contents.partitions:
        return "", path
    first, _, rest = "/".join(part for part in path.split("/") if part not in ("", ".")).partition("/")
    if first == "..":
        raise InsideError(f"{path}: .. leads out of the backup")
    if first:
        # It is a partition, and can be looked into: raises otherwise.
        contents.get(first)
    return first, rest


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _follow(folder: str, path: str) -> tuple[str, str]:
    """Return where a path of the image leads to and how it is written without dots; raises InsideError."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InsideError(f"{path}: .. leads out of the backup")
    at = folder
    for number, part in enumerate(parts):
        at = os.path.join(at, part)
        try:
            status = os.lstat(at)
        except FileNotFoundError as err:
            raise InsideError(f"there is no {'/'.join(parts[: number + 1])} in this backup") from err
        except NotADirectoryError as err:
            raise InsideError(f"{'/'.join(parts[:number])} is no directory") from err
        if stat.S_ISLNK(status.st_mode) and number + 1 < len(parts):
            link = "/".join(parts[: number + 1])
            raise InsideError(f"{link} is a symbolic link to {os.readlink(at)}: name the file by that")
    return at, "/".join(parts)


def _partition_entry(partition: Partition) -> dict[str, object]:
    return {
        "path": partition.name,
        "kind": "partition",
        "size": partition.size,
        "mode": None,
        "uid": None,
        "gid": None,
        "modified": None,
        "target": None,
        "content": partition.content,
        "reason": partition.reason,
    }


def kind_of(mode: int) -> str:
    """Return what people call a kind of file."""
    return _KINDS.get(stat.S_IFMT(mode), "unknown")


def _entry(name: str, path: str, status: os.stat_result) -> dict[str, object]:
    kind = kind_of(status.st_mode)
    return {
        "path": name,
        "kind": kind,
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "modified": status.st_mtime,
        "target": os.readlink(path) if kind == "link" else None,
    }
