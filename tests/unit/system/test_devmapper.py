from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.system import devmapper
from blocksnap.system.devmapper import (
    SnapshotStatus,
    SnapshotTable,
    decode_name,
    encode_name,
    parse_pool_status,
    parse_snapshot_status,
    parse_snapshot_table,
)

NAMES = st.from_regex(r"[a-z0-9+_.][a-z0-9+_.-]{0,12}", fullmatch=True)


@given(NAMES, NAMES)
def test_names_survive_the_doubling_of_hyphens(vg: str, lv: str) -> None:
    assert decode_name(encode_name(vg, lv)) == (vg, lv)


@pytest.mark.parametrize("name", ["nothing", "vg-lv-real", "vg--lv", "", "a-b-tpool"])
def test_other_names_are_none_of_a_volume(name: str) -> None:
    assert decode_name(name) is None


def test_status_of_a_healthy_pool() -> None:
    status = parse_pool_status(
        "0 2097152 thin-pool 2 113/1024 512/16384 - rw no_discard_passdown queue_if_no_space - 256\n"
    )
    assert (status.mode, status.needs_check, status.transaction_id, status.held_root) == (
        "rw",
        False,
        2,
        None,
    )
    assert status.metadata_percent == pytest.approx(11.035, abs=0.001)
    assert status.data_percent == 3.125


@pytest.mark.parametrize(
    ("line", "mode", "needs_check"),
    [
        ("2 1/2 3/4 77 rw discard_passdown error_if_no_space - 256", "rw", False),
        ("2 1/2 3/4 - ro discard_passdown queue_if_no_space needs_check 256", "ro", True),
        (
            "2 1/2 4/4 - out_of_data_space discard_passdown queue_if_no_space - 256",
            "out_of_data_space",
            False,
        ),
        ("Fail", "fail", True),
        ("Error", "fail", True),
    ],
)
def test_status_of_pools_in_trouble(line: str, mode: str, needs_check: bool) -> None:
    status = parse_pool_status(f"0 2097152 thin-pool {line}")
    assert (status.mode, status.needs_check) == (mode, needs_check)


def test_held_root() -> None:
    assert (
        parse_pool_status("0 8 thin-pool 2 1/2 3/4 77 rw discard_passdown error_if_no_space - 256").held_root
        == 77
    )


def test_another_target_is_refused() -> None:
    with pytest.raises(ValueError, match="not the status of a thin pool"):
        parse_pool_status("0 8 linear")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("snapshot 112/20480 16", SnapshotStatus("valid", 57344, 10485760, 8192)),
        ("snapshot-merge 112/20480 16", SnapshotStatus("merging", 57344, 10485760, 8192)),
        ("snapshot Invalid", SnapshotStatus("invalid")),
        ("snapshot Overflow", SnapshotStatus("overflow")),
        ("snapshot Merge failed", SnapshotStatus("merge failed")),
        ("snapshot-merge Merge failed", SnapshotStatus("merge failed")),
        ("snapshot-merge Invalid", SnapshotStatus("invalid")),
        ("snapshot Unknown", SnapshotStatus("unknown")),
        ("snapshot", SnapshotStatus("unknown")),
        ("snapshot 112/20480", SnapshotStatus("unknown")),
        ("snapshot -1/20480 16", SnapshotStatus("unknown")),
    ],
)
def test_status_of_a_snapshot(line: str, status: SnapshotStatus) -> None:
    assert parse_snapshot_status(f"0 204800 {line}\n") == status


@pytest.mark.parametrize(
    ("line", "table"),
    [
        (
            "snapshot 253:1 253:2 P 8",
            SnapshotTable(os.makedev(253, 1), os.makedev(253, 2), 4096, is_merging=False, is_persistent=True),
        ),
        (
            "snapshot-merge 253:1 8:200 PO 128 1 discard_zeroes_cow",
            SnapshotTable(os.makedev(253, 1), os.makedev(8, 200), 65536, is_merging=True, is_persistent=True),
        ),
        (
            "snapshot 253:1 253:2 N 8",
            SnapshotTable(
                os.makedev(253, 1), os.makedev(253, 2), 4096, is_merging=False, is_persistent=False
            ),
        ),
    ],
)
def test_table_of_a_snapshot(line: str, table: SnapshotTable) -> None:
    assert parse_snapshot_table(f"0 204800 {line}\n") == table


@pytest.mark.parametrize(
    "text",
    ["", "0 8 linear 8:0 0", "0 8 snapshot-origin 8:0", "0 8 snapshot 1/2 3\n8 8 snapshot 1/2 3\n"],
)
def test_other_targets_are_no_snapshots(text: str) -> None:
    with pytest.raises(ValueError, match="of a snapshot"):
        parse_snapshot_status(text)
    with pytest.raises(ValueError, match="of a snapshot"):
        parse_snapshot_table(text)


def test_a_short_table_is_refused() -> None:
    with pytest.raises(ValueError, match="table of a snapshot"):
        parse_snapshot_table("0 8 snapshot 253:1 253:2 P")


def test_a_number_that_is_given_out_again_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is discarded of a thin volume reads as zeros, and of a linear one as it was."""
    uuids = {5: "LVM-thin"}
    tables = {"LVM-thin": "0 8 thin 253:1 1\n", "LVM-linear": "0 8 linear 253:1 0\n"}
    asked: list[str | None] = []

    def run(*argv: str) -> str:
        asked.append(uuids[5])
        return tables[uuids[5]]

    monkeypatch.setattr(devmapper, "dm_uuid", uuids.get)
    monkeypatch.setattr(devmapper, "run", run)
    assert devmapper.is_plain_thin(5)
    assert devmapper.is_plain_thin(5)
    uuids[5] = "LVM-linear"
    assert not devmapper.is_plain_thin(5)
    assert not devmapper.is_plain_thin(6)
    assert asked == ["LVM-thin", "LVM-linear"]
