"""Loop devices and filesystems for tests: asked from the kernel, removed whatever happens."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocksnap.system.files import is_being_written
from blocksnap.system.udev import settle

_MOMENT_SECONDS = 10
RELEASE_SECONDS = 600
"""A lab keeps copies of the mounts of others as long as it runs."""


def call(*argv: str | Path) -> str:
    """Run a tool that has to succeed."""
    done = subprocess.run([str(word) for word in argv], check=False, capture_output=True, text=True)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


@contextmanager
def loop_device(
    image: Path, *options: str, size: int | None = None, read_only: bool = False
) -> Iterator[str]:
    """Attach a file, made with ``size`` bytes if asked for; yield the device's path.

    Further ``options`` are those of losetup(8).
    """
    if size is not None:
        with image.open("ab") as file:
            file.truncate(size)
    device = call(
        "losetup", "--find", "--show", *(["--read-only"] if read_only else []), *options, image
    ).strip()
    try:
        _remove_partitions(device)
        # What udev knows of the file that the device had before would be taken for this one's.
        settle()
        yield device
    finally:
        detach(device)


def detach(device: str) -> None:
    """Let a loop device go, and wait until nobody keeps its file; does nothing where it has none."""
    attached = Path("/sys/block", Path(device).name, "loop/backing_file")
    if attached.exists():
        image = attached.read_text().rstrip("\n")
        call("losetup", "--detach", device)
        _await_release(attached, image)


def _remove_partitions(device: str) -> None:
    """Remove what a test that was killed left: a partition that was added outlives the file of its device."""
    for number in Path("/sys/block", Path(device).name).glob("*p*/partition"):
        _remove_partition(device, number)


def _remove_partition(device: str, number: Path) -> None:
    """Remove one, once nobody looks at it any more; the kernel may be about to do it itself."""
    deadline = time.monotonic() + RELEASE_SECONDS
    try:
        name = number.read_text().strip()
    except OSError:
        return
    while number.exists():
        done = subprocess.run(["delpart", device, name], check=False, capture_output=True, text=True)
        if done.returncode != 0:
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.2)


def _await_release(attached: Path, image: str) -> None:
    """Wait until nobody keeps the file: its filesystem could not be unmounted.

    Whoever looks at new devices does, and what another test began meanwhile with mounts of its own.
    """
    deadline = time.monotonic() + RELEASE_SECONDS
    with contextlib.suppress(OSError):
        while attached.read_text().rstrip("\n") == image:
            assert time.monotonic() < deadline, f"{image} is kept"
            time.sleep(0.05)
    # The kernel closes the file a moment after it has taken its name away (drivers/block/loop.c). It may be
    # the test's own by now.
    deadline = time.monotonic() + _MOMENT_SECONDS
    while is_being_written(image) and time.monotonic() < deadline:
        time.sleep(0.05)


def call_until_done(*argv: str | Path) -> None:
    """Run a tool that succeeds once nobody uses its object, as a copy of all mounts does for an instant."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while time.monotonic() < deadline:
        if subprocess.run([str(word) for word in argv], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.2)
    call(*argv)


def unmount(folder: Path) -> None:
    """Unmount a filesystem, once nobody is in it any more."""
    call_until_done("umount", folder)


def await_unused(device: str) -> None:
    """Wait until nobody has a device mounted, in any namespace, or holds it for itself.

    What others began while it was mounted, a lab or a server, may have a copy of all mounts all its life.
    """
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError:
            assert time.monotonic() < deadline, f"{device} is held"
            time.sleep(0.1)
        else:
            return


@contextmanager
def mounted(device: str, folder: Path, *options: str) -> Iterator[Path]:
    """Mount a device; yield the folder."""
    folder.mkdir(exist_ok=True)
    call("mount", *options, device, folder)
    try:
        yield folder
    finally:
        unmount(folder)
