from __future__ import annotations

import pytest
from pydantic import ValidationError

from blocksnap.quiesce.settings import HookSettings, QuiesceSettings


def test_nothing_said_is_ten_seconds_and_failure() -> None:
    settings = QuiesceSettings()
    assert (settings.deadline_seconds, settings.on_failure, settings.filesystems) == (10.0, "fail", "auto")
    assert settings.asks_for_nothing


def test_what_is_said_is_taken() -> None:
    settings = QuiesceSettings.model_validate(
        {
            "deadline_seconds": 2,
            "on_failure": "crash-consistent",
            "units": ["postgresql@15-main.service"],
            "hooks": [{"session": ["/bin/lock", "--now"]}, {"after": ["/bin/true"]}],
        }
    )
    assert settings.hooks[0].session == ("/bin/lock", "--now")
    assert not settings.asks_for_nothing


@pytest.mark.parametrize(
    "wrong",
    [
        {"deadline_seconds": 0},
        {"deadline_seconds": float("nan")},
        {"deadline_seconds": 601},
        {"deadline": 10},
        {"on_failure": "ignore"},
        {"units": ["-a"]},
        {"units": ["a/b"]},
        {"cgroups": ["system.slice"]},
        {"cgroups": ["/sys/fs/cgroup/../x"]},
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        QuiesceSettings.model_validate(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"session": []},
        {"session": ["lock"]},
        {"before": ["/bin/a\0b"]},
        {"session": ["/bin/a"], "after": ["/bin/b"]},
        {"shell": "rm -rf /"},
    ],
)
def test_a_hook_is_one_kind_of_absolute_command(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HookSettings.model_validate(wrong)
