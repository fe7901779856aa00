from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blocksnap.system import cgroup, mounts
from blocksnap.system.cgroup import CgroupError
from blocksnap.system.mounts import parse_mountinfo
from support.mock_command import MockCommands

HYBRID = """\
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
33 30 0:27 /docker/abc /somewhere/else rw - cgroup2 cgroup2 rw
"""


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MockCommands:
    commands = MockCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", commands.path)
    monkeypatch.setattr(mounts, "read_mounts", lambda: parse_mountinfo(HYBRID))
    return commands


def test_a_unit_is_found_where_version_2_is_mounted(mock: MockCommands) -> None:
    mock.add("systemctl", "/system.slice/system-postgresql.slice/postgresql@15-main.service\n")
    path = cgroup.of_unit("postgresql@15-main.service")
    assert str(path) == (
        "/sys/fs/cgroup/unified/system.slice/system-postgresql.slice/postgresql@15-main.service"
    )
    assert mock.calls_of("systemctl") == [
        ["show", "--property", "ControlGroup", "--value", "--", "postgresql@15-main.service"]
    ]


@pytest.mark.parametrize("said", ["\n", "/\n"])
def test_a_unit_without_processes_is_refused(mock: MockCommands, said: str) -> None:
    mock.add("systemctl", said)
    with pytest.raises(CgroupError, match="no process of it runs"):
        cgroup.of_unit("shop.service")


def test_a_systemd_that_does_not_answer_is_told(mock: MockCommands) -> None:
    mock.add("systemctl", err="System has not been booted with systemd\n", status=1)
    with pytest.raises(CgroupError, match=r"shop\.service cannot be frozen: .*not been booted"):
        cgroup.of_unit("shop.service")


def test_without_version_2_nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "read_mounts", list)
    with pytest.raises(CgroupError, match="no control group hierarchy"):
        cgroup.of_unit("shop.service")


def test_states_are_read_from_open_files(tmp_path: Path) -> None:
    events, wanted = tmp_path / "cgroup.events", tmp_path / "cgroup.freeze"
    events.write_text("populated 1\nfrozen 0\n")
    wanted.write_text("1\n")
    fds = [os.open(path, os.O_RDONLY) for path in (events, wanted)]
    try:
        assert not cgroup.is_frozen(fds[0])
        assert not cgroup.wait_frozen(fds[0], time.monotonic() + 0.01)
        assert cgroup.is_asked_to_freeze(fds[1])
        events.write_text("populated 1\nfrozen 1\n")
        wanted.write_text("0\n")
        assert cgroup.wait_frozen(fds[0], time.monotonic())
        assert not cgroup.is_asked_to_freeze(fds[1])
    finally:
        for fd in fds:
            os.close(fd)


def test_processes_of_groups_below_count_and_foreign_ones_do_not(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "cgroup.procs").write_text("12\n0\n")
    (tmp_path / "below" / "cgroup.procs").write_text("34\n")
    assert sorted(cgroup.processes(tmp_path)) == [12, 34]
    assert cgroup.command_of(os.getpid())
    assert cgroup.command_of(2**22) == ""


def test_names_of_programs_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_bytes(b"caf\xc3\n")
    (tmp_path / "7" / "cgroup").write_bytes(b"0::/caf\xc3\n")
    assert os.fsencode(cgroup.command_of(7)) == b"caf\xc3"
    assert not cgroup.stands_still(7)
