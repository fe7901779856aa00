"""What is written down of instant restores: one holder, whole or not at all, and what doctor makes of it."""

from __future__ import annotations

from pathlib import Path
from threading import Timer

import pytest

from blocksnap.controller.arriving import Arrival, ArrivalFile, InstantBusyError, Stage, read_arrivals
from blocksnap.controller.examine_host import examine_arrivals
from blocksnap.system.flock import try_lock

ARRIVAL = Arrival(
    stage="making",
    repository="r" * 32,
    backup="b" * 32,
    size=4096,
    group="vg-1",
    name="data",
    arriving="data-arriving",
    meanwhile="data-meanwhile",
    token="blocksnap-1",
)


def test_one_holds_it_and_others_see_that(tmp_path: Path) -> None:
    state = str(tmp_path)
    file = ArrivalFile(state, "vg-1", "data")
    with file.held():
        file.write(ARRIVAL)
        assert read_arrivals(state) == [(ARRIVAL, True)]
        assert list(examine_arrivals(state)) == []
        with pytest.raises(InstantBusyError, match="vg-1/data"), ArrivalFile(state, "vg-1", "data").held():
            pass
        with ArrivalFile(state, "vg", "1-data").held():
            pass
    assert read_arrivals(state) == [(ARRIVAL, False)]
    with file.held():
        file.remove()
    assert read_arrivals(state) == []
    assert file.read() is None


def test_who_only_looks_keeps_nobody_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocksnap.controller.arriving._LOCK_SECONDS", 60.0)
    with ArrivalFile(str(tmp_path), "vg-1", "data").held():
        pass
    with (tmp_path / "instant" / "vg--1-data.lock").open("r+b") as looking:
        assert try_lock(looking.fileno(), shared=True)
        ends = Timer(0.2, looking.close)
        ends.start()
        with ArrivalFile(str(tmp_path), "vg-1", "data").held():
            assert looking.closed
        ends.join()


@pytest.mark.parametrize(
    ("stage", "severity"), [("making", "warning"), ("arriving", "error"), ("whole", "warning")]
)
def test_an_interrupted_one_is_told_with_what_to_do(tmp_path: Path, stage: Stage, severity: str) -> None:
    file = ArrivalFile(str(tmp_path), "vg-1", "data")
    with file.held():
        file.write(ARRIVAL.model_copy(update={"stage": stage}))
    (found,) = examine_arrivals(str(tmp_path))
    assert (found.severity, found.subject, found.ours) == (severity, "vg-1/data", True)
    assert found.advice == "blocksnap restore --instant --resume vg-1/data"


def test_what_cannot_be_understood_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "instant").mkdir()
    (tmp_path / "instant" / "x.json").write_text('{"stage": "whole"}')
    (tmp_path / "instant" / "y.json").write_text("")
    assert read_arrivals(str(tmp_path)) == []
