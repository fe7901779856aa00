from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from blocksnap.system.command import (
    CommandError,
    CommandTimeoutError,
    MissingProgramError,
    has_program,
    run,
    run_observed,
)
from support.mock_command import MockCommands
from support.standing import wait_until


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def both(program: str) -> list[str]:
    return [run(program), run_observed([program], lambda: None)]


def test_output_is_returned_and_arguments_are_single_words(folder: Path) -> None:
    mock = MockCommands(folder / "mock")
    mock.add("lvs", out="hello\n")
    os.environ["PATH"] = mock.path
    assert run("lvs", "a b", "$HOME", "*") == "hello\n"
    assert mock.calls == [["lvs", "a b", "$HOME", "*"]]


def test_child_has_no_terminal_and_speaks_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    script(folder, "look", 'test -t 1 && echo tty; env | grep ^LC_; echo "$LVM_SUPPRESS_FD_WARNINGS"')
    assert both("look") == ["LC_ALL=C\n1\n"] * 2


def test_child_inherits_no_descriptor(folder: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    script(folder, "look", f"test -e /proc/self/fd/{write} && echo inherited; echo end")
    try:
        assert both("look") == ["end\n"] * 2
    finally:
        os.close(read)
        os.close(write)


def test_child_is_out_of_reach_of_ctrl_c(folder: Path) -> None:
    script(folder, "look", "ps -o sid= -p $$")
    assert str(os.getsid(0)) not in [each.strip() for each in both("look")]


def test_failure_tells_program_status_and_last_lines(folder: Path) -> None:
    # More than the 750 bytes that sh keeps in the text of its exception.
    script(folder, "lvcreate", "seq 1000 >&2; echo 'the reason' >&2; exit 5")
    for call in (lambda: run("lvcreate"), lambda: run_observed(["lvcreate"], lambda: None)):
        with pytest.raises(CommandError) as caught:
            call()
        assert str(caught.value) == "lvcreate failed (exit status 5): the reason"
        assert caught.value.details == "998\n999\n1000\nthe reason"
        assert caught.value.status == 5
        assert caught.value.message.startswith("1\n2\n")


def test_signal_is_told(folder: Path) -> None:
    script(folder, "die", "kill -TERM $$")
    with pytest.raises(CommandError, match="signal 15"):
        run("die")
    with pytest.raises(CommandError, match="signal 15"):
        run_observed(["die"], lambda: None)


def test_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocksnap.system.command._find", lambda _: None)
    with pytest.raises(MissingProgramError) as caught:
        run("lvs")
    assert str(caught.value) == "lvs is not installed"
    assert caught.value.resolution == "install it: apt install lvm2"
    assert not has_program("lvs")


@pytest.mark.parametrize("observed", [False, True])
def test_a_program_that_takes_too_long_is_left_alone(folder: Path, observed: bool) -> None:
    script(folder, "wait", f"until [ -e {folder}/go ]; do sleep 0.05; done; touch {folder}/done")
    with pytest.raises(CommandTimeoutError) as caught:
        run_observed(["wait"], lambda: None, timeout_seconds=0.1) if observed else run(
            "wait", timeout_seconds=0.1
        )
    assert str(caught.value.pid) in str(caught.value)
    (folder / "go").touch()
    assert wait_until((folder / "done").exists, 60)


def test_observer_looks_while_the_program_runs(folder: Path) -> None:
    script(folder, "work", f"until [ -e {folder}/go ]; do sleep 0.05; done; touch {folder}/done")
    seen: list[bool] = []

    def look() -> None:
        seen.append((folder / "done").exists())
        if len(seen) == 10:
            (folder / "go").touch()

    run_observed(["work"], look)
    assert seen[:10] == [False] * 10
    assert (folder / "done").exists()


def test_an_interrupt_waits_until_the_program_is_done(folder: Path) -> None:
    script(folder, "work", f"sleep 0.2; touch {folder}/done")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_observed(["work"], interrupt)
    assert (folder / "done").exists()


def test_an_interrupt_while_a_program_is_started_waits_until_it_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(folder, "work", f"sleep 0.2; touch {folder}/done")
    spawn = os.posix_spawn

    def interrupted(*words: object, **named: object) -> int:
        pid = spawn(*words, **named)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "posix_spawn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_observed(["work"], lambda: None)
    assert (folder / "done").exists()


def test_child_can_be_interrupted_though_we_hold_signals_back(folder: Path) -> None:
    script(folder, "look", "grep SigBlk /proc/self/status")
    assert [text.split()[1] for text in both("look")] == ["0" * 16] * 2


def test_long_output_is_whole(folder: Path) -> None:
    script(folder, "talk", "seq 100000")
    assert [len(text) for text in both("talk")] == [588895, 588895]


def test_sh_is_imported_only_when_something_is_run() -> None:
    import subprocess
    import sys

    code = (
        "import sys, blocksnap.system.command, blocksnap.volumes.resolve, blocksnap.controller.session\n"
        "print([name for name in ('sh', 'pyudev', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file may be called by any bytes; Python has them as surrogates."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    run("touch", name)
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]
    assert run("ls", str(tmp_path)).encode(errors="surrogateescape").rstrip().endswith(b"\xff\xfe")
