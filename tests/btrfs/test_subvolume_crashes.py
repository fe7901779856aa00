"""Runs that are killed at every step: nothing is left on the filesystem after the next run, or doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.btrfs_lab import BtrfsLab
from support.commands import CommandLine
from support.file_trees import noise, rsync_differences
from support.loops import call

KILLER = """
import os, signal, sys
from importlib import import_module
module, name, moment = sys.argv.pop(1).split(":")
owner = import_module(module)
*path, last = name.split(".")
for each in path:
    owner = getattr(owner, each)
called = getattr(owner, last)
def killed(*arguments, **named):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    called(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, last, killed)
from blocksnap.cli.main import run
sys.exit(run(sys.argv[1:]))
"""
MOMENTS = {
    "before the snapshot": "blocksnap.system.btrfs:create_snapshot:before",
    "with the snapshot": "blocksnap.system.btrfs:create_snapshot:after",
    "while it reads": "blocksnap.system.btrfs_places:open_inode:before",
    "before the commit": "blocksnap.controller.session:SnapshotSession.committing:after",
    "after the commit": "blocksnap.repository.writer:RepositoryWriter.commit:after",
    "before it is removed": "blocksnap.system.btrfs:delete_snapshot:before",
    "when it is removed": "blocksnap.system.btrfs:delete_snapshot:after",
}


@pytest.fixture
def blocksnap(blocksnap: CommandLine, lab: BtrfsLab) -> CommandLine:
    (lab.live / "file").write_bytes(noise(1, 300_000))
    return blocksnap


def killed(blocksnap: CommandLine, moment: str, *arguments: str | Path) -> None:
    where = MOMENTS[moment]
    if "open_inode" in where:
        where = where.replace("blocksnap.system.btrfs_places", "blocksnap.volumes.subvolume")
    process = subprocess.run(
        [sys.executable, "-c", KILLER, where, *map(str, arguments)],
        env=blocksnap.environment, check=False, capture_output=True,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process


def ours(lab: BtrfsLab) -> list[str]:
    listed = call("btrfs", "subvolume", "list", lab.mount)
    found = {word for line in listed.splitlines() for word in line.split() if ".blocksnap" in word}
    return sorted(found | {name for name in os.listdir(lab.mount) if ".blocksnap" in name})


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_leaves_nothing(lab: BtrfsLab, blocksnap: CommandLine, moment: str) -> None:
    killed(blocksnap, moment, "backup", lab.live)
    left = ours(lab)
    assert len(left) == (moment not in ("before the snapshot", "when it is removed"))
    (lab.live / "file").write_bytes(noise(2, 100_000))
    outcome = blocksnap.done("backup", "--json", lab.live)
    assert ours(lab) == []
    assert bool(left) == any(event["event"] == "recovered" for event in outcome.events)
    assert not list((blocksnap.folder / "state" / "journal").iterdir())
    (backup,) = outcome.backups
    committed = moment in ("after the commit", "before it is removed", "when it is removed")
    assert (backup["method"], backup["kind"]) == (
        ("btrfs-tree", "incremental") if committed else ("compare", "full")
    )
    if moment == "while it reads":
        blocksnap.done("restore", "latest", lab.mount / "back")
        assert rsync_differences(lab.live, lab.mount / "back") == ""


def test_doctor_finds_and_removes_it(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    killed(blocksnap, "while it reads", "backup", lab.live)
    (name,) = ours(lab)
    found = blocksnap("doctor", "--json")
    told = [each for each in found.document["findings"] if name in each["subject"]]
    assert [each["ours"] for each in told] == [True], found
    fixed = blocksnap("doctor", "--fix", "--json")
    assert any(name in line for line in fixed.document["fixed"]), fixed
    assert ours(lab) == []
    assert name not in json.dumps(blocksnap("doctor", "--json").document)


def test_what_no_journal_knows_is_told_and_left(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    killed(blocksnap, "while it reads", "backup", lab.live)
    (name,) = ours(lab)
    for entry in (blocksnap.folder / "state" / "journal").iterdir():
        entry.unlink()
    blocksnap("doctor", "--fix")
    found = blocksnap("doctor", "--json")
    (told,) = [each for each in found.document["findings"] if name in each["subject"]]
    assert "does not know" in told["message"]
    blocksnap.done("backup", lab.live)
    assert ours(lab) == [name]


def test_what_is_not_ours_is_left(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    """A name alone removes nothing: the kernel has to say that it is a snapshot of this subvolume."""
    killed(blocksnap, "with the snapshot", "backup", lab.live)
    (name,) = ours(lab)
    lab.delete(lab.mount / name)
    (lab.mount / name).mkdir()
    (lab.mount / name / "precious").write_text("not ours")
    blocksnap("backup", lab.live)
    assert (lab.mount / name / "precious").read_text() == "not ours"
