"""Forgetting from a repository: whose backups count together, and which clock is believed."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocksnap.operations import catalogue
from blocksnap.operations.catalogue import find_backup, newest_of
from blocksnap.operations.forget import ForgetPlan, NewestBackupError, plan_by_name, plan_by_policy
from blocksnap.operations.report import Ages, make_report
from blocksnap.operations.reporting import Quiet
from blocksnap.repository.repository import Repository
from blocksnap.retention import Keep, Policy, Rule
from support.repositories import make_repository, store_empty

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
DAYS = Policy((Rule(Keep(daily=14, weekly=8)),))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "r", encrypted=False)


def plan(repository: Repository, policy: Policy = DAYS, report: Quiet | None = None) -> ForgetPlan:
    return plan_by_policy(repository, policy, NOW, arriving={}, force=False, report=report or Quiet())


def warnings_of(repository: Repository) -> list[str]:
    report = Quiet()
    plan(repository, report=report)
    return report.warnings


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("same", "vm-a"), ("same", "vm-b")),
        (("1" * 32, "localhost"), ("2" * 32, "localhost")),
        (("1" * 32, "vm-a"), ("2" * 32, "vm-b")),
    ],
)
def test_clones_do_not_lose_their_backups_to_each_other(
    repository: Repository, one: tuple[str, str], other: tuple[str, str]
) -> None:
    hosts = {}
    for day in range(20, 0, -1):
        for place, host in enumerate((one, other)):
            time = NOW.replace(hour=2) - timedelta(days=day) + timedelta(minutes=5 * place)
            hosts[store_empty(repository, time, host=host)] = host
    decided = plan(repository)
    kept = Counter(hosts[each.candidate.id] for each in decided.decisions if each.keep)
    assert kept[one] == kept[other] >= 14
    # Nobody has to guess which is whose.
    names = decided.hosts()
    assert set(names) == {one, other}
    assert len(set(names.values())) == 2
    assert all(name.startswith(hostname) for (_, hostname), name in names.items())


def test_hosts_that_share_a_name_are_told_apart_in_a_report(repository: Repository) -> None:
    for id_ in ("1" * 32, "2" * 32):
        store_empty(repository, NOW - timedelta(days=9), host=(id_, "localhost"))
    report = make_report(repository, Ages.parse("26h", None, None), NOW)
    assert sorted(report.warnings) == [
        "vg0/root on localhost (11111111): the last backup is 9 days old",
        "vg0/root on localhost (22222222): the last backup is 9 days old",
    ]


def test_a_host_installed_anew_begins_again_and_loses_nothing(repository: Repository) -> None:
    before = [
        store_empty(repository, NOW - timedelta(days=day), host=("old", "web")) for day in range(60, 30, -1)
    ]
    plan(repository)
    since = [
        store_empty(repository, NOW - timedelta(days=day), host=("new", "web")) for day in range(30, 0, -1)
    ]
    kept = {each.candidate.id for each in plan(repository).decisions if each.keep}
    assert kept >= {*before[-14:], *since[-14:]}


def test_the_newest_of_each_host_is_not_given_up_unasked(repository: Repository) -> None:
    mine = store_empty(repository, NOW - timedelta(days=2), host=("same", "vm-a"))
    store_empty(repository, NOW - timedelta(days=1), host=("same", "vm-b"))
    with pytest.raises(NewestBackupError):
        plan_by_name(repository, [mine], arriving={}, force=False)
    assert plan_by_name(repository, [mine], arriving={}, force=True).forgotten == (mine,)


def test_a_backup_builds_on_this_hosts_own(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = store_empty(repository, NOW - timedelta(days=2), host=("same", "vm-a"))
    other = store_empty(repository, NOW - timedelta(days=1), host=("same", "vm-b"))
    for hostname, expected in (("vm-a", mine), ("vm-b", other), ("vm-c", other)):
        monkeypatch.setattr(catalogue, "this_origin", lambda name=hostname: ("same", name))
        found = newest_of(repository.backups(), "lvm:VG/LV")
        assert found is not None
        assert found.id == expected
        if hostname != "vm-c":
            assert find_backup(repository, "vg0/root@latest").backup.id == expected


def test_a_report_speaks_of_each_host(repository: Repository) -> None:
    store_empty(repository, NOW - timedelta(days=9), host=("same", "vm-a"))
    store_empty(repository, NOW - timedelta(hours=9), host=("same", "vm-b"))
    report = make_report(repository, Ages.parse("26h", None, None), NOW)
    assert [volume.host for volume in report.volumes] == ["vm-a", "vm-b"]
    assert report.warnings == ("vg0/root on vm-a: the last backup is 9 days old",)


def test_a_clock_that_was_ahead_does_not_make_a_backup_the_newest(repository: Repository) -> None:
    ahead = store_empty(repository, NOW + timedelta(days=300), received=NOW - timedelta(days=40))
    days = {day: store_empty(repository, NOW - timedelta(days=day)) for day in range(39, 2, -1)}
    assert repository.backups()[0].backup.id == ahead
    for name in ("latest", "vg0/root@latest", "vg0/root@2027-12-31"):
        assert find_backup(repository, name).backup.id == days[3], name
    assert find_backup(repository, "vg0/root@2026-10-18T00:00Z").backup.id == ahead
    found = newest_of(repository.backups(), "lvm:VG/LV")
    assert found is not None
    assert found.id == days[3]
    report = make_report(repository, Ages.parse("26h", None, None), NOW)
    assert report.warnings == ("vg0/root: the last backup is 3 days old",)


def test_a_clock_that_was_behind_does_not_hide_the_newest(repository: Repository) -> None:
    for day in range(9, 2, -1):
        store_empty(repository, NOW - timedelta(days=day))
    behind = store_empty(repository, NOW - timedelta(days=8, hours=3), received=NOW)
    assert find_backup(repository, "latest").backup.id == behind
    # What is restored by its time is what the listing shows with it; monitoring fears the worse.
    assert find_backup(repository, "vg0/root@2026-11-18T10:00Z").backup.id == behind
    assert make_report(repository, Ages.parse("26h", None, None), NOW).warnings


def test_what_was_copied_in_two_parts_keeps_its_order(repository: Repository) -> None:
    first, second = NOW - timedelta(days=30), NOW
    made = [
        store_empty(
            repository,
            NOW - timedelta(days=day),
            received=first if day >= 30 else second - timedelta(seconds=60 - day),
        )
        for day in range(60, 0, -1)
    ]
    assert [stored.backup.id for stored in repository.backups()] == made


def test_what_was_copied_in_two_parts_loses_no_days(repository: Repository) -> None:
    first, second = NOW - timedelta(days=30), NOW
    for day in range(60, 0, -1):
        received = first if day >= 30 else second - timedelta(seconds=60 - day)
        store_empty(repository, NOW - timedelta(days=day), received=received)
    decisions = plan(repository).decisions
    kept = {(NOW - each.candidate.time).days: each for each in decisions if each.keep}
    assert set(range(1, 15)) <= kept.keys()
    assert all("by its host's clock" in kept[day].reasons[0] for day in range(2, 15))
    assert "by its host's clock" not in kept[1].reasons[0]
    (warning,) = warnings_of(repository)
    assert warning.startswith("29 backups made over 28 days arrived together: the repository was copied")


def test_a_copy_is_told_of_while_the_original_may_be_there(repository: Repository) -> None:
    store_empty(repository, NOW - timedelta(days=100))
    for day in range(90, 60, -1):
        store_empty(repository, NOW - timedelta(days=day), received=NOW - timedelta(days=31))
    assert warnings_of(repository) == []
    for day in range(90, 60, -1):
        store_empty(
            repository, NOW - timedelta(days=day), host=("id", "db"), received=NOW - timedelta(days=29)
        )
    assert len(warnings_of(repository)) == 1


def test_a_copy_that_changes_no_date_is_not_told(repository: Repository) -> None:
    """As by ``cp -r`` from a cold copy, the original being gone; and it is gone on with."""
    for day in range(90, 60, -1):
        store_empty(repository, NOW - timedelta(days=day), received=NOW - timedelta(days=9, seconds=day))
    for day in range(9, 0, -1):
        store_empty(repository, NOW - timedelta(days=day))
    assert warnings_of(repository) == []
    assert not any("clock" in reason for each in plan(repository).decisions for reason in each.reasons)


def test_what_arrives_late_is_no_copy(repository: Repository) -> None:
    for day in range(9, 0, -1):
        # Storing takes its time; one clock is a year behind; and many hosts are done at the same time.
        store_empty(repository, NOW - timedelta(days=day), received=NOW - timedelta(days=day, hours=-9))
        store_empty(
            repository, NOW - timedelta(days=day + 365), host=("o", "o"), received=NOW - timedelta(days=day)
        )
        store_empty(repository, NOW - timedelta(days=day), host=("id", f"db{day}"), received=NOW)
    for minute in range(4):
        late = timedelta(days=300, minutes=minute)
        store_empty(repository, NOW - late, host=("o", "p"), received=NOW - timedelta(minutes=minute))
    assert warnings_of(repository) == []
