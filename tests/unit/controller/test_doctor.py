"""What an examination finds, by LVM's report, the journals and sysfs; and that it changes nothing."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from blocksnap.controller import doctor, examine_host, examine_lvm, recover, subvolume_leftovers
from blocksnap.controller.findings import Finding, exit_code_for
from blocksnap.controller.history import History
from blocksnap.controller.journal import Journal, read_entries
from blocksnap.controller.lock import VolumeLocks
from blocksnap.controller.settings import LimitSettings
from blocksnap.errors import BlocksnapError
from blocksnap.system import devmapper, host, lvm, lvm_config
from blocksnap.system.btrfs_places import NotReachedError
from blocksnap.system.devmapper import LvmIdentity, PoolStatus
from blocksnap.system.lvm_report import parse_report
from blocksnap.system.mounts import Mount
from blocksnap.volumes import subvolume
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands

KEY = f"lvm:{row('x')['vg_uuid']}/{uuid_of('data')}"
NOW = 1_000_000.0
HEALTHY = PoolStatus("rw", False, 1, 10, 100, 10, 100)


def dead_run(
    state: Path, run: str = "d1", *steps: dict[str, Any], key: str | None = KEY, boot: str = "earlier"
) -> None:
    lines: list[dict[str, Any]] = [
        {"step": "begin", "pid": 4194999, "start": 1, "boot": boot, "host": "h", "began": NOW - 7200}
    ]
    if key:
        trace = {
            "kind": "lvm",
            "vg": "vg0",
            "lv": f"blocksnap-{run}",
            "run": run,
            "origin_uuid": uuid_of("data"),
        }
        lines.append({"step": "snapshot", "volume": key, "name": "vg0/data", "trace": trace})
    lines += steps
    (state / "journal").mkdir(exist_ok=True, parents=True)
    (state / "journal" / f"{run}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def snapshot_row(run: str, **fields: str) -> dict[str, str]:
    named = {
        "origin": "data",
        "origin_uuid": uuid_of("data"),
        "lv_time": "2099-01-01 00:00:00 +0000",
        **fields,
    }
    return row(f"blocksnap-{run}", lv_tags=f"blocksnap,blocksnap.{run}", **named)


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Return what is found in a report of LVM, for a pool with this status."""

    def look(
        *rows: dict[str, str], status: PoolStatus = HEALTHY, mounts: tuple[Mount, ...] = ()
    ) -> list[Finding]:
        monkeypatch.setattr(devmapper, "pool_above", {9: 10}.get)
        monkeypatch.setattr(devmapper, "pool_status", lambda _: status)
        monkeypatch.setattr(devmapper, "dm_name", lambda _: "vg0-pool-tpool")
        host = examine_lvm.Host(
            parse_report(report_text(*rows)),
            read_entries(tmp_path),
            list(mounts),
            NOW,
            str(tmp_path),
            LimitSettings(),
        )
        return list(examine_lvm.examine_lvm(host))

    return look


def active_pool() -> list[dict[str, str]]:
    rows = thin_rows("data")
    rows[1].update({"lv_kernel_major": "0", "lv_kernel_minor": "9"})
    return rows


Look = Callable[..., list[Finding]]


def test_nothing_is_found_where_nothing_is(look: Look) -> None:
    assert look(*active_pool()) == []
    assert look() == []
    assert exit_code_for([]) == 0


def test_what_a_dead_run_left_is_ours_and_what_nobody_knows_is_not(look: Look, tmp_path: Path) -> None:
    dead_run(tmp_path)
    mounted = Mount(os.makedev(0, 7), "/", "/mnt", "ext4", "/dev/x", read_only=True)
    rows = [
        *thin_rows("data"),
        snapshot_row("d1", lv_kernel_major="0", lv_kernel_minor="7"),
        snapshot_row("other"),
        snapshot_row("old", lv_time="1970-01-01 00:00:00 +0000"),
    ]
    dead, old, other = sorted(look(*rows, mounts=(mounted,)), key=lambda one: one.subject)
    assert (dead.subject, dead.ours, dead.severity) == ("vg0/blocksnap-d1", True, "warning")
    assert dead.message == "a snapshot of vg0/data that run d1 left, mounted on /mnt"
    # Older than this boot: who made it is gone.
    assert (old.subject, old.ours) == ("vg0/blocksnap-old", True)
    assert (other.ours, "knows nothing" in other.message) == (False, True)
    assert other.advice is not None
    assert other.advice.endswith("lvremove vg0/blocksnap-other")


def test_a_live_run_s_snapshot_is_nothing_to_find(look: Look, tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1")
    try:
        assert look(*thin_rows("data"), snapshot_row("r1")) == []
    finally:
        journal.finish()


def test_bases(look: Look, tmp_path: Path) -> None:
    def base(name: str, of: str, **fields: str) -> dict[str, str]:
        tags = f"blocksnap,blocksnap.{name},{lvm.BaseMark('owner', uuid_of(of)).tag}"
        return row(f"blocksnap-{name}", lv_tags=tags, **fields)

    assert look(*thin_rows("data"), base("fine", "data")) == []
    (used,) = look(
        *thin_rows("data"), base("b1", "data", lv_kernel_major="0", lv_kernel_minor="7", lv_device_open="1")
    )
    assert used.message == "a base snapshot that nobody should use, active and open"
    (lost,) = look(*thin_rows("data"), base("b2", "gone"))
    assert (lost.ours, lost.message) == (False, "the base snapshot of a volume that is gone")
    History(tmp_path, f"lvm:{row('x')['vg_uuid']}/{uuid_of('gone')}").add("b2")
    assert look(*thin_rows("data"), base("b2", "gone"))[0].ours


@pytest.mark.parametrize(
    ("status", "severity", "message"),
    [
        (PoolStatus("rw", False, 1, 10, 100, 96, 100), "warning", "its data is 96.0 % full"),
        (PoolStatus("rw", False, 1, 91, 100, 10, 100), "warning", "its metadata is 91.0 % full"),
        (PoolStatus("out_of_data_space", False, 1, 1, 100, 90, 100), "error", "is out of data space"),
        (PoolStatus("ro", False, 1, 1, 100, 90, 100), "error", "is read-only"),
        (
            PoolStatus("rw", False, 1, 10, 100, 10, 100, 77),
            "warning",
            "holds a metadata snapshot (block 77) that is not",
        ),
    ],
)
def test_pools(look: Look, status: PoolStatus, severity: str, message: str) -> None:
    (found,) = look(*active_pool(), status=status)
    assert (found.severity, found.subject, found.ours) == (severity, "vg0/pool", False)
    assert found.message.startswith(message)
    assert found.advice


def test_pools_that_lvm_calls_damaged(look: Look) -> None:
    rows = active_pool()
    rows[0]["lv_check_needed"] = "1"
    assert [found.severity for found in look(*rows)] == ["error"]
    rows[0].update({"lv_check_needed": "0", "lv_health_status": "failed"})
    assert "failed" in look(*rows)[0].message


@pytest.mark.parametrize(("block", "ours"), [("77", True), ("78", False), ("", False)])
def test_a_metadata_snapshot_is_ours_if_the_journal_names_its_block(
    look: Look, tmp_path: Path, block: str, ours: bool
) -> None:
    trace = {"kind": "hold", "pool": "vg0/pool", "pool_uuid": uuid_of("pool"), "run": "d1", "block": block}
    dead_run(tmp_path, "d1", {"step": "hold", "volume": KEY, "name": "vg0/data", "trace": trace})
    (found,) = look(*active_pool(), status=PoolStatus("rw", False, 1, 10, 100, 10, 100, 77))
    assert found.ours is ours


def test_classic_snapshots_groups_and_restores(look: Look) -> None:
    snapshot = {"lv_role": "public,snapshot,thicksnapshot", "segtype": "linear", "origin": "thick"}
    found = look(
        row("full", **snapshot, data_percent="93.10", lv_attr="swi-a-s---"),
        row("fine", **snapshot, data_percent="12.00", lv_attr="swi-a-s---"),
        row("invalid", **snapshot, data_percent="100.00", lv_attr="swi-I-s---"),
        row("restoring", lv_tags="blocksnap.restoring,blocksnap.restoring.1"),
        row("being-restored", lv_tags="blocksnap.restoring", lv_device_open="1"),
        row("data-before-1", lv_tags="blocksnap.way-back", origin="data"),
        row("other-arriving", lv_tags="blocksnap.instant"),
        row("partial", vg_name="vg1", vg_partial="1"),
    )
    assert [(one.subject, one.severity) for one in found] == [
        ("vg0/data-before-1", "warning"),
        ("vg0/full", "warning"),
        ("vg0/invalid", "warning"),
        ("vg0/other-arriving", "warning"),
        ("vg0/restoring", "warning"),
        ("vg1", "error"),
    ]
    assert exit_code_for(found) == 1
    assert exit_code_for(found[:3]) == 3


def test_journals(tmp_path: Path) -> None:
    dead_run(tmp_path)
    (tmp_path / "journal" / "torn.jsonl").write_text("{")
    journal = Journal(tmp_path, "r1")
    try:
        found = list(examine_host.examine_journals(read_entries(tmp_path), NOW))
        assert [one.subject for one in found] == ["torn", "d1"]
        assert (
            found[1].message
            == "the run died after the step snapshot, 2.0 hours ago, and was not cleaned up after"
        )
        (late,) = examine_host.examine_journals(
            [entry for entry in read_entries(tmp_path) if entry.alive], time.time() + 49 * 3600
        )
        assert f"process {os.getpid()} has been taking this backup for 49.0 hours" in late.message
    finally:
        journal.finish()


@pytest.mark.parametrize("below", ["", "/a/b"])
@pytest.mark.parametrize(
    ("kind", "trouble"),
    [("file", "is not a directory"), ("link", "is not a directory"), ("closed", "cannot be written to")],
)
def test_a_state_directory_that_cannot_be_one(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, trouble: str, below: str
) -> None:
    mock.add("lvs", out=report_text())
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        # Root may write everywhere, unless the file system is read-only.
        asked = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: not (mode & os.W_OK and path == str(place)) and asked(path, mode)
        )
    found = [one for one in doctor.examine(f"{place}{below}") if one.area == "journal"]
    (one,) = found
    assert one.severity == "error"
    assert one.message == f"no backup can keep its journal there: {place} {trouble}"
    assert "state_directory" in str(one.advice)
    assert [one for one in doctor.examine(f"{tmp_path}/new{below}") if one.area == "journal"] == []


def test_what_a_dead_run_left_standing_still_is_an_error_until_it_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = tmp_path / "after"
    standing = [{"kind": "after", "argv": ["/usr/bin/touch", str(after)]}]
    dead_run(tmp_path, "d1", {"step": "quiesce", "deadline_seconds": 1, "standing": standing}, key=None)
    (found,) = examine_host.examine_journals(read_entries(tmp_path), NOW)
    assert (found.severity, found.ours) == ("error", True)

    def no_answer() -> None:
        raise BlocksnapError("lvs does not answer")

    monkeypatch.setattr(doctor, "read_report", no_answer)
    done = doctor.fix(str(tmp_path))
    assert done.removed == ("ran /usr/bin/touch, which run d1 left standing still",)
    assert done.warnings == ("cannot look at LVM: lvs does not answer",)
    assert after.exists()


def test_fixing_tells_what_it_could_not_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_report", lambda: None)
    trace = {"kind": "after", "argv": ["/no/such/hook"]}
    quiesce = {"step": "quiesce", "standing": [trace], "deadline_seconds": 1, "environment": {}}
    dead_run(tmp_path, "d1", quiesce, key=None)
    done = doctor.fix(str(tmp_path))
    (warning,) = done.warnings
    assert "run d1 left something standing still: the hook /no/such/hook cannot be run" in warning
    assert read_entries(tmp_path) == []


@pytest.mark.parametrize("same_boot", [True, False])
def test_suspended_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, same_boot: bool) -> None:
    dead_run(tmp_path, boot=recover.host.boot_id() if same_boot else "earlier")
    states = [{1, 2, 3}, {1, 2}]
    uuids = {1: uuid_of("data").replace("-", ""), 2: "x" * 32}
    monkeypatch.setattr(devmapper, "suspended_devices", lambda: states.pop(0))
    monkeypatch.setattr(devmapper, "lvm_identity", lambda number: LvmIdentity("v", uuids[number], ""))
    monkeypatch.setattr(devmapper, "dm_name", lambda number: f"vg0-{number}")
    monkeypatch.setattr(examine_host, "_SECOND_LOOK_SECONDS", 0)
    found = list(examine_host.examine_suspended(read_entries(tmp_path)))
    assert [(one.subject, one.severity, one.ours) for one in found] == [
        ("vg0-1", "error", same_boot),
        ("vg0-2", "error", False),
    ]


def test_block_devices_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_host, "_SYS_BLOCK", tmp_path)
    for name, file, text in (
        ("loop0", "loop/backing_file", "/srv/a.img\n"),
        ("loop1", "loop/backing_file", "/srv/b.img (deleted)\n"),
        ("nbd0", "pid", f"{os.getpid()}\n"),
        ("nbd1", "pid", "999999999\n"),
    ):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "loop2/loop").mkdir(parents=True)
    (tmp_path / "loop2/loop/backing_file").write_bytes(b"/srv/caf\xe9.img (deleted)\n")
    found = [one.subject for one in examine_host.examine_block_devices()]
    assert found == ["/dev/loop1", "/dev/loop2", "/dev/nbd1"]


def test_an_archive_that_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lvm, "archive_folder", lambda: str(tmp_path))
    for number in range(examine_host.ARCHIVE_FILES - 1):
        (tmp_path / f"vg0_{number:05}.vg").touch()
    assert list(examine_host.examine_archive()) == []
    (tmp_path / "vg0_99999.vg").write_text("x" * 50)
    (found,) = examine_host.examine_archive()
    assert found.message.startswith("1000 old versions of LVM's metadata, 50 bytes, since ")
    monkeypatch.setattr(lvm, "archive_folder", lambda: None)
    assert list(examine_host.examine_archive()) == []


def test_where_lvm_keeps_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out='archive=1\narchive_dir="/etc/lvm/archive"\n')
    assert lvm.archive_folder() == "/etc/lvm/archive"
    mock.add("lvmconfig", out='archive=0\narchive_dir="/etc/lvm/archive"\n')
    assert lvm.archive_folder() is None


def test_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_host, "has_program", lambda name: name not in ("lvcreate", "thin_check"))
    found = {one.subject: one for one in examine_host.examine_tools(lvm_in_use=True)}
    assert {name: one.severity for name, one in found.items()} == {
        "lvcreate": "error",
        "thin_check": "warning",
    }
    assert found["thin_check"].advice == "apt install thin-provisioning-tools"
    assert list(examine_host.examine_tools(lvm_in_use=False)) == []


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out="use_devicesfile=0\n")
    mock.add("lvremove", out="successfully removed\n")
    return mock


def test_fixing_removes_what_is_ours_and_leaves_what_a_live_run_has(
    mock: MockCommands, tmp_path: Path
) -> None:
    dead_run(tmp_path)
    held = KEY.replace(uuid_of("data"), uuid_of("held"))
    dead_run(tmp_path, "d2", key=held)
    rows = [
        *thin_rows("data", "held"),
        snapshot_row("d1"),
        snapshot_row("d2", origin="held", origin_uuid=uuid_of("held")),
        snapshot_row("stranger"),
    ]
    mock.add("lvs", out=report_text(*rows))
    with VolumeLocks(tmp_path, [(held, "vg0/held")]):
        done = doctor.fix(str(tmp_path))
    assert done.removed == ("removed vg0/blocksnap-d1, a snapshot of vg0/data that run d1 left",)
    assert done.warnings == ()
    assert len(done.puzzles) == 1
    assert [entry.run for entry in read_entries(tmp_path)] == ["d2"]
    assert len(mock.calls_of("lvremove")) == 1
    done = doctor.fix(str(tmp_path))
    assert "vg0/blocksnap-d2" in done.removed[-1]
    assert read_entries(tmp_path) == []


def test_one_that_cannot_be_removed_does_not_keep_the_others(mock: MockCommands, tmp_path: Path) -> None:
    for run in ("d1", "d2"):
        dead_run(tmp_path, run)
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1"), snapshot_row("d2")))
    mock.add_sequence("lvremove", [("", "  it is broken\n", 5), ("successfully removed\n", "", 0)])
    done = doctor.fix(str(tmp_path))
    assert [len(done.removed), len(done.warnings)] == [1, 1]
    assert [entry.run for entry in read_entries(tmp_path)] == ["d1"]


def test_lvm_that_does_not_answer_is_told_and_the_rest_is_looked_at(
    mock: MockCommands, tmp_path: Path
) -> None:
    dead_run(tmp_path)
    mock.add("lvs", err="  it is broken\n", status=5)
    found = doctor.examine(str(tmp_path))
    assert [one.message for one in found if one.severity == "error"] == [
        "cannot be looked at: lvs failed (exit status 5): it is broken"
    ]
    assert any(one.area == "journal" for one in found)
    done = doctor.fix(str(tmp_path))
    assert done.warnings == ("cannot look at LVM: lvs failed (exit status 5): it is broken",)
    assert len(read_entries(tmp_path)) == 1


def test_what_is_suspended_since_another_boot_is_somebody_elses(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead_run(tmp_path)
    mock.add("lvs", out=report_text(*thin_rows("data", lv_kernel_major="0", lv_kernel_minor="7")))
    mock.add("dmsetup")
    monkeypatch.setattr(recover, "_SECOND_LOOK_SECONDS", 0)
    monkeypatch.setattr(devmapper, "is_suspended", lambda number: number == 7)
    assert doctor.fix(str(tmp_path)).removed == ()
    assert mock.calls_of("dmsetup") == []


@pytest.mark.parametrize(("at_work", "resumed"), [([], True), ([4711], False)])
def test_what_a_dead_run_left_suspended_is_resumed(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_work: list[int], resumed: bool
) -> None:
    dead_run(tmp_path, boot=recover.host.boot_id())
    rows = thin_rows("data", lv_kernel_major="0", lv_kernel_minor="7")
    mock.add("lvs", out=report_text(*rows))
    mock.add("dmsetup")
    monkeypatch.setattr(recover, "_SECOND_LOOK_SECONDS", 0)
    monkeypatch.setattr(devmapper, "is_suspended", lambda number: number == 7)
    monkeypatch.setattr(devmapper, "suspended_with", lambda number: [number])
    monkeypatch.setattr(recover.host, "processes", lambda _: at_work)
    done = doctor.fix(str(tmp_path))
    assert (done.removed == ("resumed vg0/data, which run d1 left suspended",)) is resumed
    assert mock.calls_of("dmsetup") == ([["resume", "--major", "0", "--minor", "7"]] if resumed else [])
    assert (len(done.puzzles) == 1) is not resumed


@pytest.mark.parametrize("left", ["another device", "nothing"])
def test_a_pool_that_is_taken_away_meanwhile(look: Look, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    uuids = iter(["LVM-one", *(["LVM-two"] if left == "another device" else [None])])
    healthy = look(*active_pool())

    def status(_: int) -> PoolStatus:
        raise ValueError("not the status of a thin pool: ''")

    host = examine_lvm.Host(
        parse_report(report_text(*active_pool())), [], [], NOW, "/nowhere", LimitSettings()
    )
    monkeypatch.setattr(devmapper, "pool_status", status)
    monkeypatch.setattr(devmapper, "dm_uuid", lambda _: next(uuids))
    assert list(examine_lvm.examine_lvm(host)) == healthy == []
    monkeypatch.setattr(devmapper, "dm_uuid", lambda _: "LVM-one")
    with pytest.raises(ValueError, match="not the status"):
        list(examine_lvm.examine_lvm(host))


def test_a_filesystem_that_is_not_reached_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be unmounted meanwhile, and one that is mounted for reading only has nothing of ours since."""
    gone, there = UUID(int=1), UUID(int=2)

    def snapshots_on(filesystem: UUID) -> list[str]:
        if filesystem == gone:
            raise NotReachedError(filesystem, "it is not mounted")
        return [".blocksnap-x"]

    looks = [{gone, there}, {there}, {gone, there}, {gone, there}]
    monkeypatch.setattr(subvolume_leftovers, "_filesystems", lambda _: looks.pop(0))
    monkeypatch.setattr(subvolume, "snapshots_on", snapshots_on)
    (found,) = subvolume_leftovers.examine_subvolumes([], [])
    assert found.subject == f".blocksnap-x on btrfs {there}"
    # It is mounted for writing all the same.
    first, second = subvolume_leftovers.examine_subvolumes([], [])
    assert (first.severity, first.subject) == ("error", f"btrfs {gone}")
    assert second == found


def test_where_it_cannot_be_told_what_runs_a_dead_run_is_looked_for_again(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("d1", "d2"):
        dead_run(tmp_path, run)
    mock.add("lvs", out=report_text(*thin_rows("data")))

    def processes(_: object) -> list[int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(host, "processes", processes)
    done = doctor.fix(str(tmp_path))
    assert [warning.split(":")[0] for warning in done.warnings] == [
        f"run {run} is looked for again" for run in ("d1", "d2")
    ]
    assert len(read_entries(tmp_path)) == 2
    monkeypatch.undo()
    monkeypatch.setenv("PATH", mock.path)
    assert doctor.fix(str(tmp_path)).warnings == ()
    assert read_entries(tmp_path) == []
