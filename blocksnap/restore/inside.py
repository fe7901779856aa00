"""A process that mounts the filesystems of images where only we see them, and answers what others ask of it.

It is forked while there are no threads, and has no part in serving the images: a process that waits for
a FUSE filesystem that it serves itself cannot be killed. It lives in the mount namespace that its parent made
(``system.namespace``) and dies with its parent; the kernel then removes mounts and loop devices.

Requests and answers are JSON, one a message of a SOCK_SEQPACKET socket: ``{"do": NAME, ...}``; any
number of ``{"entry": ...}``, then ``{"done": ...}`` or ``{"error": TEXT}``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from blocksnap.errors import BlocksnapError
from blocksnap.restore.partitions import Contents, NoFilesystemError, look_inside
from blocksnap.system import namespace
from blocksnap.system.children import fork_child

_MESSAGE_BYTES = 1 << 17
_END_SECONDS = 10.0
Request = dict[str, Any]
Answering = Callable[["Inner", Request], Iterator[object]]


class InsideError(BlocksnapError):
    """What was asked about the inside of an image cannot be answered."""

    def __init__(self, brief: str) -> None:
        super().__init__(
            brief, resolution="the image itself can be restored, or read through: blocksnap mount"
        )


class NoFuseError(BlocksnapError):
    """FUSE does not work here."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the images of backups cannot be shown: {reason}",
            resolution="it needs root, /dev/fuse and libfuse 3 (Debian: apt-get install fuse3)",
        )


class Inner:
    """What the inner process knows: where the images are, and what of them is mounted."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._contents: dict[str, Contents] = {}
        self._mounted: dict[tuple[str, str], str] = {}
        self.is_apart = False
        """Whether its mounts are no other process's."""

    def image(self, backup: str) -> str:
        """Return where the image of a backup is."""
        return f"{self._root}/images/{backup}"

    def contents(self, backup: str) -> Contents:
        """Return what is in an image; raises BlocksnapError, OSError."""
        found = self._contents.get(backup)
        if found is None:
            found = self._contents[backup] = look_inside(self.image(backup))
        return found

    def folder(self, backup: str, partition: str = "") -> str:
        """Return where the filesystem of an image, or of a partition, is mounted, now at the latest.

        Raises NoFilesystemError, UnnamedPartitionError, PartitionNotShownError, NotMountedError, OSError.
        """
        found = self._mounted.get((backup, partition))
        if found is None:
            found = self._mounted[backup, partition] = self._mount(backup, partition)
        return found

    def own_folder(self, backup: str) -> str:
        """Return the folder of an image's own, in which what is in the image is mounted."""
        folder = f"{self._root}/files/{backup}"
        os.makedirs(folder, exist_ok=True)
        return folder

    def close(self) -> None:
        """Take all mounts away, while their images are still served."""
        for folder in self._mounted.values():
            namespace.unmount(folder)

    def _mount(self, backup: str, name: str) -> str:
        contents, folder = self.contents(backup), self.own_folder(backup)
        inside, offset, size = contents.whole, 0, 0
        if contents.partitions:
            partition = contents.get(name)
            inside, offset, size = partition.inside, partition.offset, partition.size
            folder = f"{folder}/{partition.name}"
            os.makedirs(folder, exist_ok=True)
        if inside is None:
            raise NoFilesystemError
        image = self.image(backup)
        namespace.mount_image(image, folder, inside.filesystem, inside.options, offset=offset, size=size)
        return folder


class InnerProcess:
    """The process as its parent sees it: ends when every copy of ``questions`` is closed."""

    def __init__(self, pid: int, questions: socket.socket) -> None:
        self._pid = pid
        self.questions = questions

    def end(self, seconds: float = _END_SECONDS) -> None:
        """Wait so long for it to take its mounts away, then kill it; a second call does nothing."""
        self.questions.close()
        deadline = time.monotonic() + seconds
        while self._pid and not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.005)
        self._pid = 0


def fork_inner(answers: dict[str, Answering], root: str, *foreign: socket.socket) -> InnerProcess:
    """Fork the inner process; it closes ``foreign``, so that their other ends see ours being closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def work() -> bool:
        for each in (ours, *foreign):
            each.close()
        return _answer_all(answers, root, its)

    pid = fork_child(work)
    its.close()
    return InnerProcess(pid, ours)


def ask(inner: socket.socket, request: Request) -> Iterator[Any]:
    """Ask the inner process and yield what it answers; raises InsideError."""
    inner.sendall(json.dumps(request).encode())
    while True:
        message = inner.recv(_MESSAGE_BYTES)
        if not message:
            raise InsideError("the process that mounts images has died")
        answer = json.loads(message)
        if "entry" in answer:
            yield answer["entry"]
            continue
        if "error" in answer:
            raise InsideError(answer["error"])
        return


def _answer_all(answers: dict[str, Answering], root: str, questions: socket.socket) -> bool:
    """Answer until nobody asks any more."""
    namespace.die_with_parent()
    inner = Inner(root)
    while message := questions.recv(_MESSAGE_BYTES):
        request = json.loads(message)
        try:
            for entry in answers[request["do"]](inner, request):
                questions.sendall(json.dumps({"entry": entry}).encode())
            answer: dict[str, object] = {"done": True}
        except (BlocksnapError, OSError) as err:
            answer = {"error": str(err)}
        questions.sendall(json.dumps(answer).encode())
    inner.close()
    return True
