from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blocksnap.controller.journal import Journal, Owner, StateError, close_entry, read_entries
from blocksnap.errors import UsageError

TRACE = {"kind": "lvm", "vg": "vg", "lv": "s", "run": "r"}


def test_steps_are_on_the_medium_before_they_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    journal = Journal(tmp_path, "run1")
    assert len(synced) == 1
    journal.append("snapshot", volume="v", trace=TRACE)
    assert len(synced) == 2
    (entry,) = read_entries(tmp_path)
    assert (entry.run, entry.alive, entry.traces(), entry.volumes()) == ("run1", True, [TRACE], {"v"})
    assert entry.traces("other") == []
    journal.append("removed", trace=TRACE)
    assert read_entries(tmp_path)[0].traces() == []
    journal.finish()
    journal.finish()
    assert read_entries(tmp_path) == []
    assert os.listdir(tmp_path / "journal") == []


def test_a_run_that_died_is_told_from_one_that_lives(tmp_path: Path) -> None:
    code = (
        "import os, sys; from blocksnap.controller.journal import Journal\n"
        "Journal(sys.argv[1], 'dead').append('snapshot', volume='v', trace={'lv': 's'}); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    journal = Journal(tmp_path, "live")
    assert [(entry.run, entry.alive) for entry in read_entries(tmp_path)] == [("dead", False), ("live", True)]
    close_entry(read_entries(tmp_path)[0])
    assert [entry.run for entry in read_entries(tmp_path)] == ["live"]
    journal.finish()


def test_one_that_is_just_being_made_is_not_read_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that begin at once: the one looks for dead runs when the other has just made its file."""
    Journal(tmp_path, "earlier").finish()
    made, found = threading.Event(), []
    reader = threading.Thread(target=lambda: (made.wait(), found.extend(read_entries(tmp_path))))
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        if how == fcntl.LOCK_EX and os.readlink(f"/proc/self/fd/{fd}").endswith(".jsonl"):
            made.set()
            reader.join(0.2)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    reader.start()
    journal = Journal(tmp_path, "run1")
    reader.join()
    assert [(entry.run, entry.alive) for entry in found] == [("run1", True)]
    journal.finish()


def test_a_medium_that_fills_up_takes_a_part_of_a_step_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "run1")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    journal.append("snapshot", volume="v", trace=TRACE)
    assert read_entries(tmp_path)[0].traces() == [TRACE]
    journal.finish()


def test_what_did_not_fit_keeps_no_later_step_from_being_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel takes so much, as a medium does that fills up, and refuses the rest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 7, hard))
        with pytest.raises(StateError):
            journal.append("commit")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.path.read_text().endswith('\n{"step"')
    journal.append("snapshot", volume="v", trace=TRACE)
    journal.append("hold", volume="w", trace={"lv": "other"})
    (entry,) = read_entries(tmp_path)
    assert entry.traces() == [TRACE, {"lv": "other"}]
    journal.finish()


def test_owner_is_known_by_number_start_and_boot() -> None:
    me = Owner.current()
    assert me.is_alive()
    assert not Owner(me.pid, me.start + 1, me.boot, me.host, me.began).is_alive()
    assert not Owner(me.pid, me.start, "other boot", me.host, me.began).is_alive()


def test_a_lock_that_is_held_means_life_even_where_the_process_cannot_be_seen(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run1")
    text = journal.path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194999')
    with journal.path.open("r+") as file:
        file.write(text)
    assert read_entries(tmp_path)[0].alive
    journal.close()
    assert not read_entries(tmp_path)[0].alive


@pytest.mark.parametrize("tail", ["", "{", '{"step": "snapshot", "vol', "\0\0\0\0", "[]\n"])
def test_torn_last_line_is_a_step_not_taken(tmp_path: Path, tail: str) -> None:
    journal = Journal(tmp_path, "run1")
    journal.append("snapshot", volume="v", trace=TRACE)
    journal.close()
    with journal.path.open("a") as file:
        file.write(tail)
    assert read_entries(tmp_path)[0].traces() == [TRACE]


@pytest.mark.parametrize("content", ["", "garbage", "{}\n", '{"pid": "x"}\n'])
def test_journal_that_says_nothing_is_dead(tmp_path: Path, content: str) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "r.jsonl").write_text(content)
    (entry,) = read_entries(tmp_path)
    assert (entry.alive, entry.owner, entry.traces()) == (False, None, [])


def test_there_is_one_run_of_a_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run1")
    with pytest.raises(UsageError, match="there is a run run1 already"):
        Journal(tmp_path, "run1")
    assert read_entries(tmp_path)[0].alive
    assert os.listdir(tmp_path / "journal") == ["run1.jsonl"]
    journal.finish()


@pytest.mark.parametrize("run", ["", "../x", "a/b", ".x", "a b"])
def test_names_that_are_no_file(tmp_path: Path, run: str) -> None:
    with pytest.raises(UsageError):
        Journal(tmp_path, run)


def test_state_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError) as caught:
        Journal(tmp_path / "file", "run1")
    assert caught.value.resolution


def test_lines_are_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run1")
    journal.append("commit")
    begin, commit = map(json.loads, journal.path.read_text().splitlines())
    assert (begin["step"], begin["pid"], commit["step"]) == ("begin", os.getpid(), "commit")
    journal.finish()
