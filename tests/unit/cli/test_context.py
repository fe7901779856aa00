"""What the commands share: how warnings end a command."""

from __future__ import annotations

from dataclasses import replace

import click
import pytest

from blocksnap.cli.context import Settings, common_options


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
