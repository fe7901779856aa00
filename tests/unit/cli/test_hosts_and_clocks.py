"""Tables of what several hosts stored say whose it is, and what a wrong clock said."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocksnap.cli.main import run
from support.repositories import make_repository, store_empty

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
COMMANDS = (["list"], ["report"], ["forget", "--keep-last", "9", "--dry-run"])


def printed(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> str:
    capsys.readouterr()
    assert run([*words, "--repo", str(place)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_where_one_host_has_it_all_nobody_needs_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    store_empty(make_repository(tmp_path / "r", encrypted=False), NOW)
    said = printed(capsys, tmp_path / "r", *command)
    assert "vg0/root" in said
    assert "HOST" not in said
    assert "web" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_of_several_hosts_each_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    repository = make_repository(tmp_path / "r", encrypted=False)
    for host in (("1" * 32, "web"), ("2" * 32, "web"), ("3" * 32, "mail")):
        store_empty(repository, NOW, host=host)
    header, *rows = printed(capsys, tmp_path / "r", *command).splitlines()
    at = header.index("HOST")
    assert header[:at].split()[-1] == "VOLUME"
    names = {row[at:].split("  ")[0] for row in rows if "vg0/root" in row}
    assert names == {"web (11111111)", "web (22222222)", "mail"}


def test_a_listing_says_the_host_to_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_empty(make_repository(tmp_path / "r", encrypted=False), NOW)
    (backup,) = json.loads(printed(capsys, tmp_path / "r", "list", "--json"))["backups"]
    assert backup["host"] == "web"


def test_a_time_that_is_not_believed_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository, place = make_repository(tmp_path / "r", encrypted=False), tmp_path / "r"
    ahead = store_empty(repository, NOW + timedelta(days=300), received=NOW - timedelta(days=2))
    slow = store_empty(
        repository, NOW - timedelta(hours=9), received=NOW, seconds=timedelta(hours=9).total_seconds()
    )
    fine = store_empty(repository, NOW + timedelta(hours=1))
    listed = json.loads(printed(capsys, place, "list", "--json"))["backups"]
    assert [each["id"] for each in listed] == [ahead, slow, fine]
    assert [each["arrived"] for each in listed] == [
        (NOW - timedelta(days=2)).isoformat(),
        NOW.isoformat(),
        (NOW + timedelta(hours=1)).isoformat(),
    ]
    assert [each["dated"] for each in listed] == [each["arrived"] for each in listed]
    _, *rows, note = printed(capsys, place, "list").splitlines()
    assert [" *  " in row for row in rows] == [True, False, False]
    assert note.startswith("* ")
    assert "clock, which was wrong" in note
    assert note not in printed(capsys, place, "list", "--quiet")
    assert "by its arrival: its host's clock was wrong" in printed(capsys, place, "show", ahead)
    assert "by its arrival: storing it took that long" in printed(capsys, place, "show", slow)
    assert "by its arrival" not in printed(capsys, place, "show", fine)


def test_a_backup_that_took_longer_than_times_can_tell_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, place = make_repository(tmp_path / "r", encrypted=False), tmp_path / "r"
    store_empty(repository, NOW - timedelta(days=9))
    forged = store_empty(repository, NOW - timedelta(hours=9), received=NOW, seconds=1e300)
    assert f"{forged[:8]}  vg0/root" in printed(capsys, place, "list")
    assert forged in printed(capsys, place, "show", forged)


def test_a_copied_repository_marks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository, place = make_repository(tmp_path / "r", encrypted=False), tmp_path / "r"
    for day in (3, 2, 1):
        store_empty(repository, NOW - timedelta(days=day), received=NOW)
    assert "*" not in printed(capsys, place, "list")
    listed = json.loads(printed(capsys, place, "list", "--json"))["backups"]
    assert [each["dated"] for each in listed] == [each["time"] for each in listed]
