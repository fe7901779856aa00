"""The commands on files, as processes: results, exit codes, messages and JSON are a contract."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from support.commands import CommandLine

KIB, MIB = 1 << 10, 1 << 20
COMMANDS = ("init", "volumes", "backup", "list", "show", "restore", "verify", "check")


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Return a sparse file: 2 MiB of noise, 2 MiB hole, 1 MiB of zeros, a short tail."""
    path = tmp_path / "volume.img"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(2 * MIB))
        file.seek(4 * MIB)
        file.write(bytes(MIB) + b"tail")
    return path


def test_the_main_job(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    blocksnap.new_interpreters = True
    created = blocksnap.done("init", "--json").document
    assert created["encryption"] == "aes-256-gcm"
    first = blocksnap.done("backup", volume, "--json", "--tag", "purpose=test").backups[0]
    wanted = {
        "id", "volume", "kind", "method", "reason", "volume_bytes", "changed_bytes", "read_bytes",
        "new_bytes", "stored_bytes", "metadata_bytes", "freeze_ms", "skew_ms", "seconds",
    }  # fmt: skip
    assert wanted <= first.keys()
    assert (first["kind"], first["method"], first["volume"]) == ("full", "compare", str(volume))
    assert first["volume_bytes"] == 5 * MIB + 4
    assert 3 * MIB <= first["read_bytes"] < 4 * MIB
    assert first["new_bytes"] == 2 * MIB + 4
    with volume.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    second = blocksnap.done("backup", volume, "--json").backups[0]
    assert (second["kind"], second["parent"]) == ("incremental", first["id"])
    assert second["changed_bytes"] == second["new_bytes"] == 128 * KIB
    listed = blocksnap.done("list", "--json").document["backups"]
    assert [backup["id"] for backup in listed] == [first["id"], second["id"]]
    assert {"id", "volume", "time", "kind", "parent", "volume_bytes", "stored_bytes", "tags"} <= listed[
        0
    ].keys()
    assert listed[0]["tags"] == {"purpose": "test"}
    assert listed[0]["stored_bytes"] == first["stored_bytes"]
    for name in (second["id"][:8], "latest", f"{volume}@latest", f"{volume}@{listed[1]['time']}"):
        assert blocksnap.done("show", name, "--json").document["id"] == second["id"]
    blocksnap.done("restore", "latest", tmp_path / "out", "--verify")
    assert (tmp_path / "out").read_bytes() == volume.read_bytes()
    assert (tmp_path / "out").stat().st_blocks * 512 < 3 * MIB
    assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()
    assert blocksnap.done("restore", first["id"], "-").stdout != volume.read_bytes()
    assert blocksnap.done("check", "--read-data", "--json").document["damaged"] is False
    blocksnap.done("verify", "latest")
    blocksnap.done("verify", "latest", volume)
    assert blocksnap("verify", first["id"], volume).code == 1


def test_what_people_see(blocksnap: CommandLine, volume: Path) -> None:
    blocksnap.done("init")
    told = blocksnap.done("backup", volume)
    assert re.search(r"read +3 MiB, changed 3 MiB", told.text)
    assert "first backup" in told.stderr
    assert blocksnap.done("backup", volume, "-q").text == ""
    table = blocksnap.done("list").text.splitlines()
    assert len(table) == 3
    assert str(volume) in table[1]
    assert "method" in blocksnap.done("show", "latest").text
    assert blocksnap.done("check").text.startswith("sound")
    assert blocksnap.done("list", "no/such").text == ""


def test_an_unchanged_volume_stores_next_to_nothing(blocksnap: CommandLine, volume: Path) -> None:
    blocksnap.done("init")
    blocksnap.done("backup", volume)
    again = blocksnap.done("backup", volume, "--json").backups[0]
    assert again["changed_bytes"] == again["new_bytes"] == 0
    assert again["stored_bytes"] < 16 * KIB
    full = blocksnap.done("backup", volume, "--full", "--json").backups[0]
    assert (full["kind"], full["parent"], full["new_bytes"]) == ("full", None, 0)


def test_volumes_that_grow_and_shrink(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    blocksnap.done("init", "--chunk-size", "16K")
    for size in (5 * MIB + 4, 9 * MIB + 1, 64 * MIB, 3 * MIB + 7, 3 * MIB + 9, 1, 20 * MIB):
        os.truncate(volume, size)
        blocksnap.done("backup", volume)
        blocksnap.done("restore", "latest", tmp_path / f"out-{size}", "--verify")
        assert (tmp_path / f"out-{size}").read_bytes() == volume.read_bytes()


def test_groups_are_one_commit(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"other" * 100_000)
    blocksnap.done("init")
    backups = blocksnap.done("backup", volume, other, "--json").backups
    assert [backup["volume"] for backup in backups] == [str(volume), str(other)]
    assert len(list((blocksnap.repository / "manifests").iterdir())) == 1
    assert blocksnap.done("restore", f"{other}@latest", "-").stdout == other.read_bytes()
    twice = blocksnap("backup", other, other)
    assert (twice.code, len(twice.errors)) == (2, 1)


def test_dry_run_stores_nothing(blocksnap: CommandLine, volume: Path) -> None:
    blocksnap.done("init")
    before = sorted(blocksnap.repository.rglob("*"))
    told = blocksnap.done("backup", volume, "--dry-run", "--json").events[-1]
    assert told["backups"] == []
    assert told["plans"][0]["read_bytes"] > 2 * MIB
    assert sorted(blocksnap.repository.rglob("*")) == before


def test_jobs_come_from_the_configuration(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    (tmp_path / "blocksnap.toml").write_text(
        f'repository = "main"\n[repositories.main]\n'
        f'url = "{blocksnap.repository}"\npassphrase_file = "{secret}"\n'
        f'[jobs.night]\nvolumes = ["{volume}"]\ntags = {{ site = "one" }}\n'
    )
    bare: dict[str, str | None] = {"BLOCKSNAP_REPOSITORY": None, "BLOCKSNAP_PASSPHRASE": None}
    blocksnap.done("init", **bare)
    blocksnap.done("backup", "--job", "night", **bare)
    assert blocksnap.done("list", "--json", **bare).document["backups"][0]["tags"] == {
        "job": "night",
        "site": "one",
    }
    assert blocksnap("backup", "--job", "day", **bare).code == 2
    (tmp_path / "blocksnap.toml").write_text("repositry = 'x'\n")
    wrong = blocksnap("list", **bare)
    assert wrong.code == 2
    assert "blocksnap.toml:1: repositry" in wrong.stderr
    assert "did you mean repository?" in wrong.stderr


@pytest.mark.parametrize("source", ["file", "environment", "command", "credential"])
def test_where_the_passphrase_comes_from(blocksnap: CommandLine, tmp_path: Path, source: str) -> None:
    (tmp_path / "blocksnap.passphrase").write_text("secret\nsecond line\n")
    bare: dict[str, str | None] = {"BLOCKSNAP_PASSPHRASE": None}
    options: list[str] = []
    match source:
        case "file":
            options = ["--passphrase-file", str(tmp_path / "blocksnap.passphrase")]
        case "environment":
            bare = {"BLOCKSNAP_PASSPHRASE": "secret"}
        case "command":
            bare["BLOCKSNAP_PASSPHRASE_COMMAND"] = "echo secret"
        case "credential":
            bare["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    blocksnap.done("init", BLOCKSNAP_PASSPHRASE="secret")
    blocksnap.done("list", *options, **bare)
    assert blocksnap("list", BLOCKSNAP_PASSPHRASE="other").code == 12
    assert blocksnap("list", BLOCKSNAP_PASSPHRASE=None).code == 12


def test_encryption_is_the_default(blocksnap: CommandLine, volume: Path) -> None:
    refused = blocksnap("init", BLOCKSNAP_PASSPHRASE=None)
    assert refused.code == 12
    assert "--no-encryption" in refused.stderr
    blocksnap.done("init", "--no-encryption", BLOCKSNAP_PASSPHRASE=None)
    blocksnap.done("backup", volume, BLOCKSNAP_PASSPHRASE=None)
    assert blocksnap.done("restore", "latest", "-", BLOCKSNAP_PASSPHRASE=None).stdout == volume.read_bytes()


def test_failures_have_one_line_a_fix_and_a_code(
    blocksnap: CommandLine, volume: Path, tmp_path: Path
) -> None:
    assert blocksnap("list").code == 10
    blocksnap.done("init")
    blocksnap.done("backup", volume)
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    cases: list[tuple[int, list[str | Path]]] = [
        (2, ["init"]),
        (2, ["init", "--repo", str(tmp_path / "x"), "--chunk-size", "100K"]),
        (2, ["list", "--repo", "s3://bucket/x"]),
        (10, ["list", "--repo", str(tmp_path / "nothing")]),
        (10, ["list", "--repo", str(tmp_path / "folder")]),
        (2, ["show", "ffffffff"]),
        (2, ["show", f"{volume}@yesterday"]),
        (2, ["restore", "nothing@latest", tmp_path / "out"]),
        (1, ["restore", "latest", tmp_path / "taken"]),
        (1, ["restore", "latest", tmp_path / "folder"]),
        (1, ["restore", "latest", "/dev/blocksnap-no-such-device"]),
        (1, ["restore", "latest", tmp_path / "no" / "folder"]),
        (2, ["restore", "latest", "notavolume", "--create"]),
        (2, ["restore", "latest", "-", "--verify"]),
        (2, ["backup"]),
        (14, ["backup", tmp_path / "missing.img"]),
    ]
    for code, arguments in cases:
        outcome = blocksnap(*arguments)
        assert outcome.code == code, (arguments, outcome)
        assert len(outcome.errors) == 1, outcome.stderr
        assert "fix:" in outcome.stderr, (arguments, outcome.stderr)
        assert "Traceback" not in outcome.stderr
        told = blocksnap(*arguments, "--json")
        if told.stdout.strip():
            assert told.events[-1]["exit_code"] == code
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_rejects_the_unknown(blocksnap: CommandLine, command: str) -> None:
    shown = blocksnap.done(command, "--help").text
    for option in ("--repo", "--passphrase-file", "--json", "--quiet", "--verbose"):
        assert option in shown
    assert blocksnap(command, "--no-such-option").code == 2


def test_help_and_version(blocksnap: CommandLine) -> None:
    blocksnap.new_interpreters = True
    shown = blocksnap.done("--help").text
    assert all(command in shown for command in COMMANDS)
    assert "Exit codes" in shown
    assert re.fullmatch(r"blocksnap \d+\.\d+\.\d+\n", blocksnap.done("--version").text)
    assert blocksnap("no-such-command").code == 2


def read_slowly(blocksnap: CommandLine, volume: Path, rate: str) -> None:
    """Have a job that reads so much in a second."""
    pace = f'pace = {{ policy = "fixed", read_rate = "{rate}" }}'
    (blocksnap.folder / "blocksnap.toml").write_text(f'[jobs.slow]\nvolumes = ["{volume}"]\n{pace}\n')


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_commit_nothing(
    blocksnap: CommandLine, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    big = tmp_path / "big.img"
    big.write_bytes(random.Random(3).randbytes(8 * MIB))
    blocksnap.done("init")
    # It takes two minutes, and is interrupted long before.
    read_slowly(blocksnap, big, "64K")
    process = blocksnap.start("backup", "--job", "slow", "--json")
    assert process.stdout is not None
    assert b"plan" in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert b"Traceback" not in stderr
    assert blocksnap.done("list", "--json").document["backups"] == []
    assert list((tmp_path / "state" / "journal").iterdir()) == []
    blocksnap.done("backup", big, "-q")
    blocksnap.done("check", "--read-data")


def test_a_file_written_during_its_backup_is_refused(blocksnap: CommandLine, tmp_path: Path) -> None:
    big = tmp_path / "big.img"
    big.write_bytes(random.Random(4).randbytes(16 * MIB))
    blocksnap.done("init")
    # It takes a quarter of a minute, and is written to long before.
    read_slowly(blocksnap, big, "1M")
    process = blocksnap.start("backup", "--job", "slow", "--json")
    assert process.stdout is not None
    assert b"plan" in process.stdout.readline()
    with big.open("r+b") as file:
        file.write(b"changed")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 14, stderr
    assert blocksnap.done("list", "--json").document["backups"] == []


def test_flipped_bits_are_never_restored(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    blocksnap.done("init")
    blocksnap.done("backup", volume)
    dice = random.Random(5)
    for path in sorted(p for p in blocksnap.repository.rglob("*") if p.is_file()):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        checked = blocksnap("check", "--read-data")
        assert checked.code in (13, 10, 12), (path, checked)
        if path.parent.name != "keys":
            assert checked.code == 13, (path, checked)
        restored = blocksnap("restore", "latest", tmp_path / "out")
        if restored.code in (0, 3):
            assert (tmp_path / "out").read_bytes() == volume.read_bytes()
            (tmp_path / "out").unlink()
        assert not (tmp_path / "out").exists()
        path.write_bytes(original)
    blocksnap.done("check", "--read-data")
