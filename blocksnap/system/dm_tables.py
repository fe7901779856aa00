"""Make, change and remove device-mapper devices of our own, by name; tables are text as of dmsetup(8).

A device whose table is replaced goes on being used: what is under way is waited for, what comes meanwhile
waits, and then goes by the new table.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from blocksnap.system import sysfs
from blocksnap.system.command import CommandError, run
from blocksnap.system.devmapper import dm_name, is_suspended

_SYS_BLOCK = Path("/sys/block")
_REMOVE_ATTEMPTS = 20
_REPLACE_ATTEMPTS = 3
WAIT_SECONDS = 30 * 86400.0
"""What is under way may wait for a repository that is away."""


def number_of(name: str) -> int | None:
    """Return the number of the device with this name; None when there is none."""
    numbers = sysfs.numbers_of(sysfs.find(_SYS_BLOCK, "dm-*/dev"))
    return next((number for number in numbers if dm_name(number) == name), None)


def read_table(name: str) -> str:
    """Return the table that is in force; raises CommandError when there is no such device."""
    return run("dmsetup", "table", name).strip()


def create(name: str, table: str, uuid: str | None = None) -> int:
    """Make a device and return its number; raises CommandError when the name is taken."""
    _with_table(table, "create", *(["--uuid", uuid] if uuid else []), name)
    number = number_of(name)
    if number is None:
        raise CommandError("dmsetup", 0, f"{name} is not there although it was made")
    return number


def replace(name: str, table: str, *, flushing: bool, limit_seconds: float = WAIT_SECONDS) -> None:
    """Put another table in force, unless it is already.

    With ``flushing`` a filesystem on the device is frozen meanwhile, so that it stands still at one point.
    Raises CommandTimeoutError when what is under way has not come to an end after ``limit_seconds``.
    """
    number = number_of(name)
    for attempt in range(_REPLACE_ATTEMPTS):
        if read_table(name) == table:
            break
        _with_table(table, "load", name)
        # The kernel suspends it for that itself: as two commands, a kill in between would leave it suspended.
        options = [] if flushing else ["--nolockfs"]
        try:
            run("dmsetup", "resume", *options, name, timeout_seconds=limit_seconds)
        except CommandError:
            # A command that an earlier call left running waited for the same, and has just exchanged the
            # table; ours was dropped then (do_resume in drivers/md/dm-ioctl.c). It may also do so right
            # after ours, while that lets the device go on: so the table is looked at again in any case.
            if attempt == _REPLACE_ATTEMPTS - 1:
                raise
    if number is not None and is_suspended(number):
        run("dmsetup", "resume", name, timeout_seconds=limit_seconds)


def replace_if(name: str, table: str, check: Callable[[], None]) -> None:
    """Put another table in force, unless ``check`` raises something while the device stands still.

    What it finds cannot change before the table does: nothing is under way, and a filesystem is frozen. Who
    is killed in between leaves the device suspended, and needs somebody who calls ``go_on``.
    """
    check()
    if read_table(name) == table:
        go_on(name)
        return
    _with_table(table, "load", name)
    try:
        run("dmsetup", "suspend", name, timeout_seconds=WAIT_SECONDS)
        check()
        run("dmsetup", "resume", name, timeout_seconds=WAIT_SECONDS)
    except BaseException:
        go_on(name)
        raise


def go_on(name: str) -> None:
    """Let a device that may have been left suspended go on by the table that is in force."""
    if number_of(name) is None:
        return
    try:
        clear(name)
    finally:
        run("dmsetup", "resume", name, timeout_seconds=WAIT_SECONDS)


def clear(name: str) -> None:
    """Drop the table that was loaded but never put in force; there need be none."""
    run("dmsetup", "clear", name)


def remove(name: str) -> None:
    """Remove a device, once whoever looks at new devices (udev) has let go; one that is gone is fine."""
    for attempt in range(_REMOVE_ATTEMPTS):
        if number_of(name) is None:
            return
        try:
            run("dmsetup", "remove", name)
        except CommandError as err:
            if not re.search("busy", err.message) or attempt == _REMOVE_ATTEMPTS - 1:
                raise
            time.sleep(0.1)


def give_uuid(name: str, uuid: str) -> None:
    """Give a device that has none its UUID, while it is used; it cannot be changed later."""
    run("dmsetup", "rename", name, "--setuuid", uuid)


def _with_table(table: str, *words: str) -> None:
    # In memory, since no folder is sure to have room for it.
    fd = os.memfd_create("blocksnap-table", os.MFD_CLOEXEC)
    try:
        os.write(fd, f"{table}\n".encode())
        run("dmsetup", *words, f"/proc/{os.getpid()}/fd/{fd}")
    finally:
        os.close(fd)
