"""Physical volumes on LUKS: headers go along, and make a new disk one that the old passphrase opens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap.system.luks import read_header
from support.in_process import InProcess
from support.loops import call_until_done
from support.lvm_lab import remove_group, scratch_disks, tool, write_at
from support.require import require

MIB = 1 << 20
GROUP = "vault-vg"
MAPPING = "blocksnap-vault"
NODE = f"/dev/mapper/{MAPPING}"
PASSPHRASE = b"an old secret\n"
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
PROJECT = Path(__file__).parents[2]
CONFIGURATION = f"""
[defaults]
luks_headers = true

[jobs.vault]
volumes = ["{GROUP}/data"]
quiesce.hooks = [{{ before = ["/bin/true"], after = ["/bin/true"] }}]
"""


def cryptsetup(*words: str | Path, secret: bytes = PASSPHRASE) -> None:
    argv = ["cryptsetup", "--batch-mode", *map(str, words)]
    done = subprocess.run(argv, check=False, input=secret, capture_output=True)
    assert done.returncode == 0, (argv, done.stderr)


def make_container(disk: str, version: int) -> None:
    cryptsetup("luksFormat", "--type", f"luks{version}", *CHEAP, disk)


def close() -> None:
    if os.path.exists(NODE):
        call_until_done("cryptsetup", "close", MAPPING)


@pytest.fixture
def disk(_lab: None) -> Iterator[str]:
    require("cryptsetup", shutil.which("cryptsetup") is not None, "cryptsetup-bin is not installed")
    subprocess.run(["modprobe", "-a", "dm-crypt", "algif_skcipher", "xts"], check=True)
    chosen = scratch_disks()[0]
    yield chosen
    remove_group(GROUP, [NODE])
    close()
    write_at(chosen, 0, bytes(20 * MIB))


@pytest.mark.parametrize("version", [1, 2])
def test_the_end_is_where_cryptsetup_says_it_is(disk: str, tmp_path: Path, version: int) -> None:
    make_container(disk, version)
    copy = tmp_path / "header"
    cryptsetup("luksHeaderBackup", disk, "--header-backup-file", copy)
    with open(disk, "rb") as file:
        found = read_header(file)
        assert found is not None
        assert found.version == version
        assert found.uuid == tool("cryptsetup", "luksUUID", disk).strip()
        file.seek(0)
        content = file.read(found.size)
    # Of LUKS1 cryptsetup leaves out the gap before the payload.
    stored = copy.read_bytes()
    assert content.startswith(stored)
    assert found.size - len(stored) < MIB
    assert version == 1 or found.size == len(stored)


def test_a_group_on_a_container_is_back_with_its_old_passphrase(
    disk: str, blocksnap: InProcess, tmp_path: Path
) -> None:
    make_container(disk, 2)
    cryptsetup("open", disk, MAPPING)
    tool("vgcreate", "-y", GROUP, NODE)
    tool("lvcreate", "-y", "-L", "8M", "-n", "data", GROUP)
    content = os.urandom(3 * MIB)
    write_at(f"/dev/{GROUP}/data", MIB, content)
    name = f"luks:{tool('cryptsetup', 'luksUUID', disk).strip()}"
    # Nobody asked for headers.
    blocksnap.done("backup", f"{GROUP}/data")
    assert name not in blocksnap.done("list").decode()
    # Applications that stand still for the snapshot of the volume do not for the header, which has none.
    (blocksnap.folder / "blocksnap.toml").write_text(CONFIGURATION)
    first = backups(blocksnap)
    assert [each["volume"] for each in first] == [name, f"{GROUP}/data"]
    assert first[1]["quiesced"]["by"] == ["hook /bin/true"]
    assert first[0]["kind"] == "full"
    assert first[0]["new_bytes"] > 100_000
    # One that did not change is not stored again, and latest is what somebody named.
    second = backups(blocksnap)
    assert (second[0]["kind"], second[0]["new_bytes"]) == ("incremental", 0)
    assert json.loads(blocksnap.done("show", "latest", "--json"))["volume"] == f"{GROUP}/data"
    blocksnap.done("check", "--read-data")
    copy = tmp_path / "copy"
    blocksnap.done("restore", f"{name}@latest", copy)
    with open(disk, "rb") as file:
        assert copy.read_bytes() == file.read(16 * MIB)

    remove_group(GROUP, [NODE])
    close()
    write_at(disk, 0, bytes(20 * MIB))
    folder = tmp_path / "host"
    blocksnap.done("show", "latest", "--host", "--to", folder)
    done = subprocess.run(
        ["sh", "-eu", folder / "recover.sh"],
        check=False,
        capture_output=True,
        input=PASSPHRASE,
        env={**os.environ, "PATH": f"{PROJECT}/.venv/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, ((folder / "recover.sh").read_text(), done.stdout, done.stderr)
    assert tool("cryptsetup", "luksUUID", disk).strip() == name.removeprefix("luks:")
    with open(f"/dev/{GROUP}/data", "rb") as device:
        device.seek(MIB)
        assert device.read(len(content)) == content
    assert not list(folder.glob("*.luks"))


def backups(blocksnap: InProcess) -> list[dict[str, Any]]:
    """Back the volume up; return what the last event says of all backups of the run."""
    out = blocksnap.done("backup", "--json", "--job", "vault")
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["backups"]
    return found
