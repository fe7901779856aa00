"""Classic volumes on real LVM: what is particular to them; the rest is in the conformance suite."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.controller import guard
from blocksnap.errors import BlocksnapError, VolumeError
from blocksnap.system import written
from blocksnap.volumes import classic_store
from blocksnap.volumes.resolve import resolve_volume
from support.classic_volume import ClassicVolume, classic_group
from support.held_reading import hold_reading
from support.in_process import InProcess
from support.lvm_lab import tool, write_at
from support.standing import wait_until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB
NAME = "data-1.x+y"


@pytest.fixture(scope="module")
def group(_lab: None) -> Iterator[str]:
    with classic_group() as made:
        yield made


@pytest.fixture
def volume(group: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ClassicVolume]:
    """A volume of 24 MiB; its snapshots get 4 MiB."""
    monkeypatch.setattr(classic_store, "SMALLEST_STORE", 4 * MIB)
    monkeypatch.setattr(written, "_FOLDER", tmp_path / "written")
    monkeypatch.setattr(written, "observe", lambda *_: None)
    tool("lvcreate", "-y", "-W", "n", "-L", f"{SIZE}b", "-n", NAME, group)
    made = ClassicVolume(group, NAME)
    write_at(made.node, 0, random.Random(1).randbytes(8 * MIB))
    yield made
    tool("lvremove", "-ff", "-y", f"{group}/{NAME}")


def ours(group: str) -> list[str]:
    text = tool("lvs", "-a", "--noheadings", "-o", "lv_name", group)
    return [name.strip("[]") for name in text.split() if name.startswith("blocksnap-")]


def content(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def require_restored(blocksnap: InProcess, volume: ClassicVolume) -> None:
    assert blocksnap.done("restore", "latest", "-", "-q") == content(volume.node)


def test_a_base_is_kept_where_the_job_asks_for_it_and_says_what_changed(
    volume: ClassicVolume, blocksnap: InProcess
) -> None:
    name = f"{volume.group}/{NAME}"
    told = blocksnap.backup(name, "--base", "auto")
    assert (told["method"], told["source"]["base_kept"], ours(volume.group)) == ("compare", False, [])
    assert "slow down" in told["source"]["base_reason"]
    told = blocksnap.backup(name, "--base", "keep")
    assert (told["kind"], told["method"]) == ("incremental", "compare")
    assert told["source"]["store_size"] == 4 * MIB
    assert "the least that is taken" in told["source"]["store_reason"]
    (base,) = ours(volume.group)
    write_at(volume.node, 3 * MIB, os.urandom(5 * KIB))
    # What has the same UUID in it does not take the links of the volume.
    properties = tool("udevadm", "info", "-q", "property", volume.node_of(base)).split()
    assert "DM_UDEV_LOW_PRIORITY_FLAG=1" in properties
    # Nothing is changed by one that stores nothing.
    blocksnap.done("backup", name, "--dry-run")
    assert ours(volume.group) == [base]
    told = blocksnap.backup(name, "--base", "keep")
    assert (told["method"], told["read_bytes"]) == ("cow", 128 * KIB)
    assert "exception store has what was written since" in told["reason"]
    (next_base,) = ours(volume.group)
    assert next_base != base
    (listed,) = (
        each for each in json.loads(blocksnap.done("volumes", "--json"))["volumes"] if each["name"] == name
    )
    assert (listed["kind"], listed["tracking"], listed["bases"]) == (
        "classic",
        "cow",
        [f"{volume.group}/{next_base}"],
    )
    require_restored(blocksnap, volume)
    assert blocksnap.done("doctor") == b"nothing found\n"
    # A base that is half full is no beginning for the next one, which gets a store of twice as much.
    write_at(volume.node, 0, os.urandom(3 * MIB))
    told = blocksnap.backup(name)
    assert (told["method"], told["source"]["base_kept"], ours(volume.group)) == ("cow", False, [])
    assert told["source"]["store_size"] == 8 * MIB
    assert "twice what the base's store came to hold" in told["source"]["store_reason"]
    require_restored(blocksnap, volume)


def overflow(volume: ClassicVolume, blocksnap: InProcess) -> str:
    write_at(volume.node, 0, os.urandom(6 * MIB))
    code, out, _ = blocksnap("doctor", "--json")
    (found,) = json.loads(out)["findings"]
    assert (code, "invalid" in found["message"], "reads everything" in found["advice"]) == (3, True, True)
    return "the base snapshot became invalid"


def lose(volume: ClassicVolume, blocksnap: InProcess) -> str:
    volume.remove(*ours(volume.group))
    return "the snapshot of the parent backup is not there any more"


def merge(volume: ClassicVolume, blocksnap: InProcess) -> str:
    write_at(volume.node, MIB, os.urandom(MIB))
    tool("lvconvert", "--merge", f"{volume.group}/{ours(volume.group)[0]}")
    assert wait_until(lambda: not ours(volume.group), 300)
    return "the snapshot of the parent backup is not there any more"


def write_to_base(volume: ClassicVolume, blocksnap: InProcess) -> str:
    (base,) = ours(volume.group)
    tool("lvchange", "-prw", f"{volume.group}/{base}")
    write_at(volume.node_of(base), MIB, os.urandom(MIB))
    return "can be written to"


def put_back(volume: ClassicVolume, blocksnap: InProcess) -> str:
    """Written to, and given other places, while the base is no snapshot: with one LVM does not shrink it."""
    (base,) = ours(volume.group)
    name = f"{volume.group}/{NAME}"
    for active in ("y", "n"):
        tool("lvchange", f"-a{active}", name)
        with pytest.raises(AssertionError, match="cannot be reduced"):
            tool("lvreduce", "-y", "-f", "-L", "4M", name)
    tool("lvconvert", "-y", "--splitsnapshot", f"{volume.group}/{base}")
    tool("lvreduce", "-y", "-f", "-L", "4M", name)
    tool("lvcreate", "-y", "-W", "n", "-L", "4M", "-n", "in-the-way", volume.group)
    tool("lvextend", "-y", "-L", f"{SIZE}b", name)
    tool("lvchange", "-ay", name)
    write_at(volume.node, 2 * MIB, os.urandom(MIB))
    tool("lvconvert", "-y", "-s", "-Zn", "-c", "4k", name, f"{volume.group}/{base}")
    tool("lvremove", "-y", f"{volume.group}/in-the-way")
    return "taken off the volume and put back"


@pytest.mark.parametrize(
    "spoil",
    [overflow, lose, merge, write_to_base, put_back],
    ids=lambda each: each.__name__,
)
def test_any_doubt_about_the_base_is_a_full_compare(
    volume: ClassicVolume, blocksnap: InProcess, spoil: object
) -> None:
    name = f"{volume.group}/{NAME}"
    blocksnap.backup(name, "--base", "keep")
    write_at(volume.node, 10 * MIB, os.urandom(KIB))
    assert callable(spoil)
    reason = spoil(volume, blocksnap)
    told = blocksnap.backup(name, "--base", "keep")
    assert (told["kind"], told["method"]) == ("incremental", "compare")
    assert reason in told["reason"]
    assert len(ours(volume.group)) == 1
    require_restored(blocksnap, volume)
    write_at(volume.node, 10 * MIB, os.urandom(KIB))
    assert blocksnap.backup(name)["method"] == "cow"
    require_restored(blocksnap, volume)


def test_a_volume_that_grew_is_tracked(volume: ClassicVolume, blocksnap: InProcess) -> None:
    name = f"{volume.group}/{NAME}"
    blocksnap.backup(name, "--base", "keep")
    tool("lvchange", "-an", name)
    tool("lvextend", "-L", f"{SIZE + 4 * MIB}b", name)
    tool("lvchange", "-ay", name)
    write_at(volume.node, SIZE + MIB, os.urandom(KIB))
    write_at(volume.node, MIB, os.urandom(KIB))
    told = blocksnap.backup(name)
    assert (told["method"], told["read_bytes"]) == ("cow", 4 * MIB + 128 * KIB)
    require_restored(blocksnap, volume)


class LateWriter(threading.Thread):
    """Overwrites a volume once there is a snapshot of it: more than the stores of that and the base hold."""

    def __init__(self, volume: ClassicVolume) -> None:
        super().__init__()
        self._volume = volume
        self.is_due = threading.Event()
        self.error = ""

    def has_ended(self) -> bool:
        """Have it begin, and tell whether it has ended."""
        self.is_due.set()
        return not self.is_alive()

    def wrote(self) -> None:
        """Called after each write."""

    def run(self) -> None:
        try:
            assert self.is_due.wait(600), "there was no snapshot"
            for number in range(48):
                write_at(self._volume.node, number * 128 * KIB, os.urandom(128 * KIB))
                self.wrote()
        except (OSError, AssertionError) as err:
            self.error = str(err)


class GuardedWriter(LateWriter):
    """Has the guard look after each write, as it can where it is not slower than the writer."""

    def __init__(self, volume: ClassicVolume, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(volume)
        self._looked, self._saw_enough = threading.Event(), threading.Event()
        look = guard.LevelWatch.__call__

        def looking(watch: guard.LevelWatch) -> BlocksnapError | None:
            found = look(watch)
            if found is not None:
                self._saw_enough.set()
            self._looked.set()
            return found

        monkeypatch.setattr(guard.LevelWatch, "__call__", looking)

    def wrote(self) -> None:
        self._looked.clear()
        assert wait_until(lambda: self._looked.is_set() or self._saw_enough.is_set()), "nobody looked"


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_an_overflow_while_it_is_read_fails_and_commits_nothing(
    volume: ClassicVolume, blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch, *, guarded: bool
) -> None:
    """The writer sees nothing of it; without the guard the check before the commit finds it."""
    name = f"{volume.group}/{NAME}"
    blocksnap.backup(name, "--base", "keep")
    (base,) = ours(volume.group)
    writer = GuardedWriter(volume, monkeypatch) if guarded else LateWriter(volume)
    if not guarded:
        monkeypatch.setattr(guard.LevelWatch, "__call__", lambda _: None)
    hold_reading(monkeypatch, blocksnap.folder / "blocksnap.toml", writer.has_ended)
    writer.start()
    code, _, err = blocksnap("backup", name, "--full", "--base", "keep")
    writer.join()
    assert (code, writer.error) == (14, ""), err
    assert ("the exception store of the snapshot of" in err) is guarded, err
    # The base before stays, though it overflowed as well.
    assert ours(volume.group) == [base]
    assert len(json.loads(blocksnap.done("list", "--json"))["backups"]) == 1
    assert os.listdir(blocksnap.folder / "state" / "journal") == []
    (blocksnap.folder / "blocksnap.toml").unlink()
    told = blocksnap.backup(name)
    assert (told["method"], ours(volume.group)) == ("compare", [])
    require_restored(blocksnap, volume)


def test_no_room_for_a_store_is_told_before_anything_is_done(
    volume: ClassicVolume, blocksnap: InProcess
) -> None:
    tool("lvcreate", "-y", "-l", "100%FREE", "-n", "filler", volume.group)
    try:
        code, _, err = blocksnap("backup", f"{volume.group}/{NAME}")
        assert (code, "there is no room for a snapshot of" in err) == (14, True)
    finally:
        tool("lvremove", "-y", f"{volume.group}/filler")


def test_a_volume_that_is_not_active(volume: ClassicVolume, blocksnap: InProcess) -> None:
    name = f"{volume.group}/{NAME}"
    tool("lvchange", "-an", name)
    with pytest.raises(VolumeError, match="is not active"):
        resolve_volume(name).prepare()
    tool("lvchange", "-ay", name)
