from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap import config_files
from blocksnap.config import Configuration, JobSettings
from blocksnap.config_files import ConfigurationError, load, locate_keys
from blocksnap.errors import UsageError
from blocksnap.retention import ALL

EXAMPLE = Path(__file__).parents[2] / "docs" / "blocksnap.toml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(str(path), required=True)
    assert caught.value.exit_code == 2
    return [str(each).removeprefix(f"{path.parent}/") for each in caught.value.problems]


def test_the_example_says_everything(tmp_path: Path) -> None:
    """It is valid, and every key there is stands in it, with its default where that is shown."""
    text = EXAMPLE.read_text()
    loaded = load(str(write(tmp_path / "blocksnap.toml", text)), required=True)
    job = loaded.configuration.job("postgres")
    assert job.retention is not None
    assert (job.retention.keep.daily, job.retention.keep.hourly) == (14, 0)
    assert job.tags == {"site": "north", "service": "postgres"}
    assert job.limits.repository_free == 10 << 30
    assert [hook.session is not None for hook in job.quiesce.hooks] == [True, False]
    for model in config_files._MODELS:
        for name in model.model_fields:
            if name not in ("hourly", "monthly", "last", "yearly"):
                assert f"{name} = " in text or f"[{name}" in text or f".{name}" in text, name
    # What is commented out is the default: without the hash signs the same holds.
    said = "\n".join(
        line.removeprefix("#") if line.startswith("#") and line[1:2] not in (" ", "") else line
        for line in text.splitlines()
    )
    again = load(str(write(tmp_path / "again.toml", said)), required=True).configuration
    assert again.job("postgres") == job
    assert again.defaults.limits == loaded.configuration.defaults.limits


def test_nothing_is_configuration_too(tmp_path: Path) -> None:
    assert load(str(tmp_path / "none.toml"), required=False).configuration == Configuration()
    assert problems_of(tmp_path / "none.toml") == ["none.toml: No such file or directory"]


def test_drop_ins_win_key_by_key(tmp_path: Path) -> None:
    main = write(
        tmp_path / "b.toml",
        'repository = "/r"\n[jobs.a]\nvolumes = ["v/a"]\nbase = "keep"\n[jobs.b]\nvolumes = ["v/b"]\n',
    )
    write(tmp_path / "b.d" / "20.toml", '[jobs.a]\nvolumes = ["v/c", "v/d"]\n')
    write(
        tmp_path / "b.d" / "10.toml",
        'repository = "/s"\n[jobs.a]\nvolumes = ["v/x"]\n[jobs.c]\nvolumes=["v/e"]',
    )
    write(tmp_path / "b.d" / "ignored.txt", "no TOML")
    loaded = load(str(main), required=True)
    assert loaded.configuration.repository == "/s"
    assert sorted(loaded.configuration.jobs) == ["a", "b", "c"]
    job = loaded.configuration.job("a")
    assert (job.volumes, job.base) == (("v/c", "v/d"), "keep")
    assert [str(loaded.place_of(("jobs", "a", key))) for key in ("volumes", "base")] == [
        f"{tmp_path}/b.d/20.toml:2",
        f"{main}:4",
    ]
    write(tmp_path / "b.d" / "30.toml", "[jobs.a]\nvolumes = 3\n")
    assert problems_of(main) == ["b.d/30.toml:2: jobs.a.volumes: Input should be a valid tuple"]


def test_defaults_are_those_of_every_job(tmp_path: Path) -> None:
    loaded = load(
        str(
            write(
                tmp_path / "b.toml",
                """
[defaults]
base = "auto"
tags = { a = "1", b = "1" }
limits = { cow_percent = 50, pool_data_percent = 60 }
retention = { daily = 3, last = 9 }
pace = { policy = "gentle", write_rate = "1M" }
[jobs.x]
volumes = ["v/x"]
tags = { b = "2" }
limits = { cow_percent = 70 }
retention = { weekly = "all" }
pace = { policy = "off" }
[jobs.y]
volumes = ["v/y"]
""",
            )
        ),
        required=True,
    ).configuration
    x, y = loaded.job("x"), loaded.job("y")
    assert (x.base, x.tags, y.tags) == ("auto", {"a": "1", "b": "2"}, {"a": "1", "b": "1"})
    assert (x.limits.cow_percent, x.limits.pool_data_percent, y.limits.cow_percent) == (70, 60, 50)
    assert x.retention is not None
    assert y.retention is not None
    assert (x.retention.keep.daily, x.retention.keep.weekly, y.retention.keep.daily) == (0, ALL, 3)
    assert (x.pace.policy, x.pace.write_rate, y.pace.write_rate) == ("off", None, 1 << 20)
    named = loaded.job_for(("v/z",))
    assert (named.volumes, named.limits) == (("v/z",), y.limits)


WRONG = [
    ("repositroy = '/r'", "b.toml:1: repositroy: there is no such key; did you mean repository?"),
    (
        "[jobs.a]\nvolmes = ['v/a']\nvolumes = ['v/a']",
        "b.toml:2: jobs.a.volmes: there is no such key; did you mean volumes?",
    ),
    ("[jobs.a]\nbase = 'none'\n", "b.toml:1: jobs.a.volumes: is missing"),
    ("[jobs.a]\nvolumes = []\n", "b.toml:2: jobs.a.volumes: Tuple should have at least 1 item"),
    (
        "[jobs.a]\nvolumes = ['v/a']\n[jobs.a.quiesce]\nx = 1",
        "b.toml:4: jobs.a.quiesce.x: there is no such key",
    ),
    (
        ("[jobs.a]\nvolumes = ['v/a']\n[[jobs.a.quiesce.hooks]]\nafter = ['/x']\n"
        "\n[[jobs.a.quiesce.hooks]]\n\nbefore = ['x']"),
        "b.toml:8: jobs.a.quiesce.hooks.1.before: has to be an absolute path",
    ),
    (
        "[jobs.a]\nvolumes = ['v/a',\n 'nosuch']",
        "b.toml:2: jobs.a.volumes.1: there is no nosuch in [volumes]",
    ),
    (
        "[volumes.w]\npath = 'v/a'\n[jobs.a]\nvolumes = ['v/a', 'w']",
        "b.toml:4: jobs.a.volumes: v/a is named twice",
    ),
    (
        "repository = 'x'",
        "b.toml:1: repository: there is no repository x; a directory is written with a slash",
    ),
    (
        "[jobs.a]\nvolumes = ['v/a']\nschedule = 'sometimes'",
        "b.toml:3: jobs.a.schedule: is no calendar event",
    ),
    ("[defaults]\nbase = 'x'\n[jobs.a]\nvolumes = ['v/a']\n[jobs.b]\nvolumes = ['v/b']", "b.toml:2: "),
    ("[defaults.limits]\nrepository_free = '1X'\n", "b.toml:2: defaults.limits.repository_free: is no size"),
    ("[defaults.limits]\ndrop_data_percent = 90\n", "b.toml:1: defaults.limits: drop_data_percent is below"),
    ("[defaults.limits]\nrestore_data_percent = 100\n", "b.toml:2: defaults.limits.restore_data_percent: "),
    (
        "[jobs.a]\nvolumes = ['v/a']\nlimits = {restore_metadata_percent = 0}",
        "b.toml:3: jobs.a.limits.restore_metadata_percent: ",
    ),
    ("[defaults.limits]\nrestore_wait_seconds = -1\n", "b.toml:2: defaults.limits.restore_wait_seconds: "),
    ("[defaults.pace]\npolicy = 'fixed'\n", "b.toml:1: defaults.pace: policy fixed needs a read_rate"),
    ("[defaults.pace]\nread_rate = 5\n", 'b.toml:1: defaults.pace: rates need policy = "fixed"'),
    ("[defaults.retention]\nzone = 'UTC'\n", "b.toml:1: defaults.retention: keep: it would keep nothing"),
    ("[defaults.retention]\ndaily = 'x'\n", "b.toml:1: defaults.retention: daily: write a number, or all"),
    (
        "[repositories.r]\nurl = '/r'\npassphrase_file = 'p'",
        "b.toml:3: repositories.r.passphrase_file: has to be an absolute",
    ),
    (
        "[repositories.r]\nurl = '/r'\npassphrase_file = '/p'\npassphrase_command = ['/c']",
        "b.toml:1: repositories.r: the passphrase comes from a file, a command or a credential",
    ),
    ("[jobs.a]\nvolumes = ['v/a']\ntags = { job = 'b' }", "b.toml:3: jobs.a.tags: the tag job is set by"),
    ("[defaults.tags]\njob = 'b'\n[jobs.a]\nvolumes = ['v/a']",
     "b.toml:1: defaults.tags: the tag job is set by"),
    ("[jobs.'a b']\nvolumes = ['v/a']", "b.toml:1: jobs.a b: String should match pattern"),
    ("\n\nrepository = ", "b.toml:3: Invalid value"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WRONG)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    told = problems_of(write(tmp_path / "b.toml", text))
    assert len(told) == 1, told
    assert told[0].startswith(expected)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "b.toml", "x = 1\n[jobs.a]\nvolumes = ['v/a']\ny = 2\n[jobs.b]\nz = 3\n")
    assert [line.split(": ")[:2] for line in problems_of(path)] == [
        ["b.toml:1", "x"],
        ["b.toml:4", "jobs.a.y"],
        ["b.toml:5", "jobs.b.volumes"],
        ["b.toml:6", "jobs.b.z"],
    ]


def test_only_root_and_oneself_may_write_it(tmp_path: Path) -> None:
    path = write(tmp_path / "etc" / "b.toml", "")
    path.chmod(0o646)
    assert "can be written by others (mode 0646)" in problems_of(path)[0]
    path.chmod(0o644)
    path.parent.chmod(0o777)
    assert "its directory can be written by others" in problems_of(path)[0]
    path.parent.chmod(0o1777)
    load(str(path), required=True)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1234)
        assert "belongs to user 1234" in problems_of(path)[0]


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_a_directory_is_no_file(path: str) -> None:
    with pytest.raises(ConfigurationError, match="Is a directory"):
        load(path, required=True)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_bytes(b"\xff\xfe")
    assert problems_of(path) == ["b.toml: is not UTF-8"]


def test_places_of_statements_over_several_lines() -> None:
    text = (
        '\n# c\na = """\nb = 1\n"""\nc = [ # x\n  1,\n\n  2 ]\n[t]\r\nd = {e = 1,f = [\n{g=1}]}\n[[u.v]]\n'
        "h.i = 1\n[u.v.w]\nj=1\n[[u.v]]"
    )
    assert locate_keys(text) == {
        ("a",): 3,
        ("c",): 6,
        ("t",): 10,
        ("t", "d"): 11,
        ("t", "d", "e"): 11,
        ("t", "d", "f"): 11,
        ("u", "v", 0): 13,
        ("u", "v", 0, "h"): 14,
        ("u", "v", 0, "h", "i"): 14,
        ("u", "v", 0, "w"): 15,
        ("u", "v", 0, "w", "j"): 16,
        ("u", "v", 1): 17,
    }


@given(st.text(alphabet="a=[]{}\"'\n,#1.", max_size=40))
def test_places_of_any_valid_document(text: str) -> None:
    import tomllib

    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = locate_keys(text)
    assert {path[0] for path in lines if path} >= set(table)


@pytest.mark.parametrize(
    "text",
    [
        "daily", "Mon..Fri 02:30", "Sun 06:00", "*-*-* 01:30:00", "*-*-01 04:00", "Mon,Wed *-*-* 10:00",
        "12-24",
        "*:0/15", "2026-01..06-01 00:00:00 UTC", "*-*~01 03:00", "Sat", "weekly Europe/Berlin",
        "*-*-* 02:00 Europe/Berlin",
    ],
)  # fmt: skip
def test_schedules(text: str) -> None:
    assert JobSettings(schedule=text).schedule == text


@pytest.mark.parametrize(
    "text", ["", " ", "sometimes", "at 5", "25", "5 pm", "02.30", "Foo 02:30", "02:30\n[x]"]
)
def test_no_schedules(text: str) -> None:
    with pytest.raises(ValueError, match="calendar event"):
        JobSettings(schedule=text)


@pytest.mark.parametrize("url", ["/srv/repo", "/srv/repo/", "file:///srv/repo", "file:///srv//repo/."])
def test_a_repository_is_found_however_its_directory_is_written(url: str) -> None:
    other = {"url": "."}
    found = Configuration.model_validate({"repositories": {"other": other, "main": {"url": url}}})
    for name in ("main", "/srv/repo", "/srv/repo/", "file:///srv/repo", "file:///srv/repo/"):
        assert found.find_repository(name) is found.repositories["main"], name
    for name in ("", "/srv", "srv/repo", "file://srv/repo", "/srv/x/../repo", "sftp:///srv/repo"):
        assert found.find_repository(name) is None, name


def test_names_stand_for_repositories_and_volumes(tmp_path: Path) -> None:
    text = """
repository = "main"
[repositories.main]
url = "/r"
[volumes.wal]
path = "v/wal"
limits = { cow_percent = 10 }
[jobs.a]
volumes = ["wal", "v/b"]
repository = "/elsewhere"
limits = { cow_percent = 20 }
"""
    configuration = load(str(write(tmp_path / "b.toml", text)), required=True).configuration
    job = configuration.job("a")
    assert configuration.repository_of(job) == "/elsewhere"
    main = configuration.repositories["main"]
    assert configuration.find_repository("main") is configuration.find_repository("/r") is main
    assert configuration.find_repository("/elsewhere") is None
    found: list[Any] = [configuration.volume(text, job) for text in job.volumes]
    assert [(path, limits.cow_percent) for path, limits in found] == [("v/wal", 10), ("v/b", 20)]
    with pytest.raises(UsageError, match="there is no job 'b'") as caught:
        configuration.job("b")
    assert caught.value.resolution == "configured jobs: a"
