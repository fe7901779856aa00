from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.errors import QuiesceError
from blocksnap.quiesce.errors import HookError, UnsafeHookError
from blocksnap.quiesce.hook import check_command
from blocksnap.quiesce.standstill import Standstill
from support.standing import is_gone, read_log, wait_until, write_hook

MakeStandstill = Callable[..., Standstill]
GOOD_SESSION = 'read word; log "$word"; echo ready; read word; log "$word"'


def test_a_session_is_held_until_the_end(attended: MakeStandstill, hooks: Path) -> None:
    script = write_hook(
        hooks, "lock", 'log "$BLOCKSNAP_RUN $BLOCKSNAP_PHASE $1 $(env | wc -l)"\n' + GOOD_SESSION
    )
    standstill = attended(hooks=[{"session": [script, "an argument"]}])
    assert wait_until(lambda: read_log(hooks) and read_log(hooks)[0].startswith("run1 session an argument"))
    assert len(read_log(hooks)) == 1
    standstill.begin()
    assert read_log(hooks)[1:] == ["begin"]
    standstill.end()
    outcome = standstill.conclude()
    assert read_log(hooks)[1:] == ["begin", "end"]
    assert (outcome.state, outcome.by, outcome.reason) == ("application", (f"hook {script}",), None)
    assert outcome.seconds > 0
    assert standstill.traces() == []


def test_hooks_find_what_is_documented_in_their_environment_and_nothing_else(
    attended: MakeStandstill, hooks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKSNAP_PASSPHRASE", "secret")
    script = write_hook(hooks, "show", f"env | sort | sed 's/=.*//' | grep -v '^_$' > {hooks}/names")
    standstill = attended(hooks=[{"before": [script]}])
    standstill.begin()
    names = set((hooks / "names").read_text().split("\n"))
    assert {"PATH", "HOME", "LC_ALL", "BLOCKSNAP_RUN", "BLOCKSNAP_VOLUMES", "BLOCKSNAP_PHASE"} <= names
    assert not [name for name in names if "PASS" in name]


def test_what_is_begun_first_is_ended_last(attended: MakeStandstill, hooks: Path) -> None:
    one = write_hook(hooks, "one", 'log "one $BLOCKSNAP_PHASE"')
    two = write_hook(hooks, "two", 'log "two $BLOCKSNAP_PHASE"')
    standstill = attended(hooks=[{"before": [one], "after": [one]}, {"before": [two], "after": [two]}])
    standstill.begin()
    standstill.end()
    assert standstill.conclude().state == "application"
    assert read_log(hooks) == ["one before", "two before", "two after", "one after"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("read word; echo refuse the table is locked; read word", "refused: the table is locked"),
        ("read word; echo maybe; read word", "answered 'maybe'"),
        ("read word; echo why it is so >&2; exit 3", "ended with exit status 3 and did not get ready"),
        ("exit 0", "ended with exit status 0 and did not get ready"),
        ("read word; kill -9 $$", "ended with signal 9 and did not get ready"),
        # One that forks and exits is no session, whoever holds its pipes and answers in its place.
        ("(sleep 100; echo ready) & exit 0", "ended with exit status 0 and did not get ready"),
    ],
)
def test_a_session_that_does_not_get_ready_is_refused(
    attended: MakeStandstill, hooks: Path, body: str, says: str
) -> None:
    script = write_hook(hooks, "lock", body)
    standstill = attended(deadline_seconds=100, hooks=[{"session": [script]}])
    began = time.monotonic()
    with pytest.raises(HookError, match="the hook") as caught:
        standstill.begin()
    assert says in caught.value.brief
    assert caught.value.exit_code == 15
    if ">&2" in body:
        assert caught.value.details == "why it is so"
    assert time.monotonic() - began < 60
    with pytest.raises(QuiesceError):
        standstill.conclude()


def test_a_session_that_hangs_is_killed_with_all_that_it_started(
    attended: MakeStandstill, hooks: Path
) -> None:
    script = write_hook(hooks, "lock", "trap '' TERM; sleep 1000 & echo $! > $0.child; log ran; read a; wait")
    standstill = attended(deadline_seconds=0.5, hooks=[{"session": [script]}])
    assert wait_until(lambda: read_log(hooks) == ["ran"])
    with pytest.raises(QuiesceError):
        standstill.begin()
    standstill.close()
    assert wait_until(lambda: is_gone(int(Path(script + ".child").read_text())))


@pytest.mark.parametrize("body", ["{much}; read word", "read word; {much}", "{much}; exec >&-; read word"])
def test_a_session_may_print_what_it_likes_once_it_is_ready(
    attended: MakeStandstill, hooks: Path, body: str
) -> None:
    """More than a pipe holds: it would wait for a reader, and never see the end."""
    much = "head -c 300000 /dev/zero"
    script = write_hook(hooks, "lock", f"read word; echo ready; {body.format(much=much)}; log end")
    standstill = attended(deadline_seconds=60, hooks=[{"session": [script]}])
    standstill.begin()
    standstill.end()
    assert standstill.conclude().state == "application"
    assert read_log(hooks) == ["end"]


def test_a_session_that_ends_before_it_is_told_to_has_let_go(attended: MakeStandstill, hooks: Path) -> None:
    script = write_hook(hooks, "lock", "echo $$ > $0.pid; read word; echo ready; exit 0")
    standstill = attended(hooks=[{"session": [script]}])
    standstill.begin()
    assert wait_until(lambda: is_gone(int(Path(script + ".pid").read_text())))
    standstill.end()
    with pytest.raises(HookError, match="ended too early, with exit status 0"):
        standstill.conclude()


def test_a_session_that_fails_at_the_end_did_not_hold(attended: MakeStandstill, hooks: Path) -> None:
    script = write_hook(hooks, "lock", "read word; echo ready; read word; exit 4")
    standstill = attended(hooks=[{"session": [script]}])
    standstill.begin()
    standstill.end()
    with pytest.raises(HookError, match="failed at the end, with exit status 4"):
        standstill.conclude()


def test_a_session_that_does_not_end_is_killed(attended: MakeStandstill, hooks: Path) -> None:
    body = "echo $$ > $0.pid; log runs; read word; echo ready; while :; do sleep 1; done"
    script = write_hook(hooks, "lock", body)
    standstill = attended(deadline_seconds=4, hooks=[{"session": [script]}])
    assert wait_until(lambda: read_log(hooks) == ["runs"])
    standstill.begin()
    standstill.end()
    with pytest.raises(HookError, match="did not end when it was told to"):
        standstill.conclude()
    assert wait_until(lambda: is_gone(int(Path(script + ".pid").read_text())))


def test_after_runs_when_before_fails(attended: MakeStandstill, hooks: Path) -> None:
    stop = write_hook(hooks, "stop", "log before; echo no such service; exit 7")
    start = write_hook(hooks, "start", "log after")
    standstill = attended(hooks=[{"before": [stop], "after": [start]}])
    with pytest.raises(HookError, match="failed, with exit status 7") as caught:
        standstill.begin()
    assert caught.value.details == "no such service"
    assert read_log(hooks) == ["before", "after"]


def test_after_runs_when_before_hangs(attended: MakeStandstill, hooks: Path) -> None:
    stop = write_hook(hooks, "stop", "log before; sleep 1000; log never")
    start = write_hook(hooks, "start", "log after")
    standstill = attended(deadline_seconds=2, hooks=[{"before": [stop], "after": [start]}])
    with pytest.raises(QuiesceError):
        standstill.begin()
    standstill.close()
    assert read_log(hooks) == ["before", "after"]


class Interrupted(BaseException):
    """What a signal is made into."""


@pytest.mark.parametrize("with_after", [True, False], ids=["and its after", "alone"])
def test_a_before_that_is_interrupted_is_gone_before_anything_else_is_done(
    attended: MakeStandstill, hooks: Path, *, with_after: bool
) -> None:
    """What it did once its ``after`` had been run, nothing would undo."""
    stop = write_hook(hooks, "stop", "echo $$ > $0.pid; log before; sleep 60; log locked")
    start = write_hook(hooks, "start", f"log after; ! kill -0 $(cat {hooks}/stop.pid) || log beside")
    hook = {"before": [stop], **({"after": [start]} if with_after else {})}
    standstill = attended(deadline_seconds=100, hooks=[hook])

    def interrupt(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGUSR1, interrupt)
    here = threading.get_ident()

    def send() -> None:
        wait_until(lambda: read_log(hooks) == ["before"])
        signal.pthread_kill(here, signal.SIGUSR1)

    sender = threading.Thread(target=send)
    try:
        sender.start()
        with pytest.raises(Interrupted):
            standstill.begin()
    finally:
        signal.signal(signal.SIGUSR1, previous)
        sender.join()
    standstill.end()
    assert is_gone(int(Path(stop + ".pid").read_text()))
    assert read_log(hooks) == ["before", *(["after"] if with_after else [])]
    assert not standstill.left
    # Nothing is in force any more, so the watchdog has nothing to tell of.
    standstill.close()
    assert standstill.warnings == []


def test_after_runs_once_although_a_later_hook_fails(attended: MakeStandstill, hooks: Path) -> None:
    one = write_hook(hooks, "one", 'log "one $BLOCKSNAP_PHASE"')
    bad = write_hook(hooks, "bad", "exit 1")
    standstill = attended(
        on_failure="crash-consistent",
        hooks=[{"before": [one], "after": [one]}, {"before": [bad]}, {"after": [one]}],
    )
    standstill.begin()
    standstill.end()
    outcome = standstill.conclude()
    assert (outcome.state, outcome.reason) == ("failed", f"the hook {bad} failed, with exit status 1")
    # The third was never reached, so there is nothing after it.
    assert read_log(hooks) == ["one before", "one after"]


def test_an_after_that_fails_is_a_warning(attended: MakeStandstill, hooks: Path) -> None:
    start = write_hook(hooks, "start", "exit 9")
    standstill = attended(hooks=[{"after": [start]}])
    standstill.begin()
    standstill.end()
    assert standstill.conclude().state == "application"
    assert standstill.warnings == [f"the hook {start} failed, with exit status 9"]
    assert not standstill.left


def test_an_after_that_hangs_is_killed(attended: MakeStandstill, hooks: Path) -> None:
    start = write_hook(hooks, "start", "sleep 1000")
    standstill = attended(deadline_seconds=3, hooks=[{"after": [start]}])
    standstill.begin()
    standstill.end()
    assert standstill.warnings == [f"the hook {start} failed, with signal 15"]


def test_a_before_may_leave_a_process_and_is_not_waited_for(attended: MakeStandstill, hooks: Path) -> None:
    script = write_hook(hooks, "stop", "sleep 1000 & echo $! > $0.child; exit 0")
    standstill = attended(deadline_seconds=100, hooks=[{"before": [script]}])
    began = time.monotonic()
    standstill.begin()
    assert time.monotonic() - began < 60
    child = int(Path(script + ".child").read_text())
    standstill.end()
    standstill.close()
    assert not is_gone(child)
    os.kill(child, 9)


def test_a_hook_that_cannot_be_started_says_so(attended: MakeStandstill, hooks: Path) -> None:
    script = write_hook(hooks, "lock", "")
    (hooks / "lock").write_text("#!/no/such/interpreter\n")
    standstill = attended(hooks=[{"before": [script]}])
    with pytest.raises(HookError, match="exit status 127") as caught:
        standstill.begin()
    assert "No such file" in (caught.value.details or "")
    with pytest.raises(HookError, match="cannot be run: No such file"):
        attended(hooks=[{"before": [str(hooks / "nothing")]}])


def test_only_what_nobody_else_can_change_is_run(hooks: Path, tmp_path: Path) -> None:
    script = hooks / "lock"
    write_hook(hooks, "lock", "")
    check_command(str(script))
    link = hooks / "link"
    link.symlink_to(script)
    check_command(str(link))

    script.chmod(0o720)
    with pytest.raises(UnsafeHookError, match="lock is writable by others"):
        check_command(str(link))
    script.chmod(0o600)
    with pytest.raises(HookError, match="no executable file"):
        check_command(str(script))
    script.chmod(0o700)
    hooks.chmod(0o777)
    with pytest.raises(UnsafeHookError, match="is writable by others"):
        check_command(str(script))
    hooks.chmod(0o700)
    with pytest.raises(HookError, match="no executable file"):
        check_command(str(hooks))
    # A link in the middle of the way lies where anybody can put another one.
    tmp_path.chmod(0o1777)
    (tmp_path / "between").symlink_to(script)
    (hooks / "roundabout").symlink_to(tmp_path / "between")
    with pytest.raises(UnsafeHookError, match="is writable by others"):
        check_command(str(hooks / "roundabout"))
    (hooks / "round").symlink_to(hooks / "round")
    with pytest.raises(HookError, match="Too many levels of symbolic links"):
        check_command(str(hooks / "round"))
    if os.geteuid() == 0:
        os.chown(script, 65534, 0)
        with pytest.raises(UnsafeHookError, match="belongs to user 65534"):
            check_command(str(script))


def test_the_policy_lets_a_run_go_on_without(attended: MakeStandstill, hooks: Path) -> None:
    standstill = attended(on_failure="crash-consistent", hooks=[{"session": [str(hooks / "nothing")]}])
    standstill.begin()
    standstill.end()
    outcome = standstill.conclude()
    assert outcome.state == "failed"
    assert "cannot be run" in (outcome.reason or "")
