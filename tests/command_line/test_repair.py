"""Repair as an administrator does it: from the repository itself, and from the volume that is still there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from support.commands import CommandLine

MIB = 1 << 20
CHUNK = 16 << 10


@pytest.fixture
def volume(tmp_path: Path, blocksnap: CommandLine) -> Path:
    path = tmp_path / "volume.img"
    path.write_bytes(random.Random(1).randbytes(4 * MIB) + bytes(MIB) + b"end")
    blocksnap.done("backup", path)
    return path


def packs(blocksnap: CommandLine) -> list[Path]:
    """Return the packs, the largest first: that of the data."""
    found = [path for path in (blocksnap.repository / "packs").rglob("*-*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def flip(path: Path, *positions: int) -> None:
    stored = bytearray(path.read_bytes())
    for position in positions:
        stored[position] ^= 1
    path.write_bytes(stored)


def repair(blocksnap: CommandLine, *arguments: str | Path, code: int = 0) -> Any:
    outcome = blocksnap("repair", "--json", *arguments)
    assert outcome.code == code, outcome
    return outcome.document


def require_whole(blocksnap: CommandLine, volume: Path) -> None:
    checked = blocksnap.done("check", "--read-data", "--json").document
    assert not checked["damaged"]
    assert blocksnap.done("restore", f"{volume}@latest", "-").stdout == volume.read_bytes()
    blocksnap.done("prune")


@pytest.mark.parametrize("harm", ["deleted", "flipped", "cut"])
def test_the_index_comes_back(blocksnap: CommandLine, volume: Path, harm: str) -> None:
    for path in (blocksnap.repository / "index").iterdir():
        if harm == "deleted":
            path.unlink()
        elif harm == "flipped":
            flip(path, 50)
        else:
            path.write_bytes(path.read_bytes()[:40])
    assert blocksnap("check").code == 13
    planned = repair(blocksnap, "--dry-run", code=13)
    assert (planned["done"], len(planned["listed_packs"])) == (False, 2)
    assert blocksnap("check").code == 13
    assert repair(blocksnap)["whole"] is True
    require_whole(blocksnap, volume)
    assert repair(blocksnap)["done"] is False


def test_unharmed_frames_are_saved_and_the_rest_is_told(blocksnap: CommandLine, volume: Path) -> None:
    data, _ = packs(blocksnap)
    flip(data, MIB, 2 * MIB)
    assert blocksnap("check", "--scrub").code == 13
    found = repair(blocksnap, code=13)
    assert [bad["object"].rpartition("/")[2] for bad in found["bad_packs"]] == [data.name]
    assert [loss["length"] for loss in found["losses"]] == [CHUNK, CHUNK]
    lost = [(loss["offset"], loss["offset"] + loss["length"]) for loss in found["losses"]]

    shown = blocksnap.done("show", "latest").text
    assert [f"LOST             bytes {begin} to {end}".split() for begin, end in lost] == [
        line.split() for line in shown.splitlines() if line.startswith("LOST")
    ]
    told = blocksnap("verify", "latest")
    assert told.code == 13
    assert all(f"bytes {begin} to {end} cannot be restored" in told.stderr for begin, end in lost)
    checked = blocksnap("check", "--read-data", "--json")
    assert checked.code == 13
    assert checked.document["losses"] == found["losses"]
    assert data.exists()

    # A backup that reads everything finds the lost chunks in the volume, and stores them for all.
    blocksnap.done("backup", volume)
    require_whole(blocksnap, volume)
    assert not data.exists()
    assert "LOST" not in blocksnap.done("show", "latest").text
    assert repair(blocksnap)["whole"] is True


def test_prune_goes_on_when_a_loss_is_accepted(blocksnap: CommandLine, volume: Path) -> None:
    with volume.open("r+b") as file:
        file.write(random.Random(7).randbytes(3 * MIB))
    blocksnap.done("backup", volume)
    older, newer = (backup["id"] for backup in blocksnap.done("list", "--json").document["backups"])
    for pack in packs(blocksnap):
        if MIB < pack.stat().st_size < 4 * MIB:
            pack.unlink()
    assert blocksnap("prune").code == 13
    lost = repair(blocksnap, code=13)["losses"]
    assert {loss["backup"] for loss in lost} == {newer}
    assert blocksnap("prune").code == 13
    again = repair(blocksnap, "--accept-loss", code=13)
    assert again["losses"] == lost
    blocksnap.done("prune")
    assert blocksnap.done("restore", older, "-").stdout
    assert blocksnap("restore", newer, "-", "--missing=zero").code == 3
    blocksnap.done("forget", newer, "--force")
    blocksnap.done("prune")
    assert not list((blocksnap.repository / "gc" / "aside").iterdir())
    blocksnap.done("check", "--read-data")


def test_an_unreadable_manifest_is_told_and_given_up_only_on_demand(
    blocksnap: CommandLine, volume: Path
) -> None:
    (manifest,) = (blocksnap.repository / "manifests").iterdir()
    blocksnap.done("backup", volume)
    flip(manifest, 100)
    found = repair(blocksnap, code=13)
    assert [bad["object"] for bad in found["bad_manifests"]] == [f"manifests/{manifest.name}"]
    assert blocksnap("prune").code in (3, 13)
    assert blocksnap("list").code == 3
    repair(blocksnap, "--accept-loss", code=13)
    assert len(blocksnap.done("list", "--json").document["backups"]) == 1
    require_whole(blocksnap, volume)


@pytest.mark.parametrize("kind", ["data", "maps", "both"])
def test_healed_from_the_volume(blocksnap: CommandLine, volume: Path, kind: str) -> None:
    data, nodes = packs(blocksnap)
    for pack in {"data": [data], "maps": [nodes], "both": [data, nodes]}[kind]:
        pack.unlink()
    assert blocksnap("restore", "latest", "-").code == 13
    assert repair(blocksnap, code=13)["losses"]
    found = repair(blocksnap, "--heal-from", volume)
    assert found["whole"] is True
    assert found["healed"]["chunks"] == (0 if kind == "maps" else 257)
    assert (found["healed"]["nodes"] > 0) == (kind != "data")
    require_whole(blocksnap, volume)


def test_what_has_changed_since_is_not_healed(blocksnap: CommandLine, volume: Path, tmp_path: Path) -> None:
    data, _ = packs(blocksnap)
    flip(data, *range(MIB, 3 * MIB, MIB // 4))
    before = repair(blocksnap, "--read-data", code=13)["losses"]
    assert len(before) == 8
    content = bytearray(volume.read_bytes())
    changed = before[3]["offset"] + 5
    content[changed] ^= 1
    # A copy under another name does as well.
    copy = tmp_path / "copy.img"
    copy.write_bytes(content)
    after = repair(blocksnap, "--heal-from", copy, code=13)
    assert after["losses"] == [before[3]]
    assert after["healed"]["chunks"] == 7
    restored = blocksnap("restore", "latest", "-", "--missing=zero")
    assert restored.code == 3
    expected = bytearray(volume.read_bytes())
    expected[before[3]["offset"] :][:CHUNK] = bytes(CHUNK)
    offset = before[3]["offset"]
    expected[offset : offset + CHUNK] = bytes(CHUNK)
    assert restored.stdout == expected


def test_each_role_does_what_it_can(tmp_path: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init", "--chunk-size", "16K")
    volume = tmp_path / "volume.img"
    volume.write_bytes(random.Random(2).randbytes(2 * MIB))
    blocksnap.done("backup", volume)
    for role in ("backup", "gc", "restore"):
        blocksnap.done("key", "add", "--role", role, BLOCKSNAP_NEW_PASSPHRASE=f"the {role} one")
    backup, gc, restore = (
        {"BLOCKSNAP_PASSPHRASE": f"the {role} one"} for role in ("backup", "gc", "restore")
    )
    data, _ = packs(blocksnap)
    flip(data, MIB)
    for key in (backup, restore):
        assert blocksnap("repair", "--read-data", **key).code == 12
    # It cannot be told yet which chunks of the pack are harmed: without the right to read, none is trusted.
    doubtful = blocksnap("repair", "--read-data", "--json", **gc)
    assert doubtful.code == 13
    assert "may be unharmed" in doubtful.stderr
    assert blocksnap("restore", "latest", "-", "--missing=zero", **restore).stdout.count(bytes(CHUNK)) == 1
    # A key that cannot read heals all the same: content proves itself.
    healed = blocksnap("repair", "--heal-from", volume, "--json", **backup)
    assert healed.code == 0, healed
    assert healed.document["healed"]["chunks"] == 128
    assert blocksnap.done("restore", "latest", "-", **restore).stdout == volume.read_bytes()
    blocksnap.done("check", "--read-data", **restore)
    blocksnap.done("prune", **gc)
    assert not data.exists()
    blocksnap.done("check", "--read-data", **restore)


def test_what_is_not_set_aside_is_not_healed_by_a_backup_key(tmp_path: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init", "--chunk-size", "16K")
    volume = tmp_path / "volume.img"
    volume.write_bytes(random.Random(2).randbytes(MIB))
    blocksnap.done("backup", volume)
    blocksnap.done("key", "add", "--role", "backup", BLOCKSNAP_NEW_PASSPHRASE="another")
    flip(packs(blocksnap)[0], MIB // 2)
    key = {"BLOCKSNAP_PASSPHRASE": "another"}
    told = blocksnap("repair", "--read-data", "--heal-from", volume, "--json", **key)
    assert told.code == 13
    assert told.document["healed"]["waiting"] > 0
    assert told.document["healed"]["chunks"] == 0
    blocksnap.done("repair", "--heal-from", volume)
    assert blocksnap.done("restore", "latest", "-").stdout == volume.read_bytes()


def test_heal_from_stores_and_a_dry_run_does_not(blocksnap: CommandLine, volume: Path) -> None:
    assert blocksnap("repair", "--dry-run", "--heal-from", volume).code == 2
