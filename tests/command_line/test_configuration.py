"""Jobs, repositories by name, `config` and `timers`, as a user runs them."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path

import pytest

from blocksnap.backends.local import LocalBackend
from blocksnap.volumes.device import FileVolume
from support.commands import PASSPHRASE, Outcome
from support.in_process import InProcess

CONFIGURATION = """
repository = "main"

[repositories.main]
url = "{folder}/repository"
passphrase_file = "{folder}/secret"

[repositories.second]
url = "{folder}/second"
passphrase_command = ["/bin/echo", "another one"]

[volumes.images]
path = "{folder}/two.img"

[defaults]
tags = {{ site = "north" }}

[jobs.files]
volumes = ["{folder}/one.img", "images"]
schedule = "daily"
[jobs.files.retention]
last = 1

[jobs.apart]
volumes = ["{folder}/gone.img", "images"]
repository = "second"
group = false
"""


class Configured:
    """A command line that has everything from its configuration, inside this process."""

    def __init__(self, command: InProcess) -> None:
        self._command = command

    def __call__(self, *words: str | Path) -> Outcome:
        return Outcome(*self._command(*words))

    def done(self, *words: str | Path) -> Outcome:
        outcome = self(*words)
        assert outcome.code == 0, (words, outcome)
        return outcome


@pytest.fixture
def blocksnap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Configured:
    command = InProcess(tmp_path, monkeypatch, capsysbinary)
    for name in ("BLOCKSNAP_REPOSITORY", "BLOCKSNAP_PASSPHRASE"):
        monkeypatch.delenv(name)
    (tmp_path / "blocksnap.toml").write_text(CONFIGURATION.format(folder=tmp_path))
    (tmp_path / "secret").write_text(f"{PASSPHRASE}\n")
    (tmp_path / "secret").chmod(0o600)
    for name in ("one", "two"):
        (tmp_path / f"{name}.img").write_bytes(os.urandom(300_000))
    return Configured(command)


def test_jobs_and_repositories_by_name(blocksnap: Configured, tmp_path: Path) -> None:
    blocksnap.done("init")
    blocksnap.done("init", "--repo", "second")
    for _ in range(2):
        made = blocksnap.done("backup", "--job", "files", "--tag", "a=b", "--json").backups
        assert [each["volume"] for each in made] == [f"{tmp_path}/one.img", f"{tmp_path}/two.img"]
    listed = blocksnap.done("list", "--json", "--repo", "main").document["backups"]
    assert listed[0]["tags"] == {"job": "files", "site": "north", "a": "b"}
    (tmp_path / "gone.img").write_bytes(b"x" * 5000)
    blocksnap.done("backup", "--job", "apart")
    listed = blocksnap.done("list", "--json", "--repo", "second").document["backups"]
    assert [each["volume"] for each in listed] == [f"{tmp_path}/gone.img", f"{tmp_path}/two.img"]
    # What was not backed up by the job is none of its retention's business.
    blocksnap.done("backup", tmp_path / "one.img")
    forgotten = blocksnap.done("forget", "--job", "files", "--json").document
    assert {(each["volume"], each["keep"]) for each in forgotten["decisions"]} == {
        (f"{tmp_path}/{name}.img", keep) for name in ("one", "two") for keep in (True, False)
    }
    left = blocksnap.done("list", "--json").document["backups"]
    assert sorted(each["tags"].get("job", "") for each in left) == ["", "files", "files"]
    for words in (("--keep-last", "3"), ("--tag", "a=b"), ("--zone", "UTC")):
        assert blocksnap("forget", "--job", "files", *words).code == 2
    for words in (("--job", "files"), (tmp_path / "one.img",)):
        refused = blocksnap("backup", *words, "--tag", "job=apart")
        assert (refused.code, "the tag job is set by blocksnap" in refused.stderr) == (2, True)
    assert len(blocksnap.done("list", "--json").document["backups"]) == len(left)
    assert "has no retention" in blocksnap("forget", "--job", "apart").stderr
    assert "configured jobs: apart, files" in blocksnap("backup", "--job", "nosuch").stderr


def test_one_volume_that_fails_does_not_keep_the_others(blocksnap: Configured, tmp_path: Path) -> None:
    blocksnap.done("init", "--repo", "second")
    (tmp_path / "gone.img").write_bytes(b"x" * 5000)
    # The lock of the first volume is held by somebody else.
    blocksnap.done("backup", tmp_path / "gone.img", "--repo", "second")
    (lock,) = (tmp_path / "state" / "locks").iterdir()
    with lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = blocksnap("backup", "--job", "apart", "--json")
    assert done.code == 11, done
    assert [each["volume"] for each in done.backups] == [f"{tmp_path}/two.img"]


def test_one_that_is_missing_does_not_keep_the_others(blocksnap: Configured, tmp_path: Path) -> None:
    blocksnap.done("init", "--repo", "second")
    done = blocksnap("backup", "--job", "apart", "--json")
    assert done.code == 14, done
    assert [each["volume"] for each in done.backups] == [f"{tmp_path}/two.img"]
    (warning,) = [event for event in done.events if event["event"] == "warning"]
    assert f"there is no volume {tmp_path}/gone.img" in warning["message"]
    planned = blocksnap("backup", "--job", "apart", "--dry-run", "--json")
    assert planned.code == 14, planned
    assert [plan["volume"] for plan in planned.events[-1]["plans"]] == [f"{tmp_path}/two.img"]
    (tmp_path / "two.img").unlink()
    gone = blocksnap("backup", "--job", "apart")
    assert (gone.code, len(gone.errors)) == (14, 1), gone


def test_one_that_fails_in_an_unforeseen_way_does_not_keep_the_others(
    blocksnap: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocksnap.done("init", "--repo", "second")
    (tmp_path / "gone.img").write_bytes(b"x" * 5000)
    real = FileVolume.prepare

    def prepare(volume: FileVolume) -> None:
        if volume.name.endswith("gone.img"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), volume.name)
        real(volume)

    monkeypatch.setattr(FileVolume, "prepare", prepare)
    done = blocksnap("backup", "--job", "apart", "--json")
    assert done.code == 1, done
    assert [each["volume"] for each in done.backups] == [f"{tmp_path}/two.img"]


def test_config_check_and_show(blocksnap: Configured, tmp_path: Path) -> None:
    (tmp_path / "gone.img").touch()
    checked = blocksnap.done("config", "check")
    assert checked.text == "1 files, 2 jobs, 2 repositories\n"
    shown = blocksnap.done("config", "show").text
    assert f'jobs.files.schedule = "daily"  # {tmp_path}/blocksnap.toml:20\n' in shown
    assert f'jobs.files.tags.site = "north"  # {tmp_path}/blocksnap.toml:16\n' in shown
    assert 'jobs.files.base = "none"  # default\n' in shown
    # What a backup of volumes that no job names goes by.
    assert f'defaults.tags.site = "north"  # {tmp_path}/blocksnap.toml:16\n' in shown
    # What is shown is itself a configuration, and says the same.
    (tmp_path / "shown.toml").write_text(shown)
    again = blocksnap.done("config", "show", "--json", "--config", tmp_path / "shown.toml").document
    assert again["configuration"] == blocksnap.done("config", "show", "--json").document["configuration"]
    assert "jobs.apart" not in blocksnap.done("config", "show", "--job", "files").text
    (tmp_path / "gone.img").unlink()
    (tmp_path / "secret").chmod(0o644)
    warned = blocksnap("config", "check")
    assert warned.code == 3
    assert f"blocksnap.toml:25: jobs.apart.volumes.0: there is no volume {tmp_path}/gone.img" in warned.stderr
    assert "can be read by others (mode 0644)" in warned.stderr
    assert len(blocksnap("config", "check", "--json").document["warnings"]) == 2
    (tmp_path / "shop.toml").write_text(
        f"repository = '{tmp_path}'\n[jobs.a]\nvolumes = ['{tmp_path}/two.img']\n"
        f"[[jobs.a.quiesce.mariadb]]\npassword_file = '{tmp_path}/secret'\n"
    )
    warned = blocksnap("config", "check", "--config", tmp_path / "shop.toml")
    assert f"shop.toml:5: jobs.a.quiesce.mariadb.0.password_file: {tmp_path}/secret can be" in warned.stderr
    (tmp_path / "wrong.toml").write_text("[jobs.a]\nvolumes = ['v/a']\nvolums = 1\n")
    wrong = blocksnap("config", "check", "--config", tmp_path / "wrong.toml")
    assert wrong.code == 2
    assert wrong.errors == [
        f"error: {tmp_path}/wrong.toml:3: jobs.a.volums: there is no such key; did you mean volumes?"
    ]
    assert blocksnap("config", "check", "--config", tmp_path / "none.toml").code == 2
    assert blocksnap("list", "--config", tmp_path / "none.toml").code == 2


@pytest.mark.parametrize(("server", "package"), [("postgresql", "'psycopg[binary]'"), ("mariadb", "PyMySQL")])
def test_a_driver_goes_where_blocksnap_is(
    blocksnap: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, package: str
) -> None:
    """The distribution's package of it is not seen from a virtual environment."""
    (tmp_path / "shop.toml").write_text(
        f"repository = '{tmp_path}'\n[jobs.a]\nvolumes = ['{tmp_path}/two.img']\n"
        f"[[jobs.a.quiesce.{server}]]\n"
    )
    monkeypatch.setattr("blocksnap.operations.check_configuration.find_spec", lambda name: None)
    warned = blocksnap("config", "check", "--config", tmp_path / "shop.toml", "--json")
    assert f"install it: {sys.executable} -m pip install {package}" in {
        each["resolution"] for each in warned.document["warnings"]
    }


def test_timers_are_printed_and_installed(blocksnap: Configured, tmp_path: Path) -> None:
    assert "OnCalendar=daily" in blocksnap.done("timers").text
    units = tmp_path / "units"
    units.mkdir()
    blocksnap.done("timers", "--install", "--directory", units)
    assert sorted(os.listdir(units)) == ["blocksnap-backup-files.service", "blocksnap-backup-files.timer"]
    service = (units / "blocksnap-backup-files.service").read_text()
    assert f"backup --job files --config {tmp_path}/blocksnap.toml" in service
    (tmp_path / "blocksnap.toml").write_text("[jobs.a]\nvolumes = ['v/a']\n")
    assert blocksnap.done("timers", "--install", "--directory", units, "--json").document["removed"]
    assert os.listdir(units) == []


def test_limits_and_pace_take_effect(blocksnap: Configured, tmp_path: Path) -> None:
    blocksnap.done("init")
    configuration = (tmp_path / "blocksnap.toml").read_text()
    paced = '[defaults.pace]\npolicy = "fixed"\nread_rate = "1M"\n'
    (tmp_path / "blocksnap.toml").write_text(configuration + paced)
    done = blocksnap.done("backup", tmp_path / "one.img", "--json")
    (told,) = [event for event in done.events if event["event"] == "paced"]
    assert told["volume"] == f"{tmp_path}/one.img"
    assert (tmp_path / "one.img").stat().st_size == done.backups[0]["read_bytes"]
    limits = '[defaults.limits]\nrepository_free = "100T"\n'
    (tmp_path / "blocksnap.toml").write_text(configuration + limits)
    failed = blocksnap("backup", "--job", "files")
    assert failed.code == 1
    assert "bytes left, less than limits.repository_free (109951162777600)" in failed.stderr
    warned = blocksnap("doctor")
    assert warned.code in (1, 3)
    assert "less than repository_free = 109951162777600" in warned.text


def test_the_repository_that_runs_full_meanwhile(
    blocksnap: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at again and again: the run ends, and nothing of it counts."""
    blocksnap.done("init")
    (tmp_path / "one.img").write_bytes(os.urandom(4 << 20))
    (tmp_path / "blocksnap.toml").write_text(
        (tmp_path / "blocksnap.toml").read_text()
        + '[defaults.limits]\nrepository_free = 1000\n[defaults.pace]\npolicy = "fixed"\nread_rate = "1M"\n'
    )
    free = iter([2000, 2000])
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda _: next(free, 999))
    failed = blocksnap("backup", tmp_path / "one.img")
    assert failed.code == 1
    assert "has 999 bytes left, less than limits.repository_free (1000)" in failed.stderr
    assert blocksnap.done("list", "--json").document["backups"] == []
    assert os.listdir(tmp_path / "state" / "journal") == []
