"""Names that are no UTF-8: others can be backed up, and a result is told all the same."""

from __future__ import annotations

import os
from pathlib import Path

from support.commands import CommandLine


def test_a_file_with_an_odd_name_does_not_stop_the_others(blocksnap: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    odd = folder / os.fsdecode(b"\xff.img")
    for path in (folder / "a.img", odd):
        path.write_bytes(os.urandom(50_000))
    outcome = blocksnap("backup", f"{folder}/*.img", "--json")
    assert outcome.code == 3, outcome
    assert [each["volume"] for each in outcome.backups] == [f"{folder}/a.img"]
    (warning,) = [each for each in outcome.events if each["event"] == "warning"]
    assert warning["message"] == f"left out: {folder}/\\xff.img cannot be backed up: its name is no UTF-8"
    named = blocksnap("backup", odd)
    assert (named.code, len(named.errors)) == (14, 1), named
    (folder / "a.img").unlink()
    assert blocksnap("backup", f"{folder}/*.img").code == 14


def test_a_restore_to_an_odd_name_is_done(blocksnap: CommandLine, tmp_path: Path) -> None:
    volume, target = tmp_path / "volume.img", tmp_path / os.fsdecode(b"out\xff.img")
    volume.write_bytes(os.urandom(50_000))
    blocksnap.done("backup", volume, "-q")
    process = blocksnap.start("restore", "latest", target, PYTHONIOENCODING="utf-8:strict")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"out\\udcff.img" in out
    assert target.read_bytes() == volume.read_bytes()
    process = blocksnap.start("files", "latest", target, PYTHONIOENCODING="utf-8:strict")
    assert b"codec" not in b"".join(process.communicate(timeout=60))


def test_a_dry_run_that_has_warned_ends_with_3(blocksnap: CommandLine, tmp_path: Path) -> None:
    for name in (b"a.img", b"\xff.img"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"x" * 5000)
    assert blocksnap("backup", "--dry-run", f"{tmp_path}/*.img").code == 3
    assert blocksnap("backup", "--dry-run", f"{tmp_path}/a.img").code == 0
