"""A snapshot of a classic volume, with an LVM that only remembers how it was called."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.model import ExtentList
from blocksnap.system import lvm, lvm_config
from blocksnap.system.lvm import BaseMark
from blocksnap.volumes.base import SnapshotTiming
from blocksnap.volumes.classic import ClassicSnapshot
from blocksnap.volumes.classic_store import StoreSize
from support.lvm_lab import report_text, row, uuid_of
from support.mock_command import MockCommands

SIZE = 1 << 20


def snapshot_row(name: str, run: str, *more_tags: str) -> dict[str, str]:
    return row(
        name, lv_tags=",".join(["blocksnap", f"blocksnap.{run}", *more_tags]), segtype="linear",
        lv_role="public,snapshot,thicksnapshot", lv_kernel_major="254", lv_kernel_minor="9",
        origin="data", origin_uuid=uuid_of("data"), origin_size=str(SIZE), chunk_size="4096",
    )  # fmt: skip


def find_changes() -> Changes:
    report = lvm.report("vg0")
    origin = report.find("vg0", "data")
    assert origin is not None
    snapshot = ClassicSnapshot(origin, "s2", "run2", SnapshotTiming(0.0, 0.0), StoreSize(SIZE, ""))
    parent = Parent(size=SIZE, binding={"run": "run1"}, known_here=True, load_mapped=lambda: None)
    return snapshot.find_changes(parent)


def test_a_base_of_which_lvm_cannot_tell_is_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out="use_devicesfile=0\n")
    base = {
        **snapshot_row("s1", "run1", BaseMark("me", uuid_of("data")).tag),
        "lv_kernel_major": "-1",
        "lv_kernel_minor": "-1",
    }
    mock.add("lvs", out=report_text(row("data", segtype="linear"), base, snapshot_row("s2", "run2")))
    mock.add("vgcfgbackup", err="No space left on device\n", status=5)
    found = find_changes()
    assert (found.method, found.inherits) == ("compare", False)
    assert "No space left on device" in found.reason
    assert found.changed == ExtentList.whole(SIZE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    found = find_changes()
    assert found.method == "compare"
    assert found.reason.startswith("what LVM writes of the volume group vg0 cannot be read")
