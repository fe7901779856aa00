from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.quiesce.assemble import _stop
from blocksnap.quiesce.base import Guard
from blocksnap.quiesce.errors import FilesystemFreezeError
from blocksnap.quiesce.filesystem import SYSTEM_PATHS, Action, Decision, decide, protected_filesystems
from blocksnap.system.freeze import Layer
from blocksnap.system.mounts import Mount, mount_under

DEVICE = os.makedev(254, 7)
NOWHERE = os.makedev(4000, 99999)
"""A device that nothing is mounted from."""


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


def mounted_at(point: str, *, device: int) -> Layer:
    return Layer(Mount(device, "/", point, "ext4", "/dev/mapper/x", read_only=False), 1)


@pytest.mark.parametrize("action", ["freeze", "flush"])
@pytest.mark.parametrize("left", ["empty", "gone"])
def test_what_is_unmounted_meanwhile_need_not_stand_still(tmp_path: Path, left: str, action: Action) -> None:
    """Its directory is there still, or was removed with it."""
    point = tmp_path / "point"
    if left == "empty":
        point.mkdir()
    decision = Decision(mounted_at(str(point), device=NOWHERE), action, "it lies above")
    found = list(_stop(decision))
    assert len(found) == (action == "flush")
    for quiescer in found:
        quiescer.attend(Guard(None, 0))  # type: ignore[arg-type]
        quiescer.begin(0.0)
        quiescer.end(0.0)
        quiescer.close()


@pytest.mark.parametrize("action", ["freeze", "flush"])
def test_what_is_mounted_elsewhere_is_not_left_out(tmp_path: Path, action: Action) -> None:
    here = mount_under(str(tmp_path))
    assert here is not None
    decision = Decision(mounted_at(str(tmp_path / "gone"), device=here.device), action, "it lies above")
    with pytest.raises(FilesystemFreezeError, match="cannot be frozen"):
        [quiescer.attend(Guard(None, 0)) for quiescer in _stop(decision)]  # type: ignore[arg-type, func-returns-value]
