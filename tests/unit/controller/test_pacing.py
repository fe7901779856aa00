from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.controller import pacing
from blocksnap.controller.pacing import Backoff, Pace, TokenBucket
from blocksnap.controller.settings import PaceSettings
from blocksnap.system.pressure import PressureFiles


@given(
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 0.5)), min_size=1), st.integers(1000, 1 << 30)
)
def test_no_more_than_the_rate_goes_through(steps: list[tuple[int, float]], rate: int) -> None:
    """From any moment on: the rate times the time, and a tenth of a second that was saved up."""
    bucket = TokenBucket(rate)
    now = 0.0
    moved: list[tuple[float, int]] = []
    for length, idle in steps:
        now += idle
        now += bucket.take(length, now)
        moved.append((now, length))
    for at in range(len(moved)):
        total = sum(length for _, length in moved[at:-1])
        assert total <= rate * (moved[-1][0] - moved[at][0] + 0.1) * 1.001 + 1


def test_a_rate_that_is_not_used_up_costs_nothing() -> None:
    bucket = TokenBucket(1000)
    assert [bucket.take(100, float(now)) for now in range(5)] == [0.0] * 5


def test_pauses_grow_while_others_wait_and_shrink_when_they_do_not() -> None:
    backoff = Backoff(0.1)
    assert backoff.after_window(0.1) == 0.0
    grown = [backoff.after_window(0.5) for _ in range(8)]
    assert grown == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0]
    assert [backoff.after_window(0.0) for _ in range(7)] == [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0]


class Host:
    """A clock that the waiting moves, and what others wait while one reads."""

    def __init__(self, path: Path, share: float, *, ours_too: bool = False) -> None:
        self.now = 0.0
        self.files = PressureFiles((path,), ours_too=ours_too)
        self.share = share
        self.waited = 0.0
        self.write()

    def write(self) -> None:
        total = int(self.waited * 1e6)
        self.files.paths[0].write_text(f"some avg10=0.00 avg60=0.00 total={total}\nfull avg10=0.00 total=0\n")

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def read(self, seconds: float) -> None:
        self.now += seconds
        self.waited += seconds * self.share
        self.write()

    def pace(self, **settings: object) -> Pace:
        return Pace(
            PaceSettings.model_validate(settings), clock=lambda: self.now, find_files=lambda: self.files
        )


def run(host: Host, pace: Pace, reads: int = 200) -> None:
    pace.begin_reading()
    for _ in range(reads):
        pace.before_read(1 << 20, host.wait)
        host.read(0.01)
        pace.after_read(0.01)


@pytest.fixture(autouse=True)
def _no_ionice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "has_program", lambda _: False)


@pytest.mark.parametrize(
    ("share", "at_least", "at_most"), [(0.0, 0.0, 0.0), (0.05, 0.0, 0.0), (0.5, 5.0, 30.0)]
)
def test_gentle_holds_back_while_others_wait(
    tmp_path: Path, share: float, at_least: float, at_most: float
) -> None:
    host = Host(tmp_path / "io.pressure", share)
    pace = host.pace(policy="gentle")
    run(host, pace)
    assert at_least <= pace.held_back_seconds <= at_most


def test_where_ours_is_counted_too_only_the_rest_is_others(tmp_path: Path) -> None:
    host = Host(tmp_path / "io.pressure", 1.0, ours_too=True)
    pace = host.pace(policy="gentle")
    run(host, pace)
    assert pace.held_back_seconds == 0.0


def test_fixed_rates_hold_for_reading_and_storing(tmp_path: Path) -> None:
    host = Host(tmp_path / "io.pressure", 1.0)
    pace = host.pace(policy="fixed", read_rate="10M", write_rate="5M")
    run(host, pace, 100)
    assert host.now == pytest.approx(10.0, abs=0.3)
    began = host.now
    for _ in range(50):
        pace.before_write(1 << 20, host.wait)
    assert host.now - began == pytest.approx(10.0, abs=0.5)
    assert pace.held_back_seconds == pytest.approx(host.now - 1.0, abs=0.3)


def test_a_kernel_that_counts_nothing_leaves_the_rates(tmp_path: Path) -> None:
    pace = Pace(PaceSettings(policy="gentle", write_rate=1 << 20), find_files=lambda: None)
    waited: list[float] = []
    pace.before_read(1 << 20, waited.append)
    for _ in range(3):
        pace.before_write(1 << 20, waited.append)
    assert len(waited) == 2
