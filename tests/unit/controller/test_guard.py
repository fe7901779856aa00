from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from blocksnap.controller import guard as guard_module
from blocksnap.controller.guard import (
    AgeWatch,
    FillingError,
    Guard,
    LevelWatch,
    RepositoryFillingError,
    RoomWatch,
    SnapshotTooOldError,
    Watch,
    judge,
)
from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import BlocksnapError, VolumeError
from blocksnap.volumes.base import Level


class Snapshot:
    def __init__(self, *looks: tuple[Level, ...] | VolumeError) -> None:
        self.looks = list(looks)
        self.dropped = 0
        self.failure: BlocksnapError | None = None

    def levels(self) -> tuple[Level, ...]:
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, VolumeError):
            raise look
        return look

    def drop(self) -> None:
        self.dropped += 1
        if self.failure:
            raise self.failure


def level(used: int, part: str = "pool data") -> Level:
    return Level("vg0/pool", part, used, 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("used", "rate", "reason"),
    [
        (980, 0.0, None),
        (981, 0.0, "is 98.1 % full, beyond 98 %"),
        (500, 99.0, None),
        (500, 100.0, "is 50.0 % full and would be full in 5.0 s"),
        (900, -500.0, None),
    ],
)
def test_how_full_is_too_full(used: int, rate: float, reason: str | None) -> None:
    assert judge(level(used), 98.0, rate) == reason


def test_what_has_no_size_is_never_full() -> None:
    assert judge(Level("vg0/pool", "pool data", 0, 0), 98.0, 5.0) is None


def watch(*looks: tuple[Level, ...] | VolumeError) -> LevelWatch:
    times = iter(range(100))
    return LevelWatch(Snapshot(*looks), LimitSettings(), lambda: next(times))  # type: ignore[arg-type]


def test_levels_are_watched_with_the_rate_at_which_they_rise() -> None:
    look = watch((level(100),), (level(200),), (level(600),))
    assert look() is None
    assert look() is None
    found = look()
    assert isinstance(found, FillingError)
    assert found.exit_code == 14
    assert found.brief.startswith("data of thin pool vg0/pool is 60.0 % full and would be full in 1.0 s")
    assert found.resolution is not None
    assert "lvextend --size +SIZE vg0/pool" in found.resolution


def test_one_burst_is_no_rate() -> None:
    times = iter([0.0, 0.25, 0.5, 0.75, 1.0, 1.25])
    used = [500, 500, 500, 530, 530, 530]
    snapshot = Snapshot(*[(level(each),) for each in used])
    look = LevelWatch(snapshot, LimitSettings(), lambda: next(times))  # type: ignore[arg-type]
    # 120 units a second for a quarter of one, which would fill it in four seconds.
    assert [look() for _ in used] == [None] * 6


@pytest.mark.parametrize(
    ("part", "used", "what"),
    [
        ("pool metadata", 951, "lvextend --poolmetadatasize +SIZE vg0/pool"),
        ("store", 901, "raise limits.store_percent"),
        ("filesystem", 981, "make room there"),
    ],
)
def test_each_part_has_its_limit_and_its_advice(part: str, used: int, what: str) -> None:
    assert watch((level(used - 1, part),))() is None
    found = watch((level(used, part),))()
    assert found is not None
    assert found.resolution is not None
    assert what in found.resolution


def test_a_pool_that_failed_is_a_reason_too() -> None:
    trouble = VolumeError("it has failed")
    assert watch(trouble)() is trouble


def test_age_and_room() -> None:
    now = [0.0]
    look = AgeWatch(5.0, lambda: now[0])
    assert look() is None
    now[0] = 5.1
    assert isinstance(look(), SnapshotTooOldError)
    free: list[int | None] = [None, 10, 9]
    room = RoomWatch("/r", lambda: free.pop(0), 10)
    assert (room(), room()) == (None, None)
    found = room()
    assert isinstance(found, RepositoryFillingError)
    assert found.exit_code == 1


def after(looks: int, found: BlocksnapError) -> Watch:
    left = [looks]

    def look() -> BlocksnapError | None:
        left[0] -= 1
        return found if left[0] < 0 else None

    return look


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def guard(snapshots: list[Snapshot], *watches: Watch) -> Guard:
    return Guard(snapshots, watches, interval_seconds=0.001)  # type: ignore[arg-type]


def test_nothing_happens_while_there_is_room() -> None:
    snapshot = Snapshot((level(1),))
    with guard([snapshot], LevelWatch(snapshot, LimitSettings())) as it:  # type: ignore[arg-type]
        time.sleep(0.01)
        it.release()
    assert (snapshot.dropped, it.warnings) == (0, [])


@pytest.mark.parametrize("failure", [None, ValueError("the device ended")])
def test_all_snapshots_go_and_the_run_fails_with_the_reason(failure: Exception | None) -> None:
    first, second = Snapshot(()), Snapshot(())
    first.failure = BlocksnapError("it is in use")
    reason = VolumeError("full")
    it = guard([first, second], after(3, reason))

    def body() -> None:
        with it:
            wait_for(lambda: second.dropped)
            if failure:
                raise failure

    with pytest.raises(VolumeError, match="full") as caught:
        body()
    assert (first.dropped, second.dropped) == (1, 1)
    assert caught.value.__cause__ is failure
    assert it.warnings == ["a snapshot could not be removed in time: it is in use"]


def interrupt(snapshot: Snapshot) -> None:
    wait_for(lambda: snapshot.dropped)
    raise KeyboardInterrupt


def test_an_interrupt_stays_an_interrupt() -> None:
    snapshot = Snapshot(())
    with pytest.raises(KeyboardInterrupt), guard([snapshot], after(0, VolumeError("full"))):
        interrupt(snapshot)


def test_what_nobody_needs_any_more_goes_without_harm_unless_it_is_needed_again() -> None:
    snapshot = Snapshot(())
    ready = threading.Event()

    def look() -> BlocksnapError | None:
        return VolumeError("full") if ready.is_set() else None

    with guard([snapshot], look) as it:
        it.claim()
        it.release()
        ready.set()
        wait_for(lambda: snapshot.dropped and it.warnings)
        with pytest.raises(VolumeError, match="full"):
            it.claim()
    assert it.warnings == ["full"]


def test_what_was_found_is_told_at_the_latest_when_all_is_read() -> None:
    snapshot = Snapshot(())
    it = guard([snapshot], after(0, VolumeError("full")))

    def body() -> None:
        with it:
            wait_for(lambda: snapshot.dropped)
            with pytest.raises(VolumeError, match="full"):
                it.release()

    with pytest.raises(VolumeError, match="full"):
        body()


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), BlocksnapError("no answer")])
def test_a_guard_that_cannot_look_gives_the_snapshots_up(failure: Exception) -> None:
    snapshot = Snapshot(())

    def look() -> BlocksnapError | None:
        raise failure

    with pytest.raises(BlocksnapError), guard([snapshot], look):
        wait_for(lambda: snapshot.dropped)


def test_one_watch_that_hangs_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_JOIN_SECONDS", 0.01)
    snapshot = Snapshot(())
    going = threading.Event()

    def hang() -> BlocksnapError | None:
        going.wait(30)
        return None

    with pytest.raises(VolumeError, match="full"), guard([snapshot], hang, after(3, VolumeError("full"))):
        wait_for(lambda: snapshot.dropped)
    going.set()
