"""When the times in a thin pool's mappings are trusted, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocksnap.errors import VolumeError
from blocksnap.extents import thin, thin_metadata
from blocksnap.extents.changes import Parent
from blocksnap.extents.mapped_set import PAGE_BYTES, UNITS_PER_PAGE, MappedSet
from blocksnap.extents.model import ExtentList
from blocksnap.extents.thin_identity import (
    BaseSnapshot,
    Compare,
    Inherit,
    LostBase,
    ThinIdentity,
    Walk,
    decide,
    decide_base,
)
from blocksnap.extents.thin_metadata import DeviceFacts, PoolBusyError, ThinMetadata
from support.thin_metadata import Run, restore

UNIT = 65536
PARENT = ThinIdentity(
    vg_uuid="vg",
    lv_uuid="lv",
    pool_uuid="pool",
    metadata_uuid="meta",
    metadata_place="pv(0)",
    thin_id=3,
    origin_transaction=2,
    origin_time=0,
    snapshot_id=7,
    snapshot_time=10,
    snapshot_uuid="base",
    snapshot_root=4,
    snapshot_transaction=19,
    snapshot_mapped=100,
    pool_time=10,
    pool_transaction=20,
    chunk_size=UNIT,
    devices="3@2 4@19",
    run="run1",
)
CURRENT = replace(
    PARENT,
    snapshot_id=8,
    snapshot_time=14,
    snapshot_uuid="snapshot",
    snapshot_root=5,
    snapshot_transaction=29,
    pool_time=15,
    pool_transaction=30,
    run="run2",
)


def test_same_history_inherits_since_the_time_of_the_parents_snapshot() -> None:
    decision = decide(CURRENT, PARENT.to_binding(), known_here=True)
    assert isinstance(decision, Inherit)
    assert decision.since == 10


def test_id_of_the_removed_snapshot_may_be_used_again() -> None:
    assert isinstance(decide(replace(CURRENT, snapshot_id=7), PARENT.to_binding(), known_here=True), Inherit)
    assert isinstance(decide(replace(CURRENT, snapshot_id=8), PARENT.to_binding(), known_here=True), Inherit)


DOUBTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"vg_uuid": "x"}, {}, "another volume group"),
    ({"lv_uuid": "x"}, {}, "another logical volume"),
    ({"pool_uuid": "x"}, {}, "another pool"),
    ({"metadata_uuid": "x"}, {}, "metadata was moved or replaced"),
    ({"metadata_place": "pv(9)"}, {}, "metadata was moved or replaced"),
    ({"chunk_size": UNIT * 2}, {}, "another chunk size"),
    ({"thin_id": 4}, {}, "as after a merge"),
    ({"origin_transaction": 3}, {}, "made the volume's device anew"),
    ({"origin_time": 1}, {}, "made the volume's device anew"),
    ({"pool_time": 1 << 24}, {}, "more snapshots than the times"),
    ({}, {"pool_time": 1 << 24}, "more snapshots than the times"),
    ({}, {"snapshot_time": 11}, "contradict each other"),
    ({"pool_time": 9}, {}, "time went backwards"),
    ({"pool_transaction": 19}, {}, "transaction count went backwards"),
    ({"snapshot_time": 10}, {}, "not younger"),
    ({"snapshot_time": 9}, {}, "not younger"),
    ({"devices": "3@2 4@19 5@19"}, {}, "device 5 of the pool is older"),
    ({"devices": "3@2 4@18"}, {}, "device 4 of the pool is older"),
    ({"devices": "3@2 nonsense"}, {}, "device nonsense of the pool"),
]


@pytest.mark.parametrize(("now", "then", "reason"), DOUBTS)
def test_every_doubt_has_its_own_reason(now: dict[str, Any], then: dict[str, Any], reason: str) -> None:
    decision = decide(replace(CURRENT, **now), replace(PARENT, **then).to_binding(), known_here=True)
    assert isinstance(decision, Compare)
    assert reason in decision.reason


def test_host_that_does_not_know_the_parents_run_has_another_history() -> None:
    decision = decide(CURRENT, PARENT.to_binding(), known_here=False)
    assert isinstance(decision, Compare)
    assert "no record of the parent backup" in decision.reason


@pytest.mark.parametrize("name", [each.name for each in fields(ThinIdentity)])
@pytest.mark.parametrize("value", [None, "missing", -1, "", True, 1.5, [], {"a": 1}])
def test_malformed_binding_is_never_trusted(name: str, value: Any) -> None:
    binding = PARENT.to_binding()
    if value == "missing":
        del binding[name]
    else:
        binding[name] = value
    assert isinstance(decide(CURRENT, binding, known_here=True), Compare)


def test_binding_of_another_source_is_never_trusted() -> None:
    for binding in ({}, {"source": "file"}, {**PARENT.to_binding(), "source": "cow"}):
        decision = decide(CURRENT, binding, known_here=True)
        assert isinstance(decision, Compare)
        assert "does not say" in decision.reason


def test_binding_survives_json() -> None:
    import json

    assert ThinIdentity.from_binding(json.loads(json.dumps(PARENT.to_binding()))) == PARENT


UNTOUCHED = BaseSnapshot(
    "base",
    7,
    DeviceFacts(
        15,
        30,
        needs_check=False,
        held_root=0,
        chunk_size=UNIT,
        device_root=4,
        mapped_chunks=100,
        transaction=19,
        created=10,
    ),
)


def test_untouched_base_is_walked() -> None:
    decision = decide_base(CURRENT, PARENT.to_binding(), UNTOUCHED, known_here=True)
    assert decision == Walk(UNTOUCHED, "the parent's snapshot was kept as base and nobody has touched it")
    # What happened to the volume meanwhile, a merge for example, does not matter to two trees.
    merged = replace(CURRENT, thin_id=9, origin_transaction=25, origin_time=12)
    assert isinstance(decide_base(merged, PARENT.to_binding(), UNTOUCHED, known_here=True), Walk)


BASE_DOUBTS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({"vg_uuid": "x"}, {}, {}, "another logical volume or pool"),
    ({"lv_uuid": "x"}, {}, {}, "another logical volume or pool"),
    ({"pool_uuid": "x"}, {}, {}, "another logical volume or pool"),
    ({"metadata_place": "x"}, {}, {}, "as a repair does"),
    ({"chunk_size": 131072}, {}, {}, "another chunk size"),
    ({"pool_time": 1 << 24}, {}, {}, "more snapshots than the times"),
    ({"pool_time": 9}, {}, {}, "went backwards"),
    ({"pool_transaction": 19}, {}, {}, "went backwards"),
    ({}, {"lv_uuid": "x"}, {}, "not that of the parent"),
    ({}, {"thin_id": 8}, {}, "not that of the parent"),
    ({}, {}, {"transaction": 20}, "device anew"),
    ({}, {}, {"created": 11}, "device anew"),
    ({}, {}, {"device_root": 5}, "was changed since"),
    ({}, {}, {"mapped_chunks": 99}, "was changed since"),
]


@pytest.mark.parametrize(("now", "base", "facts", "reason"), BASE_DOUBTS)
def test_every_doubt_about_a_base_has_its_own_reason(
    now: dict[str, Any], base: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    found = replace(UNTOUCHED, **base, facts=replace(UNTOUCHED.facts, **facts))
    decision = decide_base(replace(CURRENT, **now), PARENT.to_binding(), found, known_here=True)
    assert isinstance(decision, Compare)
    assert reason in decision.reason


def test_base_of_a_run_that_the_host_does_not_know_is_not_walked() -> None:
    decision = decide_base(CURRENT, PARENT.to_binding(), UNTOUCHED, known_here=False)
    assert isinstance(decision, Compare)
    assert isinstance(decide_base(CURRENT, {}, UNTOUCHED, known_here=True), Compare)


def test_base_that_cannot_be_used_is_named_in_the_reason(use: Any) -> None:
    use(Pool({0: 12}))
    touched = replace(UNTOUCHED, facts=replace(UNTOUCHED.facts, device_root=9))
    changes = thin.find_thin_changes(
        ThinMetadata(0), CURRENT, 16 * UNIT, parent(), touched, external_origin=False
    )
    assert changes.method == "thin-time"
    assert changes.reason.endswith(
        "the base is not used: the base snapshot was changed since the parent backup"
    )


def test_base_that_is_gone_is_named_in_the_reason(use: Any) -> None:
    use(Pool({0: 12}))
    for of, reason in ((parent(), "thin-time"), (parent(identity=replace(PARENT, thin_id=4)), "compare")):
        changes = thin.find_thin_changes(
            ThinMetadata(0), CURRENT, 16 * UNIT, of, LostBase("the base is gone"), external_origin=False
        )
        assert changes.method == reason
        assert changes.reason.endswith("; the base is not used: the base is gone")


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_base_that_changes_while_it_is_compared_with_is_not_used(
    use: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    from blocksnap import _native

    pool = use(Pool({0: 12}))
    root = [UNTOUCHED.facts.device_root]

    def look(_fd: int, device: int, _held: int) -> tuple[int, ...]:
        if device != UNTOUCHED.thin_id:
            return pool.thin_device(0, device, 0)
        return (15, 30, 0, 0, UNIT, 2048, 1, 2, root[0], 100, 19, 10)

    def compare(*_: int) -> tuple[bytes, bytes, int]:
        if when == "within":
            raise ValueError("the device changed while it was read")
        root[0] = 9
        return b"", b"", 1

    monkeypatch.setattr(_native, "thin_device", look)
    monkeypatch.setattr(_native, "thin_diff", compare)
    base = replace(UNTOUCHED, facts=replace(UNTOUCHED.facts, device_root=9 if when == "before" else 4))
    changes = thin.find_thin_changes(
        ThinMetadata(0), CURRENT, 16 * UNIT, parent(*range(12)), base, external_origin=False
    )
    assert changes.method == "thin-time"
    assert "the base is not used: the base snapshot" in changes.reason


@given(
    st.sampled_from([each.name for each in fields(ThinIdentity)]),
    st.one_of(st.integers(-2, 1 << 25), st.text(max_size=4)),
)
def test_whatever_is_inherited_is_since_a_past_snapshot(name: str, value: Any) -> None:
    decision = decide(CURRENT, {**PARENT.to_binding(), name: value}, known_here=True)
    if isinstance(decision, Inherit):
        assert 0 <= decision.since < CURRENT.snapshot_time


class Pool:
    """A pretended pool: chunk number to mapping time."""

    def __init__(self, mappings: dict[int, int], created: int = 14) -> None:
        self.mappings = mappings
        self.created = created
        self.root = 5
        self.trouble: list[Exception] = []

    def thin_device(self, _fd: int, device: int, _held: int) -> tuple[int, ...]:
        return (15, 30, 0, 0, UNIT, 2048, 1, 2, self.root, len(self.mappings), 29, self.created)

    def thin_scan(
        self, _fd: int, device: int, since: int, first: int, nr_chunks: int, more: bool, _held: int
    ) -> tuple[bytes, bytes, int, int]:
        if self.trouble:
            raise self.trouble.pop()
        assert device == CURRENT.snapshot_id
        beyond = {chunk for chunk in self.mappings if chunk >= first + nr_chunks}
        window = {c: time for c, time in self.mappings.items() if c >= first and c not in beyond}
        changed = ExtentList.of((chunk * UNIT, UNIT) for chunk, time in window.items() if time >= since)
        bitmap = sum(1 << chunk - first for chunk in window).to_bytes(-(-nr_chunks // 8), "little")
        return changed.packed, bitmap, len(window) + (0 if more else len(beyond)), 3


def bits(*chunks: int, count: int = 16) -> bytes:
    return sum(1 << chunk for chunk in chunks).to_bytes(-(-count // 8), "little")


def parent(*mapped: int, size: int = 16 * UNIT, identity: ThinIdentity = PARENT) -> Parent:
    return Parent(
        size,
        identity.to_binding(),
        known_here=True,
        load_mapped=lambda: MappedSet.of(UNIT, bits(*mapped, count=-(-size // UNIT))),
    )


def whole(mapped: MappedSet) -> tuple[int, bytes]:
    return mapped.unit, mapped.read(0, mapped.length)


def chunks(*numbers: int) -> ExtentList:
    return ExtentList.of((number * UNIT, UNIT) for number in numbers)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    from blocksnap import _native

    def install(pool: Pool) -> Pool:
        monkeypatch.setattr(_native, "thin_device", pool.thin_device)
        monkeypatch.setattr(_native, "thin_scan", pool.thin_scan)
        monkeypatch.setattr(thin_metadata.time, "sleep", lambda _: None)
        return pool

    return install


def find(size: int, of: Parent | None, *, external_origin: bool = False) -> Any:
    return thin.find_thin_changes(ThinMetadata(0), CURRENT, size, of, external_origin=external_origin)


def test_first_backup_reads_what_is_mapped(use: Any) -> None:
    use(Pool({0: 1, 1: 12, 9: 3}))
    changes = find(16 * UNIT, None)
    assert (changes.method, changes.inherits) == ("compare", False)
    assert changes.allocated == changes.changed == chunks(0, 1, 9)
    assert whole(changes.mapped) == (UNIT, bits(0, 1, 9))


def test_increment_reads_what_was_mapped_since_and_drops_what_is_gone(use: Any) -> None:
    use(Pool({0: 9, 1: 10, 2: 14, 9: 3}))
    changes = find(16 * UNIT, parent(0, 1, 5, 9))
    assert (changes.method, changes.inherits) == ("thin-time", True)
    assert changes.changed == chunks(1, 2)
    assert changes.discarded == chunks(5)
    assert changes.allocated == chunks(0, 1, 2, 9)


def test_last_chunk_is_clipped_to_the_size(use: Any) -> None:
    use(Pool({3: 12, 2: 1}))
    size = 3 * UNIT + 512
    changes = find(size, parent(2, size=size))
    assert changes.changed == ExtentList.of([(3 * UNIT, 512)])
    assert changes.allocated == ExtentList.of([(2 * UNIT, UNIT + 512)])


def test_growth_after_a_shrink_reads_the_old_mappings_that_show_again(use: Any) -> None:
    use(Pool(dict.fromkeys(range(10), 1)))
    changes = find(10 * UNIT, parent(0, 1, 2, 3, size=3 * UNIT + 512))
    # The chunk at the parent's end holds bytes that the parent never saw.
    assert changes.changed == ExtentList.of([(3 * UNIT, 7 * UNIT)])
    assert changes.discarded == ExtentList()


def test_shrinking_drops_what_is_beyond_the_end(use: Any) -> None:
    use(Pool({0: 1, 3: 1, 9: 1}))
    changes = find(3 * UNIT + 512, parent(0, 2, 3, 8, size=10 * UNIT))
    assert changes.discarded == chunks(2)
    assert changes.changed == ExtentList.of([(3 * UNIT, 512)])


def test_memory_is_of_what_changed(use: Any) -> None:
    """A volume of a thousand pages, all mapped, of which one is written and one discarded."""
    span, fetched = UNITS_PER_PAGE, []

    def page(number: int) -> bytes:
        fetched.append(number)
        return b"\x01" + bytes(PAGE_BYTES - 1)

    remembered = MappedSet(UNIT, 1000 * PAGE_BYTES, page)
    before = Parent(1000 * span * UNIT, PARENT.to_binding(), known_here=True, load_mapped=lambda: remembered)
    use(Pool({number * span: 3 for number in range(1000) if number != 77} | {500 * span + 9: 14}))
    changes = find(1000 * span * UNIT, before)
    assert changes.changed == chunks(500 * span + 9)
    assert changes.discarded == chunks(77 * span)
    assert set(changes.mapped.pages) == {77, 500}
    assert set(fetched) == set(range(1000))
    # Where a chunk of the repository may have lost all that it had, and at the end, which is no whole page.
    assert changes.allocated == chunks(500 * span + 9)


def test_forgotten_or_unfitting_mapped_sets_compare(use: Any) -> None:
    use(Pool({0: 1}))
    for mapped in (None, MappedSet.of(UNIT * 2, bits(0)), MappedSet.of(UNIT, b"")):
        changes = find(
            16 * UNIT,
            Parent(16 * UNIT, PARENT.to_binding(), known_here=True, load_mapped=lambda mapped=mapped: mapped),
        )
        assert (changes.method, changes.inherits) == ("compare", False)
        assert "which chunks were mapped" in changes.reason
        assert changes.changed == changes.allocated == chunks(0)


def test_mapped_set_is_not_fetched_in_vain(use: Any) -> None:
    use(Pool({0: 1}))

    def fail() -> None:
        raise AssertionError

    changes = find(16 * UNIT, Parent(16 * UNIT, PARENT.to_binding(), known_here=False, load_mapped=fail))
    assert "no record" in changes.reason


def test_external_origin_shows_everywhere(use: Any) -> None:
    use(Pool({0: 1}))
    changes = find(16 * UNIT, parent(0), external_origin=True)
    assert (changes.method, changes.inherits, changes.mapped) == ("compare", False, None)
    assert changes.allocated == ExtentList.whole(16 * UNIT)


def test_torn_reads_are_tried_again(use: Any) -> None:
    pool = use(Pool({0: 12}))
    pool.trouble = [ValueError("checksum of block 7"), KeyError(7)]
    assert find(16 * UNIT, parent()).changed == chunks(0)


def test_metadata_that_never_settles_is_an_error(use: Any) -> None:
    pool = use(Pool({0: 12}))
    pool.trouble = [ValueError("checksum of block 7")] * 1000
    with pytest.raises(VolumeError, match="checksum of block 7"):
        find(16 * UNIT, parent())


def test_replaced_snapshot_is_an_error(use: Any) -> None:
    use(Pool({0: 12}, created=99))
    with pytest.raises(VolumeError, match="replaced"):
        find(16 * UNIT, parent())
    use(Pool({0: 12})).root += 1
    with pytest.raises(VolumeError, match="written to"):
        find(16 * UNIT, parent())


def test_a_pool_too_busy_is_asked_to_hold_its_metadata(use: Any) -> None:
    pool = use(Pool({0: 12}))
    held: list[int] = []

    @contextmanager
    def hold() -> Iterator[int]:
        held.append(77)
        yield 77
        held.append(0)

    pool.trouble = [BlockingIOError()]
    with pytest.raises(PoolBusyError):
        find(16 * UNIT, parent())
    pool.trouble = [BlockingIOError()]
    changes = thin.find_thin_changes(
        ThinMetadata(0, hold), CURRENT, 16 * UNIT, parent(), external_origin=False
    )
    assert changes.changed == chunks(0)
    assert held == [77, 0]


def test_more_mappings_than_the_pool_counts_are_an_error(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from blocksnap import _native

    pool = use(Pool({0: 12, 1: 12}))
    monkeypatch.setattr(_native, "thin_device", lambda *_: (*pool.thin_device(0, 0, 0)[:9], 1, 29, 14))
    with pytest.raises(VolumeError, match="2 chunks in the tree and 1"):
        find(16 * UNIT, parent())


@given(
    before=st.dictionaries(st.integers(0, 40), st.integers(1, 9), max_size=30),
    after=st.dictionaries(st.integers(0, 40), st.integers(10, 15), max_size=30),
    discarded=st.sets(st.integers(0, 40), max_size=10),
    sizes=st.tuples(st.integers(1, 40 * UNIT), st.integers(1, 40 * UNIT)),
    stride=st.sampled_from([1, 8191]),
)
def test_nothing_is_missed(
    before: dict[int, int], after: dict[int, int], discarded: set[int], sizes: tuple[int, int], stride: int
) -> None:
    """What is neither changed nor discarded had the same mapping at the parent, within its size.

    With the long stride a volume has several windows and more pages.
    """
    from unittest.mock import patch

    from blocksnap import _native

    then, now = (size * stride for size in sizes)
    before = {chunk * stride: time for chunk, time in before.items()}
    mappings = {
        chunk: time
        for chunk, time in {**before, **{c * stride: time for c, time in after.items()}}.items()
        if chunk // stride not in discarded
    }
    pool = Pool(mappings)
    remembered = parent(*(chunk for chunk in before if chunk < -(-then // UNIT)), size=then)
    with (
        patch.object(_native, "thin_device", pool.thin_device),
        patch.object(_native, "thin_scan", pool.thin_scan),
        patch.object(thin_metadata, "WINDOW_CHUNKS", UNITS_PER_PAGE),
    ):
        changes = find(now, remembered)
    assert changes.inherits
    touched = changes.changed.union(changes.discarded)
    for extent in (*touched, *changes.allocated):
        assert extent.end <= now
    assert not changes.changed.intersect(changes.discarded)
    assert changes.mapped
    assert whole(changes.mapped) == (
        UNIT,
        bits(*(chunk for chunk in mappings if chunk * UNIT < now), count=-(-now // UNIT)),
    )
    for chunk in {chunk for chunk in {*before, *mappings} if chunk * UNIT < now}:
        begin, end = chunk * UNIT, min((chunk + 1) * UNIT, now)
        if touched.intersect(ExtentList.of([(begin, end - begin)])):
            continue
        if chunk in mappings:
            assert mappings[chunk] == before.get(chunk)
            assert end <= then
        else:
            assert chunk not in before or begin >= then


MAPPINGS = st.dictionaries(st.integers(0, 200), st.integers(0, 3), max_size=60)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    before=MAPPINGS, after=MAPPINGS, sizes=st.tuples(st.integers(1, 200 * UNIT), st.integers(1, 200 * UNIT))
)
def test_trees_give_what_a_comparison_of_the_mappings_gives(
    tmp_path: Path, before: dict[int, int], after: dict[int, int], sizes: tuple[int, int]
) -> None:
    """Two real trees, in which chunk ``c`` of version ``v`` lies in data block ``4 c + v``."""
    then, now = sizes
    image = tmp_path / "meta"
    pool = restore(
        image,
        {
            number: [Run(chunk, 1, 4 * chunk + version, 1) for chunk, version in sorted(mappings.items())]
            for number, mappings in ((7, before), (8, after))
        },
        time=1,
    )
    devices = pool.devices()

    def identify(number: int, **facts: Any) -> ThinIdentity:
        device = devices[number]
        return replace(
            PARENT,
            snapshot_id=number,
            snapshot_time=device.creation_time,
            snapshot_root=device.root,
            snapshot_transaction=device.transaction_id,
            snapshot_mapped=device.mapped_blocks,
            pool_time=1,
            pool_transaction=4,
            **facts,
        )

    remembered = parent(
        *(chunk for chunk in before if chunk * UNIT < then), size=then, identity=identify(7, run="run1")
    )
    with image.open("rb") as file:
        metadata = ThinMetadata(file.fileno())
        base = BaseSnapshot("base", 7, metadata.facts(7))
        changes = thin.find_thin_changes(
            metadata, identify(8, snapshot_uuid="snapshot"), now, remembered, base, external_origin=False
        )
    assert changes.method == "thin-tree"
    mapped = {chunk for chunk in after if chunk * UNIT < now}
    first = min(now - 1, then) // UNIT if now != then else 1 << 40
    expected = {chunk for chunk in mapped if chunk >= first or before.get(chunk) != after[chunk]}
    gone = {chunk for chunk in before if chunk * UNIT < now and chunk not in after}
    assert changes.changed == chunks(*expected).clip(now)
    assert changes.discarded == chunks(*gone).clip(now)
    assert whole(changes.mapped) == (UNIT, bits(*mapped, count=-(-now // UNIT)))
    # So small a volume is all neighbourhood, if there is anything in it that asks.
    assert changes.allocated == chunks(*mapped).clip(now)
