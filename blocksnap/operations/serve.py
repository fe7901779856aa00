"""Serve a backup as a network block device: by nbdkit, over the image that a FUSE filesystem shows it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from blocksnap.errors import BlocksnapError, UsageError
from blocksnap.operations.catalogue import find_backup
from blocksnap.operations.images import IMAGES_FOLDER, OpenRepository, require_fuse, served_images
from blocksnap.operations.reporting import Reporter
from blocksnap.repository.documents import Backup
from blocksnap.system import namespace
from blocksnap.system.command import MissingProgramError, has_program
from blocksnap.system.nbdkit import LOOPBACK, NbdkitError, serve_socket

DEFAULT_FOLDER = "/run/blocksnap"
_LOOK_SECONDS = 0.5


class SocketTakenError(BlocksnapError):
    """Something is in the way of the socket (exit code 1)."""

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        super().__init__(f"cannot serve on {path}: {what}", resolution="name another one: --socket PATH")


class ImageLostError(BlocksnapError):
    """The image cannot be served any more (exit code 1)."""

    def __init__(self, backup: str, reason: str) -> None:
        self.backup, self.reason = backup, reason
        super().__init__(
            f"{backup[:8]} is not served any more: {reason}", resolution="run the same command again"
        )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where clients connect: a port of the loopback interface, or else a socket in the filesystem."""

    port: int = 0
    socket: str = ""

    def url(self, socket_path: str) -> str:
        """Return the NBD URL (https://github.com/NetworkBlockDevice/nbd, uri.md)."""
        if self.port:
            return f"nbd://{LOOPBACK}:{self.port}"
        return f"nbd+unix:///?socket={quote(socket_path)}"


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, and where."""

    backup: Backup
    url: str


def serve_backup(
    open_repository: OpenRepository,
    name: str,
    endpoint: Endpoint,
    report: Reporter,
    serving: Callable[[Serving], None],
    *,
    writable: bool,
) -> None:
    """Serve until a signal ends it; ``serving`` is called when clients can connect.

    Raises NoFuseError, MissingProgramError, SocketTakenError, NbdkitError, ImageLostError, and what
    opening the repository and finding the backup raise.
    """
    if endpoint.port and endpoint.socket:
        raise UsageError("a socket and a port: name one of them")
    require_fuse()
    if not has_program("nbdkit"):
        raise MissingProgramError("nbdkit")
    namespace.leave_mounts()
    repository = open_repository()
    backup = find_backup(repository, name).backup
    lost: list[str] = []
    with (
        ExitStack() as users,
        served_images(repository, [backup], report, end_users=users.close, when_lost=lost.append),
    ):
        where, path, made = ["--ipaddr", LOOPBACK, "--port", str(endpoint.port)], "", None
        if not endpoint.port:
            path = os.path.abspath(endpoint.socket or f"{DEFAULT_FOLDER}/{backup.id[:8]}.nbd")
            made = users.enter_context(_free_socket(path))
            where = ["--unix", path]
        mark = Path(namespace.PRIVATE_FOLDER) / "nbdkit.pid"
        image = f"{IMAGES_FOLDER}/{backup.id}"
        server = users.enter_context(serve_socket(image, where, mark, writable=writable))
        if made is not None:
            made.note()
        serving(Serving(backup, endpoint.url(path)))
        while not server.wait(_LOOK_SECONDS):
            if lost:
                raise ImageLostError(backup.id, lost[0])
        raise NbdkitError(server.said())


@contextmanager
def _free_socket(path: str) -> Iterator[_Made]:
    """Make a path free for a socket that only root can reach, and see that ours is gone afterwards."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    except OSError as err:
        raise SocketTakenError(path, os.strerror(err.errno or 0)) from err
    if os.path.lexists(path):
        _remove_dead(path)
    made = _Made(path)
    yield made
    made.remove()


class _Made:
    """A socket that another server, of the same backup, may make in the same moment."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._status: os.stat_result | None = None

    def note(self) -> None:
        """Take what is there now for ours, and let only root reach it."""
        os.chmod(self._path, 0o600)
        self._status = os.lstat(self._path)

    def remove(self) -> None:
        """Remove it if it is still there."""
        with suppress(FileNotFoundError):
            if self._status is not None and os.path.samestat(self._status, os.lstat(self._path)):
                os.unlink(self._path)


def _remove_dead(path: str) -> None:
    """Remove a socket that nobody listens on any more; raises SocketTakenError for anything else."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(path)
        except OSError as err:
            if err.errno != errno.ECONNREFUSED or not Path(path).is_socket():
                raise SocketTakenError(path, "a file of that name is there") from err
            os.unlink(path)
            return
    raise SocketTakenError(path, "another server listens there")
