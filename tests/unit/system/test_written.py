from __future__ import annotations

import time
from pathlib import Path

import pytest

from blocksnap.system import written
from blocksnap.system.written import WriteRate

NUMBER = 0xFE05


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(written, "_FOLDER", tmp_path / "run/written")
    monkeypatch.setattr(written, "sysfs_folder", lambda number: tmp_path / str(number))
    (tmp_path / str(NUMBER)).mkdir()
    return tmp_path / str(NUMBER) / "stat"


def set_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(time, "clock_gettime", lambda _: seconds)


def counted(sectors: int) -> str:
    return f"  10 0 80 4 500 0 {sectors} 90 0 0 0 0 0 0 0\n"


def test_it_is_counted_from_one_run_to_the_next(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device.write_text(counted(1000))
    set_clock(monkeypatch, 100.0)
    since_boot = written.observe(NUMBER, "lv")
    assert since_boot == WriteRate(512000, 100.0)
    assert since_boot.bytes_per_second == 5120
    device.write_text(counted(1600))
    set_clock(monkeypatch, 160.0)
    assert written.observe(NUMBER, "lv") == WriteRate(600 * 512, 60.0)
    # Activated anew, it counts from zero.
    device.write_text(counted(20))
    set_clock(monkeypatch, 200.0)
    assert written.observe(NUMBER, "lv") == WriteRate(20 * 512, 200.0)
    assert written.observe(NUMBER, "other") == WriteRate(20 * 512, 200.0)


def test_what_was_discarded_is_touched_too(device: Path) -> None:
    device.write_text("10 0 80 4 500 0 1000 90 0 0 0 7 0 24 0 0 0\n")
    assert written.touched_bytes(NUMBER) == 1024 * 512
    device.write_text("10 0 80 4 500 0 1000 90 0 0 0\n")
    assert written.touched_bytes(NUMBER) is None


def test_what_cannot_be_read_is_no_reason_to_stop(device: Path) -> None:
    assert written.observe(NUMBER, "lv") is None
    device.write_text("1 2 3\n")
    assert written.observe(NUMBER, "lv") is None
    device.write_text(counted(7))
    (device.parents[1] / "run/written").mkdir(parents=True)
    (device.parents[1] / "run/written/lv").write_text("[]")
    found = written.observe(NUMBER, "lv")
    assert found is not None
    assert found.written_bytes == 7 * 512
    assert WriteRate(5, 0.0).bytes_per_second == 0
