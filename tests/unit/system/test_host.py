from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from blocksnap.system import host
from support.standing import wait_until


@pytest.fixture(autouse=True)
def _fresh() -> None:
    host.host_id.cache_clear()


def test_id_is_stable_and_does_not_show_the_machine_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "machine-id"
    source.write_text("0123456789abcdef0123456789abcdef\n")
    monkeypatch.setattr(host, "_SOURCES", (tmp_path / "none", source))
    first = host.host_id()
    assert len(first) == 32
    assert "0123456789abcdef" not in first
    host.host_id.cache_clear()
    assert host.host_id() == first
    source.write_text("1123456789abcdef0123456789abcdef\n")
    host.host_id.cache_clear()
    assert host.host_id() != first


@pytest.mark.parametrize("content", [None, "uninitialized\n", ""])
def test_host_without_machine_id_is_known_by_its_name(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "machine-id"
    if content is not None:
        source.write_text(content)
    monkeypatch.setattr(host, "_SOURCES", (source,))
    first = host.host_id()
    monkeypatch.setattr(host, "host_name", lambda: "other")
    host.host_id.cache_clear()
    assert host.host_id() != first


def test_a_process_is_told_from_its_remains() -> None:
    assert host.process_start(os.getpid()) is not None
    child = subprocess.Popen(["true"])
    assert wait_until(lambda: host.process_start(child.pid) is None, 60)
    child.wait()
    assert host.process_start(child.pid) is None


def test_boot() -> None:
    assert len(host.boot_id()) == 36
    assert 0 < host.boot_time() < time.time()


def test_a_program_that_has_ended_is_not_at_work(tmp_path: Path) -> None:
    program = tmp_path / f"a (s) {os.getpid()}"
    program.symlink_to("/bin/sleep")
    running = subprocess.Popen([program, "60"])
    try:
        while not (found := host.processes({program.name})):
            time.sleep(0.01)
        assert found == [running.pid]
        running.kill()
        # It stays until it is waited for.
        os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
        assert host.processes({program.name}) == []
    finally:
        running.kill()
        running.wait()


def test_names_of_programs_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel cuts them at fifteen bytes, also within a letter."""
    monkeypatch.setattr(host, "_PROC", tmp_path)
    for pid, name in ((b"7", b"caf\xc3"), (b"8", b"lvcreate")):
        folder = tmp_path / pid.decode()
        folder.mkdir()
        (folder / "comm").write_bytes(name + b"\n")
        (folder / "stat").write_bytes(pid + b" (" + name + b") S 1 " + b"0 " * 17 + b"4711 0\n")
    (tmp_path / "9").mkdir()
    assert host.processes({"lvcreate"}) == [8]
    assert host.process_start(7) == host.process_start(8) == 4711


def test_a_look_at_the_processes_that_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="open files"):
        host.processes({"lvcreate"})
