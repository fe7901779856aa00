"""Drills: what is good passes, what is not fails and says where, and nothing is left or changed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from images.test_mount import make_filesystem
from support.commands import CommandLine
from support.sleepers import long_time, processes_with
from support.standing import wait_until

MIB = 1 << 20
DATABASE_CHECK = """\
#!/bin/sh -e
test "$(sha256sum < "$BLOCKSNAP_DRILL_FOLDER/dir0/file 0" | cut -c1-64)" = DIGEST
test -b "$BLOCKSNAP_DRILL_DEVICE"
# It may write, and leave processes behind.
echo changed > "$BLOCKSNAP_DRILL_FOLDER/dir0/file 0"
sleep TIME &
echo "looked at $BLOCKSNAP_DRILL_BACKUP"
"""


def configure(blocksnap: CommandLine, image: Path, check: str, **more: object) -> None:
    """A job for the image whose check command is a script."""
    script = blocksnap.folder / "check"
    script.write_text(check)
    script.chmod(0o700)
    settings = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    (blocksnap.folder / "blocksnap.toml").write_text(
        f'[jobs.images]\nvolumes = ["{image}"]\n[jobs.images.drill]\ncommand = ["{script}"]\n{settings}'
    )
    (blocksnap.folder / "blocksnap.toml").chmod(0o600)


def drilled(blocksnap: CommandLine, *words: str, code: int = 0) -> dict[str, Any]:
    outcome = blocksnap("drill", *words, "--json")
    assert outcome.code == code, outcome
    found: dict[str, Any] = next(event for event in outcome.events if event["event"] == "drilled")
    return found


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_good_backup_passes_and_stays_as_it_is(blocksnap: CommandLine, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    digests = make_filesystem(kind, image)
    sleeps = long_time()
    check = DATABASE_CHECK.replace("TIME", sleeps).replace("DIGEST", digests["dir0/file 0"])
    configure(blocksnap, image, check)
    blocksnap.done("backup", "--job", "images")
    # The second one would find what the first one has written.
    for words in (("latest",), ("--job", "images")) if kind == "ext4" else (("latest",),):
        result = drilled(blocksnap, *words)
        assert [step["step"] for step in result["steps"]] == [
            *("sample", "replay", "fsck", "mount", "check", "unmount"),
        ]
        assert (result["good"], result["chunks"] > 10) == (True, True)
        assert "looked at" in result["steps"][4]["said"]
        assert wait_until(lambda: processes_with(sleeps) == [])
    (listed,) = blocksnap.done("list", "--json").document["backups"]
    assert (listed["drill"]["good"], listed["drill"]["failed_at"]) == (True, None)
    assert blocksnap.done("check").code == 0


def test_what_is_wrong_with_the_data_fails_and_is_told(blocksnap: CommandLine, tmp_path: Path) -> None:
    image = tmp_path / "image"
    make_filesystem("ext4", image)
    configure(blocksnap, image, "#!/bin/sh\necho rows are missing\nexit 7\n")
    blocksnap.done("backup", "--job", "images")
    result = drilled(blocksnap, "latest", code=1)
    assert (result["good"], result["steps"][-1]["step"]) == (False, "check")
    assert "ended with 7: rows are missing" in result["steps"][-1]["said"]
    outcome = blocksnap("report", "--json")
    (volume,) = outcome.document["volumes"]
    assert (outcome.code, volume["last_drill"]["failed_at"]) == (3, "check")
    assert "failed at check" in volume["warnings"][0]
    assert "FAILED" in blocksnap.done("list").text
    # A command that hangs is ended, with what it started.
    sleeps = long_time()
    configure(blocksnap, image, f"#!/bin/sh\nsleep {sleeps} & sleep {sleeps}\n", seconds=1)
    result = drilled(blocksnap, "latest", code=1)
    assert "was killed" in result["steps"][-1]["said"]
    assert wait_until(lambda: processes_with(sleeps) == [])
    # A filesystem whose own check finds fault.
    content = bytearray(image.read_bytes())
    content[8 * MIB : 9 * MIB] = b"\xff" * MIB
    content[5 * 4096 : 40 * 4096] = b"\xa5" * (35 * 4096)
    image.write_bytes(content)
    configure(blocksnap, image, "#!/bin/sh\n")
    blocksnap.done("backup", "--job", "images")
    result = drilled(blocksnap, "--job", "images", code=1)
    assert result["steps"][-1]["step"] in ("replay", "fsck")


def test_damage_in_the_repository_fails_a_drill(blocksnap: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(4 * MIB))
    blocksnap.done("backup", tmp_path / "raw")
    sample, contents = drilled(blocksnap, "latest")["steps"]
    # Nobody is to think that it was looked into.
    assert (sample["step"], contents["said"]) == ("sample", "it holds no filesystem that is known")
    for pack in (blocksnap.repository / "packs").rglob("*-*"):
        content = bytearray(pack.read_bytes())
        if len(content) > MIB:
            content[len(content) // 2] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)
    result = drilled(blocksnap, "latest", code=1)
    assert (result["steps"][-1]["step"], result["good"]) == ("sample", False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(
    blocksnap: CommandLine, tmp_path: Path, number: signal.Signals
) -> None:
    image = tmp_path / "image"
    make_filesystem("ext4", image)
    mark, sleeps = tmp_path / "began", long_time()
    configure(blocksnap, image, f"#!/bin/sh\ntouch {mark}\nsleep {sleeps}\n")
    blocksnap.done("backup", "--job", "images")
    process = blocksnap.start("drill", "latest")
    try:
        assert wait_until(lambda: mark.exists() or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        assert process.wait(timeout=60) in (143, -9)
    finally:
        process.kill()
        process.communicate()
    assert wait_until(lambda: not processes_with(sleeps), 60)
    assert str(blocksnap.folder) not in Path("/proc/mounts").read_text()
    # What was interrupted says nothing about the backup.
    assert blocksnap.done("list", "--json").document["backups"][0]["drill"] is None


def test_report_tells_ages(blocksnap: CommandLine, tmp_path: Path) -> None:
    assert blocksnap("report").code == 3
    (tmp_path / "raw").write_bytes(b"x" * MIB)
    blocksnap.done("backup", tmp_path / "raw")
    outcome = blocksnap.done("report", "--backup-age", "26h", "--json")
    (volume,) = outcome.document["volumes"]
    assert (volume["backups"], volume["last_drill"], volume["warnings"]) == (1, None, [])
    outcome = blocksnap("report", "--drill-age", "8d", "--check-age", "8d")
    assert (outcome.code, "never drilled" in outcome.stderr, "check --scrub" in outcome.stderr) == (
        3,
        True,
        True,
    )
    drilled(blocksnap, "latest")
    blocksnap.done("check", "--scrub")
    blocksnap.done("report", "--drill-age", "8d", "--check-age", "8d", "--backup-age", "1d")
    assert blocksnap("report", "--backup-age", "soon").code == 2
    assert blocksnap("drill").code == 2
    assert blocksnap("drill", "--job", "nobody").code == 2
