"""Damage to one object costs what lay in it and no more, and the next backup stores it again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.commands import CommandLine

MIB = 1 << 20


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture
def volumes(tmp_path: Path, blocksnap: CommandLine) -> list[Path]:
    paths = [tmp_path / f"volume-{number}.img" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(random.Random(number).randbytes(4 * MIB))
        blocksnap.done("backup", path)
    return paths


def test_a_lost_pack_is_stored_again(blocksnap: CommandLine, volumes: list[Path]) -> None:
    largest(blocksnap.repository / "packs").unlink()
    assert blocksnap("check").code == 13
    for volume in volumes:
        again = blocksnap.done("backup", volume, "--full", "--json").backups[0]
        assert blocksnap.done("restore", again["id"], "-").stdout == volume.read_bytes()
        assert blocksnap("verify", again["id"]).code == 0


def test_a_damaged_parent_is_done_without(blocksnap: CommandLine, volumes: list[Path]) -> None:
    nodes = [p for p in (blocksnap.repository / "packs").rglob("*-*") if p.stat().st_size < MIB]
    for pack in nodes:
        flip(pack, 64 + 72 + 20)
    for volume in volumes:
        with volume.open("r+b") as file:
            file.write(b"changed")
        told = blocksnap("backup", volume, "--json")
        assert told.code == 3, told
        assert any(event["event"] == "warning" for event in told.events)
        backup = told.backups[0]
        assert (backup["kind"], backup["parent"]) == ("full", None)
        assert "damaged" in backup["reason"]
        assert blocksnap.done("restore", backup["id"], "-").stdout == volume.read_bytes()
        assert blocksnap.done("backup", volume, "--json").backups[0]["kind"] == "incremental"


def test_one_damaged_manifest_does_not_hide_the_others(blocksnap: CommandLine, volumes: list[Path]) -> None:
    backups = blocksnap.done("list", "--json").document["backups"]
    manifests = {path: path.read_bytes() for path in (blocksnap.repository / "manifests").iterdir()}
    for path, content in manifests.items():
        flip(path)
        listed = blocksnap("list", "--json")
        assert listed.code == 3
        (left,) = listed.document["backups"]
        assert "damaged" in listed.stderr
        restored = blocksnap("restore", left["id"], "-")
        assert restored.code == 3
        assert restored.stdout == Path(left["volume"]).read_bytes()
        (lost,) = [backup for backup in backups if backup["id"] != left["id"]]
        assert blocksnap("restore", lost["id"], "-").code == 13
        checked = blocksnap("check", "--read-data", "--json")
        assert checked.code == 13
        assert [f["object"] for f in checked.document["findings"]] == [f"manifests/{path.name}"]
        path.write_bytes(content)


def test_a_damaged_index_segment_is_read_from_the_packs(blocksnap: CommandLine, volumes: list[Path]) -> None:
    for path in (blocksnap.repository / "index").iterdir():
        flip(path)
    for volume in volumes:
        # A host that knows the index from before does not even notice.
        assert blocksnap("restore", f"{volume}@latest", "-").code == 0
        restored = blocksnap("restore", f"{volume}@latest", "-", "--no-cache")
        assert restored.code == 3
        assert restored.stdout == volume.read_bytes()
    findings = blocksnap("check", "--json").document["findings"]
    assert {finding["severity"] for finding in findings} == {"damage"}
    assert all(finding["object"].startswith("index/") for finding in findings)


def test_every_backup_that_shares_a_damaged_node_is_named(
    blocksnap: CommandLine, volumes: list[Path]
) -> None:
    for number in range(3):
        with volumes[0].open("r+b") as file:
            file.seek(3 * MIB)
            file.write(bytes([number]) * 100)
        blocksnap.done("backup", volumes[0])
    oldest = min(
        (p for p in (blocksnap.repository / "packs").rglob("*-*") if p.stat().st_size < MIB),
        key=lambda path: path.stat().st_mtime,
    )
    flip(oldest, 64 + 72 + 20)
    findings = blocksnap("check", "--json").document["findings"]
    named = [f["object"] for f in findings if f"of {volumes[0]}" in f["object"]]
    assert len(named) == 4
    assert all("cannot be restored" in f["message"] for f in findings if f["object"] in named)


def test_check_survives_what_it_looks_for(blocksnap: CommandLine, volumes: list[Path]) -> None:
    pack = largest(blocksnap.repository / "packs")
    pack.write_bytes(b"short")
    flip(next(iter((blocksnap.repository / "manifests").iterdir())))
    (blocksnap.repository / "packs" / "README").write_text("not a pack")
    (blocksnap.repository / "manifests" / ".nfs0001").write_text("not a manifest")
    checked = blocksnap("check", "--read-data", "--json")
    assert checked.code == 13, checked
    assert checked.document["damaged"] is True
    assert "damage:" in blocksnap("check", "-q").stderr
    assert volumes


def test_encryption_cannot_be_taken_away(tmp_path: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    volume = tmp_path / "volume.img"
    volume.write_bytes(b"secret" * 1000)
    blocksnap.done("init")
    blocksnap.done("backup", volume)
    blocksnap.repository.rename(tmp_path / "away")
    blocksnap.done("init", "--no-encryption")
    refused = blocksnap("backup", volume)
    assert refused.code == 2
    assert "was encrypted" in refused.stderr
    assert not any(b"secret" in p.read_bytes() for p in blocksnap.repository.rglob("*") if p.is_file())


@pytest.mark.parametrize("passphrase", ["", "\n"])
def test_an_empty_passphrase_is_refused(tmp_path: Path, passphrase: str) -> None:
    blocksnap = CommandLine(tmp_path)
    (tmp_path / "secret").write_text(passphrase)
    assert blocksnap("init", "--passphrase-file", tmp_path / "secret").code == 12
    assert blocksnap("init", BLOCKSNAP_PASSPHRASE="").code == 12
    assert not blocksnap.repository.exists()
