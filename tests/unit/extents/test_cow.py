"""When the exception store of a base is trusted, and when not; the stores are real ones, in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.extents import cow
from blocksnap.extents.changes import Changes, Parent
from blocksnap.extents.cow import (
    ATTACHMENT,
    CowBase,
    CowIdentity,
    CowStore,
    Doubt,
    Exceptions,
    Trust,
    decide,
    doubt_about_status,
    find_cow_changes,
    read_exceptions,
)
from blocksnap.extents.model import ExtentList
from blocksnap.system.command import CommandError
from blocksnap.system.devmapper import SnapshotStatus
from support.cow_store import CowStore as BuiltStore
from support.cow_store import in_memory

UNIT = 4096
SIZE = 1000 * UNIT
PARENT = CowIdentity(
    vg_uuid="vg",
    lv_uuid="lv",
    snapshot_uuid="base",
    snapshot_created="2026-11-22 21:47:39 +0000",
    chunk_size=UNIT,
    size=SIZE,
    run="run1",
)
CURRENT = replace(PARENT, snapshot_uuid="snapshot", snapshot_created="2026-11-23 21:47:39 +0000", run="run2")
BASE = CowBase(
    lv_uuid="base",
    origin_uuid="lv",
    created="2026-11-22 21:47:39 +0000",
    chunk_size=UNIT,
    is_writable=False,
    is_merging=False,
)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cow.time, "sleep", lambda _: None)


def parent(identity: CowIdentity = PARENT, *, size: int = SIZE, known_here: bool = True) -> Parent:
    return Parent(size, identity.to_binding(), known_here, lambda: None)


def status_of(store: BuiltStore) -> SnapshotStatus:
    """What the kernel says of a store that is not being written."""
    unit = store.chunk_size
    return SnapshotStatus("valid", store.allocated * unit, store.size, (store.areas + 1) * unit)


@contextmanager
def opened(built: BuiltStore, ask: Callable[[], SnapshotStatus] | None = None) -> Iterator[CowStore]:
    with in_memory(built) as fd:
        yield CowStore(fd, ask or (lambda: status_of(built)))


def find(
    changed: Sequence[int], size: int = SIZE, ask: Callable[[], SnapshotStatus] | None = None, **built: Any
) -> Changes:
    built.setdefault("chunks", 3000)
    with opened(BuiltStore(changed, **built), ask) as store:
        return find_cow_changes(replace(CURRENT, size=size), size, parent(), BASE, store)


def chunks(*numbers: int) -> ExtentList:
    return ExtentList.of((number * UNIT, UNIT) for number in numbers)


def refused(changes: Changes, size: int = SIZE) -> str:
    assert (changes.method, changes.inherits, changes.mapped) == ("compare", False, None)
    assert changes.allocated == changes.changed == ExtentList.whole(size)
    assert not changes.discarded
    return changes.reason


def test_increment_is_what_the_list_of_the_base_has() -> None:
    changes = find([9, 3, 4, 700])
    assert (changes.method, changes.inherits) == ("cow", True)
    assert changes.reason.startswith("the parent's snapshot was kept as base")
    assert changes.changed == chunks(3, 4, 9, 700)
    assert changes.allocated == ExtentList.whole(SIZE)
    assert not changes.discarded
    assert changes.mapped is None


def test_the_chunk_size_that_counts_is_that_of_the_base() -> None:
    """The next snapshot may be made with another one."""
    for unit in (UNIT, 65536):
        built = BuiltStore([9, 3], unit, chunks=9000)
        then = replace(PARENT, chunk_size=unit)
        with opened(built) as store:
            changes = find_cow_changes(
                replace(CURRENT, chunk_size=16384), SIZE, parent(then), replace(BASE, chunk_size=unit), store
            )
        assert changes.method == "cow", changes.reason
        assert changes.changed == ExtentList.of([(3 * unit, unit), (9 * unit, unit)])


def test_nothing_written_is_nothing_changed() -> None:
    changes = find([])
    assert (changes.method, changes.changed) == ("cow", ExtentList())


def test_what_the_origin_grew_by_is_changed() -> None:
    """Beyond its end a snapshot records nothing."""
    changes = find([999, 3], SIZE + 10 * UNIT)
    assert changes.changed == chunks(3, *range(999, 1010))
    assert changes.allocated == ExtentList.whole(SIZE + 10 * UNIT)


def test_the_last_chunk_may_be_partial() -> None:
    size = 999 * UNIT + 512
    then = replace(PARENT, size=size)
    for grown in (0, 512, 5 * UNIT):
        with opened(BuiltStore([2, 999], chunks=3000)) as store:
            changes = find_cow_changes(
                replace(CURRENT, size=size + grown), size + grown, parent(then, size=size), BASE, store
            )
        assert changes.changed == ExtentList.of([(2 * UNIT, UNIT), (999 * UNIT, 512 + grown)])


def test_first_backup_reads_everything() -> None:
    assert "first backup" in refused(find_cow_changes(CURRENT, SIZE, None, None, None))


def test_a_base_that_is_gone_or_not_active() -> None:
    assert "not there any more" in refused(find_cow_changes(CURRENT, SIZE, parent(), None, None))
    assert "not active" in refused(find_cow_changes(CURRENT, SIZE, parent(), BASE, None))


def test_trusted_base() -> None:
    assert isinstance(decide(CURRENT, parent(), BASE), Trust)
    # The new snapshot may have chunks of another size, and the volume may have grown.
    assert isinstance(decide(replace(CURRENT, chunk_size=65536, size=2 * SIZE), parent(), BASE), Trust)


DOUBTS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"vg_uuid": "x"}, {}, {}, "another volume group"),
    ({"lv_uuid": "x"}, {}, {}, "another logical volume"),
    ({"size": SIZE - 1}, {}, {}, "smaller than at the parent"),
    ({"snapshot_uuid": "base"}, {}, {}, "are the same"),
    ({}, {"size": SIZE - UNIT}, {}, "not as large as its snapshot"),
    ({}, {"known_here": False}, {}, "no record of the parent"),
    ({}, {}, {"lv_uuid": "x"}, "not that of the parent"),
    ({}, {}, {"created": "2026-11-22 21:47:40 +0000"}, "not that of the parent"),
    ({}, {}, {"origin_uuid": "x"}, "of another volume"),
    ({}, {}, {"is_merging": True}, "being merged"),
    ({}, {}, {"is_writable": True}, "can be written to"),
    ({}, {}, {"chunk_size": 8192}, "another chunk size"),
]


@pytest.mark.parametrize(("now", "then", "base", "reason"), DOUBTS)
def test_every_doubt_about_a_base_has_its_own_reason(
    now: dict[str, Any], then: dict[str, Any], base: dict[str, Any], reason: str
) -> None:
    decision = decide(replace(CURRENT, **now), parent(**then), replace(BASE, **base))
    assert isinstance(decision, Doubt)
    assert reason in decision.reason


def test_a_base_that_was_put_back_is_doubted() -> None:
    known = Parent(
        SIZE, {**PARENT.to_binding(), ATTACHMENT: "joined"}, known_here=True, load_mapped=lambda: None
    )
    assert isinstance(decide(CURRENT, known, replace(BASE, attachment="joined")), Trust)
    for other in ("joined again", ""):
        found = decide(CURRENT, known, replace(BASE, attachment=other))
        assert isinstance(found, Doubt)
        assert "put back" in found.reason
    # An older parent does not say.
    assert isinstance(decide(CURRENT, parent(), replace(BASE, attachment="joined")), Trust)


@pytest.mark.parametrize("name", [each.name for each in fields(CowIdentity)])
@pytest.mark.parametrize("value", [None, "missing", -1, 0, "", True, 1.5, [], {"a": 1}])
def test_malformed_binding_is_never_trusted(name: str, value: Any) -> None:
    binding = PARENT.to_binding()
    if value == "missing":
        del binding[name]
    else:
        binding[name] = value
    decision = decide(CURRENT, Parent(SIZE, binding, True, lambda: None), BASE)
    assert isinstance(decision, Doubt)
    assert "does not say" in decision.reason


def test_binding_of_another_source_is_never_trusted() -> None:
    for binding in ({}, {"source": "file"}, {**PARENT.to_binding(), "source": "lvm-thin"}):
        decision = decide(CURRENT, Parent(SIZE, binding, True, lambda: None), BASE)
        assert isinstance(decision, Doubt)


def test_binding_survives_json() -> None:
    assert CowIdentity.from_binding(json.loads(json.dumps(PARENT.to_binding()))) == PARENT


STATES = [
    (SnapshotStatus("invalid"), "became invalid"),
    (SnapshotStatus("overflow"), "overflowed"),
    (SnapshotStatus("merging", UNIT, SIZE, UNIT), "being merged"),
    (SnapshotStatus("merge failed"), "that failed"),
    (SnapshotStatus("unknown"), "does not know"),
    (SnapshotStatus("valid", SIZE, SIZE, UNIT), "full to the last chunk"),
    (SnapshotStatus("valid", SIZE - UNIT + 512, SIZE, UNIT), "full to the last chunk"),
    (SnapshotStatus("valid", 2 * SIZE, SIZE, UNIT), "full to the last chunk"),
]


@pytest.mark.parametrize(("status", "reason"), STATES)
def test_states_in_which_a_list_may_be_incomplete(status: SnapshotStatus, reason: str) -> None:
    assert reason in str(doubt_about_status(status, UNIT))
    assert reason in refused(find([1, 2], ask=lambda: status))


@pytest.mark.parametrize(("status", "reason"), STATES)
def test_states_that_come_while_the_list_is_read(status: SnapshotStatus, reason: str) -> None:
    built = BuiltStore([1, 2], chunks=3000)
    answers = [status, status_of(built)]
    assert reason in refused(find([1, 2], ask=answers.pop))
    assert not answers


def test_a_valid_snapshot_with_room_has_no_doubt() -> None:
    assert doubt_about_status(SnapshotStatus("valid", SIZE - UNIT, SIZE, UNIT), UNIT) is None


def test_a_snapshot_that_is_gone_has_an_unknown_state() -> None:
    def ask() -> SnapshotStatus:
        raise CommandError("dmsetup", 1, "Device does not exist.")

    assert "does not know" in refused(find([1], ask=ask))

    def parse() -> SnapshotStatus:
        raise ValueError("not the status of a snapshot")

    assert "does not know" in refused(find([1], ask=parse))


@pytest.mark.parametrize("missing", [1, 2, 255, 256, 257, 300, 600])
def test_a_list_shorter_than_the_kernels_count_is_doubted(missing: int) -> None:
    """As a stale copy is, or one that was cut at its end."""
    whole = BuiltStore(range(600), chunks=3000)
    reason = refused(find(range(600 - missing), ask=lambda: status_of(whole)))
    assert "shorter than the kernel" in reason


def test_a_list_longer_than_the_kernels_count_is_what_was_written_meanwhile() -> None:
    before = BuiltStore(range(200), chunks=3000)
    changes = find(range(600), ask=lambda: status_of(before))
    assert changes.changed == ExtentList.of([(0, 600 * UNIT)])


def test_what_was_counted_and_is_not_yet_in_the_list_is_waited_for() -> None:
    counted = BuiltStore(range(300), chunks=3000)
    with in_memory(BuiltStore(range(290), chunks=3000)) as fd:

        class Growing(CowStore):
            scans = 0

            def scan(self, origin_size: int, settled_areas: int) -> Exceptions:
                assert settled_areas == 1
                Growing.scans += 1
                if Growing.scans == 2:
                    counted.write(fd)
                return super().scan(origin_size, settled_areas)

        found = read_exceptions(Growing(fd, lambda: status_of(counted)), SIZE, UNIT)
    assert isinstance(found, Exceptions)
    assert (found.count, Growing.scans) == (300, 2)


def test_the_kernel_counts_the_chunk_of_an_area_before_the_area() -> None:
    """The last chunks of an area are given away but not yet committed: one more counts than was written."""
    built = BuiltStore(range(256), chunks=3000)
    settled = status_of(built)
    in_flight = replace(settled, metadata=settled.metadata - UNIT)
    assert (in_flight.allocated - in_flight.metadata) // UNIT == 257
    assert find(range(256), ask=lambda: in_flight).changed == ExtentList.of([(0, 256 * UNIT)])


def test_unused_chunks_of_the_store_are_no_reason_to_doubt() -> None:
    """An old kernel may have left some at a crash: it counts them too."""
    places = [2, 5, 3, 9]
    built = BuiltStore([7, 8, 11, 10], places=places, chunks=3000)
    assert (status_of(built).allocated - status_of(built).metadata) // UNIT == 8
    changes = find([7, 8, 11, 10], places=places, ask=lambda: status_of(built))
    assert changes.changed == chunks(7, 8, 10, 11)


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        ({"valid": 0}, "invalidated the snapshot"),
        ({"magic": 0}, "never initialised"),
        ({"magic": 5}, "not the exception store"),
        ({"version": 2}, "unknown version"),
        ({"chunk_size": 8192, "chunks": 3000}, "another chunk size than the snapshot"),
    ],
)
def test_stores_that_the_kernel_would_not_vouch_for(built: dict[str, int], reason: str) -> None:
    status = status_of(BuiltStore([1], chunks=3000))
    assert reason in refused(find([1], ask=lambda: status, **built))


def test_an_exception_beyond_the_end_of_the_base_is_doubted() -> None:
    assert "beyond the end of the origin" in refused(find([3, 1000]))
    assert "beyond the end of the origin" in refused(find([3, 1000], SIZE * 2), SIZE * 2)


def test_a_store_that_cannot_be_read_is_doubted() -> None:
    fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        store = CowStore(fd, lambda: SnapshotStatus("valid", 2 * UNIT, SIZE, 2 * UNIT))
        assert "cannot be read" in refused(find_cow_changes(CURRENT, SIZE, parent(), BASE, store))
    finally:
        os.close(fd)


@settings(max_examples=60, deadline=None)
@given(
    changed=st.lists(st.integers(0, 999), unique=True, max_size=700),
    counted=st.integers(0, 700),
    sizes=st.tuples(st.integers(999 * UNIT + 1, 1000 * UNIT), st.integers(0, 20 * UNIT)),
)
def test_nothing_is_missed(changed: list[int], counted: int, sizes: tuple[int, int]) -> None:
    """Whatever the kernel had counted before: all in the list, and all growth, is changed, or all is read."""
    then, now = sizes[0], sizes[0] + sizes[1]
    status = status_of(BuiltStore(range(counted), chunks=3000))
    with opened(BuiltStore(changed, chunks=3000), lambda: status) as store:
        found = find_cow_changes(
            replace(CURRENT, size=now), now, parent(replace(PARENT, size=then), size=then), BASE, store
        )
    assert found.inherits == (counted <= len(changed))
    if found.inherits:
        assert found.changed == chunks(*changed).clip(then).union(ExtentList.of([(then, now - then)]))
    assert all(extent.end <= now for extent in found.changed)
