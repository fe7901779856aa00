from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blocksnap.system import devmapper
from blocksnap.system.devmapper import PoolStatus, decode_name, encode_name
from blocksnap.system.lvm_report import ThinRecord, parse_report
from blocksnap.volumes import thin_pool
from blocksnap.volumes.errors import PoolFullError, PoolHealthError, PoolWornOutError
from blocksnap.volumes.lvm_snapshot import FreezeWatch, snapshot_name
from blocksnap.volumes.thin_pool import PoolLimits, check_age, check_pool
from support.lvm_lab import report_text, thin_rows

UUID = "4zm1NG-BjNf-KLNp-7M3I-jxEI-qFop-X0R8bQ"


def test_snapshot_names_are_short_and_differ_by_run_and_volume() -> None:
    runs = ["20261122T103000Z-aaaa", "20261122T103000Z-bbbb", "f" * 100, "a.b-c_d", "x"]
    names = {snapshot_name(run, uuid) for run in runs for uuid in (UUID, UUID[::-1])}
    assert len(names) == 10
    for name in names:
        assert len(encode_name("v" * 80, name)) <= 127
        assert decode_name(encode_name("my-vg", name)) == ("my-vg", name)
        assert not any(word in name for word in ("_tmeta", "_tdata", "_cdata", "pvmove", "snapshot"))


METADATA = os.makedev(254, 0)
TPOOL = os.makedev(254, 2)


def pool(*, active: bool = True, **fields: str) -> ThinRecord:
    """A volume in a pool that runs because of it: LVM gives no number for the pool itself then."""
    rows = thin_rows("data")
    rows[0].update(fields)
    rows[1].update({"lv_kernel_major": "254", "lv_kernel_minor": "0"} if active else {})
    report = parse_report(report_text(*rows))
    found = report.find("vg0", "data")
    assert found is not None
    return report.thin(found)


HEALTHY = {"mode": "rw", "needs_check": False, "metadata_total": 1000, "data_total": 1000}


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        ({}, None, ""),
        ({"data_used": 950, "metadata_used": 900}, None, ""),
        ({"data_used": 951}, PoolFullError, "data of thin pool vg0/pool is 95.1 % full"),
        ({"metadata_used": 901}, PoolFullError, "metadata of thin pool vg0/pool is 90.1 % full"),
        ({"mode": "ro"}, PoolHealthError, "read-only"),
        ({"mode": "out_of_data_space"}, PoolHealthError, "out of data space"),
        ({"mode": "fail"}, PoolHealthError, "failed"),
        ({"needs_check": True}, PoolHealthError, "needs a check"),
    ],
)
def test_pool_is_looked_at_before_it_gets_a_snapshot(
    status: dict[str, object], error: type[Exception] | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devmapper, "pool_above", {METADATA: TPOOL}.get)
    answers = {TPOOL: PoolStatus(**{**HEALTHY, **status})}  # type: ignore[arg-type]
    monkeypatch.setattr(devmapper, "pool_status", answers.__getitem__)
    if error is None:
        check_pool(pool(), PoolLimits())
        return
    with pytest.raises(error, match=message):
        check_pool(pool(), PoolLimits())


@pytest.mark.parametrize("fields", [{"lv_check_needed": "1"}, {"lv_health_status": "metadata_read_only"}])
def test_what_lvm_says_about_the_pool_counts_too(fields: dict[str, str]) -> None:
    with pytest.raises(PoolHealthError):
        check_pool(pool(**fields), PoolLimits())


def test_pool_that_runs_out_of_times_gets_no_more_snapshots() -> None:
    last = (1 << 24) - 1
    check_age("vg0/pool", last - thin_pool.SPARE_SNAPSHOTS)
    for taken in (last - thin_pool.SPARE_SNAPSHOTS + 1, last, last + 9):
        with pytest.raises(PoolWornOutError, match=f"has taken {taken} snapshots"):
            check_age("vg0/pool", taken)


def test_inactive_pool_has_no_status() -> None:
    check_pool(pool(active=False), PoolLimits())


def test_freeze_is_measured_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "suspended"
    state.write_text("0\n")
    watch = FreezeWatch(None)
    watch._path = str(state)
    with watch:
        began, began_at = time.monotonic(), time.time()
        watch.observe()
        state.write_text("1\n")
        watch.observe()
        seen_at = time.time()
        time.sleep(0.05)
        watch.observe()
        state.write_text("0\n")
        watch.observe()
        ended = time.monotonic()
        time.sleep(0.2)
        watch.observe()
    # It begins with the last look before, and ends with the first look after.
    assert 0.05 <= watch.timing().freeze_seconds <= ended - began
    assert began_at <= watch.timing().taken_at <= seen_at


def test_freeze_of_an_inactive_volume_is_none(tmp_path: Path) -> None:
    for number in (None, os.makedev(4095, 1)):
        watch = FreezeWatch(number)
        with watch:
            watch.observe()
        assert watch.timing().freeze_seconds == 0
        assert watch.timing().taken_at <= time.time()
