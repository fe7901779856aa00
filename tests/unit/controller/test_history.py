from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blocksnap.controller import history as history_module
from blocksnap.controller.history import History


def test_runs_of_a_volume_are_known_to_later_processes(tmp_path: Path) -> None:
    History(tmp_path, "a").add("run1")
    History(tmp_path, "a").add("run2")
    assert [History(tmp_path, "a").knows(run) for run in ("run1", "run2", "run3")] == [True, True, False]
    assert not History(tmp_path, "b").knows("run1")
    assert len(os.listdir(tmp_path / "history")) == 1


def test_runs_to_one_repository_do_not_push_out_those_to_another(tmp_path: Path) -> None:
    history = History(tmp_path, "a")
    history.add("quarterly")
    (path,) = (tmp_path / "history").iterdir()
    hourly = [f"{number:032x}" for number in range(92 * 24)]
    path.write_text(json.dumps({"volume": "a", "runs": ["quarterly", *hourly]}))
    history.add("last")
    assert all(history.knows(run) for run in ("quarterly", hourly[0], hourly[-1], "last"))
    assert path.stat().st_size < 100_000


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_RUNS_KEPT", 64)
    history = History(tmp_path, "a")
    for number in range(70):
        history.add(f"run{number}")
    assert [history.knows(f"run{number}") for number in (0, 5, 6, 69)] == [False, False, True, True]
    history.add("run6")
    history.add("new")
    assert history.knows("run6")
    assert not history.knows("run7")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"runs": 1}', '{"runs": [1, null, {}]}'])
def test_damaged_history_knows_nothing_and_begins_anew(tmp_path: Path, content: str) -> None:
    history = History(tmp_path, "a")
    history.add("run1")
    (path,) = (tmp_path / "history").iterdir()
    path.write_text(content)
    assert not history.knows("run1")
    history.add("run2")
    assert history.knows("run2")
