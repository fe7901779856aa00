"""The recipe of docs/operations.md, "A repository that only grows", on a real ext4."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.repository.check import FOLDERS
from blocksnap.repository.repository import ASIDE, FORGET
from support.commands import CommandLine
from support.loops import call, loop_device, mounted
from support.require import require

MIB = 1 << 20
RECIPE = Path(__file__).parents[2] / "docs" / "operations.md"
# What a host has that is not the one which holds the storage: root there cannot take the attributes away.
CLIENT = ["setpriv", "--bounding-set=-linux_immutable", "--inh-caps=-linux_immutable"]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    with loop_device(tmp_path / "storage.img", size=200 * MIB) as device:
        call("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "storage") as folder:
            try:
                yield folder
            finally:
                call("chattr", "-R", "-ia", folder)


def recipe(place: Path) -> list[str]:
    """Return the lines of the document, for another place; files count as complete at once."""
    text = RECIPE.read_text()
    section = text[text.index("## A repository that only grows") :]
    lines = [line[4:] for line in section.split("\n## ")[0].splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    here = [line.replace("/srv/backup/blocksnap", str(place)) for line in lines]
    return [line.replace("-mmin +60 ", "") for line in here]


def test_every_folder_is_made_beforehand(tmp_path: Path) -> None:
    """One that is made later has no +a: what lies in it could be removed."""
    CommandLine(tmp_path).done("init")
    place = tmp_path / "repository"
    subprocess.run(["bash", "-ec", recipe(place)[0]], check=True)
    folders = {path for path in place.rglob("*") if path.is_dir()}
    assert {place / name.rstrip("/") for name in (*FOLDERS, ASIDE, FORGET)} <= folders
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def client(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    words = [*CLIENT, *map(str, argv)]
    return subprocess.run(words, check=False, capture_output=True, text=True)


def is_refused(*argv: str | Path) -> bool:
    done = client(*argv)
    assert done.returncode == 0 or "Operation not permitted" in done.stderr, (argv, done)
    return done.returncode != 0


def test_what_is_stored_stays(tmp_path: Path, storage: Path) -> None:
    require("chattr", client("true").returncode == 0, "setpriv cannot drop a capability here")
    place = storage / "repository"
    blocksnap = CommandLine(tmp_path)
    blocksnap.environment["BLOCKSNAP_REPOSITORY"] = str(place)
    blocksnap.done("init", "--chunk-size", "16K")
    *once, sweep = recipe(place)
    for line in once:
        subprocess.run(["bash", "-ec", line], check=True)

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [*CLIENT, *blocksnap.argv(*words)],
            check=False,
            capture_output=True,
            text=True,
            env=blocksnap.environment,
        )
        assert done.returncode == 0, (words, done)
        return done.stdout

    volume, dice = tmp_path / "volume", random.Random(1)
    volume.write_bytes(dice.randbytes(3 * MIB))
    contents = []
    for number in range(3):
        with volume.open("r+b") as file:
            file.seek(number * MIB)
            file.write(dice.randbytes(MIB // 2))
        run("backup", volume)
        contents.append(volume.read_bytes())
        subprocess.run(["bash", "-ec", sweep], check=True)
    files = [path for path in place.rglob("*") if path.is_file()]
    # Of the 256 folders of packs, those that hold some and a few that do not.
    folders = {place, *(path.parent for path in files), *sorted((place / "packs").iterdir())[:3]}
    assert len(files) > 12
    assert all(is_refused("rm", "-f", path) for path in files)
    assert all(is_refused("mv", path, storage / "away") for path in [*files, *folders])
    assert all(is_refused("dd", "if=/dev/zero", f"of={path}", "count=1", "conv=notrunc") for path in files)
    assert is_refused("truncate", "-s", "0", files[0])
    assert is_refused("chattr", "-i", files[0])
    assert is_refused("chattr", "-a", place)
    run("backup", volume)
    run("check", "--read-data")
    for backup, content in zip(blocksnap.done("list", "--json").document["backups"], contents, strict=False):
        assert blocksnap.done("restore", backup["id"], "-").stdout == content
    # Until it is swept, a new object can still be overwritten in place, though not removed.
    fresh = [path for path in place.rglob("*") if path.is_file() and path not in files]
    assert fresh
    for path in fresh:
        assert is_refused("rm", "-f", path)
        assert not is_refused("dd", f"if={path}", f"of={path}", "count=1", "conv=notrunc")
