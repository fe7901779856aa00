"""The metadata snapshot of a pool: written down before and after, and let go whatever happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blocksnap.system import blockdev, devmapper
from blocksnap.system.command import CommandError, CommandTimeoutError
from blocksnap.system.devmapper import PoolStatus
from blocksnap.system.lvm_report import LvReport, parse_report
from blocksnap.volumes import thin_hold
from blocksnap.volumes.thin_hold import MetadataHeldError, hold_metadata, release_leftover
from support.lvm_lab import report_text, thin_rows, uuid_of

TPOOL = 77
TRACE = {"vg": "vg0", "pool": "vg0/pool", "pool_uuid": uuid_of("pool"), "run": "r1"}


class Pretended:
    """A pool whose only metadata snapshot is ``held``, and a ledger that remembers."""

    def __init__(self, folder: Path) -> None:
        self.held: int | None = None
        self.failures: list[Exception] = []
        self.left: list[dict[str, str]] = []
        self.log: list[str] = []
        self.image = folder / "metadata"
        self.image.write_bytes(b"".join(bytes([number]) * 4096 for number in range(8)))

    def reserve(self, number: int) -> None:
        assert number == TPOOL
        self.log.append("reserve")
        if self.failures:
            raise self.failures.pop(0)
        if self.held is not None:
            raise CommandError("dmsetup", 1, "message ioctl failed: Device or resource busy")
        self.held = 5

    def release(self, number: int) -> None:
        assert self.held is not None
        self.log.append("release")
        self.held = None

    def status(self, number: int) -> PoolStatus:
        return PoolStatus(mode="rw", needs_check=False, held_root=self.held)

    def add(self, trace: dict[str, str]) -> None:
        self.log.append(f"add {trace['block'] or '?'}")
        self.left.append(trace)

    def strike(self, trace: dict[str, str]) -> None:
        self.log.append(f"strike {trace['block'] or '?'}")
        self.left.remove(trace)

    @contextmanager
    def hold(self) -> Iterator[int]:
        with self.image.open("rb") as file, hold_metadata(file.fileno(), TPOOL, TRACE, self) as block:
            yield block


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    made = Pretended(tmp_path)
    monkeypatch.setattr(devmapper, "reserve_metadata_snapshot", made.reserve)
    monkeypatch.setattr(devmapper, "release_metadata_snapshot", made.release)
    monkeypatch.setattr(devmapper, "pool_status", made.status)
    monkeypatch.setattr(devmapper, "pool_above", {9: TPOOL}.get)
    monkeypatch.setattr(thin_hold.time, "sleep", lambda _: None)
    monkeypatch.setattr(blockdev, "open_by_number", lambda _: os.open(made.image, os.O_RDONLY | os.O_CLOEXEC))
    return made


def test_it_is_written_down_before_and_after(pool: Pretended) -> None:
    with pool.hold() as block:
        assert (block, pool.held) == (5, 5)
        (left,) = pool.left
        assert (left["kind"], left["block"], left["run"]) == ("hold", "5", "r1")
    assert pool.log == ["add ?", "reserve", "add 5", "strike ?", "release", "strike 5"]
    assert pool.held is None


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_it_is_let_go_whatever_happens(pool: Pretended, failure: type[BaseException]) -> None:
    with pytest.raises(failure), pool.hold():
        raise failure
    assert (pool.held, pool.left) == (None, [])


def test_it_is_let_go_when_it_cannot_be_written_down(
    pool: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_hold, "_digest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), pool.hold():
        pass
    assert (pool.held, pool.left) == (None, [])


def test_that_of_another_is_waited_for_and_never_released(pool: Pretended) -> None:
    pool.held = 3
    with pytest.raises(MetadataHeldError, match="vg0/pool"), pool.hold():
        pass
    assert (pool.held, pool.left) == (3, [])
    assert pool.log.count("reserve") == 5
    pool.held = None
    pool.failures = [CommandError("dmsetup", 1, "Device or resource busy")]
    with pool.hold() as block:
        assert block == 5


def test_a_refusal_leaves_nothing_and_an_unknown_outcome_leaves_the_note(pool: Pretended) -> None:
    pool.failures = [CommandError("dmsetup", 1, "Invalid argument")]
    with pytest.raises(CommandError), pool.hold():
        pass
    assert pool.left == []
    pool.failures = [CommandTimeoutError("dmsetup", 1, 120.0)]
    with pytest.raises(CommandTimeoutError), pool.hold():
        pass
    assert [trace["block"] for trace in pool.left] == [""]
    assert "release" not in pool.log


def report(*, active: bool = True) -> LvReport:
    rows = thin_rows("data")
    if active:
        rows[1].update({"lv_kernel_major": "0", "lv_kernel_minor": "9"})
    return parse_report(report_text(*rows))


def left_by_a_dead_run(pool: Pretended) -> dict[str, str]:
    with pool.hold():
        (left,) = pool.left
    return left


def test_what_a_dead_run_left_is_released(pool: Pretended) -> None:
    left = left_by_a_dead_run(pool)
    assert release_leftover(left, report()) == "gone"
    pool.held = 5
    assert release_leftover(left, report(active=False)) == "inactive"
    assert release_leftover(left, report()) == "released"
    assert pool.held is None


def test_that_of_another_in_its_place_is_not(pool: Pretended) -> None:
    left = left_by_a_dead_run(pool)
    pool.held = 3
    assert release_leftover(left, report()) == "gone"
    pool.held = 5
    content = bytearray(pool.image.read_bytes())
    content[5 * 4096 + 44] ^= 1
    pool.image.write_bytes(content)
    assert release_leftover(left, report()) == "gone"
    assert release_leftover({**left, "block": "", "digest": ""}, report()) == "unclear"
    assert pool.held == 5


def test_a_pool_that_is_gone_holds_nothing(pool: Pretended) -> None:
    left: dict[str, Any] = left_by_a_dead_run(pool)
    assert release_leftover({**left, "pool_uuid": uuid_of("other")}, report()) == "gone"
