"""What the inner process does to prove that a backup is of use: its filesystem, and the job's check command.

All happens on loop devices over an image with an overlay, in mounts and processes that die with the inner
process. A disk with partitions has each of its filesystems put to the same steps, and one command for all.

Each step yields ``{"step": NAME, "seconds": N, "ok": BOOL, "said": TEXT}``; the first that fails is the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blocksnap.errors import BlocksnapError
from blocksnap.restore.filesystems import Inside
from blocksnap.restore.inside import Answering, Inner, Request
from blocksnap.restore.partitions import Contents
from blocksnap.system import namespace
from blocksnap.system.contained import TIMED_OUT, run_contained
from blocksnap.system.partitions import name_content

_CHECK_SECONDS = 6 * 3600.0
SAID_BYTES = 1000


class _StepFailedError(BlocksnapError):
    """A step came to another end than it should."""


def answers() -> dict[str, Answering]:
    """Return what can be asked, by name."""
    return {"drill": _drill}


def _drill(inner: Inner, request: Request) -> Iterator[object]:
    if not inner.is_apart:
        namespace.part_mounts()
        inner.is_apart = True
    image = inner.image(request["backup"])
    folder = f"{namespace.PRIVATE_FOLDER}/drill"
    os.makedirs(folder, exist_ok=True)
    with ExitStack() as stack:
        contents = inner.contents(request["backup"])
        drilled = [_attach(image, each, folder, stack) for each in _filesystems(contents)]
        yield from performed(_steps(contents, drilled, _Check.of(request, image, folder)))


def performed(steps: Iterable[tuple[str, Callable[[], str]]]) -> Iterator[dict[str, object]]:
    """Do what a drill does, step by step up to the first that fails, and yield what came of each."""
    for name, act in steps:
        began = time.monotonic()
        try:
            said, ok = act(), True
        except (BlocksnapError, OSError) as err:
            said, ok = str(err), False
        seconds = round(time.monotonic() - began, 3)
        yield {"step": name, "seconds": seconds, "ok": ok, "said": said[-SAID_BYTES:]}
        if not ok:
            return


@dataclass(frozen=True, slots=True)
class _Filesystem:
    """A filesystem of an image (``name``: of its partition), its device, and where it is mounted."""

    name: str
    inside: Inside
    node: str
    folder: str

    def mount(self) -> str:
        namespace.mount_device(self.node, self.folder, self.inside.filesystem, self.inside.replaying)
        return self.inside.filesystem

    def unmount(self) -> str:
        namespace.unmount_for_good(self.folder)
        return self.inside.filesystem

    def replay(self) -> str:
        self.mount()
        return self.unmount()

    def find_fault(self) -> str:
        return run_check([*self.inside.check, self.node], _CHECK_SECONDS, {})


@dataclass(frozen=True, slots=True)
class _Check:
    """The job's own command, and what it is told."""

    image: str
    folder: str
    backup: str
    command: tuple[str, ...]
    seconds: float

    @classmethod
    def of(cls, request: Request, image: str, folder: str) -> _Check:
        return cls(image, folder, request["backup"], tuple(request["command"]), request["seconds"])

    def run(self, device: str | None, *, is_mounted: bool) -> str:
        """Run it; without a ``device`` it is given one of the whole image, attached only for it.

        A device attached earlier would go on having in memory what was there before filesystems changed it.
        """
        environment = {"BLOCKSNAP_DRILL_BACKUP": self.backup}
        if is_mounted:
            environment["BLOCKSNAP_DRILL_FOLDER"] = self.folder
        loop = namespace.attach_image(self.image) if device is None else -1
        try:
            environment["BLOCKSNAP_DRILL_DEVICE"] = device or _node_of(loop)
            return run_check(self.command, self.seconds, environment)
        finally:
            if loop >= 0:
                os.close(loop)


def _filesystems(contents: Contents) -> list[tuple[str, Inside, int, int]]:
    """Return the partition, if there are any, the filesystem, and where it begins and how long it may be."""
    if contents.whole is not None:
        return [("", contents.whole, 0, 0)]
    return [
        (each.name, each.inside, each.offset, each.size)
        for each in contents.shown()
        if each.inside is not None
    ]


def _attach(image: str, found: tuple[str, Inside, int, int], folder: str, stack: ExitStack) -> _Filesystem:
    name, inside, offset, size = found
    loop = namespace.attach_image(image, offset=offset, size=size)
    stack.callback(os.close, loop)
    own = f"{folder}/{name}" if name else folder
    os.makedirs(own, exist_ok=True)
    # What is left of it when a step fails goes before its device.
    stack.callback(namespace.unmount, own)
    return _Filesystem(name, inside, _node_of(loop), own)


def _steps(
    contents: Contents, drilled: list[_Filesystem], check: _Check
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield what there is to do, by name."""
    if contents.partitions:
        yield "partitions", lambda: _judge(contents)
    elif contents.whole is None:
        yield "contents", lambda: _name_unknown(check.image)
    # As after a power cut: first a filesystem brings itself in order, then nobody may find fault with it.
    for each in drilled:
        yield _named("replay", each), each.replay
        yield _named("fsck", each), each.find_fault
    for each in drilled:
        yield _named("mount", each), each.mount
    if check.command:
        device = drilled[0].node if contents.whole is not None else None
        yield "check", lambda: check.run(device, is_mounted=bool(drilled))
    for each in drilled:
        yield _named("unmount", each), each.unmount


def _named(step: str, filesystem: _Filesystem) -> str:
    return f"{step} {filesystem.name}" if filesystem.name else step


def _name_unknown(image: str) -> str:
    """Say what it is, if not a filesystem that can be mounted: nobody is to take it for looked into."""
    name = name_content(image, offset=0, size=os.path.getsize(image))
    return f"it holds {name}, not looked into" if name else "it holds no filesystem that is known"


def _judge(contents: Contents) -> str:
    faults = [contents.fault, *(f"{each.name}: {each.fault}" for each in contents.partitions if each.fault)]
    if any(faults):
        raise _StepFailedError("; ".join(fault for fault in faults if fault))
    return "; ".join(each.describe() for each in contents.partitions)


def _node_of(loop: int) -> str:
    return os.readlink(f"/proc/self/fd/{loop}")


def run_check(argv: Sequence[str], seconds: float, environment: dict[str, str]) -> str:
    """Run what finds fault, or not, and return what it said; of it nothing is left.

    Raises BlocksnapError when it found one, or was not done in time.
    """
    done = run_contained(argv, timeout_seconds=seconds, environment=environment)
    if done.status == TIMED_OUT:
        raise _StepFailedError(f"{argv[0]} was not done after {seconds:g} s and was killed: {done.said}")
    if done.status:
        raise _StepFailedError(f"{argv[0]} ended with {done.status}: {done.said}")
    return done.said
