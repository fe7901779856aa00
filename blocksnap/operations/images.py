"""Look into backups without restoring them: a tree of images and their files, or single files copied out.

Everything that is mounted for it is seen by our own processes only, and goes with them, however they end. The
processes are forked first, before there are threads and connections, and before the repository is opened.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC
from typing import Any, Protocol

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.operations.catalogue import find_backup, is_tree, map_root, of_volume, require_image
from blocksnap.operations.reporting import Reporter, each_once
from blocksnap.operations.trees import FilesOfTree, served_trees
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.documents import Backup
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository
from blocksnap.restore.contents import answers
from blocksnap.restore.inside import InnerProcess, NoFuseError, ask, fork_inner
from blocksnap.restore.tree_mount import (
    MOUNTED,
    NoTreeError,
    TreeEnd,
    hold_tree,
    read_further_ahead,
    require_mounted,
)
from blocksnap.system import namespace, own_mount
from blocksnap.system.children import fork_child, wait_for_child

_MESSAGE_BYTES = 1 << 20
IMAGES_FOLDER = f"{namespace.PRIVATE_FOLDER}/images"
OpenRepository = Callable[[], Repository]


def show_backups(
    open_repository: OpenRepository,
    name: str,
    folder: str,
    report: Reporter,
    mounted: Callable[[int], None],
) -> None:
    """Show a backup, or all of a volume, as a tree in ``folder`` until that is unmounted.

    ``mounted`` is called with the number of backups when it is there. Raises NoTreeError, NoFuseError, and
    what opening the repository and finding the backup raise; and TreeLostError when it ends otherwise.
    """
    folder = os.path.realpath(folder)
    if not os.path.isdir(folder):
        raise NoTreeError(folder, "there is no such directory")
    require_fuse()
    with ExitStack() as stack:
        source = own_mount.new_source()
        control, pid = _fork_tree(folder, source)
        here = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(_end_tree, control, pid, source, here)
        end = TreeEnd(control, folder)
        namespace.leave_mounts()
        inner = fork_inner(answers(), namespace.PRIVATE_FOLDER, control)
        repository = open_repository()
        shown = _backups_of(repository, name)
        shows_trees = is_tree(next(iter(shown.values())))
        if shows_trees:
            inner.end()
            _send_all(control, b"", [])
            serving = served_trees(repository, shown, control, folder, end, report)
        else:
            serving = served_images(
                repository, shown.values(), report, end_users=inner.end, when_lost=end.because
            )
        with serving:
            try:
                if shows_trees:
                    read_further_ahead(f"/proc/{pid}/mountinfo", source)
                else:
                    _hand_over(control, shown, inner.questions, folder)
                mounted(len(shown))
                end.wait()
            finally:
                # The tree goes before what it is made of.
                stack.close()


def _hand_over(control: socket.socket, shown: dict[str, Backup], inner: socket.socket, folder: str) -> None:
    """Have the other process mount the tree; raises NoTreeError."""
    root = os.open(namespace.PRIVATE_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    tree = [_Shown(each, backup.id, backup.time.timestamp()) for each, backup in shown.items()]
    document = json.dumps([asdict(each) for each in tree]).encode()
    _send_all(control, document, [root, inner.fileno()])
    os.close(root)
    inner.close()
    # What it says when the tree is unmounted at once is not part of that.
    said = control.recv(len(MOUNTED))
    require_mounted(said if said == MOUNTED else said + control.recv(_MESSAGE_BYTES), folder)


@dataclass(frozen=True, slots=True)
class _Shown:
    folder: str
    backup: str
    taken_at: float


class Files(Protocol):
    """The files in one backup."""

    backup: Backup

    def entries(self, path: str, *, recursive: bool, find: str | None) -> Iterator[dict[str, Any]]:
        """Yield what is in a folder, or the entry that a path names; raises BlocksnapError."""
        ...

    def copy(self, path: str, folder: str) -> list[str]:
        """Copy a path into a folder; return what was made. Raises BlocksnapError."""
        ...


class FilesInImage:
    """The files in the filesystem of an image, which another process mounts."""

    def __init__(self, inner: socket.socket, backup: Backup, report: Reporter) -> None:
        self._inner = inner
        self.backup = backup
        self._report = report

    def entries(self, path: str, *, recursive: bool, find: str | None) -> Iterator[dict[str, Any]]:
        """Yield what is in a folder, or the entry that a path names; raises InsideError."""
        yield from ask(self._inner, self._request("list", path, recursive=recursive, find=find))

    def copy(self, path: str, folder: str) -> list[str]:
        """Copy a path into a folder; return what was made. Raises InsideError.

        What cannot be kept is a warning.
        """
        answer = list(ask(self._inner, self._request("copy", path, to=os.path.realpath(folder))))
        for line in (entry["not_kept"] for entry in answer if "not_kept" in entry):
            self._report.warn(f"not kept: {line}")
        return [entry["made"] for entry in answer if "made" in entry]

    def _request(self, do: str, path: str, **more: object) -> dict[str, object]:
        return {"do": do, "backup": self.backup.id, "path": path, **more}


@contextmanager
def files_of(open_repository: OpenRepository, name: str, report: Reporter) -> Iterator[Files]:
    """Make the files in a backup readable for as long as the block lasts.

    Those of a subvolume are read from the repository; only for those in an image something is mounted.
    Raises NoFuseError, NotMountedError, and what opening the repository and finding the backup raise.
    """
    # Whether it can be done is told when it is known that it has to be.
    inner: InnerProcess | BlocksnapError
    try:
        require_fuse()
        namespace.leave_mounts()
        inner = fork_inner(answers(), namespace.PRIVATE_FOLDER)
    except BlocksnapError as err:
        inner = err
    repository = open_repository()
    backup = find_backup(repository, name).backup
    if is_tree(backup):
        if isinstance(inner, InnerProcess):
            inner.end()
        yield FilesOfTree(repository, backup, report)
        return
    if isinstance(inner, BlocksnapError):
        raise inner
    with served_images(repository, [backup], report, end_users=inner.end):
        yield FilesInImage(inner.questions, backup, report)


def require_fuse() -> None:
    """Raise NoFuseError where images of backups cannot be shown."""
    if os.geteuid():
        raise NoFuseError("it mounts, which only root may")
    try:
        # This loads the module, where that has not happened yet.
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        raise NoFuseError(f"/dev/fuse: {os.strerror(err.errno or 0)}") from err
    try:
        from blocksnap.restore.fuse import require_libfuse
    except OSError as err:
        raise NoFuseError(str(err)) from err
    require_libfuse()


@contextmanager
def served_images(
    repository: Repository,
    backups: Iterable[Backup],
    report: Reporter,
    *,
    end_users: Callable[[], object],
    tell: Callable[[BlocksnapError], None] | None = None,
    when_lost: Callable[[str], None] = lambda _: None,
    patient: bool = False,
    writable: bool = False,
    silence: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Serve backups as files of the folder ``IMAGES_FOLDER``, for other processes, never this one.

    ``end_users`` is called at the end: what is made of an image goes before the image, and not by the hand
    that serves it. Reads that wait for the repository fail before that, and ``silence`` is called still
    before, for users who are not to hear of it. ``tell`` is called with what keeps a read waiting or fails
    it, each time; without it that is a warning, once. ``when_lost`` is called, by another thread, with the
    reason when they are served no more before the end. With ``patient`` their reads wait for a repository
    that is away; with ``writable`` each image has an overlay that is thrown away.
    """
    from blocksnap.restore.serving import ServedImages

    repository.keys.require(Right.READ)
    backups = list(backups)
    for backup in backups:
        require_image(backup)
    described = {
        backup.id: (Geometry(backup.size, backup.chunk_size), map_root(backup.map), backup.time.timestamp())
        for backup in backups
    }
    # Loaded now, so that the threads that read find it.
    _ = repository.index
    os.mkdir(IMAGES_FOLDER)
    with ServedImages(
        repository,
        described,
        IMAGES_FOLDER,
        tell or each_once(report),
        patient=patient,
        writable=writable,
        when_lost=when_lost,
    ) as images:
        try:
            yield
        finally:
            silence()
            images.give_up()
            end_users()


def _backups_of(repository: Repository, name: str) -> dict[str, Backup]:
    """Return the backups that a name means, by their folders; the only one is in none."""
    of_it = [stored.backup for stored in of_volume(repository.backups(), name)]
    if not of_it:
        return {"": find_backup(repository, name).backup}
    found: dict[str, Backup] = {}
    for backup in of_it:
        folder = backup.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        found[f"{folder}-{backup.id[:8]}" if folder in found else folder] = backup
    if len({is_tree(backup) for backup in found.values()}) > 1:
        raise UsageError(
            f"{name} is a subvolume and an image too, which are not shown as one",
            resolution="name one by its key: blocksnap list --json",
        )
    return found


def _fork_tree(folder: str, source: str) -> tuple[socket.socket, int]:
    """Fork the process that shows the tree, where everybody sees it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def work() -> bool:
        ours.close()
        return _show_tree(folder, source, its)

    pid = fork_child(work)
    its.close()
    return ours, pid


def _show_tree(folder: str, source: str, control: socket.socket) -> bool:
    handed_over = _receive_all(control)
    if handed_over is None:
        # Whoever was to tell what to show has given up.
        return True
    document, fds = handed_over
    if not fds:
        return hold_tree(folder, source, control)
    from blocksnap.restore.showing import Shown, serve_tree

    root, inner = fds
    shown = [Shown(**each) for each in json.loads(document)]
    return serve_tree(folder, source, control, shown, root, socket.socket(fileno=inner))


def _end_tree(control: socket.socket, pid: int, source: str, namespace_fd: int) -> None:
    """End the process that shows the tree, and unmount that, and nothing else, where it could not."""
    with suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    if wait_for_child(pid):
        own_mount.unmount_in(namespace_fd, source)
    os.close(namespace_fd)


def _send_all(control: socket.socket, document: bytes, fds: list[int]) -> None:
    socket.send_fds(control, [len(document).to_bytes(8, "little")], fds)
    control.sendall(document)


def _receive_all(control: socket.socket) -> tuple[bytes, list[int]] | None:
    head, fds, _, _ = socket.recv_fds(control, 8, 2)
    length, document = int.from_bytes(head, "little"), b""
    while len(document) < length and (part := control.recv(length - len(document))):
        document += part
    return (document, fds) if head and len(document) == length else None
