from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap.system.devmapper import decode_name, encode_name, parse_pool_status

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
