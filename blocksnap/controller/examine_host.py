"""Examine what is beside LVM: journals, suspended, loop and nbd devices, the archive, tools.

Nothing is changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from blocksnap.controller.arriving import Stage, read_arrivals
from blocksnap.controller.findings import Finding, Severity
from blocksnap.controller.journal import Entry
from blocksnap.system import devmapper, host, lvm, sysfs
from blocksnap.system.command import has_program, package_of

LONG_RUN_SECONDS = 48 * 3600.0
ARCHIVE_FILES = 1000
"""Files of LVM's archive from which on each LVM command takes noticeably longer."""
_SYS_BLOCK = Path("/sys/block")
_INTERRUPTED: dict[Stage, tuple[Severity, str]] = {
    "making": (
        "warning",
        "an instant restore was interrupted before anything could be used, and left volumes",
    ),
    "arriving": ("error", "an instant restore was interrupted: reads of what has not arrived wait"),
    "verifying": ("warning", "an instant restore was interrupted: all is there, but not yet read back"),
    "whole": ("warning", "an instant restore was interrupted: all is there, but not yet one volume again"),
    "merged": ("warning", "an instant restore was interrupted: all is there, but not yet LVM's own"),
}
_SECOND_LOOK_SECONDS = 1.0
_TOOLS = {
    "dmsetup": "asks pools how full they are",
    "lvchange": "activates snapshots",
    "lvcreate": "takes snapshots",
    "lvmconfig": "tells which devices LVM looks at",
    "lvremove": "removes snapshots",
    "lvs": "tells what volumes there are",
    "pvs": "tells on which disks a pool lies",
    "thin_check": "is run by LVM whenever it activates a thin pool",
    "udevadm": "waits for device nodes",
}


def examine_state_directory(state_directory: str) -> Iterator[Finding]:
    """Every backup needs a place for its journal, which is made when it is not there yet."""
    nearest = os.path.abspath(state_directory)
    # A link that leads nowhere is there as well, and in the way.
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if not os.path.isdir(nearest):
        trouble = "is not a directory"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        trouble = "cannot be written to"
    else:
        return
    yield Finding(
        "error",
        "journal",
        state_directory,
        f"no backup can keep its journal there: {nearest} {trouble}",
        "name another state directory: state_directory in the configuration, or BLOCKSNAP_STATE_DIRECTORY",
    )


def examine_journals(entries: Collection[Entry], now: float) -> Iterator[Finding]:
    """Tell of runs that died, or that take very long."""
    for entry in entries:
        began = entry.owner.began if entry.owner else None
        age = f"{(now - began) / 3600:.1f} hours" if began is not None else "an unknown time"
        if entry.alive:
            if began is not None and now - began > LONG_RUN_SECONDS:
                pid = entry.owner.pid if entry.owner else "?"
                yield Finding(
                    "warning",
                    "journal",
                    entry.run,
                    f"process {pid} has been taking this backup for {age}",
                    "see what it waits for; limits.snapshot_seconds ends such runs",
                )
            continue
        if entry.standstill() is not None:
            yield Finding(
                "error",
                "journal",
                entry.run,
                "the run died while applications or filesystems stood still, and some may do so still",
                "blocksnap doctor --fix lets them go, and so does the next backup",
                ours=True,
            )
            continue
        steps = [str(step.get("step")) for step in entry.steps]
        last = f"died after the step {steps[-1]}" if steps else "died at once"
        yield Finding(
            "warning",
            "journal",
            entry.run,
            f"the run {last}, {age} ago, and was not cleaned up after",
            "blocksnap doctor --fix does that, or the next backup of its volumes",
            ours=True,
        )


def examine_standing(entries: Collection[Entry]) -> Iterator[Finding]:
    """Tell what a run that died together with its watchdog may have left standing still."""
    for entry in entries:
        standing = (entry.standstill() or {}).get("standing") if not entry.alive else None
        for trace in standing if isinstance(standing, list) else ():
            yield Finding(
                "error",
                "leftover",
                str(trace.get("name", trace.get("point", " ".join(map(str, trace.get("argv", ())))))),
                f"run {entry.run} may have left it standing still",
                "blocksnap doctor --fix lets it go; so does the next backup of any volume",
                ours=True,
            )


def examine_arrivals(state_directory: str) -> Iterator[Finding]:
    """Tell of instant restores that were interrupted."""
    for arrival, held in read_arrivals(state_directory):
        if held:
            continue
        severity, message = _INTERRUPTED[arrival.stage]
        yield Finding(
            severity,
            "leftover",
            arrival.volume,
            message,
            f"blocksnap restore --instant --resume {arrival.volume}",
            ours=True,
        )


def examine_suspended(entries: Collection[Entry]) -> Iterator[Finding]:
    """Tell of device-mapper devices that stay suspended: whoever writes to them waits."""
    suspended = devmapper.suspended_devices()
    if not suspended:
        return
    # An LVM command that is at work suspends for some milliseconds.
    time.sleep(_SECOND_LOOK_SECONDS)
    announced = {
        trace["origin_uuid"].replace("-", "")
        for entry in entries
        if not entry.alive and entry.is_of_this_boot
        for trace in entry.traces()
        if "origin_uuid" in trace
    }
    for number in sorted(suspended & devmapper.suspended_devices()):
        identity = devmapper.lvm_identity(number)
        ours = identity is not None and identity.layer == "" and identity.lv_uuid in announced
        name = devmapper.dm_name(number) or f"{os.major(number)}:{os.minor(number)}"
        yield Finding(
            "error",
            "device",
            name,
            "is suspended: whatever reads or writes it waits",
            "blocksnap doctor --fix resumes it, for a run of blocksnap died while it took a snapshot"
            if ours
            else f"if no LVM command is running that does this: dmsetup resume {name}",
            ours=ours,
        )


def examine_block_devices() -> Iterator[Finding]:
    """Tell of loop devices without a file, and of nbd devices that nobody serves any more."""
    for backing in sysfs.find(_SYS_BLOCK, "loop*/loop/backing_file"):
        name = f"/dev/{backing.parent.parent.name}"
        if _text(backing).endswith(" (deleted)"):
            yield Finding(
                "warning",
                "device",
                name,
                f"its file was deleted and takes space until it is detached: {_text(backing)}",
                f"if nothing needs it: losetup --detach {name}",
            )
    for pid in sysfs.find(_SYS_BLOCK, "nbd*/pid"):
        name = f"/dev/{pid.parent.name}"
        server = _text(pid)
        if _text(pid.parent / "backend").startswith("blocksnap-"):
            # It waits for the next server of an instant restore, which is told by itself.
            continue
        if server.isdigit() and host.process_start(int(server)) is None:
            yield Finding(
                "warning",
                "device",
                name,
                f"process {server}, which connected it, is gone; if nobody answers for it, LVM commands hang",
                f"nbd-client -d {name}, or qemu-nbd -d {name}",
            )


def examine_archive() -> Iterator[Finding]:
    """Tell of an archive of LVM metadata that slows every LVM command down."""
    folder = lvm.archive_folder()
    if folder is None:
        return
    try:
        files = [entry.stat() for entry in os.scandir(folder) if entry.name.endswith(".vg")]
    except OSError:
        return
    if len(files) < ARCHIVE_FILES:
        return
    size = sum(status.st_size for status in files)
    oldest = time.strftime("%Y-%m-%d", time.localtime(min(status.st_mtime for status in files)))
    yield Finding(
        "warning",
        "archive",
        folder,
        f"{len(files)} old versions of LVM's metadata, {size} bytes, since {oldest}; blocksnap adds none",
        "lower backup/retain_days and retain_min in lvm.conf, and remove the oldest",
    )


def examine_tools(*, lvm_in_use: bool) -> Iterator[Finding]:
    """Tell of programs that are not installed though this host needs them."""
    for program, purpose in _TOOLS.items():
        if lvm_in_use and not has_program(program):
            package = package_of(program)
            yield Finding(
                "error" if program in ("lvs", "lvcreate", "lvremove", "dmsetup") else "warning",
                "tool",
                program,
                f"is not installed; it {purpose}",
                f"apt install {package}" if package else None,
            )


def _text(path: Path) -> str:
    try:
        return sysfs.exact_text(path).removesuffix("\n")
    except OSError:
        return ""
