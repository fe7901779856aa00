"""Drills of subvolumes: restored for that alone, verified, looked at by the job's command, and gone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.btrfs_lab import BtrfsLab
from support.commands import CommandLine
from support.file_trees import make_everything
from support.loops import call, loop_device, mounted
from support.repositories import harm_largest_pack
from support.require import require
from support.sleepers import long_time, processes_with
from support.standing import wait_until

MIB = 1 << 20
SLEEPS = long_time()
CHECK = f"""\
#!/bin/sh -e
cd "$BLOCKSNAP_DRILL_FOLDER"
test "$(cat why)" = because
test "$(stat -c %u:%a why)" = 1234:640
test -z "$BLOCKSNAP_DRILL_DEVICE"
# It may write, and leave processes behind.
echo changed > why
sleep {SLEEPS} &
echo "looked at $BLOCKSNAP_DRILL_BACKUP"
"""


@pytest.fixture
def blocksnap(tmp_path: Path) -> Iterator[CommandLine]:
    """A command line whose scratch files have a folder of their own; nothing of them may stay."""
    require("fuse", os.path.exists("/dev/fuse"), "needs /dev/fuse")
    command = CommandLine(tmp_path)
    command.done("init", "--no-encryption")
    (tmp_path / "scratch").mkdir()
    command.environment["TMPDIR"] = str(tmp_path / "scratch")
    yield command
    wait_until(lambda: not left(tmp_path), 60)
    assert left(tmp_path) == []
    assert os.listdir(tmp_path / "scratch") == []


def left(folder: Path) -> list[str]:
    """Return loop devices over files in the scratch folder, mounts, and what the check has left running."""
    listed = call("losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE").splitlines()
    loops = [line for line in listed if str(folder / "scratch") in line]
    mounts = [
        line for line in Path("/proc/mounts").read_text().splitlines() if "/connections/scratch" in line
    ]
    return [*loops, *mounts, *processes_with(SLEEPS)]


def back_up(blocksnap: CommandLine, lab: BtrfsLab, check: str) -> dict[str, Any]:
    """Back up a subvolume by a job whose drill has this command."""
    (lab.live / "why").write_text("because\n")
    os.chown(lab.live / "why", 1234, 100)
    (lab.live / "why").chmod(0o640)
    script = blocksnap.folder / "check"
    script.write_text(check)
    script.chmod(0o755)
    (blocksnap.folder / "blocksnap.toml").write_text(
        f'[jobs.files]\nvolumes = ["{lab.live}"]\n[jobs.files.drill]\ncommand = ["{script}"]\n'
    )
    (blocksnap.folder / "blocksnap.toml").chmod(0o600)
    (backup,) = blocksnap.done("backup", "--job", "files", "--json").backups
    return backup


def drill(blocksnap: CommandLine, code: int) -> list[tuple[str, bool, str]]:
    outcome = blocksnap("drill", "latest", "--json")
    assert outcome.code == code, outcome
    (result,) = [event for event in outcome.events if event["event"] == "drilled"]
    assert result["good"] == (code == 0)
    return [(step["step"], step["ok"], step["said"]) for step in result["steps"]]


def test_a_subvolume_is_restored_verified_and_looked_at(lab: BtrfsLab, blocksnap: CommandLine) -> None:
    make_everything(lab.live)
    back_up(blocksnap, lab, CHECK)
    # The second one would find what the first one has written.
    for _ in range(2):
        steps = drill(blocksnap, 0)
        assert [(name, ok) for name, ok, _ in steps] == [
            ("scratch", True),
            ("restore", True),
            ("check", True),
        ]
        assert "looked at" in steps[2][2]
        assert "not kept" not in steps[1][2]
        assert wait_until(lambda: left(blocksnap.folder) == [])
    (listed,) = blocksnap.done("list", "--json").document["backups"]
    assert (listed["drill"]["good"], listed["drill"]["failed_at"]) == (True, None)
    blocksnap.done("report", "--drill-age", "1d")
    blocksnap.done("check")


def test_what_is_wrong_fails_where_it_is(lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path) -> None:
    back_up(blocksnap, lab, "#!/bin/sh\necho rows are missing\nexit 7\n")
    assert drill(blocksnap, 1)[-1][:2] == ("check", False)
    assert "FAILED" in blocksnap.done("list").text
    # A place without the room takes nothing, and is told.
    with loop_device(tmp_path / "small.img", size=64 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "small") as small:
            blocksnap.environment["TMPDIR"] = str(small)
            ((name, ok, said),) = drill(blocksnap, 1)
            assert (name, ok) == ("scratch", False)
            assert f"{small} does not give the" in said
    blocksnap.environment["TMPDIR"] = str(tmp_path / "scratch")
    # Damage to a file's content.
    (lab.live / "noise").write_bytes(os.urandom(4 * MIB))
    back_up(blocksnap, lab, "#!/bin/sh\n")
    harm_largest_pack(blocksnap.repository)
    name, ok, said = drill(blocksnap, 1)[-1]
    assert (name, ok) == ("restore", False)
    assert "noise" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(
    lab: BtrfsLab, blocksnap: CommandLine, tmp_path: Path, number: signal.Signals
) -> None:
    mark = tmp_path / "began"
    back_up(blocksnap, lab, f"#!/bin/sh\ntouch {mark}\nsleep {SLEEPS}\n")
    process = blocksnap.start("drill", "latest")
    try:
        assert wait_until(lambda: mark.exists() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        loops = json.loads(call("losetup", "--list", "--json", "--output", "NAME,BACK-FILE"))["loopdevices"]
        assert [loop for loop in loops if str(tmp_path / "scratch") in (loop["back-file"] or "")]
        process.send_signal(number)
        assert process.wait(timeout=60) in (143, -9)
    finally:
        process.kill()
        process.communicate()
    assert blocksnap.done("list", "--json").document["backups"][0]["drill"] is None
