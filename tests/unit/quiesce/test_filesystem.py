from __future__ import annotations

import os

import pytest

from blocksnap.quiesce.filesystem import SYSTEM_PATHS, decide, protected_filesystems
from blocksnap.system.freeze import Layer
from blocksnap.system.mounts import Mount, mount_under

DEVICE = os.makedev(254, 7)


def layer(depth: int, filesystem: str = "ext4", *, read_only: bool = False) -> Layer:
    return Layer(Mount(DEVICE, "/", "/srv", filesystem, "/dev/mapper/x", read_only), depth)


@pytest.mark.parametrize(
    ("found", "protected", "action"),
    [
        # Frozen by the snapshot; if we did, lvcreate would fail with EBUSY.
        (layer(0), False, "leave"),
        (layer(0, "xfs"), True, "leave"),
        (layer(0, "btrfs"), False, "freeze"),
        (layer(0, "btrfs"), True, "flush"),
        (layer(1), False, "freeze"),
        (layer(3, "xfs"), False, "freeze"),
        (layer(1), True, "flush"),
        (layer(1, read_only=True), False, "leave"),
        (layer(0, "btrfs", read_only=True), True, "leave"),
    ],
)
def test_what_is_frozen(found: Layer, action: str, *, protected: bool) -> None:
    decision = decide(found, {DEVICE} if protected else set())
    assert decision.action == action
    assert decision.reason


def test_the_host_s_own_filesystems_and_ours_are_protected() -> None:
    protected = protected_filesystems(["/var/lib/blocksnap/not there yet"])
    for path in (*SYSTEM_PATHS, "/var/lib"):
        mount = mount_under(path)
        assert mount is not None
        assert mount.device in protected
