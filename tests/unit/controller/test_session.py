from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocksnap.controller import recover as recover_module
from blocksnap.controller import session as session_module
from blocksnap.controller.journal import Journal, Step, read_entries
from blocksnap.controller.recover import Leftover, may_remove, parse_lvm_time, recover
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import BusyError, UsageError, VolumeError
from blocksnap.system import devmapper, host, lvm_config
from blocksnap.system.command import CommandTimeoutError
from blocksnap.system.host import host_name
from blocksnap.volumes.base import Ledger, SnapshotTiming
from support.forks import exit_code_of
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands


class FakeSnapshot:
    size = 4096

    def __init__(self, volume: FakeVolume, taken_at: float) -> None:
        self.binding: dict[str, Any] = {}
        self.volume = volume
        self.timing = SnapshotTiming(taken_at, 0.0)

    def check(self) -> None:
        self.volume.happen("check")

    def remove(self) -> None:
        self.volume.happen("remove")


class FakeVolume:
    kind = "file"
    size = 4096
    snapshot_device: int | None = None

    def __init__(self, name: str, log: list[str], taken_at: float = 100.0) -> None:
        self.name = name
        self.key = f"key:{name}"
        self.log = log
        self.taken_at = taken_at
        self.failures: dict[str, BaseException] = {}
        self.on: dict[str, Callable[[], None]] = {}

    def happen(self, what: str, *words: str) -> None:
        self.log.append(" ".join([what, self.name, *words]))
        if what in self.on:
            self.on[what]()
        if what in self.failures:
            raise self.failures[what]

    def trace(self, run: str) -> dict[str, str] | None:
        return {"kind": "lvm", "vg": "vg", "lv": f"s-{self.name}", "run": run}

    def prepare(self) -> None:
        self.happen("prepare")

    def take_snapshot(self, run: str, ledger: Ledger) -> FakeSnapshot:
        self.happen("take")
        return FakeSnapshot(self, self.taken_at)


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def _no_lvm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "mock" not in request.fixturenames:
        monkeypatch.setattr(recover_module, "read_report", lambda *_: None)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    removed: list[str] = []
    monkeypatch.setattr(session_module, "remove_trace", lambda trace: removed.append(trace["lv"]))
    return removed


def test_all_are_prepared_announced_taken_and_removed(tmp_path: Path, log: list[str]) -> None:
    a, b = FakeVolume("a", log, 100.0), FakeVolume("b", log, 100.25)

    def announced() -> None:
        (entry,) = read_entries(tmp_path)
        assert [trace["lv"] for trace in entry.traces()] == ["s-a", "s-b"]

    a.on["take"] = announced
    with SnapshotSession([a, b], "run1", tmp_path) as session:
        assert len(session.snapshots) == 2
        assert session.skew_seconds == 0.25
        session.committing()
    assert log == [
        "prepare a", "prepare b", "take a", "take b", "check a", "check b",
        "remove b", "remove a",
    ]  # fmt: skip
    assert (session.warnings, session.recovered) == ([], [])
    assert read_entries(tmp_path) == []


def test_no_snapshot_is_taken_when_one_volume_is_not_fit(tmp_path: Path, log: list[str]) -> None:
    a, b = FakeVolume("a", log), FakeVolume("b", log)
    b.failures["prepare"] = VolumeError("full")
    with pytest.raises(VolumeError, match="full"), SnapshotSession([a, b], "run1", tmp_path):
        pass
    assert log == ["prepare a", "prepare b"]
    assert read_entries(tmp_path) == []


@pytest.mark.parametrize("failure", [VolumeError("no"), KeyboardInterrupt(), SystemExit(143), RuntimeError()])
@pytest.mark.parametrize("step", ["take", "check"])
def test_whatever_fails_nothing_stays(
    tmp_path: Path, log: list[str], traces: list[str], failure: BaseException, step: str
) -> None:
    a, b = FakeVolume("a", log), FakeVolume("b", log)
    b.failures[step] = failure
    with pytest.raises(type(failure)), SnapshotSession([a, b], "run1", tmp_path):
        pass
    assert "remove a" in log
    # One that failed while it was taken may have come to be, and has only a name.
    assert traces == (["s-b"] if step == "take" else [])
    assert read_entries(tmp_path) == []


@pytest.mark.parametrize("failure", [VolumeError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_the_body_may_fail_by_any_means(tmp_path: Path, log: list[str], failure: BaseException) -> None:
    with pytest.raises(type(failure)), SnapshotSession([FakeVolume("a", log)], "run1", tmp_path):
        raise failure
    assert log[-1] == "remove a"


def test_one_that_cannot_be_removed_does_not_keep_the_others(tmp_path: Path, log: list[str]) -> None:
    volumes = [FakeVolume(name, log) for name in "abc"]
    volumes[1].failures["remove"] = VolumeError("stuck")
    with SnapshotSession(volumes, "run1", tmp_path) as session:
        pass
    assert log[-3:] == ["remove c", "remove b", "remove a"]
    assert session.warnings == ["the snapshot of b was not removed, the next run tries again: stuck"]
    (entry,) = read_entries(tmp_path)
    assert "s-b" in [trace["lv"] for trace in entry.traces()]


def test_interrupt_while_cleaning_up_is_kept_for_the_end(tmp_path: Path, log: list[str]) -> None:
    volumes = [FakeVolume(name, log) for name in "abc"]
    volumes[2].failures["remove"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), SnapshotSession(volumes, "run1", tmp_path):
        pass
    assert log[-3:] == ["remove c", "remove b", "remove a"]
    with SnapshotSession(volumes[:1], "run2", tmp_path):
        pass


def test_committed_runs_are_remembered_and_others_are_not(tmp_path: Path, log: list[str]) -> None:
    a, b = FakeVolume("a", log), FakeVolume("b", log)
    with SnapshotSession([a], "run1", tmp_path) as session:
        assert not session.remembers(a, "run1")
        session.committing()
    with SnapshotSession([a, b], "run2", tmp_path) as session:
        assert session.remembers(a, "run1")
        assert not session.remembers(b, "run1")
    with SnapshotSession([a], "run3", tmp_path) as session:
        assert not session.remembers(a, "run2")
        assert not SnapshotSession([a], "run4", tmp_path / "elsewhere").remembers(a, "run1")


def test_run_that_cannot_be_written_down_is_a_warning(tmp_path: Path, log: list[str]) -> None:
    (tmp_path / "history").touch()
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path) as session:
        session.committing()
    (warning,) = session.warnings
    assert "cannot be written down" in warning
    assert "the next backup of a reads all of it" in warning


def test_a_journal_that_takes_nothing_more_fails_no_backup_that_was_read(
    tmp_path: Path, log: list[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path) as session:
        (entry,) = read_entries(tmp_path)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (entry.path.stat().st_size, hard))
            session.committing()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert session.remembers(session.volumes[0], "run1")
    assert session.warnings == []
    assert read_entries(tmp_path) == []


def test_a_journal_that_cannot_be_removed_is_a_warning(tmp_path: Path, log: list[str]) -> None:
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path) as session:
        (entry,) = read_entries(tmp_path)
        entry.path.unlink()
        entry.path.mkdir()
    (warning,) = session.warnings
    assert warning.startswith("the journal of this run stays until the next one: cannot write ")
    entry.path.rmdir()
    # The volume is free all the same.
    with SnapshotSession([FakeVolume("a", log)], "run2", tmp_path):
        pass


def test_other_runs_of_the_volume_are_kept_out(tmp_path: Path, log: list[str]) -> None:
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path):
        with pytest.raises(BusyError), SnapshotSession([FakeVolume("a", log)], "run2", tmp_path):
            pass
        with SnapshotSession([FakeVolume("b", log)], "run3", tmp_path):
            pass
    assert read_entries(tmp_path) == []


def test_a_volume_is_named_once(tmp_path: Path, log: list[str]) -> None:
    with pytest.raises(UsageError, match="a is named twice"):
        SnapshotSession([FakeVolume("a", log), FakeVolume("a", log)], "run1", tmp_path)


def test_a_snapshot_that_may_still_come_is_not_forgotten(
    tmp_path: Path, log: list[str], traces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lvcreate waits for the lock of its group, is left running, and makes the snapshot in the end."""
    at_work = [4711]
    monkeypatch.setattr(host, "processes", lambda names: at_work if "lvcreate" in names else [])
    volume = FakeVolume("a", log)
    volume.failures["take"] = CommandTimeoutError("lvcreate", 4711, 120)
    session = SnapshotSession([volume], "run1", tmp_path)
    with pytest.raises(CommandTimeoutError), session:
        pass
    assert session.warnings == [
        "lvcreate is still at work: should it make a snapshot of a, the next run removes it"
    ]
    assert traces == ["s-a"]
    assert [entry.run for entry in read_entries(tmp_path)] == ["run1"]
    begin, *steps = (tmp_path / "journal" / "run1.jsonl").read_text().splitlines()
    dead = json.loads(begin) | {"pid": 4194999, "start": 1}
    (tmp_path / "journal" / "run1.jsonl").write_text("\n".join([json.dumps(dead), *steps]) + "\n")
    recover(tmp_path, ["key:a"])
    assert [entry.run for entry in read_entries(tmp_path)] == ["run1"]
    at_work.clear()
    recover(tmp_path, ["key:a"])
    assert read_entries(tmp_path) == []


@pytest.mark.parametrize(
    "failure", [OSError(24, "Too many open files"), ValueError("what?"), KeyboardInterrupt()]
)
def test_whoever_cannot_tell_what_comes_removes_all_the_same(
    tmp_path: Path, log: list[str], traces: list[str], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def processes(names: object) -> list[int]:
        raise failure

    monkeypatch.setattr(host, "processes", processes)
    a, b = FakeVolume("a", log), FakeVolume("b", log)
    b.failures["take"] = VolumeError("full")
    session = SnapshotSession([a, b], "run1", tmp_path)
    with pytest.raises(VolumeError if isinstance(failure, Exception) else KeyboardInterrupt), session:
        pass
    assert log[-1] == "remove a"
    assert traces == ["s-b"]
    (warning,) = session.warnings
    assert warning.startswith("lvcreate may be at work still")
    assert [entry.run for entry in read_entries(tmp_path)] == ["run1"]


def test_what_cannot_be_told_does_not_end_a_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody may be at work on is not resumed, and not forgotten."""

    def processes(names: object) -> list[int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(host, "processes", processes)
    monkeypatch.setattr(devmapper, "is_suspended", lambda number: True)
    monkeypatch.setattr(recover_module, "_SECOND_LOOK_SECONDS", 0)
    entry = SimpleNamespace(run="r", is_of_this_boot=True, traces=lambda: [{"origin_uuid": "u"}])
    report = SimpleNamespace(find_uuid=lambda uuid: SimpleNamespace(number=5, full_name="vg/a"))
    found = recover_module._Findings()
    recover_module._resume_origins(cast("Any", [entry]), cast("Any", report), found)
    assert (found.removed, found.kept) == ([], {"r"})
    (warning,) = found.warnings
    assert warning.startswith("cannot resume vg/a, which may be suspended: ")


# What dead runs left.

NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("state", "created", "force", "removed"),
    [
        ("dead", NOW + 5, False, True),
        ("dead", None, False, True),
        ("alive", NOW - 5, False, False),
        ("alive", NOW - 5, True, False),
        ("unknown", NOW - 5, False, True),
        ("unknown", NOW + 5, False, False),
        ("unknown", None, False, False),
        ("unknown", NOW + 5, True, True),
    ],
)
def test_only_what_nobody_can_be_using_is_removed(
    state: Any, created: float | None, force: bool, removed: bool
) -> None:
    leftover = Leftover("vg", "s", "vg/a", "k", "r", created, state, host=host_name())
    assert may_remove(leftover, boot_time=NOW, force=force) is removed


def test_what_another_host_made_may_be_in_use_there() -> None:
    """Two hosts of a cluster see the same disks, and LVM does not know it: the other may be backing up."""
    leftover = Leftover("vg", "s", "vg/a", "k", "r", NOW - 5, "unknown", host="another")
    assert not may_remove(leftover, boot_time=NOW)
    assert may_remove(leftover, boot_time=NOW, force=True)


def test_times_of_lvm() -> None:
    assert parse_lvm_time("2026-11-22 21:47:39 +0100") == 1795380459.0
    assert parse_lvm_time("yesterday") is None


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out="use_devicesfile=0\n")
    mock.add("lvremove", out="successfully removed\n")
    return mock


def dead_journal(state: Path, run: str, volume: str | None = None) -> None:
    lines = [{"step": "begin", "pid": 1, "start": 1, "boot": "earlier", "host": "h", "began": 1.0}]
    if volume:
        lines.append(
            {
                "step": "snapshot",
                "volume": volume,
                "trace": {"vg": "vg0", "lv": f"blocksnap-{run}", "run": run},
            }
        )
    (state / "journal").mkdir(exist_ok=True, parents=True)
    (state / "journal" / f"{run}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def snapshot_row(run: str, origin: str, created: str = "2099-01-01 00:00:00 +0000") -> dict[str, str]:
    return row(
        f"blocksnap-{run}", lv_tags=f"blocksnap,blocksnap.{run}", origin=origin, origin_uuid=uuid_of(origin),
        lv_time=created, segtype="thin",
    )  # fmt: skip


def key_of(name: str) -> str:
    return f"lvm:{row('x')['vg_uuid']}/{uuid_of(name)}"


def removed_names(mock: MockCommands) -> list[str]:
    selections = [call[call.index("--select") + 1] for call in mock.calls_of("lvremove")]
    return [text.split('"')[1] for text in selections]


def test_leftovers_of_dead_runs_of_these_volumes_are_removed(mock: MockCommands, tmp_path: Path) -> None:
    dead_journal(tmp_path, "d1", key_of("data"))
    dead_journal(tmp_path, "d2", key_of("other"))
    dead_journal(tmp_path, "d3", key_of("data"))  # died before lvcreate
    rows = thin_rows("data", "other")
    mock.add("lvs", out=report_text(*rows, snapshot_row("d1", "data"), snapshot_row("d2", "other")))
    found = recover(tmp_path, [key_of("data")])
    assert removed_names(mock) == ["blocksnap-d1"]
    assert found.removed == ("removed vg0/blocksnap-d1, a snapshot of vg0/data that run d1 left",)
    assert [entry.run for entry in read_entries(tmp_path)] == ["d2"]
    recover(tmp_path)
    assert removed_names(mock) == ["blocksnap-d1", "blocksnap-d2"]


def test_snapshots_of_a_live_run_are_left_alone(mock: MockCommands, tmp_path: Path, log: list[str]) -> None:
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("run1", "data")))
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path):
        assert recover(tmp_path, force=True).removed == ()
    assert not mock.calls_of("lvremove")


def test_snapshot_of_an_unknown_run_is_reported_or_removed_by_age(mock: MockCommands, tmp_path: Path) -> None:
    old = snapshot_row("old", "data", "2001-01-01 00:00:00 +0000")
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("new", "data"), old))
    found = recover(tmp_path)
    assert removed_names(mock) == ["blocksnap-old"]
    (warning,) = found.puzzles
    assert "vg0/blocksnap-new" in warning
    assert "if no other run is using it" in warning
    recover(tmp_path, force=True)
    assert "blocksnap-new" in removed_names(mock)


def test_nothing_without_both_tags_is_ever_touched(mock: MockCommands, tmp_path: Path) -> None:
    dead_journal(tmp_path, "d1", key_of("data"))
    lures = [
        row("blocksnap-d1", lv_tags="blocksnap", origin="data", origin_uuid=uuid_of("data")),
        row("lure2", lv_tags="blocksnap.d1", origin="data", origin_uuid=uuid_of("data")),
        row("lure3", lv_tags="blocksnap,blocksnap.d1"),
        row("lure4", lv_tags="blocksnap-mark.0.0000000001.d1"),
        row(
            "lure5", lv_tags="blocksnap,blocksnap.d1,blocksnap.d2", origin="data", origin_uuid=uuid_of("data")
        ),
    ]
    mock.add("lvs", out=report_text(*thin_rows("data"), *lures))
    assert recover(tmp_path, force=True).removed == ()
    assert not mock.calls_of("lvremove")


def test_one_that_cannot_be_removed_keeps_its_journal(mock: MockCommands, tmp_path: Path) -> None:
    for run in ("d1", "d2"):
        dead_journal(tmp_path, run, key_of("data"))
    mock.add(
        "lvs", out=report_text(*thin_rows("data"), snapshot_row("d1", "data"), snapshot_row("d2", "data"))
    )
    mock.add_sequence("lvremove", [("", "  no\n", 5), ("successfully removed\n", "", 0)])
    found = recover(tmp_path)
    assert len(found.removed) == 1
    assert "cannot remove vg0/blocksnap-d1" in found.warnings[0]
    assert [entry.run for entry in read_entries(tmp_path)] == ["d1"]


def test_lvm_is_not_asked_for_files(mock: MockCommands, tmp_path: Path, log: list[str]) -> None:
    volume = FakeVolume("a", log)
    volume.trace = lambda _: None  # type: ignore[method-assign]
    with SnapshotSession([volume], "run1", tmp_path):
        pass
    assert not mock.calls


def run_until_killed(host: Path, steps: int) -> int:
    """Run a session in a process that dies after some steps; what was snapshotted are files in a folder."""

    def step() -> None:
        nonlocal steps
        steps -= 1
        if steps < 0:
            os._exit(9)

    class Volume(FakeVolume):
        def happen(self, what: str, *words: str) -> None:
            step()
            if what == "take":
                (host / f"s-{self.name}").touch()
                step()
            if what == "remove":
                (host / f"s-{self.name}").unlink()
                step()

    def work() -> int:
        append = Journal.append_all

        def watched(journal: Journal, steps: list[tuple[Step, dict[str, object]]]) -> None:
            step()
            append(journal, steps)
            step()

        Journal.append_all = watched  # type: ignore[method-assign]
        volumes = [Volume(name, []) for name in "ab"]
        with SnapshotSession(volumes, "run1", host / "state") as session:
            session.committing()
        return 0

    return exit_code_of(work)


def test_killed_at_any_step_the_journal_knows_what_is_left(tmp_path: Path) -> None:
    """Whatever was taken and not removed is announced in a journal of a dead run."""
    died = 0
    for number in range(40):
        host = tmp_path / str(number)
        host.mkdir()
        code = run_until_killed(host, number)
        left = {path.name for path in host.glob("s-*")}
        entries = read_entries(host / "state")
        assert not any(entry.alive for entry in entries)
        assert left <= {trace["lv"] for entry in entries for trace in entry.traces()}
        if code == 0:
            assert (left, entries) == (set(), [])
            break
        assert code == 9
        died += 1
    assert died > 10


def test_locks_of_a_session_are_free_after_a_crash(tmp_path: Path, log: list[str]) -> None:
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path) as session:
        assert os.listdir(tmp_path / "journal") == ["run1.jsonl"]
    with SnapshotSession([FakeVolume("a", log)], "run1", tmp_path) as session:
        pass
    assert session.warnings == []
