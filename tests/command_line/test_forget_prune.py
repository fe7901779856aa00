"""forget and prune as processes: what they say, what they leave, and what they refuse."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from blocksnap.controller.arriving import Arrival, ArrivalFile
from support.commands import CommandLine, Outcome
from support.repositories import make_repository, store_empty

SIZE = 2 << 20


@pytest.fixture
def blocksnap(tmp_path: Path) -> CommandLine:
    command = CommandLine(tmp_path)
    command.done("init")
    content = bytearray(random.Random(1).randbytes(SIZE))
    for number in range(4):
        content[number << 18 : (number << 18) + 300_000] = random.Random(number + 2).randbytes(300_000)
        (tmp_path / "volume.img").write_bytes(content)
        command.done("backup", tmp_path / "volume.img")
    return command


def ids(command: CommandLine) -> list[str]:
    return [each["id"] for each in json.loads(command.done("list", "--json").stdout)["backups"]]


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "repository").rglob("*") if path.is_file())


def test_space_comes_back_and_the_rest_restores(blocksnap: CommandLine, tmp_path: Path) -> None:
    before, known = stored_bytes(tmp_path), ids(blocksnap)
    would = json.loads(blocksnap.done("forget", "--keep-last", "1", "--dry-run", "--json").stdout)
    assert would["forgotten"] == known[:3]
    assert ids(blocksnap) == known
    done = json.loads(blocksnap.done("forget", "--keep-last", "1", "--json").stdout)
    assert [decision["keep"] for decision in done["decisions"]] == [False, False, False, True]
    assert all(decision["reasons"] for decision in done["decisions"])
    assert ids(blocksnap) == known[3:]
    plan = json.loads(blocksnap.done("prune", "--dry-run", "--json").stdout)
    assert plan["freed_bytes"] > 500_000
    assert stored_bytes(tmp_path) > before
    pruned = json.loads(blocksnap.done("prune", "--json").stdout)
    assert pruned["state"] == "done"
    assert len(pruned["deleted_manifests"]) == 3
    assert stored_bytes(tmp_path) < before - 500_000
    blocksnap.done("restore", "latest", tmp_path / "out", "--verify")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "volume.img").read_bytes()
    assert json.loads(blocksnap.done("check", "--read-data", "--json").stdout)["findings"] == []
    assert json.loads(blocksnap.done("prune", "--json").stdout)["state"] == "nothing"


def test_a_named_backup_goes_and_the_newest_is_refused(blocksnap: CommandLine) -> None:
    known = ids(blocksnap)
    blocksnap.done("forget", known[1][:8])
    assert ids(blocksnap) == [known[0], *known[2:]]
    refused = blocksnap("forget", known[3])
    assert (refused.code, len(refused.errors)) == (2, 1)
    assert "newest" in refused.stderr
    assert "--force" in refused.stderr
    blocksnap.done("forget", known[3], "--force")
    assert ids(blocksnap) == [known[0], known[2]]
    assert blocksnap("forget", known[3]).code == 2


def test_what_an_instant_restore_still_reads_stays(blocksnap: CommandLine, tmp_path: Path) -> None:
    known = ids(blocksnap)
    places = {"group": "vg", "name": "data", "arriving": "data-a", "meanwhile": "data-m"}
    arrival = Arrival(stage="arriving", repository="r", backup=known[0], size=SIZE, token="0" * 32, **places)
    file = ArrivalFile(str(tmp_path / "state"), "vg", "data")
    with file.held():
        file.write(arrival)
    refused = blocksnap("forget", known[0], "--force")
    assert (refused.code, len(refused.errors)) == (11, 1)
    assert "restored to vg/data" in refused.stderr
    said = json.loads(blocksnap.done("forget", "--keep-last", "1", "--force", "--json").stdout)
    assert said["forgotten"] == known[1:3]
    assert said["decisions"][0]["reasons"] == ["being restored to vg/data"]
    # From then on it reads nothing of the repository.
    file.write(arrival.model_copy(update={"stage": "whole"}))
    blocksnap.done("forget", known[0])
    assert ids(blocksnap) == known[3:]


def test_neither_names_nor_rules_is_wrong_usage(blocksnap: CommandLine) -> None:
    for words in ([], ["latest", "--keep-last", "1"], ["--keep-daily", "many"], ["--keep-within", "soon"]):
        assert blocksnap("forget", *words).code == 2, words
    assert len(ids(blocksnap)) == 4


def test_what_narrows_rules_is_refused_beside_names(blocksnap: CommandLine, tmp_path: Path) -> None:
    for words in (("--volume", "vg0/scratch"), ("--tag", "a=b"), ("--zone", "Europe/Berlin")):
        refused = blocksnap("forget", "latest", "--force", *words)
        assert refused.code == 2, words
        assert "--volume, --tag and --zone say what the rules" in refused.stderr
    assert len(ids(blocksnap)) == 4
    words = ("--volume", f"{tmp_path}/*", "--zone", "Europe/Berlin")
    blocksnap.done("forget", "--keep-daily", "1", "--force", *words)
    assert len(ids(blocksnap)) == 1


def test_a_gc_key_prunes_and_a_backup_key_does_not(blocksnap: CommandLine, tmp_path: Path) -> None:
    for role in ("gc", "backup"):
        secret = tmp_path / f"{role}.passphrase"
        secret.write_text(f"passphrase of {role}\n")
        blocksnap.done("key", "add", "--role", role, "--new-passphrase-file", secret)
    gc, backup = ({"BLOCKSNAP_PASSPHRASE": f"passphrase of {role}"} for role in ("gc", "backup"))
    for command in (("forget", "--keep-last", "1"), ("prune",)):
        refused = blocksnap(*command, **backup)
        assert (refused.code, len(refused.errors)) == (12, 1)
        assert "role admin or gc" in refused.stderr
        blocksnap.done(*command, **gc)
    assert blocksnap("restore", "latest", tmp_path / "out", **gc).code == 12
    blocksnap.done("backup", tmp_path / "volume.img", **backup)
    blocksnap.done("restore", "latest", tmp_path / "out", "--verify")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "volume.img").read_bytes()


def test_a_clock_that_was_wrong_shows_by_the_arrival(blocksnap: CommandLine, tmp_path: Path) -> None:
    """The storage says that two arrived two days before the rest, whatever their host's clock said."""
    known = ids(blocksnap)
    manifests = {path.name: path for path in (tmp_path / "repository" / "manifests").iterdir()}
    by_age = sorted(manifests.values(), key=lambda path: path.stat().st_mtime)
    for number, path in enumerate(by_age):
        arrived = path.stat().st_mtime - 2 * 86400 * (number < 2)
        os.utime(path, (arrived, arrived))
    decided = json.loads(blocksnap.done("forget", "--keep-daily", "9", "--dry-run", "--json").stdout)
    reasons = {each["id"]: each["reasons"] for each in decided["decisions"]}
    assert "dated by its arrival" in reasons[known[1]][-1]
    assert [each["keep"] for each in decided["decisions"]] == [False, True, False, True]


def test_a_copied_repository_keeps_its_dates(blocksnap: CommandLine, tmp_path: Path) -> None:
    """Copied without its times, everything arrived just now: that says nothing of when it was made."""
    for number, path in enumerate((tmp_path / "repository" / "manifests").iterdir()):
        later = path.stat().st_mtime + 30 * 86400 + number
        os.utime(path, (later, later))
    decided = json.loads(blocksnap.done("forget", "--keep-last", "1", "--dry-run", "--json").stdout)
    assert not [each for each in decided["decisions"] if "arrival" in str(each["reasons"])]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_repository_copied_twice_without_times_keeps_its_days(tmp_path: Path, pruned: bool) -> None:
    """As by ``cp -r``, or by what only brings the new objects: a part a month ago, the rest today."""
    command = CommandLine(tmp_path)
    original, now = make_repository(tmp_path / "original", encrypted=False), datetime.now(UTC)

    def forget() -> tuple[Outcome, list[dict[str, Any]]]:
        outcome = command("forget", "--keep-daily", "14", "--dry-run", "--json")
        return outcome, [each for each in outcome.document["decisions"] if each["keep"]]

    for day in range(60, 30, -1):
        store_empty(original, now - timedelta(days=day))
    require_done("cp", "-r", tmp_path / "original", command.repository)
    for path in command.repository.rglob("*"):
        os.utime(path, ((now - timedelta(days=30)).timestamp(),) * 2)
    days = [store_empty(original, now - timedelta(days=day)) for day in range(30, 0, -1)]
    require_done("rsync", "-r", "--ignore-existing", f"{tmp_path}/original/", f"{command.repository}/")
    outcome, kept = forget()
    assert {each["id"] for each in kept} >= set(days[-14:])
    assert sum("by its host's clock" in each["reasons"][0] for each in kept) >= 12
    assert outcome.code == 3
    assert "copied without the times" in outcome.document["warnings"][0]
    said = command("forget", "--keep-daily", "14", "--dry-run").stderr.splitlines()
    assert [line.partition(":")[0] for line in said] == ["warning", "fix"]
    section = re.search(r'see "(.+)" in docs/operations.md$', said[1])
    assert section is not None
    if pruned:
        assert command("forget", "--keep-daily", "14").code == 3
        assert len(json.loads(command.done("prune", "--json").stdout)["deleted_manifests"]) > 20
    listed = ids(command)
    # As it says there: with the times brought after them, all is as it was, and nothing else is touched.
    before = contents(command.repository)
    require_done("sh", "-c", documented_cure(section[1], tmp_path / "original", command.repository))
    assert contents(command.repository) == before
    outcome, kept = forget()
    assert outcome.code == 0
    assert outcome.document["warnings"] == []
    assert [each["id"] for each in kept] == days[-14:]
    assert not any("clock" in reason for each in kept for reason in each["reasons"])
    assert [each["id"] for each in outcome.document["decisions"]] == listed
    command.done("check")


def documented_cure(section: str, original: Path, copy: Path) -> str:
    """Return the command that the section gives for a copy without times, for these two places."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    paragraphs = text.partition(f"\n### {section}\n")[2].partition("\n## ")[0]
    (command,) = re.findall(r"^    (cd .*)$", paragraphs, re.MULTILINE)
    places = {"/srv/backup/blocksnap": original, "/mnt/new/blocksnap": copy}
    assert all(place in command for place in places)
    return re.sub("|".join(places), lambda found: str(places[found[0]]), command)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_done(*words: str | Path) -> None:
    subprocess.run(words, check=True, timeout=60)
