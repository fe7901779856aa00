from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from blocksnap.errors import UsageError, VolumeError
from blocksnap.system import blockdev, devmapper, lvm_config, mounts
from blocksnap.volumes import resolve
from blocksnap.volumes.errors import NoSuchVolumeError
from blocksnap.volumes.resolve import resolve_volume
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    monkeypatch.chdir(tmp_path)
    mock.add("lvmconfig", out='filter=["a|.*|"]\nuse_devicesfile=0\n')
    mock.add("lvs", out=report_text(*thin_rows("data-1.x+y", "other")))
    return mock


def test_thin_volume_by_name(mock: MockCommands) -> None:
    volume = resolve_volume("vg0/data-1.x+y")
    assert (volume.name, volume.kind, volume.size) == ("vg0/data-1.x+y", "thin", 209715200)
    assert volume.key == f"lvm:{row('x')['vg_uuid']}/{uuid_of('data-1.x+y')}"
    trace = volume.trace("run1")
    assert trace is not None
    assert trace["lv"].startswith("blocksnap-run1-")
    assert (trace["run"], trace["origin"]) == ("run1", "data-1.x+y")


@pytest.mark.parametrize("path", ["/dev/vg0/data-1.x+y", "/dev/mapper/vg0-data--1.x+y"])
def test_inactive_volume_by_the_node_it_would_have(mock: MockCommands, path: str) -> None:
    assert resolve_volume(path).name == "vg0/data-1.x+y"


def test_a_file_goes_before_a_volume_that_is_not_there(mock: MockCommands, tmp_path: Path) -> None:
    (tmp_path / "vg0").mkdir()
    (tmp_path / "vg0" / "disk").touch()
    assert resolve_volume("vg0/disk").kind == "file"
    assert not mock.calls


def test_what_can_be_read_in_two_ways_is_asked_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shm").mkdir(exist_ok=True)
    monkeypatch.setattr(os.path, "lexists", lambda path: path in ("/dev/vg0/disk", "vg0/disk"))
    with pytest.raises(UsageError, match="both a logical volume and a path"):
        resolve_volume("vg0/disk")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segtype": "linear", "lv_role": "public,snapshot,thicksnapshot"}, "a classic LVM snapshot"),
        ({"segtype": "mirror"}, "a mirrored LVM volume"),
        ({"segtype": "cache", "pool_lv_uuid": uuid_of("pool_tdata")}, "cached by a single volume"),
        ({"segtype": "vdo"}, "a VDO volume"),
        ({"segtype": "somethingnew"}, "of no known kind"),
        ({"lv_tags": "blocksnap,blocksnap.run9"}, "a snapshot that blocksnap made"),
        ({"vg_exported": "1"}, "in an exported volume group"),
        ({"vg_shared": "1"}, "that several hosts share"),
        ({"vg_partial": "1"}, "missing disks"),
        ({"lv_merging": "1"}, "being merged"),
    ],
)
def test_what_cannot_be_backed_up_is_called_by_its_name(
    mock: MockCommands, fields: dict[str, str], message: str
) -> None:
    mock.add("lvs", out=report_text(*thin_rows("data", **fields)))
    with pytest.raises(VolumeError) as caught:
        resolve_volume("vg0/data")
    assert message in str(caught.value)
    assert caught.value.exit_code == 14
    assert caught.value.resolution


@pytest.mark.parametrize(
    "segtype", ["linear", "striped", "raid0", "raid1", "raid5_ls", "raid10", "writecache"]
)
def test_what_has_classic_snapshots(mock: MockCommands, segtype: str) -> None:
    mock.add("lvs", out=report_text(row("data", segtype=segtype)))
    assert resolve_volume("vg0/data").kind == "classic"


def test_a_cache_is_to_be_a_pool(mock: MockCommands) -> None:
    pool = row("[fast_cpool]", segtype="cache-pool")
    cached = row("data", segtype="cache", devices="data_corig(0)", pool_lv_uuid=pool["lv_uuid"])
    mock.add("lvs", out=report_text(cached, pool, row("[data_corig]", segtype="linear")))
    assert resolve_volume("vg0/data").kind == "classic"


def test_integrity_is_found_at_any_depth(mock: MockCommands) -> None:
    pool = row("[fast_cpool]", segtype="cache-pool")
    rows = [
        row("data", segtype="cache", devices="data_corig(0)", pool_lv_uuid=pool["lv_uuid"]),
        row("[data_corig]", segtype="raid1", devices="data_corig_rimage_0(0),data_corig_rimage_1(0)"),
        row("[data_corig_rimage_0]", segtype="linear", devices="/dev/sda(1)"),
        row("[data_corig_rimage_1]", segtype="integrity", devices="data_corig_rimage_1_iorig(0)"),
    ]
    mock.add("lvs", out=report_text(*rows, pool))
    with pytest.raises(VolumeError, match="a RAID volume with integrity") as caught:
        resolve_volume("vg0/data")
    assert caught.value.resolution == "lvconvert --raidintegrity n vg0/data"


def test_pool_names_the_volumes_in_it(mock: MockCommands) -> None:
    with pytest.raises(VolumeError, match="a thin pool") as caught:
        resolve_volume("vg0/pool")
    assert caught.value.resolution == "name the volumes in it: vg0/data-1.x+y, vg0/other"
    with pytest.raises(VolumeError, match="an inner part"):
        resolve_volume("vg0/pool_tmeta")


@pytest.mark.parametrize(
    "text", ["vg0/none", "/dev/vg0/none", "/dev/nothing", "/nowhere/x", "./x", "x", "vg 0/x", "-a/-b"]
)
def test_nothing_there(mock: MockCommands, text: str) -> None:
    with pytest.raises((VolumeError, UsageError)):
        resolve_volume(text)


@pytest.mark.parametrize("text", ["", "/dev/null"])
def test_other_things(text: str) -> None:
    with pytest.raises((VolumeError, UsageError)):
        resolve_volume(text)


class Directory:
    """A pretended directory on a pretended device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.set = monkeypatch.setattr
        self.number = os.makedev(254, 9)
        self.set(
            mounts,
            "mount_under",
            lambda _: mounts.Mount(self.number, "/", "/srv", "ext4", "/dev/x", read_only=False),
        )
        self.set(blockdev, "sysfs_folder", lambda _: tmp_path)
        self.set(blockdev, "node_of", lambda _: "/dev/dm-9")
        self.set(devmapper, "dm_name", {self.number: "vg0-other", 77: "vg0-data--1.x+y"}.get)
        self.uuids = {self.number: uuid_of("other")}
        vg = row("x")["vg_uuid"].replace("-", "")
        self.set(
            devmapper,
            "lvm_identity",
            lambda number: (
                devmapper.LvmIdentity(vg, self.uuids[number].replace("-", ""), "")
                if number in self.uuids
                else None
            ),
        )

    def resolve(self) -> str:
        return resolve._directory("/srv/x", self.number).name


@pytest.fixture
def directory(mock: MockCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Directory:
    return Directory(monkeypatch, tmp_path)


def test_directory_means_the_volume_its_file_system_lies_on(directory: Directory) -> None:
    assert directory.resolve() == "vg0/other"


def test_volume_that_was_replaced_meanwhile(directory: Directory) -> None:
    directory.uuids[directory.number] = uuid_of("else")
    with pytest.raises(VolumeError, match="replaced"):
        directory.resolve()


def test_directory_on_something_that_lies_on_a_volume_is_not_guessed(directory: Directory) -> None:
    directory.uuids = {77: uuid_of("data-1.x+y")}
    directory.set(blockdev, "slaves", lambda number: [77] if number == directory.number else [])
    with pytest.raises(VolumeError, match="which lies on the logical volume vg0/data") as caught:
        directory.resolve()
    assert "name vg0/data-1.x+y itself" in str(caught.value.resolution)


def test_directory_on_a_plain_disk(directory: Directory) -> None:
    directory.uuids = {}
    directory.set(blockdev, "slaves", lambda _: [])
    with pytest.raises(VolumeError, match="on /dev/dm-9, which has no snapshots"):
        directory.resolve()


def test_a_directory_in_a_subvolume(directory: Directory, tmp_path: Path) -> None:
    directory.set(
        mounts, "mount_under", lambda _: mounts.Mount(5, "/", "/srv", "btrfs", "/dev/x", read_only=False)
    )
    with pytest.raises(VolumeError, match="a directory in the btrfs subvolume"):
        resolve_volume(str(tmp_path))


@pytest.mark.parametrize("goes", ["before it is looked at", "while it is looked at"])
def test_a_file_that_goes_while_a_pattern_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes: str
) -> None:
    for name in ("a.img", "b.img", "c.img"):
        (tmp_path / name).write_bytes(b"x")
    real_stat, real_path = os.stat, os.path.realpath

    def removed(path: object) -> None:
        if str(path).endswith("b.img"):
            (tmp_path / "b.img").unlink(missing_ok=True)

    def stat(path: Any, **options: Any) -> os.stat_result:
        removed(path)
        return real_stat(path, **options)

    def realpath(path: Any, **options: Any) -> Any:
        removed(path)
        return real_path(path, **options)

    paths = [str(tmp_path / f"{name}.img") for name in "abc"]
    monkeypatch.setattr(resolve.glob, "glob", lambda *_, **__: [Path(path).name for path in paths])
    monkeypatch.setattr(resolve.os.path, "isfile", lambda _: True)
    if goes.startswith("before"):
        monkeypatch.setattr(resolve.os, "stat", stat)
    else:
        monkeypatch.setattr(resolve.os.path, "realpath", realpath)
    found = resolve.resolve_volumes(f"{tmp_path}/*.img")
    assert [volume.name for volume in found] == [paths[0], paths[2]]
    for path in (paths[0], paths[2]):
        os.unlink(path)
    with pytest.raises(NoSuchVolumeError, match="no file fits the pattern"):
        resolve.resolve_volumes(f"{tmp_path}/*.img")
