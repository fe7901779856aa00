"""What becomes of base snapshots: decided before the commit, done after it, finished if the run dies."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from blocksnap.controller.history import History
from blocksnap.controller.journal import Journal, StateError, read_entries
from blocksnap.controller.recover import recover
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import UsageError, VolumeError
from blocksnap.extents.changes import BaseDecision
from blocksnap.system import lvm_config
from blocksnap.system.lvm import BaseMark, base_of
from blocksnap.volumes.base import Ledger, SnapshotTiming
from support.lvm_lab import report_text, row, thin_rows, uuid_of
from support.mock_command import MockCommands

OWNER = "0123456789abcdef"
KEEP = BaseDecision(stays=True, reason="as asked for")
DROP = BaseDecision(stays=False, reason="the pool is full")


def test_mark_says_whose_base_it_is_and_of_which_volume() -> None:
    mark = BaseMark(OWNER, uuid_of("data"))
    assert base_of(["blocksnap", "blocksnap.run1", mark.tag]) == mark
    for tags in (
        [mark.tag],
        ["blocksnap", mark.tag],
        ["blocksnap", "blocksnap.run1"],
        ["blocksnap", "blocksnap.run1", "blocksnap-base"],
        ["blocksnap", "blocksnap.run1", "blocksnap-base.x"],
        ["blocksnap", "blocksnap.run1", mark.tag, BaseMark("other", "uuid").tag],
    ):
        assert base_of(tags) is None
    for owner, uuid in (("", "u"), ("a.b", "u"), ("a", ""), ("a", "u.v"), ("a b", "u")):
        with pytest.raises(UsageError):
            _ = BaseMark(owner, uuid).tag


class Snapshot:
    size = 4096
    timing = SnapshotTiming(1.0, 0.0)

    def __init__(self, log: list[str], decision: BaseDecision | VolumeError | None) -> None:
        self.log = log
        self.decision = decision
        self.failure: Exception | None = None

    def check(self) -> None:
        pass

    def decide_base(self, policy: str) -> BaseDecision | None:
        self.log.append(f"decide {policy}")
        if isinstance(self.decision, Exception):
            raise self.decision
        return self.decision

    def settle(self, owner: str, *, stays: bool) -> None:
        self.log.append(f"settle {owner} {stays}")
        if self.failure:
            raise self.failure

    def remove(self) -> None:
        self.log.append("remove")


class Volume:
    kind = "thin"
    size = 4096

    def __init__(self, name: str, decision: BaseDecision | VolumeError | None) -> None:
        self.name = name
        self.key = f"key:{name}"
        self.log: list[str] = []
        self.snapshot = Snapshot(self.log, decision)
        self.ledger: Ledger | None = None

    def trace(self, run: str) -> dict[str, str]:
        return {"vg": "vg0", "lv": f"s-{self.name}", "origin_uuid": uuid_of(self.name), "run": run}

    def prepare(self) -> None:
        pass

    def take_snapshot(self, run: str, ledger: Ledger) -> Snapshot:
        self.ledger = ledger
        return self.snapshot


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    lvm_config._user_filters.cache_clear()
    mock = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", mock.path)
    mock.add("lvmconfig", out="use_devicesfile=0\n")
    mock.add("lvs", out=report_text())
    mock.add("lvremove", out="successfully removed\n")
    mock.add("lvchange", out="Logical volume changed.\n")
    return mock


def test_a_run_decides_before_the_commit_and_settles_after_it(mock: MockCommands, tmp_path: Path) -> None:
    a, b, file = Volume("a", KEEP), Volume("b", DROP), Volume("c", None)
    with SnapshotSession([a, b, file], "run1", tmp_path) as session:  # type: ignore[list-item]
        decisions = session.decide_bases("keep")
        assert decisions == [KEEP, DROP, None]
        assert session.warnings == ["no base of b is kept: the pool is full"]
        session.settle(OWNER, decisions)
        (entry,) = read_entries(tmp_path)
        assert [(each.snapshot, each.owner, each.lv_uuid, each.stays) for each in entry.rotations()] == [
            ("s-a", OWNER, uuid_of("a"), True),
            ("s-b", OWNER, uuid_of("b"), False),
        ]
    assert a.log == ["decide keep", f"settle {OWNER} True", "remove"]
    assert b.log == ["decide keep", f"settle {OWNER} False", "remove"]
    assert file.log == ["decide keep", "remove"]
    assert read_entries(tmp_path) == []


def test_what_cannot_be_decided_about_does_not_stay(mock: MockCommands, tmp_path: Path) -> None:
    a, b = Volume("a", VolumeError("there is no room in /tmp")), Volume("b", KEEP)
    with SnapshotSession([a, b], "run1", tmp_path) as session:  # type: ignore[list-item]
        decisions = session.decide_bases("keep")
        assert decisions == [BaseDecision(stays=False, reason="there is no room in /tmp"), KEEP]
        session.settle(OWNER, decisions)
    assert session.warnings == ["no base of a is kept: there is no room in /tmp"]
    assert a.log == ["decide keep", f"settle {OWNER} False", "remove"]


def test_auto_that_does_not_keep_is_no_warning(mock: MockCommands, tmp_path: Path) -> None:
    with SnapshotSession([Volume("a", DROP)], "run1", tmp_path) as session:  # type: ignore[list-item]
        session.decide_bases("auto")
    assert session.warnings == []


@pytest.mark.parametrize("failure", [VolumeError("no"), OSError("no")])
def test_what_fails_after_the_commit_is_a_warning(
    mock: MockCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    a, b = Volume("a", KEEP), Volume("b", KEEP)
    a.snapshot.failure = failure
    with SnapshotSession([a, b], "run1", tmp_path) as session:  # type: ignore[list-item]
        session.settle(OWNER, session.decide_bases("keep"))
    assert session.warnings == ["the base snapshots of a were not brought up to date: no"]
    assert b.log == ["decide keep", f"settle {OWNER} True", "remove"]

    def full(*_: object) -> None:
        raise StateError("journal", OSError(28, "No space left on device"))

    b.log.clear()
    with SnapshotSession([b], "run2", tmp_path) as session:  # type: ignore[list-item]
        monkeypatch.setattr(Journal, "append_all", full)
        session.settle(OWNER, [KEEP])
        monkeypatch.undo()
    # What was not announced is not done: after a crash nobody would know of it.
    assert b.log == ["remove"]
    assert "the base snapshots stay as they were" in session.warnings[0]


def test_what_a_snapshot_leaves_meanwhile_keeps_the_journal(mock: MockCommands, tmp_path: Path) -> None:
    a = Volume("a", None)
    first, second = {"kind": "hold", "pool": "vg0/p"}, {"kind": "hold", "pool": "vg0/q"}
    with SnapshotSession([a], "run1", tmp_path):  # type: ignore[list-item]
        assert a.ledger is not None
        a.ledger.add(first)
        a.ledger.add(second)
        a.ledger.strike(first)
        (entry,) = read_entries(tmp_path)
        assert second in entry.traces()
        assert first not in entry.traces()
    (entry,) = read_entries(tmp_path)
    assert second in entry.traces()


def test_what_is_gone_and_cannot_be_written_down_is_looked_for_once_more(
    mock: MockCommands, tmp_path: Path
) -> None:
    a = Volume("a", None)
    held = {"kind": "hold", "pool": "vg0/p"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SnapshotSession([a], "run1", tmp_path):  # type: ignore[list-item]
        assert a.ledger is not None
        a.ledger.add(held)
        (entry,) = read_entries(tmp_path)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (entry.path.stat().st_size, hard))
            a.ledger.strike(held)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (entry,) = read_entries(tmp_path)
    assert held in entry.traces()


# What dead runs had announced.


def dead_journal(state: Path, run: str, *, stays: bool | None) -> None:
    lines: list[dict[str, object]] = [
        {"step": "begin", "pid": 1, "start": 1, "boot": "earlier", "host": "h", "began": 1.0},
        {
            "step": "snapshot",
            "volume": KEY,
            "trace": {
                "vg": "vg0", "lv": f"blocksnap-{run}", "run": run, "origin_uuid": uuid_of("data"),
            },
        },
        {"step": "commit"},
    ]  # fmt: skip
    if stays is not None:
        facts = {"vg": "vg0", "lv": f"blocksnap-{run}", "lv_uuid": uuid_of("data"), "owner": OWNER}
        lines.append({"step": "rotate", "volume": KEY, **facts, "stays": stays})
    (state / "journal").mkdir(exist_ok=True, parents=True)
    (state / "journal" / f"{run}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


KEY = f"lvm:{row('x')['vg_uuid']}/{uuid_of('data')}"


def snapshot_row(run: str, *, base_of: str | None = None, origin: str = "data") -> dict[str, str]:
    tags = f"blocksnap,blocksnap.{run}" + (f",{BaseMark(base_of, uuid_of('data')).tag}" if base_of else "")
    return row(
        f"blocksnap-{run}", lv_tags=tags, segtype="thin", lv_time="2099-01-01 00:00:00 +0000",
        origin=origin, origin_uuid=uuid_of(origin) if origin else "",
    )  # fmt: skip


def names(calls: list[list[str]]) -> list[str]:
    return [call[call.index("--select") + 1].split('"')[1] for call in calls]


@pytest.mark.parametrize(
    ("stays", "marked", "removed"),
    [
        (None, [], ["blocksnap-d1"]),
        (False, [], ["blocksnap-d1"]),
        (True, ["blocksnap-d1"], ["blocksnap-old"]),
    ],
)
def test_a_rotation_that_was_announced_is_finished(
    mock: MockCommands, tmp_path: Path, stays: bool | None, marked: list[str], removed: list[str]
) -> None:
    """Before the announcement nobody knows whether the run is committed: the base before stays.

    Where none is to stay the next run, whose policy that is too, removes it.
    """
    dead_journal(tmp_path, "d1", stays=stays)
    bases = [snapshot_row("old", base_of=OWNER), snapshot_row("strange", base_of="another")]
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1"), *bases))
    found = recover(tmp_path, [KEY])
    assert names(mock.calls_of("lvchange")) == marked
    assert names(mock.calls_of("lvremove")) == removed
    assert len(found.removed) == len(marked) + len(removed)
    assert found.warnings == ()
    assert read_entries(tmp_path) == []


def test_a_rotation_of_a_group_is_finished_for_the_volumes_of_the_run_and_once(
    mock: MockCommands, tmp_path: Path
) -> None:
    dead_journal(tmp_path, "d1", stays=True)
    with (tmp_path / "journal" / "d1.jsonl").open("a") as journal:
        journal.write(json.dumps({"step": "snapshot", "volume": "key:other", "trace": {"lv": "x"}}) + "\n")
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1")))
    assert recover(tmp_path, ["key:other"]).removed == ()
    assert len(recover(tmp_path, [KEY]).removed) == 1
    assert names(mock.calls_of("lvchange")) == ["blocksnap-d1"]
    # The other volume of the group had no run since, so the journal is there; this one has a later base.
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d2", base_of=OWNER)))
    assert recover(tmp_path, [KEY]).removed == ()
    assert [entry.run for entry in read_entries(tmp_path)] == ["d1"]
    assert not mock.calls_of("lvremove")


def test_a_rotation_that_cannot_be_finished_is_tried_again(mock: MockCommands, tmp_path: Path) -> None:
    dead_journal(tmp_path, "d1", stays=True)
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1")))
    mock.add_sequence("lvchange", [("", "no\n", 5), ("changed\n", "", 0)])
    assert "cannot finish what run d1 began" in recover(tmp_path, [KEY]).warnings[0]
    assert not mock.calls_of("lvremove")
    assert len(recover(tmp_path, [KEY]).removed) == 1
    assert read_entries(tmp_path) == []


def test_a_base_is_no_leftover(mock: MockCommands, tmp_path: Path) -> None:
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("old", base_of=OWNER)))
    assert recover(tmp_path, force=True).removed == ()
    # A merge makes LVM forget the origin; the volume is there all the same.
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("old", base_of=OWNER, origin="")))
    assert recover(tmp_path, force=True).removed == ()
    assert not mock.calls_of("lvremove")


def test_the_base_of_a_volume_that_is_gone_is_removed_by_who_knows_it(
    mock: MockCommands, tmp_path: Path
) -> None:
    mock.add("lvs", out=report_text(*thin_rows("other"), snapshot_row("old", base_of=OWNER, origin="")))
    assert recover(tmp_path).removed == ()
    History(tmp_path, KEY).add("old")
    assert recover(tmp_path, ["key:other"]).removed == (
        "removed vg0/blocksnap-old, the base of a volume that is gone",
    )


def test_a_leftover_whose_origin_lvm_forgot_is_found_by_its_journal(
    mock: MockCommands, tmp_path: Path
) -> None:
    dead_journal(tmp_path, "d1", stays=None)
    strange = row("lure", lv_tags="blocksnap,blocksnap.d1", segtype="thin")
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1", origin=""), strange))
    recover(tmp_path, [KEY])
    assert names(mock.calls_of("lvremove")) == ["blocksnap-d1"]


@pytest.mark.parametrize("damage", [{"owner": "a b"}, {"lv_uuid": ""}])
def test_a_journal_that_makes_no_sense_changes_nothing(
    mock: MockCommands, tmp_path: Path, damage: dict[str, Any]
) -> None:
    dead_journal(tmp_path, "d1", stays=True)
    path = tmp_path / "journal" / "d1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), **damage})]) + "\n")
    mock.add("lvs", out=report_text(*thin_rows("data"), snapshot_row("d1"), snapshot_row("o", base_of=OWNER)))
    assert "cannot finish" in recover(tmp_path).warnings[0]
    assert "blocksnap-o" not in names(mock.calls_of("lvremove"))
