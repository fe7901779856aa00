from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

from blocksnap.errors import UsageError, VolumeError
from blocksnap.system import lvm, lvm_config
from blocksnap.system.command import CommandError
from blocksnap.system.lvm_report import parse_disks, parse_report
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands

SETTINGS = 'filter=["a|.*|"]\nuse_devicesfile=0\ndevicesfile="system.devices"\n'


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out=SETTINGS)
    for program in ("lvs", "lvcreate", "lvchange", "lvremove"):
        mock.add(program)
    return mock


def config_of(call: list[str]) -> str:
    return call[call.index("--config") + 1]


def without_config(call: list[str]) -> list[str]:
    at = call.index("--config")
    return call[:at] + call[at + 2 :]


def test_snapshot_is_read_only_tagged_skipped_and_not_archived(mock: MockCommands) -> None:
    lvm.create_thin_snapshot("my-vg", "data.1+x", "blocksnap-r-1", "run1", lambda: None)
    (call,) = mock.calls_of("lvcreate")
    assert without_config(call) == [
        "--autobackup", "n", "--snapshot", "--permission", "r", "--setactivationskip", "y",
        "--addtag", "blocksnap", "--addtag", "blocksnap.run1", "--name", "blocksnap-r-1", "my-vg/data.1+x",
    ]  # fmt: skip
    assert "backup/archive=0" in config_of(call)
    assert "backup/backup=0" in config_of(call)


def test_without_room_for_what_lvm_writes_that_is_told(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(VolumeError, match=r"volume group vg cannot be read: .*No such file"):
        lvm.attachment("vg", "snapshot")


def test_filter_goes_before_that_of_the_administrator(mock: MockCommands) -> None:
    mock.add("lvmconfig", out='filter=["r|/dev/sdz|","a|.*|"]\nuse_devicesfile=0\n')
    lvm.activate("vg", "lv")
    (call,) = mock.calls_of("lvchange")
    (setting,) = [word for word in config_of(call).split(" devices/") if "filter=" in word]
    patterns = json.loads(setting.partition("filter=")[2])
    assert patterns[0] == "r|^/dev/nbd|"
    assert patterns[-2:] == ["r|/dev/sdz|", "a|.*|"]
    assert any("blocksnap--" in pattern for pattern in patterns)


def test_what_an_instant_restore_is_made_of_is_rejected_by_all_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it may wait for a server that is gone."""
    for number, name in ((1, "vg--a-data-blocksnap"), (2, "vg--a-data"), (3, "vg--a-other")):
        (tmp_path / "sys" / f"dm-{number}" / "dm").mkdir(parents=True)
        (tmp_path / "sys" / f"dm-{number}" / "dm" / "name").write_text(name + "\n")
        (tmp_path / "sys" / f"dm-{number}" / "dev").write_text(f"254:{number}\n")
    (tmp_path / "sys" / "dm-1" / "holders" / "dm-2").mkdir(parents=True)
    (tmp_path / "disk" / "by-uuid").mkdir(parents=True)
    (tmp_path / "disk" / "by-uuid" / "xy").symlink_to("../../dm-2")
    (tmp_path / "disk" / "by-uuid" / "zz").symlink_to("../../dm-3")
    monkeypatch.setattr(lvm_config, "_SYS_BLOCK", tmp_path / "sys")
    monkeypatch.setattr(lvm_config, "_DEVICE_LINKS", tmp_path / "disk")
    patterns = lvm_config._device_rejects()
    for name in (
        "/dev/dm.1", "/dev/block/254.1", "/dev/mapper/vg..a.data.blocksnap",
        "/dev/dm.2", "/dev/block/254.2", "/dev/mapper/vg..a.data",
    ):  # fmt: skip
        assert f"r|^{name}$|" in patterns
    assert "r|^/dev/vg.a/data$|" in patterns
    assert len([each for each in patterns if each.endswith("xy$|")]) == 1
    assert not [
        each for each in patterns if "other" in each or "dm.3" in each or "254.3" in each or "zz" in each
    ]


def test_names_of_connected_nbd_devices_are_rejected_too(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, links = tmp_path / "block", tmp_path / "disk" / "by-uuid"
    for name, size in (("nbd0", 8), ("nbd1", 0), ("sda", 8)):
        (block / name).mkdir(parents=True)
        (block / name / "size").write_text(f"{size}\n")
    links.mkdir(parents=True)
    for link, target in (("aa-1", "nbd0"), ("bb", "nbd0p2"), ("cc", "nbd1"), ("dd", "sda")):
        (links / link).symlink_to(f"../../{target}")
    monkeypatch.setattr(lvm_config, "_SYS_BLOCK", block)
    monkeypatch.setattr(lvm_config, "_DEVICE_LINKS", tmp_path / "disk")
    patterns = lvm_config._device_rejects()
    assert sorted(pattern.rpartition("/")[2] for pattern in patterns) == ["aa.1$|", "bb$|"]


def test_devices_file_is_left_to_decide(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "system.devices").touch()
    monkeypatch.setattr(lvm_config, "_DEVICES_FOLDER", tmp_path)
    mock.add("lvmconfig", out=SETTINGS.replace("devicesfile=0", "devicesfile=1"))
    lvm.activate("vg", "lv")
    assert "filter" not in config_of(mock.calls_of("lvchange")[0])


def test_settings_are_read_once(mock: MockCommands) -> None:
    lvm.activate("vg", "lv")
    lvm.deactivate("vg", "lv")
    assert len(mock.calls_of("lvmconfig")) == 1
    activate, deactivate = map(without_config, mock.calls_of("lvchange"))
    assert activate == ["--autobackup", "n", "-ay", "-K", "vg/lv"]
    assert deactivate == ["--autobackup", "n", "-an", "vg/lv"]


def test_removal_lets_lvm_itself_check_the_tags(mock: MockCommands) -> None:
    mock.add("lvremove", out='  Logical volume "s" successfully removed.\n')
    assert lvm.remove_snapshot("vg", "s", "run1")
    (call,) = mock.calls_of("lvremove")
    selection = 'lv_name="s" && lv_tags={"blocksnap" && "blocksnap.run1"}'
    assert without_config(call) == ["--autobackup", "n", "--yes", "--select", selection, "vg"]


def test_what_is_gone_is_no_error(mock: MockCommands) -> None:
    assert not lvm.remove_snapshot("vg", "s", "run1")
    mock.add("lvremove", err='  Volume group "vg" not found\n  Cannot process volume group vg\n', status=5)
    assert not lvm.remove_snapshot("vg", "s", "run1")


def test_removal_is_tried_again_while_udev_looks(mock: MockCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    busy = ("", "  Logical volume vg/s in use.\n", 5)
    mock.add_sequence("lvremove", [busy, busy, ("  successfully removed\n", "", 0)])
    assert lvm.remove_snapshot("vg", "s", "run1")
    assert len(mock.calls_of("lvremove")) == 3


def test_removal_gives_up_in_the_end_and_at_once_for_other_reasons(
    mock: MockCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lvm.time, "sleep", lambda _: None)
    mock.add("lvremove", err="  Logical volume vg/s in use.\n", status=5)
    with pytest.raises(CommandError):
        lvm.remove_snapshot("vg", "s", "run1")
    assert len(mock.calls_of("lvremove")) == lvm._REMOVE_ATTEMPTS
    mock.add("lvremove", err="  Cannot update pool\n", status=5)
    with pytest.raises(CommandError, match="Cannot update pool"):
        lvm.remove_snapshot("vg", "s", "run1")
    assert len(mock.calls_of("lvremove")) == lvm._REMOVE_ATTEMPTS + 1


def test_new_volumes(mock: MockCommands) -> None:
    # LVM takes whole sectors, and may make more of them.
    assert lvm.create_thin("vg", "pool", "new", (5 << 20) - 511, ["t"]) == "/dev/vg/new"
    lvm.create_thick("vg", "new2", 5 << 20)
    thin, thick = map(without_config, mock.calls_of("lvcreate"))
    assert thin == [
        "--yes", "--virtualsize", "5242880b", "--type", "thin", "--thinpool", "pool",
        "--addtag", "t", "--name", "new", "vg",
    ]  # fmt: skip
    assert thick[:3] == ["--yes", "--size", "5242880b"]


def test_a_failed_restore_removes_only_what_it_tagged(mock: MockCommands) -> None:
    lvm.remove_volume("vg", "new")
    (call,) = mock.calls_of("lvremove")
    assert call[call.index("--select") + 1] == 'lv_name="new" && lv_tags="blocksnap.restoring"'


@pytest.mark.parametrize("name", ["", "-ay", ".", "..", "a/b", "a b", "ü", "a\n", 'x" || lv_name=~"'])
def test_names_from_outside_are_no_options(name: str) -> None:
    with pytest.raises(UsageError):
        lvm.check_name(name)


@pytest.mark.parametrize("name", ["vg0", "my-vg", "a.b", "c++", "_x", "9"])
def test_names_that_lvm_takes(name: str) -> None:
    assert lvm.check_name(name) == name


@pytest.mark.parametrize("run", ["", "a b", 'x"', "-x", "a/b", "x" * 101])
def test_run_names_that_make_no_tag(run: str) -> None:
    with pytest.raises(UsageError):
        lvm.run_tag(run)


@pytest.mark.parametrize(
    ("tags", "run"),
    [
        (["blocksnap", "blocksnap.r1"], "r1"),
        (["blocksnap.r1"], None),
        (["blocksnap"], None),
        (["blocksnap", "blocksnap.r1", "blocksnap.r2"], None),
        (["blocksnap.restoring"], None),
        (["blocksnap-mark.0.1.r1"], None),
        ([], None),
    ],
)
def test_whose_snapshot_it_is(tags: list[str], run: str | None) -> None:
    assert lvm.run_of(tags) == run


def test_report_knows_pool_and_metadata() -> None:
    report = parse_report(
        report_text(*thin_rows("data", "other", lv_kernel_major="254", lv_kernel_minor="7"))
    )
    data = report.find("vg0", "data")
    assert data is not None
    assert data.number == 254 << 8 | 7
    assert data.thin_id == 1
    thin = report.thin(data)
    assert (thin.pool.name, thin.metadata.name, thin.external_origin) == ("pool", "pool_tmeta", None)
    assert thin.metadata.is_internal
    assert thin.metadata.number is None
    assert thin.pool.lv_check_needed is False
    assert data.lv_check_needed is None
    assert report.find_uuid(uuid_of("other").replace("-", "")) is report.find("vg0", "other")


def test_external_origin_shows_through_snapshots_of_snapshots() -> None:
    rows = thin_rows("a", "b", "c")
    by_name = {each["lv_name"]: each for each in rows}
    by_name["c"].update(origin="b", origin_uuid=uuid_of("b"))
    by_name["b"].update(origin="a", origin_uuid=uuid_of("a"))
    report = parse_report(report_text(*rows))
    assert report.thin(report.find("vg0", "c")).external_origin is None
    by_name["a"].update(origin="thick", origin_uuid=uuid_of("thick"))
    report = parse_report(report_text(*rows, row("thick", segtype="linear")))
    for name in "abc":
        assert report.thin(report.find("vg0", name)).external_origin == "vg0/thick"


def test_place_names_disks_by_uuid_and_inner_volumes_too() -> None:
    image = row("[m_rimage_0]", segtype="linear", devices="/dev/sda(1)")
    report = parse_report(
        report_text(row("m", devices="/dev/sda(3)"), row("r", devices="m_rimage_0(0)"), image)
    )
    disks = parse_disks('{"report": [{"pv": [{"pv_name": "/dev/sda", "pv_uuid": "UUID"}]}]}')
    assert report.place(report.find("vg0", "m"), disks) == "UUID(3)"
    assert report.place(report.find("vg0", "r"), disks) == image["lv_uuid"] + "(0)"


def test_first_segment_counts() -> None:
    report = parse_report(report_text(row("m", devices="/dev/sda(3)"), row("m", devices="/dev/sdb(9)")))
    assert [each.devices for each in report] == ["/dev/sda(3)"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"report": [{"lv": [{}]}]}', '{"report": 1}', '{"report": [{"lv": [1]}]}']
)
def test_nonsense_is_told(text: str) -> None:
    with pytest.raises(VolumeError, match="makes no sense"):
        parse_report(text)


def test_fields_asked_are_fields_known(mock: MockCommands) -> None:
    mock.add("lvs", out=report_text(*thin_rows("data")))
    record, _ = lvm.get("vg0", "data")
    assert record.full_name == "vg0/data"
    (call,) = mock.calls_of("lvs")
    assert set(call[call.index("-o") + 1].split(",")) == set(row("x"))
    assert call[-1] == "vg0"


def test_missing_volume_and_group(mock: MockCommands) -> None:
    mock.add("lvs", out=report_text())
    with pytest.raises(lvm.NoVolumeError, match="vg0/none"):
        lvm.get("vg0", "none")
    mock.add("lvs", err='  Volume group "vg9" not found\n  Cannot process volume group vg9\n', status=5)
    with pytest.raises(lvm.NoVolumeError, match="vg9/none"):
        lvm.get("vg9", "none")
    with pytest.raises(UsageError):
        lvm.get("vg9", "-none")


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ("  Volume group vg is exported\n", "volume group vg cannot be used: it is exported"),
        ("  Cannot access VG vg due to failed lock.\n", "it is one that several hosts share"),
    ],
)
def test_groups_that_lvm_keeps_from_everybody(mock: MockCommands, message: str, what: str) -> None:
    mock.add("lvs", err=message, status=5)
    with pytest.raises(lvm.GroupRefusedError) as caught:
        lvm.report("vg")
    assert what in caught.value.brief
    assert caught.value.exit_code == 14
    with pytest.raises(CommandError):
        lvm.report()


def test_one_command_changes_a_group_at_a_time(
    mock: MockCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lvm, "_LOCK_FOLDER", str(tmp_path / "locks"))
    monkeypatch.setattr(lvm, "_LOCK_SECONDS", 0.05)
    mock.add("lvchange")
    with lvm._changing("vg"):
        lvm.activate("other", "lv")
        with pytest.raises(lvm.GroupBusyError, match=f"process {os.getpid()} has been changing") as caught:
            lvm.activate("vg", "lv")
    assert caught.value.exit_code == 11
    lvm.activate("vg", "lv")
    assert len(mock.calls_of("lvchange")) == 2


def test_a_link_in_place_of_a_lock_is_not_followed(
    mock: MockCommands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not even where somebody else can write, which is nowhere below root's own /run."""
    folder = Path(lvm._LOCK_FOLDER)
    while not folder.exists():
        folder = folder.parent
    while str(folder) != "/":
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o022) == (0, 0), folder
        folder = folder.parent
    monkeypatch.setattr(lvm, "_LOCK_FOLDER", str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    (tmp_path / "precious").write_text("content")
    (tmp_path / "locks" / "vg").symlink_to(tmp_path / "precious")
    mock.add("lvchange")
    with pytest.raises(OSError, match="symbolic links"):
        lvm.activate("vg", "lv")
    assert (tmp_path / "precious").read_text() == "content"
