"""What runs leave standing still: announced, told by doctor, and let go by whoever comes next."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from blocksnap.controller import journal as journal_module
from blocksnap.controller.examine_host import examine_standing
from blocksnap.controller.journal import Journal, read_entries, take_over
from blocksnap.controller.quiescing import QuiesceRequest, announce, let_go_leftovers
from blocksnap.controller.recover import recover
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import UsageError
from blocksnap.quiesce import libvirt
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.system import host
from blocksnap.volumes.resolve import resolve_volume
from support.require import require
from support.standing import hook_folder, read_log, safe_base, write_hook

STANDING: list[dict[str, Any]] = [
    {"kind": "after", "argv": ["/no/such/hook", "start"]},
    {"kind": "cgroup", "path": "/sys/fs/cgroup/blocksnap-no-such-group", "name": "unit shop.service"},
    {"kind": "filesystem", "point": "/no/such/folder", "device": 1},
]


def dead_run(state: Path, *steps: object, boot: str | None = None, run: str = "d1") -> Path:
    begin = {
        "step": "begin",
        "pid": 4194999,
        "start": 1,
        "boot": boot or host.boot_id(),
        "host": "h",
        "began": 1.0,
    }
    (state / "journal").mkdir(parents=True, exist_ok=True)
    path = state / "journal" / f"{run}.jsonl"
    path.write_text("".join(f"{json.dumps(step)}\n" for step in (begin, *steps)))
    return path


def quiesce(*standing: dict[str, Any]) -> dict[str, Any]:
    return {"step": "quiesce", "standing": list(standing), "deadline_seconds": 0.5, "environment": {}}


@pytest.mark.parametrize(
    ("steps", "stands"),
    [
        ([], False),
        ([quiesce(*STANDING)], True),
        ([quiesce(*STANDING), {"step": "released", "by": "controller"}], False),
        ([quiesce(*STANDING), {"step": "released", "by": "watchdog", "failed": 1}], True),
        ([quiesce(*STANDING), {"step": "taken"}], True),
    ],
)
def test_the_journal_tells_whether_anything_may_stand_still(
    tmp_path: Path, steps: list[object], *, stands: bool
) -> None:
    dead_run(tmp_path, *steps)
    (entry,) = read_entries(tmp_path)
    assert (entry.standstill() is not None) is stands
    found = list(examine_standing([entry]))
    assert len(found) == (3 if stands else 0)
    if stands:
        assert [each.subject for each in found] == [
            "/no/such/hook start",
            "unit shop.service",
            "/no/such/folder",
        ]
        assert {(each.severity, each.ours) for each in found} == {("error", True)}


def test_a_line_behind_a_torn_one_counts(tmp_path: Path) -> None:
    path = dead_run(tmp_path, quiesce(STANDING[1]))
    with path.open("a") as file:
        file.write('{"step": "tak\n{"step": "released", "by": "watchdog", "failed": 0}\n')
    (entry,) = read_entries(tmp_path)
    assert entry.standstill() is None


def test_what_is_gone_is_let_go_without_a_word(tmp_path: Path) -> None:
    dead_run(tmp_path, quiesce(*STANDING[1:]))
    assert let_go_leftovers(tmp_path) == ([], [])
    (entry,) = read_entries(tmp_path)
    assert entry.standstill() is None


def test_after_is_run_by_the_next_run_once_even_after_a_reboot(tmp_path: Path) -> None:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as hooks:
        script = write_hook(hooks, "start", 'log "$BLOCKSNAP_PHASE $BLOCKSNAP_RUN $1"')
        step = quiesce({"kind": "after", "argv": [script, "shop"]})
        dead_run(tmp_path, {**step, "environment": {"BLOCKSNAP_RUN": "d1"}}, boot="earlier")
        found = recover(tmp_path, [], lvm_involved=False)
        assert found.removed == (f"ran {script}, which run d1 left standing still",)
        assert read_entries(tmp_path) == []
        assert recover(tmp_path, [], lvm_involved=False).removed == ()
        assert read_log(hooks) == ["after d1 shop"]


def test_an_after_that_cannot_be_run_is_told_once(tmp_path: Path) -> None:
    dead_run(tmp_path, quiesce(STANDING[0]))
    done, (warning,) = let_go_leftovers(tmp_path)
    assert done == []
    assert "run d1 left something standing still: the hook /no/such/hook cannot be run" in warning
    assert let_go_leftovers(tmp_path) == ([], [])


def frozen_guest(said: str) -> dict[str, Any]:
    """What the journal says of a guest that virsh, as it says here, does not thaw."""
    by_hand = "virsh --connect qemu:///system domfsthaw web"
    argv = ["/bin/sh", "-c", f"echo {said} >&2; exit 1"]
    return {"kind": "after", "argv": argv, "name": "guest web", "by_hand": by_hand}


def test_a_guest_that_is_not_thawed_is_told_with_the_command_until_it_is(tmp_path: Path) -> None:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as hooks:
        script = write_hook(hooks, "start", "log started")
        guest = frozen_guest("error: Guest agent is away")
        dead_run(tmp_path, quiesce(guest, {"kind": "after", "argv": [script]}))
        for removed in ((f"ran {script}, which run d1 left standing still",), ()):
            found = recover(tmp_path, [], lvm_involved=False)
            assert found.removed == removed
            (warning,) = found.warnings
            assert warning == (
                "run d1 left something standing still: guest web may still be frozen: "
                "its thaw failed, with exit status 1: error: Guest agent is away "
                "(run: virsh --connect qemu:///system domfsthaw web)"
            )
            (entry,) = read_entries(tmp_path)
            assert (entry.standstill() or {})["standing"] == [guest]
        # What was run is not run again for its sake.
        assert read_log(hooks) == ["started"]


@pytest.mark.parametrize(
    ("said", "boot"),
    [("error: Guest agent is away", "earlier"), ("error: failed: domain is not running", None)],
    ids=["it went down with the host", "it does not run here any more"],
)
def test_a_guest_that_cannot_be_frozen_here_any_more_is_told_once(
    tmp_path: Path, said: str, boot: str | None
) -> None:
    dead_run(tmp_path, quiesce(frozen_guest(said)), boot=boot)
    (warning,) = recover(tmp_path, [], lvm_involved=False).warnings
    assert f"guest web may still be frozen: its thaw failed, with exit status 1: {said}" in warning
    assert read_entries(tmp_path) == []


def test_a_guest_has_five_minutes_to_be_thawed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the watchdog gives it."""
    given: list[float] = []
    real = libvirt.run_after

    def run_after(argv: tuple[str, ...], environment: dict[str, str], limit_seconds: float) -> None:
        given.append(limit_seconds)
        real(argv, environment, limit_seconds)

    monkeypatch.setattr(libvirt, "run_after", run_after)
    dead_run(tmp_path, quiesce({**frozen_guest(""), "argv": ["/bin/sh", "-c", "exit 0"]}))
    assert let_go_leftovers(tmp_path) == (["thawed guest web, which run d1 left standing still"], [])
    assert given == [300.0]


def test_a_live_run_is_left_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "live")
    journal.append("quiesce", standing=STANDING, deadline_seconds=10, environment={})
    assert let_go_leftovers(tmp_path) == ([], [])
    (entry,) = read_entries(tmp_path)
    assert entry.alive
    assert not entry.ending
    journal.finish()


def test_a_watchdog_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_TAKE_OVER_SECONDS", 60.0)
    path = dead_run(tmp_path, quiesce(*STANDING))
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    fcntl.flock(fd, fcntl.LOCK_EX)
    (entry,) = read_entries(tmp_path)
    assert entry.ending

    def let_go() -> None:
        time.sleep(0.2)
        os.write(fd, b'\n{"step": "released", "by": "watchdog", "failed": 0}\n')
        os.close(fd)

    watchdog = threading.Thread(target=let_go)
    watchdog.start()
    # Had it not waited, it would have tried to run the hook.
    assert let_go_leftovers(tmp_path) == ([], [])
    watchdog.join()
    assert recover(tmp_path, [], lvm_involved=False).warnings == ()
    assert read_entries(tmp_path) == []


def test_who_only_reads_the_journal_does_not_keep_anything_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the run after it: it would find nothing to let go, and the next one comes tomorrow."""
    monkeypatch.setattr(journal_module, "_TAKE_OVER_SECONDS", 60.0)
    path = dead_run(tmp_path, quiesce(STANDING[0]))
    reader = os.open(path, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH)
    done = threading.Timer(0.2, os.close, (reader,))
    done.start()
    _, warnings = let_go_leftovers(tmp_path)
    done.join()
    assert [each for each in warnings if "/no/such/hook" in each] == warnings != []


def test_two_at_once_do_not_both_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_TAKE_OVER_SECONDS", 0.1)
    dead_run(tmp_path, quiesce(*STANDING))
    (entry,) = read_entries(tmp_path)
    with take_over(entry) as first, take_over(entry) as second:
        assert first is not None
        assert second is None
    entry.path.unlink()
    with take_over(entry) as gone:
        assert gone is None


class Cold:
    name, kind, snapshot_device = "/srv/disk.img", "file", None


class Header:
    name, kind, snapshot_device = "luks:1234", "luks-header", None


class WithSnapshots:
    name, kind, snapshot_device = "vg0/data", "thin", 0x801


def test_what_has_no_snapshot_is_no_matter_of_an_instant() -> None:
    request = QuiesceRequest(QuiesceSettings(units=("shop.service",)))
    request.check([Cold()])  # type: ignore[list-item]
    assert request.is_for_reading([Cold()])  # type: ignore[list-item]
    assert not request.is_for_reading([WithSnapshots()])  # type: ignore[list-item]
    assert not QuiesceRequest(QuiesceSettings()).is_for_reading([Cold()])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"there is no snapshot of /srv/disk.*: applications would"):
        request.check([WithSnapshots(), Cold()])  # type: ignore[list-item]
    server = QuiesceSettings.model_validate({"postgresql": [{}]})
    with pytest.raises(UsageError, match=r"there is no snapshot of /srv/disk.*: databases and guests"):
        QuiesceRequest(server).check([Cold()])  # type: ignore[list-item]
    # Filesystems are looked for by themselves, and there are none.
    QuiesceRequest(QuiesceSettings()).check([Cold()])  # type: ignore[list-item]
    assert QuiesceRequest(QuiesceSettings()).assemble([Cold()], "/var/lib/blocksnap") is None  # type: ignore[list-item]


def test_that_all_goes_on_need_not_be_written_down_when_all_was_read(tmp_path: Path) -> None:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    (tmp_path / "volume").write_bytes(bytes(4096))
    with hook_folder() as hooks:
        script = write_hook(hooks, "shop", "log $1")
        pair = {"before": [script, "stop"], "after": [script, "start"]}
        request = QuiesceRequest(QuiesceSettings.model_validate({"hooks": [pair]}))
        volume = resolve_volume(str(tmp_path / "volume"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with SnapshotSession([volume], "run1", tmp_path / "state", request) as session:
            (entry,) = read_entries(tmp_path / "state")
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (entry.path.stat().st_size, hard))
                session.release()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert session.quiesced is not None
            assert session.quiesced.state == "application"
        assert read_log(hooks) == ["stop", "start"]
    (warning,) = session.warnings
    assert warning.startswith("the next run may let go once more what goes on already: cannot write ")
    # It was not, and left nothing.
    assert read_entries(tmp_path / "state") == []


def test_nobody_stands_still_for_a_header() -> None:
    """It goes along with volumes that have snapshots, and with those that have none."""
    asked: list[dict[str, Any]] = [{"units": ("shop.service",)}, {"postgresql": [{}]}]
    for request in (QuiesceRequest(QuiesceSettings.model_validate(each)) for each in asked):
        request.check([Header(), WithSnapshots()])  # type: ignore[list-item]
        assert not request.is_for_reading([Header(), WithSnapshots()])  # type: ignore[list-item]
    request = QuiesceRequest(QuiesceSettings.model_validate(asked[0]))
    request.check([Header(), Cold()])  # type: ignore[list-item]
    assert request.is_for_reading([Header(), Cold()])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"there is no snapshot of /srv/disk.img: "):
        request.check([Header(), WithSnapshots(), Cold()])  # type: ignore[list-item]


def test_nothing_is_announced_that_does_not_outlive_us(tmp_path: Path) -> None:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as hooks:
        script = write_hook(hooks, "lock", "")
        session = assemble(QuiesceSettings.model_validate({"hooks": [{"session": [script]}]}), [], [])
        assert announce(session, {}) == []
        session.close()
        pair = assemble(QuiesceSettings.model_validate({"hooks": [{"after": [script]}]}), [], [])
        ((step, facts),) = announce(pair, {"BLOCKSNAP_RUN": "r"})
        assert (step, facts["standing"]) == ("quiesce", [{"kind": "after", "argv": [script]}])
        pair.close()
