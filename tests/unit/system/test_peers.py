"""Who is at the other end of a socket, and where its files are."""

from __future__ import annotations

import os
import pwd
import socket
import sys
import threading
from pathlib import Path

import pytest

from blocksnap.system import mounts, peers
from support.require import require


def test_the_process_behind_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        client.connect(str(tmp_path / "socket"))
        assert peers.process_behind(client.fileno()) == os.getpid()
        assert client.fileno() >= 0


def test_another_user_connects(tmp_path: Path) -> None:
    require("root", os.geteuid() == 0, "only root can be somebody else")
    daemon = pwd.getpwnam("daemon").pw_uid
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        # The folder is root's alone, and is passed nevertheless.
        with peers.acting_as("daemon"):
            assert os.geteuid() == daemon
            client.connect(str(tmp_path / "socket"))
        assert os.geteuid() == 0
        accepted, _ = server.accept()
        with accepted:
            said = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert int.from_bytes(said[4:8], sys.byteorder) == daemon
    with (
        pytest.raises(peers.NoAccountError, match="no user 'nobody is called so'"),
        peers.acting_as("nobody is called so"),
    ):
        pass
    with peers.acting_as(None):
        assert os.geteuid() == 0


def test_other_threads_stay_who_they_are() -> None:
    require("root", os.geteuid() == 0, "only root can be somebody else")
    asked, answered = threading.Event(), threading.Event()
    seen: list[int] = []

    def look() -> None:
        asked.wait()
        seen.append(os.geteuid())
        answered.set()

    thread = threading.Thread(target=look)
    thread.start()
    with peers.acting_as("daemon"):
        asked.set()
        answered.wait()
    thread.join()
    assert seen == [0]


def test_paths_are_followed_as_the_process_would(tmp_path: Path) -> None:
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "far")
    (tmp_path / "relative").symlink_to("far/deep/..")
    (tmp_path / "round").symlink_to("round")
    real = os.path.realpath(tmp_path)
    pid = os.getpid()
    for path, found in (
        ("absolute/deep", "far/deep"),
        ("relative/deep/.", "far/deep"),
        ("far//deep/../deep/", "far/deep"),
    ):
        assert peers.real_path(pid, f"{tmp_path}/{path}") == f"{real}/{found}"
    assert peers.real_path(pid, "/") == peers.real_path(pid, "/../..") == "/"
    with pytest.raises(OSError, match="Too many levels"):
        peers.real_path(pid, f"{tmp_path}/round")
    with pytest.raises(FileNotFoundError):
        peers.real_path(pid, f"{tmp_path}/far/none")


def test_the_filesystem_at_a_path(tmp_path: Path) -> None:
    for path in (str(tmp_path), "/proc/self", "/sys"):
        mount = mounts.mount_under(path)
        assert mount is not None
        assert peers.filesystem_at(os.getpid(), path) == {mount.device, os.stat(path).st_dev}
