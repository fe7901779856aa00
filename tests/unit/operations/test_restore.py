"""What a target's name leads to, and what is said of one that leads nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocksnap.operations.reporting import Quiet, phase
from blocksnap.operations.restore import UnknownTargetError, plan_restore

BACKUP: Any = SimpleNamespace(source={})


def test_a_new_file(tmp_path: Path) -> None:
    plan = plan_restore(BACKUP, str(tmp_path / "out"))
    assert (plan.kind, plan.target) == ("file", str(tmp_path / "out"))


def test_places_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("n" * 256, "name too long"),
        ("file/out", "not a directory"),
        ("loop/out", "symbolic links"),
        ("no/out", "no directory"),
        (".", "is a directory"),
        ("pipe", "neither"),
    ):
        with pytest.raises(UnknownTargetError, match=reason) as caught:
            plan_restore(BACKUP, str(tmp_path / name))
        assert caught.value.exit_code == 1


@pytest.mark.parametrize("ending", [KeyboardInterrupt, ValueError])
def test_a_phase_ends_whatever_happens(ending: type[BaseException]) -> None:
    calls: list[object] = []

    class Recorder(Quiet):
        def begin(self, phase: str, total_bytes: int) -> None:
            calls.append((phase, total_bytes))

        def end(self) -> None:
            calls.append("end")

    with pytest.raises(ending), phase(Recorder(), "reading", 7):
        raise ending
    assert calls == [("reading", 7), "end"]
