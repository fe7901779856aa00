"""What may be inherited from a parent's btrfs snapshot, and the reason when nothing may."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from blocksnap.extents.btrfs_identity import (
    BtrfsIdentity,
    Compare,
    Inherit,
    decide,
    decide_base,
    decide_kept,
)
from blocksnap.system.btrfs import FilesystemInfo, SubvolumeInfo

PARENT = BtrfsIdentity(filesystem="f" * 32, source="5" * 32, snapshot="a" * 32, transaction=100)
CURRENT = replace(PARENT, snapshot="b" * 32, transaction=120)


def test_identity_of_a_snapshot() -> None:
    info = SubvolumeInfo(
        tree_id=257,
        name="s",
        generation=130,
        read_only=True,
        uuid=UUID(int=1),
        parent_uuid=UUID(int=2),
        received_uuid=UUID(int=0),
        changed_transaction=119,
        snapshot_transaction=120,
    )
    identity = BtrfsIdentity.of(FilesystemInfo(UUID(int=3), 4096), info)
    assert identity == BtrfsIdentity(UUID(int=3).hex, UUID(int=2).hex, UUID(int=1).hex, 120)
    assert BtrfsIdentity.from_binding(identity.to_binding()) == identity


@pytest.mark.parametrize(
    "change",
    [{"transaction": "100"}, {"transaction": True}, {"source": ""}, {"source_kind": "lvm-thin"}],
)
def test_bindings_that_are_not_whole(change: dict[str, object]) -> None:
    binding = {**PARENT.to_binding(), **change}
    assert BtrfsIdentity.from_binding(binding) is None  # type: ignore[arg-type]
    for found in (
        decide(CURRENT, binding, known_here=True),  # type: ignore[arg-type]
        decide_kept(CURRENT, binding, PARENT, base_is_read_only=True),  # type: ignore[arg-type]
    ):
        assert isinstance(found, Compare)
        assert "does not say" in found.reason


def test_the_same_subvolume_later() -> None:
    found = decide(CURRENT, PARENT.to_binding(), known_here=True)
    assert found == Inherit(100, "same subvolume and history since transaction 100")
    assert isinstance(decide_base(CURRENT, PARENT), Inherit)
    assert decide_base(CURRENT, CURRENT) == Inherit(120, "compared with the snapshot of transaction 120")
    assert isinstance(decide_kept(CURRENT, PARENT.to_binding(), PARENT, base_is_read_only=True), Inherit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filesystem": "e" * 32}, "different filesystems"),
        ({"source": "6" * 32}, "not taken of the same subvolume"),
        ({"source": "0" * 32}, "no snapshot"),
        ({"transaction": 99}, "older"),
    ],
)
def test_another_history(change: dict[str, str | int], reason: str) -> None:
    current = replace(CURRENT, **change)  # type: ignore[arg-type]
    for found in (decide(current, PARENT.to_binding(), known_here=True), decide_base(current, PARENT)):
        assert isinstance(found, Compare)
        assert reason in found.reason


def test_memory_is_trusted_less_than_a_base() -> None:
    same_time = replace(CURRENT, transaction=100)
    found = decide(same_time, PARENT.to_binding(), known_here=True)
    assert isinstance(found, Compare)
    assert "not younger" in found.reason
    found = decide(CURRENT, PARENT.to_binding(), known_here=False)
    assert isinstance(found, Compare)
    assert "no record" in found.reason


def test_a_base_that_is_not_the_parents() -> None:
    other = replace(PARENT, snapshot="c" * 32)
    found = decide_kept(CURRENT, PARENT.to_binding(), other, base_is_read_only=True)
    assert found == Compare("the base snapshot is not that of the parent backup")
    found = decide_kept(CURRENT, PARENT.to_binding(), PARENT, base_is_read_only=False)
    assert found == Compare("the base snapshot was made writable")
