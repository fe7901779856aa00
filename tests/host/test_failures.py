"""Full disks, dead processes and two at once: the run fails, earlier backups stay, the next run succeeds."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import CommandLine
from support.loops import call, loop_device, mounted

MIB = 1 << 20


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def small_place(tmp_path: Path) -> Iterator[Path]:
    """Yield an ext4 of 96 MiB, mounted."""
    with loop_device(tmp_path / "small.img", size=96 * MIB) as device:
        call("mkfs.ext4", "-q", "-m", "0", device)
        with mounted(device, tmp_path / "small") as folder:
            yield folder


def test_a_full_repository(tmp_path: Path, small_place: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.environment["BLOCKSNAP_REPOSITORY"] = str(small_place / "repository")
    blocksnap.done("init")
    volume = tmp_path / "volume.img"
    volume.write_bytes(noise(1, 20 * MIB))
    blocksnap.done("backup", volume)
    volume.write_bytes(noise(2, 150 * MIB))
    failed = blocksnap("backup", volume)
    assert (failed.code, len(failed.errors)) == (1, 1), failed
    assert "No space left" in failed.stderr
    assert "fix:" in failed.stderr
    blocksnap.done("check", "--read-data")
    assert blocksnap.done("restore", "latest", "-").stdout == noise(1, 20 * MIB)
    # What the failed run left is named as garbage and does no harm; the next, smaller run succeeds.
    volume.write_bytes(noise(1, 20 * MIB) + noise(3, 2 * MIB))
    blocksnap.done("backup", volume)
    assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()


def test_a_full_target(tmp_path: Path, small_place: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init")
    volume = tmp_path / "volume.img"
    volume.write_bytes(noise(4, 150 * MIB))
    blocksnap.done("backup", volume)
    failed = blocksnap("restore", "latest", small_place / "out")
    assert (failed.code, len(failed.errors)) == (1, 1), failed
    assert os.listdir(small_place) == ["lost+found"]


def test_kill_at_any_moment(blocksnap: CommandLine, tmp_path: Path) -> None:
    """Twelve runs, each killed a little later: what was reported done stays, and the next run works."""
    volume = tmp_path / "volume.img"
    volume.write_bytes(noise(5, 48 * MIB))
    dice = random.Random(6)
    done: dict[str, bytes] = {}
    for attempt in range(12):
        with volume.open("r+b") as file:
            file.seek(dice.randrange(40) * MIB)
            file.write(dice.randbytes(4 * MIB))
        process = blocksnap.start("backup", volume, "--json")
        try:
            process.wait(timeout=0.3 + attempt * 0.07)
        except subprocess.TimeoutExpired:
            process.kill()
        stdout, _ = process.communicate()
        if b'"done"' in stdout:
            latest = blocksnap.done("list", "--json").document["backups"][-1]["id"]
            done[latest] = volume.read_bytes()
    blocksnap.done("backup", volume, "-q")
    checked = blocksnap.done("check", "--read-data", "--json").document
    assert not checked["damaged"]
    for backup, content in done.items():
        assert blocksnap.done("restore", backup, "-").stdout == content
    assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()
    assert list((tmp_path / "state" / "journal").iterdir()) == []


def test_two_runs_of_one_volume(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    volume.write_bytes(noise(7, 16 * MIB))
    # The first takes four minutes, and is ended long before.
    pace = 'pace = { policy = "fixed", read_rate = "64K" }'
    (tmp_path / "blocksnap.toml").write_text(f'[jobs.slow]\nvolumes = ["{volume}"]\n{pace}\n')
    first = blocksnap.start("backup", "--job", "slow", "--json")
    try:
        assert first.stdout is not None
        assert b"plan" in first.stdout.readline()
        second = blocksnap("backup", volume)
        assert second.code == 11, second
        assert str(first.pid) in second.stderr
        first.terminate()
        assert first.wait(timeout=300) == 143
    finally:
        first.kill()
        first.communicate()
    blocksnap.done("backup", volume)


def test_two_volumes_at_once_share_what_is_equal(blocksnap: CommandLine, tmp_path: Path) -> None:
    shared = noise(8, 30 * MIB)
    volumes = [tmp_path / f"volume-{number}.img" for number in range(3)]
    for number, volume in enumerate(volumes):
        volume.write_bytes(shared + noise(100 + number, 5 * MIB))
    runs = [blocksnap.start("backup", volume, "-q") for volume in volumes]
    for run in runs:
        assert run.wait(timeout=120) == 0
        run.communicate()
    for volume in volumes:
        assert blocksnap.done("restore", f"{volume}@latest", "-").stdout == volume.read_bytes()
    blocksnap.done("check", "--read-data")


def test_a_reader_that_goes_away(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume = tmp_path / "volume.img"
    volume.write_bytes(noise(9, 64 * MIB))
    blocksnap.done("backup", volume)
    process = blocksnap.start("restore", "latest", "-")
    assert process.stdout is not None
    process.stdout.read(1000)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
