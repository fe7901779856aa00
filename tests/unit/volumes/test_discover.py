from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.system import lvm, lvm_config
from blocksnap.system.mounts import Mount
from blocksnap.system.udev import BlockDevice
from blocksnap.volumes import discover as module
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands


def device(node: str, number: int, **fields: object) -> BlockDevice:
    facts: dict[str, object] = {
        "node": node, "number": number, "is_partition": False, "size": 1 << 30, "vg_name": "", "lv_name": "",
        "dm_uuid": "", "filesystem": "", "filesystem_uuid": "", "label": "", "links": (),
    }  # fmt: skip
    return BlockDevice(**{**facts, **fields})  # type: ignore[arg-type]


DM = os.makedev(254, 7)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out="use_devicesfile=0\n")
    rows = thin_rows("data", lv_kernel_major="254", lv_kernel_minor="7")
    mine = row("blocksnap-x", lv_tags="blocksnap,blocksnap.r", segtype="thin")
    mock.add(
        "lvs",
        out=report_text(*rows, row("classic", segtype="linear"), row("mirrored", segtype="mirror"), mine),
    )
    devices = [
        device("/dev/dm-7", DM, vg_name="vg0", lv_name="data", dm_uuid="LVM-x", filesystem="ext4"),
        device("/dev/sda", 1, filesystem="LVM2_member"),
        device("/dev/sdb", 2, filesystem="xfs"),
        device("/dev/sdc", 3, filesystem="btrfs", filesystem_uuid="u"),
        device("/dev/sdd", 4, filesystem="btrfs", filesystem_uuid="u"),
        device("/dev/sde", 5),
    ]
    mounts = [
        Mount(DM, "/", "/srv", "ext4", "/dev/dm-7", read_only=False),
        Mount(2, "/", "/mnt", "xfs", "/dev/sdb", read_only=False),
        Mount(3, "/", "/home", "btrfs", "/dev/sdc", read_only=False),
    ]
    monkeypatch.setattr(module, "block_devices", lambda: devices)
    monkeypatch.setattr(module, "read_mounts", lambda: mounts)
    monkeypatch.setattr(module, "users_of_device", lambda number: ["mounted on /mnt"] if number == 2 else [])
    return mock


def test_everything_that_holds_data_is_shown_once(host: MockCommands) -> None:
    found = {each.name: each for each in module.discover()}
    assert list(found) == ["vg0/classic", "vg0/data", "vg0/mirrored", "/home", "/dev/sdb", "/dev/sde"]
    thin = found["vg0/data"]
    assert (thin.kind, thin.supported, thin.tracking, thin.filesystem, thin.mountpoints, thin.used_by) == (
        "thin", True, "thin-time", "ext4", ("/srv",), ("/srv",),
    )  # fmt: skip
    classic = found["vg0/classic"]
    assert (classic.kind, classic.supported, classic.tracking) == ("classic", True, "compare")
    mirrored = found["vg0/mirrored"]
    assert (mirrored.kind, mirrored.supported) == ("mirror", False)
    assert mirrored.obstacle == "it is a mirrored LVM volume"
    assert (found["/home"].kind, found["/home"].supported, found["/home"].size) == ("btrfs", False, 2 << 30)
    assert found["/dev/sdb"].obstacle == "it has no snapshots and is in use: mounted on /mnt"
    assert (found["/dev/sde"].supported, found["/dev/sde"].tracking) == (True, "compare")


def test_bases_are_shown_with_their_volume_or_as_what_is_in_the_way(host: MockCommands) -> None:
    rows = thin_rows("data")
    bases = [
        row(
            f"blocksnap-{number}",
            lv_tags=f"blocksnap,blocksnap.r,{lvm.BaseMark('owner', uuid_of(of)).tag}",
            segtype="thin",
        )
        for number, of in enumerate(("data", "gone"))
    ]
    host.add("lvs", out=report_text(*rows, *bases))
    found = {each.name: each for each in module.discover()}
    assert (found["vg0/data"].tracking, found["vg0/data"].bases) == ("thin-tree", ("vg0/blocksnap-0",))
    assert "vg0/blocksnap-0" not in found
    assert found["vg0/blocksnap-1"].supported is False
    assert found["vg0/blocksnap-1"].obstacle == "it is the base snapshot of a volume that is gone"


def test_works_without_lvm(host: MockCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_program", lambda _: False)
    assert [each.name for each in module.discover()] == ["/home", "/dev/sdb", "/dev/sde"]
    assert not host.calls
