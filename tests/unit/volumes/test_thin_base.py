from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from blocksnap.extents.changes import BasePolicy, Parent
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.extents.thin_identity import LostBase
from blocksnap.system import devmapper
from blocksnap.system.devmapper import PoolStatus
from blocksnap.system.lvm import BaseMark
from blocksnap.system.lvm_report import LvRecord, ThinRecord, parse_report
from blocksnap.volumes.thin_base import AUTO_BASE_MAPPINGS, decide_base, find_base
from support.lvm_lab import report_text, row, thin_rows, uuid_of

METADATA = os.makedev(254, 0)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    rows = thin_rows("data")
    rows[1].update({"lv_kernel_major": "254", "lv_kernel_minor": "0"})
    report = parse_report(report_text(*rows))
    lv = report.find("vg0", "data")
    assert lv is not None
    thin = report.thin(lv)

    def with_status(**fields: Any) -> ThinRecord:
        status = PoolStatus(
            **{"mode": "rw", "needs_check": False, "data_total": 1000, "metadata_total": 1000, **fields}
        )
        monkeypatch.setattr(devmapper, "pool_above", {METADATA: METADATA + 1}.get)
        monkeypatch.setattr(devmapper, "pool_status", {METADATA + 1: status}.__getitem__)
        return thin

    return with_status


@pytest.mark.parametrize(
    ("policy", "mapped", "status", "stays", "reason"),
    [
        ("none", AUTO_BASE_MAPPINGS, {}, False, "nothing is to stay"),
        ("keep", 0, {}, True, "as asked for"),
        ("keep", 0, {"data_used": 900, "metadata_used": 800}, True, "as asked for"),
        ("keep", 0, {"data_used": 901}, False, "data of thin pool vg0/pool is 90.1 % full, and a base needs"),
        ("keep", 0, {"metadata_used": 801}, False, "metadata of thin pool vg0/pool is 80.1 % full"),
        ("keep", 0, {"mode": "ro"}, False, "not healthy: it is read-only"),
        ("auto", AUTO_BASE_MAPPINGS - 1, {}, False, "walked in no time"),
        ("auto", AUTO_BASE_MAPPINGS, {}, True, f"the volume maps {AUTO_BASE_MAPPINGS} chunks"),
        ("auto", AUTO_BASE_MAPPINGS, {"data_used": 901}, False, "below 90 %"),
    ],
)
def test_a_base_stays_where_it_is_wanted_and_there_is_room(
    pool: Any, policy: BasePolicy, mapped: int, status: dict[str, Any], stays: bool, reason: str
) -> None:
    decision = decide_base(policy, mapped, pool(**status))
    assert decision.stays is stays
    assert reason in decision.reason
    assert decision.to_binding() == {"base_kept": stays, "base_reason": decision.reason}


def test_a_volume_with_an_external_origin_needs_no_base(pool: Any) -> None:
    decision = decide_base("keep", 0, replace(pool(), external_origin="vg0/image"))
    assert (decision.stays, "external origin" in decision.reason) == (False, True)


def parent(**binding: Any) -> Parent:
    return Parent(0, binding, known_here=True, load_mapped=lambda: MappedSet.of(1, b""))


def base_row(run: str, of: str = "data", **fields: str) -> dict[str, str]:
    tags = f"blocksnap,blocksnap.{run},{BaseMark('owner', uuid_of(of)).tag}"
    return row(f"blocksnap-{run}", **{"lv_tags": tags, "segtype": "thin", "thin_id": "9", **fields})


def test_the_base_is_that_of_the_parents_run_and_of_this_volume() -> None:
    report = parse_report(report_text(*thin_rows("data"), base_row("r1"), base_row("r2", of="other")))
    found = find_base(report, uuid_of("data"), parent(run="r1", base_kept=True))
    assert isinstance(found, LvRecord)
    assert found.name == "blocksnap-r1"
    # LVM may have forgotten the origin, and somebody may have renamed it.
    renamed = parse_report(report_text(*thin_rows("data"), base_row("r1", lv_name="mine", origin="")))
    assert isinstance(find_base(renamed, uuid_of("data"), parent(run="r1")), LvRecord)
    for binding in ({"run": "r2"}, {"run": "r2", "base_kept": False}, {"run": None}, {}):
        assert find_base(report, uuid_of("data"), parent(**binding)) is None
    lost = find_base(report, uuid_of("data"), parent(run="r2", base_kept=True))
    assert isinstance(lost, LostBase)
    assert "is gone" in lost.reason
