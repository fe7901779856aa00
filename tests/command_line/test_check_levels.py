"""Four levels of looking, budgets, and what is remembered from one check to the next."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from blocksnap.backends.local import LocalBackend
from blocksnap.operations.check import CheckOptions, check_repository
from blocksnap.operations.reporting import Quiet
from blocksnap.repository.repository import Repository
from support.commands import CommandLine

MIB = 1 << 20


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    command = CommandLine(tmp_path)
    command.done("init", "--chunk-size", "16K", "--no-encryption")
    for number in range(3):
        volume = tmp_path / f"{number}.img"
        volume.write_bytes(random.Random(number).randbytes(2 * MIB))
        command.done("backup", volume)
    return command


def data_packs(blocksnap: CommandLine) -> list[Path]:
    found = [path for path in (blocksnap.repository / "packs").rglob("*-*") if path.is_file()]
    return sorted(path for path in found if path.stat().st_size > MIB)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def check(blocksnap: CommandLine, *arguments: str, code: int = 0) -> Any:
    outcome = blocksnap("check", "--json", *arguments)
    assert outcome.code == code, outcome
    return outcome.document


def test_each_level_finds_what_the_one_below_does_not(blocksnap: CommandLine) -> None:
    node_pack = min((blocksnap.repository / "packs").rglob("*-*"), key=lambda path: path.stat().st_size)
    flip(node_pack, 64 + 72 + 20)
    assert check(blocksnap, "--level", "1")["findings"] == []
    assert check(blocksnap, code=13)["losses"]
    flip(node_pack, 64 + 72 + 20)
    pack = data_packs(blocksnap)[0]
    flip(pack, MIB)
    assert check(blocksnap)["findings"] == []
    for arguments in (("--level", "3"), ("--scrub",), ("--read-data",), ("--level=4",)):
        found = check(blocksnap, *arguments, code=13)
        assert found["packs_read"] == found["packs"] == 6
        (loss,) = found["losses"]
        assert loss["length"] == 16 << 10
    assert check(blocksnap, "--keyless", code=13)["losses"] == []


def test_a_scrub_takes_no_passphrase(tmp_path: Path) -> None:
    blocksnap = CommandLine(tmp_path)
    blocksnap.done("init", "--chunk-size", "16K")
    (tmp_path / "volume").write_bytes(random.Random(1).randbytes(2 * MIB))
    blocksnap.done("backup", tmp_path / "volume")
    stranger = {"BLOCKSNAP_PASSPHRASE": None}
    assert blocksnap("check", "--scrub", **stranger).code == 12
    sound = blocksnap.done("check", "--keyless", "--json", **stranger).document
    assert (sound["packs_read"], sound["level"], sound["backups"]) == (2, 3, 0)
    flip(data_packs(blocksnap)[0], MIB)
    found = blocksnap("check", "--keyless", "-q", **stranger)
    assert found.code == 13
    assert data_packs(blocksnap)[0].name in found.stderr


def test_a_budget_gets_round(blocksnap: CommandLine) -> None:
    read = []
    for _ in range(6):
        found = check(blocksnap, "--scrub", "--budget", "1")
        assert (found["packs_read"], found["packs_left"]) == (1, 5)
        read.append(set(states(blocksnap)))
    assert [len(names) for names in read] == [1, 2, 3, 4, 5, 6]
    assert check(blocksnap, "--scrub", "--budget=5h")["packs_left"] == 0
    assert check(blocksnap, "--scrub", "--max-age=1d")["packs_read"] == 0
    # What was hashed is not thereby opened, but what was opened has been hashed.
    assert check(blocksnap, "--read-data", "--max-age=1d")["packs_read"] == 6
    assert check(blocksnap, "--scrub", "--max-age=1d")["packs_read"] == 0


def states(blocksnap: CommandLine) -> dict[str, Any]:
    (memory,) = (blocksnap.folder / "state" / "checks").iterdir()
    found: dict[str, Any] = json.loads(memory.read_text())
    return found


def test_the_repository_remembers_for_another_host(blocksnap: CommandLine, tmp_path: Path) -> None:
    check(blocksnap, "--read-data")
    other = {"BLOCKSNAP_STATE_DIRECTORY": str(tmp_path / "other")}
    found = blocksnap.done("check", "--scrub", "--max-age", "1d", "--json", **other).document
    assert found["packs_read"] == 0
    # What is known of a bad pack is not a reason to leave it out.
    flip(data_packs(blocksnap)[0], MIB)
    assert blocksnap("check", "--scrub", **other).code == 13
    assert check(blocksnap, "--scrub", "--max-age=1d", "--budget=1", code=13)["packs_read"] == 1
    blocksnap.done("check", "--level", "2")


def test_prune_removes_what_later_checks_repeat(blocksnap: CommandLine) -> None:
    for _ in range(3):
        check(blocksnap, "--scrub")
    assert len(list((blocksnap.repository / "checks").iterdir())) == 3
    blocksnap.done("prune")
    assert len(list((blocksnap.repository / "checks").iterdir())) == 1
    assert check(blocksnap, "--scrub", "--max-age=1d")["packs_read"] == 0


def test_a_storage_that_takes_nothing_is_checked(blocksnap: CommandLine) -> None:
    # Root may write where nobody may: a file in the place of the folder refuses everybody.
    (blocksnap.repository / "checks").write_text("")
    found = check(blocksnap, "--scrub")
    assert found["packs_read"] == 6
    assert len(states(blocksnap)) == 6
    (blocksnap.folder / "state" / "checks").rename(blocksnap.folder / "away")
    (blocksnap.folder / "state" / "checks").write_text("")
    assert check(blocksnap, "--scrub")["packs_read"] == 6


class Interrupted(Quiet):
    """A check that is ended by a signal after three packs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 3

    def advance(self, done_bytes: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_check_keeps_what_it_did(blocksnap: CommandLine) -> None:
    repository = Repository.open(LocalBackend(str(blocksnap.repository)), lambda: None)
    with pytest.raises(KeyboardInterrupt):
        check_repository(repository, str(blocksnap.folder / "state"), CheckOptions(level=4), Interrupted())
    kept = states(blocksnap)
    assert 2 <= len(kept) < 6
    assert len(list((blocksnap.repository / "checks").iterdir())) == 1
    rest = check(blocksnap, "--read-data", "--max-age=1d")
    assert rest["packs_read"] == 6 - len(kept)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--read-data", "--scrub"),
        ("--level", "1", "--scrub"),
        ("--level", "5"),
        ("--budget", "1G"),
        ("--level", "2", "--max-age", "1d"),
        ("--scrub", "--budget", "much"),
        ("--scrub", "--max-age", "old"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert CommandLine(tmp_path)("check", *arguments).code == 2
