"""LVM: look volumes up, make snapshots of them, activate and remove those.

No call looks at devices that it should leave alone (``lvm_config``), or writes to the archive of LVM
metadata, which a backup every hour would fill with thousands of files.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blocksnap.errors import BusyError, UsageError, VolumeError
from blocksnap.system.command import CommandError, has_program, run, run_observed
from blocksnap.system.flock import try_lock
from blocksnap.system.lvm_config import parse_config, settings
from blocksnap.system.lvm_report import FIELDS, LvRecord, LvReport, parse_disks, parse_report
from blocksnap.system.lvm_text import sized

TAG = "blocksnap"
RESTORING_TAG = "blocksnap.restoring"
"""On a volume that a restore makes, until it is whole."""
WAY_BACK_TAG = "blocksnap.way-back"
"""On the snapshot of what a volume held before a restore wrote over it."""
INSTANT_TAG = "blocksnap.instant"
"""On both volumes that an instant restore makes, until they are one and whole."""
_NAME = re.compile(r"[a-zA-Z0-9+_.][a-zA-Z0-9+_.-]*")
_RUN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}")
_BASE = re.compile(TAG + r"-base\.([a-zA-Z0-9_]{1,64})\.([a-zA-Z0-9-]{1,64})")
_REPORT = ("--reportformat", "json", "--units", "b", "--nosuffix", "--binary", "-a", "-o", FIELDS)
_REMOVE_ATTEMPTS = 8
_LOCK_FOLDER = "/run/blocksnap/lvm"
"""Below what only root can write to; in /run/lock anybody could put links in its place."""
_LOCK_SECONDS = 60.0
_BACKUP_FOLDER = Path("/etc/lvm/backup")


@dataclass(frozen=True, slots=True)
class BaseMark:
    """What a base says of itself, in a tag: whose base it is, and of which volume, by UUID.

    LVM's own link to the origin does not do: it forgets it when the origin is removed or another snapshot is
    merged into it. ``owner`` keeps the bases of backups to different repositories apart.
    """

    owner: str
    lv_uuid: str

    @property
    def tag(self) -> str:
        """The tag; raises UsageError when it could not be read back."""
        text = f"{TAG}-base.{self.owner}.{self.lv_uuid}"
        if not _BASE.fullmatch(text):
            raise UsageError(f"{text!r} cannot be the tag of a base snapshot")
        return text


class GroupBusyError(BusyError):
    """Another run has an LVM command at work in a volume group, for too long (exit code 11)."""

    def __init__(self, vg: str, holder: str, seconds: float) -> None:
        self.vg = vg
        super().__init__(
            f"process {holder or '?'} has been changing volume group {vg} for more than {seconds:g} s",
            resolution="see what its LVM command waits for (ps, dmsetup info), then run it again",
        )


class NoVolumeError(VolumeError):
    """There is no such logical volume."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"there is no logical volume {name}", resolution="blocksnap volumes shows what there is"
        )


class GroupRefusedError(VolumeError):
    """LVM itself does not let anybody at the volumes of a group: it is exported, or other hosts share it."""

    def __init__(self, vg: str, what: str, advice: str) -> None:
        self.vg = vg
        super().__init__(f"volume group {vg} cannot be used: {what}", resolution=advice)


def check_name(name: str) -> str:
    """Return a name of a volume or group if LVM would take it; raises UsageError.

    A name that comes from a command line or a manifest must never be read as an option.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise UsageError(
            f"{name!r} is no name of a volume or a volume group",
            resolution="LVM allows letters, digits and + _ . - and no hyphen at the beginning",
        )
    return name


def run_tag(run_id: str) -> str:
    """Return the tag that the snapshots of a run carry beside ``blocksnap``; raises UsageError."""
    if not _RUN.fullmatch(run_id):
        raise UsageError(f"{run_id!r} cannot be the name of a run")
    return f"{TAG}.{run_id}"


def run_of(tags: Sequence[str]) -> str | None:
    """Return the run that tags name, when they are those of one of our snapshots."""
    runs = [tag.removeprefix(TAG + ".") for tag in tags if tag.startswith(TAG + ".")]
    return runs[0] if TAG in tags and len(runs) == 1 else None


def base_of(tags: Sequence[str]) -> BaseMark | None:
    """Return what a base snapshot says of itself; None when the tags are not those of a base of ours."""
    found = [match for tag in tags if (match := _BASE.fullmatch(tag))]
    return BaseMark(found[0][1], found[0][2]) if run_of(tags) is not None and len(found) == 1 else None


def report(vg: str | None = None) -> LvReport:
    """Return what LVM knows about a volume group, or about all of them; raises NoVolumeError."""
    try:
        text = run("lvs", *settings(), *_REPORT, *([check_name(vg)] if vg else []))
    except CommandError as err:
        if vg and f'Volume group "{vg}" not found' in err.message:
            raise NoVolumeError(f"in a volume group {vg}") from err
        refused = _refusal(vg, err.message) if vg else None
        if refused is not None:
            raise refused from err
        raise
    return parse_report(text)


def _refusal(vg: str, message: str) -> GroupRefusedError | None:
    """Return why LVM does not report a group; those that are not named it passes over without a word."""
    if f"Volume group {vg} is exported" in message:
        return GroupRefusedError(vg, "it is exported", f"import it: vgimport {vg}")
    if "failed lock" in message or "lock type" in message:
        advice = "take the backup of a local volume group"
        return GroupRefusedError(vg, "it is one that several hosts share", advice)
    return None


def group_text(vg: str, uuids: Collection[str]) -> str:
    """Return a volume group in LVM's text form, in which the volumes with these UUIDs are.

    LVM writes it to a file after each change but ours, which costs nothing to read. Where that is not kept,
    or not up to date, LVM is asked. Raises CommandError, OSError.
    """
    with contextlib.suppress(OSError):
        text = (_BACKUP_FOLDER / check_name(vg)).read_text(errors="replace")
        if all(uuid in text for uuid in uuids):
            return text
    return _present_text(vg)


def attachment(vg: str, snapshot: str) -> str:
    """Return the UUID of what joins a classic snapshot to its origin now; empty where nothing does.

    Raises VolumeError.
    """
    from blocksnap.system.lvm_text import LvmTextError, attachment_in

    try:
        return attachment_in(_present_text(vg), vg, check_name(snapshot))
    except (LvmTextError, OSError) as err:
        raise VolumeError(
            f"what LVM writes of the volume group {vg} cannot be read: {err}",
            resolution="it needs lvm2 2.03 or later, and room where temporary files lie (TMPDIR, /tmp)",
        ) from err


def _present_text(vg: str) -> str:
    with tempfile.TemporaryDirectory(prefix="blocksnap-") as folder:
        file = Path(folder, "group")
        run("vgcfgbackup", *settings(), "-f", str(file), check_name(vg))
        return file.read_text(errors="replace")


def archive_folder() -> str | None:
    """Return where LVM keeps old versions of its metadata; None when it keeps none."""
    if not has_program("lvmconfig"):
        return None
    values = parse_config(run("lvmconfig", "--type", "full", "backup/archive", "backup/archive_dir"))
    folder = values.get("archive_dir")
    return folder if values.get("archive") == 1 and isinstance(folder, str) else None


def disks() -> dict[str, str]:
    """Return the names of the physical volumes with their UUIDs."""
    return parse_disks(run("pvs", *settings(), "--reportformat", "json", "-o", "pv_name,pv_uuid"))


def get(vg: str, name: str) -> tuple[LvRecord, LvReport]:
    """Return a volume and the report of its group; raises NoVolumeError."""
    check_name(name)
    try:
        found = report(vg)
    except NoVolumeError as err:
        raise NoVolumeError(f"{vg}/{name}") from err
    record = found.find(vg, name)
    if record is None:
        raise NoVolumeError(f"{vg}/{name}")
    return record, found


def create_thin_snapshot(vg: str, origin: str, name: str, run_id: str, observe: Callable[[], None]) -> None:
    """Take a read-only snapshot of a thin volume, not activated; ``observe`` is called while it happens.

    LVM suspends the origin for it, with its file system frozen, if it is active.
    """
    _create_snapshot(vg, origin, name, run_id, observe, "--setactivationskip", "y")


def create_classic_snapshot(
    vg: str, origin: str, name: str, run_id: str, store_bytes: int, observe: Callable[[], None]
) -> None:
    """Take a read-only snapshot of a classic volume, with an exception store of so many bytes.

    It is active as long as its origin is, else it would record nothing. LVM rounds the store up to whole
    extents, and down to what can be used. Otherwise as ``create_thin_snapshot``.
    """
    _create_snapshot(vg, origin, name, run_id, observe, "--size", f"{store_bytes}b")


def _create_snapshot(
    vg: str, origin: str, name: str, run_id: str, observe: Callable[[], None], *kind: str
) -> None:
    argv = [
        *("lvcreate", *settings(), "--autobackup", "n", "--snapshot", "--permission", "r", *kind),
        *("--addtag", TAG, "--addtag", run_tag(run_id)),
        *("--name", check_name(name), f"{check_name(vg)}/{check_name(origin)}"),
    ]
    with _changing(vg):
        run_observed(argv, observe)


def create_way_back(vg: str, origin: str, name: str) -> None:
    """Take a snapshot of a thin volume that stays: what the volume held before it was written over.

    It carries none of the tags by which the snapshots of a run are found and removed.
    """
    run(
        *("lvcreate", *settings(), "--snapshot", "--setactivationskip", "y", "--addtag", WAY_BACK_TAG),
        *("--name", check_name(name), f"{check_name(vg)}/{check_name(origin)}"),
    )


def activate(vg: str, name: str) -> None:
    """Activate a volume although it carries the flag that it is to be skipped."""
    target = f"{check_name(vg)}/{check_name(name)}"
    _change(vg, "lvchange", *settings(), "--autobackup", "n", "-ay", "-K", target)


def deactivate(vg: str, name: str) -> None:
    """Deactivate a volume; waits for whoever looks at new devices (udev) to let go."""
    _insist(vg, "lvchange", *settings(), "--autobackup", "n", "-an", f"{check_name(vg)}/{check_name(name)}")


def remove_snapshot(vg: str, name: str, run_id: str) -> bool:
    """Remove a snapshot of ours; False when there was none.

    The selection makes LVM itself look at the tags under its lock: nothing else is ever removed, whatever
    has that name by now.
    """
    try:
        said = _insist(
            vg,
            *("lvremove", *settings(), "--autobackup", "n", "--yes"),
            *("--select", _our_snapshot(name, run_id), check_name(vg)),
        )
    except CommandError as err:
        if f'Volume group "{vg}" not found' in err.message:
            return False
        raise
    return "successfully removed" in said


def mark_base(vg: str, name: str, run_id: str, mark: BaseMark) -> bool:
    """Make a snapshot of ours a base; False when there is none of that name and run."""
    said = _change(
        vg,
        *("lvchange", *settings(), "--autobackup", "n", "--addtag", mark.tag),
        *("--select", _our_snapshot(name, run_id), check_name(vg)),
    )
    return "changed" in said


def add_tag(vg: str, name: str, tag: str) -> None:
    """Give a volume a tag."""
    target = f"{check_name(vg)}/{check_name(name)}"
    run("lvchange", *settings(), "--autobackup", "n", "--addtag", tag, target)


def delete_tag(vg: str, name: str, tag: str) -> None:
    """Take a tag away from a volume."""
    target = f"{check_name(vg)}/{check_name(name)}"
    _change(vg, "lvchange", *settings(), "--autobackup", "n", "--deltag", tag, target)


def create_thin(vg: str, pool: str, name: str, size_bytes: int, tags: Sequence[str] = ()) -> str:
    """Create a thin volume of at least so many bytes and return its node."""
    size = ("--virtualsize", sized(size_bytes))
    return _create(vg, name, [*size, "--type", "thin", "--thinpool", check_name(pool)], tags)


def create_thick(vg: str, name: str, size_bytes: int, tags: Sequence[str] = ()) -> str:
    """Create a classic volume of at least so many bytes and return its node."""
    # Signatures of what was there before are wiped without asking; the restore overwrites them anyway.
    return _create(vg, name, ["--size", sized(size_bytes), "--type", "linear", "--wipesignatures", "y"], tags)


def extend_volume(vg: str, name: str, size_bytes: int) -> None:
    """Make a volume larger, to at least so many bytes."""
    target = f"{check_name(vg)}/{check_name(name)}"
    _change(vg, "lvextend", *settings(), "--autobackup", "n", "--size", sized(size_bytes), target)


def remove_volume(vg: str, name: str, *, tag: str = RESTORING_TAG) -> bool:
    """Remove a volume that carries ``tag``; False when there was none. For one that a failed restore made."""
    selection = f'lv_name="{check_name(name)}" && lv_tags="{tag}"'
    said = _insist(
        vg, "lvremove", *settings(), "--autobackup", "n", "--yes", "--select", selection, check_name(vg)
    )
    return "successfully removed" in said


def rename_volume(vg: str, old: str, new: str) -> None:
    """Give a volume another name."""
    names = (check_name(vg), check_name(old), check_name(new))
    _change(vg, "lvrename", *settings(), "--autobackup", "n", *names)


def _our_snapshot(name: str, run_id: str) -> str:
    """Return the selection that fits a snapshot by its name if it carries the tags of its run."""
    return f'lv_name="{check_name(name)}" && lv_tags={{"{TAG}" && "{run_tag(run_id)}"}}'


@contextmanager
def _changing(vg: str) -> Iterator[None]:
    """Let one command of ours at a time change a volume group, and say who is at work if that takes long.

    LVM has a lock of its own, for which it waits without a word. Raises GroupBusyError.
    """
    folder = Path(_LOCK_FOLDER)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(folder / check_name(vg), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not try_lock(fd):
            if time.monotonic() > deadline:
                raise GroupBusyError(vg, os.pread(fd, 20, 0).decode(errors="replace"), _LOCK_SECONDS)
            time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _create(vg: str, name: str, kind: Sequence[str], tags: Sequence[str]) -> str:
    words = [word for tag in tags for word in ("--addtag", tag)]
    _change(vg, "lvcreate", *settings(), "--yes", *kind, *words, "--name", check_name(name), check_name(vg))
    return f"/dev/{vg}/{name}"


def _change(vg: str, *argv: str) -> str:
    with _changing(vg):
        return run(*argv)


def _insist(vg: str, *argv: str) -> str:
    """Run a command again while somebody still holds the device, as udev does with a new one."""
    pause = 0.1
    for attempt in range(_REMOVE_ATTEMPTS):
        try:
            return _change(vg, *argv)
        except CommandError as err:
            in_use = re.search(r"in use|is used by another device|busy", err.message)
            if not in_use or attempt == _REMOVE_ATTEMPTS - 1:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 2.0)
    raise VolumeError(f"{argv[0]} gave no answer")  # pragma: no cover - the loop returns or raises
