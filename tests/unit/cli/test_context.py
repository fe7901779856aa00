"""What the commands share: how warnings end a command, and which repository is meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest

from blocksnap.cli.context import Settings, common_options
from blocksnap.cli.main import run


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("warns", [False, True])
@pytest.mark.parametrize("of_job", [False, True])
def test_a_command_that_has_warned_ends_with_3(*, as_json: bool, warns: bool, of_job: bool) -> None:
    """Whichever command, and also where it goes on with the settings of a job."""

    @click.command()
    @common_options
    def command(settings: Settings) -> None:
        used = replace(settings, repo="of the job") if of_job else settings
        if warns:
            used.reporter.warn("the snapshot was not removed")

    code = command.main(args=["--json"] if as_json else [], standalone_mode=False)
    assert code == (3 if warns else None)


@pytest.mark.parametrize(
    "words",
    [
        ["backup", "vg0/x", "--wait", "nan"],
        ["backup", "vg0/x", "--wait", "-1"],
        ["prune", "--wait", "nan"],
        ["prune", "--wait", "-1"],
        ["prune", "--max-dead", "nan"],
        ["prune", "--max-dead", "-5"],
        ["prune", "--max-dead", "100.5"],
    ],
)
def test_numbers_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*words, "--repo", "/nowhere"]) == 2
    assert words[-2] in capsys.readouterr().err


def test_the_repository_of_the_defaults_is_that_of_volumes_that_are_named(tmp_path: Path) -> None:
    from blocksnap.cli.volume_commands import _job_of

    path = tmp_path / "blocksnap.toml"
    path.write_text('repository = "/srv/top"\n[defaults]\nrepository = "/srv/offsite"\n')
    settings = Settings(None, None, json=False, verbosity=0, config=str(path))
    assert _job_of(settings, ("vg0/x",), None)[0].repository_url == "/srv/offsite"
    said = replace(settings, repo="/srv/said")
    assert _job_of(said, ("vg0/x",), None)[0].repository_url == "/srv/said"
    path.write_text('repository = "/srv/top"\n')
    settings = replace(settings)
    assert _job_of(settings, ("vg0/x",), None)[0].repository_url == "/srv/top"


@pytest.mark.parametrize("url", ["file://srv/repo", "file://./repo"])
def test_a_url_that_names_no_absolute_path_is_refused(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init", "--no-encryption", "--repo", url]) == 2
    assert "names no absolute path" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
