"""What the inner process does to prove that a backup is of use: its filesystem, and the job's check command.

All happens on a loop device over an image with an overlay, in mounts and processes that die with the inner
process. Each step yields ``{"step": NAME, "seconds": N, "ok": BOOL, "said": TEXT}``; the first that fails is
the last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from blocksnap.errors import BlocksnapError
from blocksnap.restore.filesystems import Inside
from blocksnap.restore.inside import Answering, Inner, NoFilesystemError, Request, look_inside
from blocksnap.system import namespace
from blocksnap.system.contained import TIMED_OUT, run_contained

_CHECK_SECONDS = 6 * 3600.0
_SAID_BYTES = 1000


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
    loop = namespace.attach_image(image)
    try:
        node = os.readlink(f"/proc/self/fd/{loop}")
        try:
            inside: Inside | None = look_inside(image)
        except NoFilesystemError:
            inside = None
        os.makedirs(folder, exist_ok=True)
        for name, act in _steps(inside, node, folder, request):
            began = time.monotonic()
            try:
                said, ok = act(), True
            except (BlocksnapError, OSError) as err:
                said, ok = str(err), False
            seconds = round(time.monotonic() - began, 3)
            yield {"step": name, "seconds": seconds, "ok": ok, "said": said[-_SAID_BYTES:]}
            if not ok:
                return
    finally:
        namespace.unmount(folder)
        os.close(loop)


def _steps(
    inside: Inside | None, node: str, folder: str, request: Request
) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield what there is to do, by name."""
    command: list[str] = request["command"]
    environment = {"BLOCKSNAP_DRILL_DEVICE": node, "BLOCKSNAP_DRILL_BACKUP": request["backup"]}

    def check() -> str:
        return _run(command, request["seconds"], environment)

    if inside is None:
        if command:
            yield "check", check
        return
    kind, options, fault_finder = inside.filesystem, inside.replaying, inside.check

    def mount() -> str:
        namespace.mount_device(node, folder, kind, options)
        return kind

    def unmount() -> str:
        namespace.unmount_for_good(folder)
        return kind

    def replay() -> str:
        mount()
        return unmount()

    # As after a power cut: first the filesystem brings itself in order, then nobody may find fault with it.
    yield "replay", replay
    yield "fsck", lambda: _run([*fault_finder, node], _CHECK_SECONDS, {})
    yield "mount", mount
    if command:
        environment["BLOCKSNAP_DRILL_FOLDER"] = folder
        yield "check", check
    yield "unmount", unmount


def _run(argv: list[str], seconds: float, environment: dict[str, str]) -> str:
    done = run_contained(argv, timeout_seconds=seconds, environment=environment)
    if done.status == TIMED_OUT:
        raise _StepFailedError(f"{argv[0]} was not done after {seconds:g} s and was killed: {done.said}")
    if done.status:
        raise _StepFailedError(f"{argv[0]} ended with {done.status}: {done.said}")
    return done.said
