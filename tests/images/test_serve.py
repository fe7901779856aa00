"""Backups served as network block devices: right bytes, writes that are thrown away, and nothing left."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blocksnap.restore.image_server import ImageServer
from blocksnap.restore.keeper import Keeper
from blocksnap.system import nbd
from blocksnap.system.nbdkit import NbdkitError, serve_connection
from support.commands import CommandLine
from support.loops import call
from support.repositories import harm_largest_pack
from support.require import require
from support.shown import abort, children_of
from support.standing import is_gone, wait_until

MIB = 1 << 20
LISTENING = "0A"
"""The state of a socket in /proc/net/tcp."""


@pytest.fixture(autouse=True)
def _programs() -> None:
    able = all(
        any(os.access(f"{folder}/{name}", os.X_OK) for folder in ("/usr/bin", "/usr/sbin"))
        for name in ("nbdkit", "qemu-img", "qemu-io")
    )
    require("nbdkit", able, "needs nbdkit and qemu-utils")


@pytest.fixture
def backed_up(blocksnap: CommandLine, tmp_path: Path) -> bytes:
    """A file with data, holes and an odd end, which is backed up."""
    dice = random.Random(11)
    content = dice.randbytes(3 * MIB) + bytes(2 * MIB) + dice.randbytes(MIB + 512)
    (tmp_path / "disk").write_bytes(content)
    blocksnap.done("backup", tmp_path / "disk")
    return content


@contextmanager
def serving(blocksnap: CommandLine, *words: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    process = blocksnap.start("serve", "latest", "--json", *words)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert b'"serving"' in line, (line, process.communicate())
        yield process, str(blocksnap_event(line)["url"])
    finally:
        process.kill()
        process.communicate()


def blocksnap_event(line: bytes) -> dict[str, object]:
    import json

    event: dict[str, object] = json.loads(line)
    return event


def fetched(url: str, folder: Path) -> bytes:
    out = folder / "fetched"
    call("qemu-img", "convert", "-f", "raw", "-O", "raw", url, out)
    return out.read_bytes()


def gone(pids: list[int]) -> bool:
    """Wait for processes to end; a dead one that nobody has waited for counts as gone."""
    return wait_until(lambda: all(map(is_gone, pids)), 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_read_only_by_a_socket_until_any_signal(
    blocksnap: CommandLine, backed_up: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "run" / "nbd"
    with serving(blocksnap, "--socket", path) as (process, url):
        assert fetched(url, tmp_path) == backed_up
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 4096", url], capture_output=True, check=False
        )
        assert (refused.returncode, b"ermission denied" in refused.stderr) == (1, True)
        children = children_of(process.pid)
        assert children
        process.send_signal(number)
        code = process.wait(timeout=60)
        assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert gone(children)
    if number == signal.SIGKILL:
        # A dead socket is in nobody's way.
        with serving(blocksnap, "--socket", path) as (_, url):
            assert fetched(url, tmp_path) == backed_up
    else:
        assert not path.exists()


def links_of(pid: int) -> list[str]:
    """Return what a process has open, but for what it closes meanwhile."""
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(entry.path))
    return links


def test_a_server_inherits_nothing_and_says_why_it_does_not_serve(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    read, write = os.pipe()
    os.set_inheritable(write, True)
    server, ours, its = serve_connection(str(tmp_path / "image"))
    try:
        with ours, its:
            assert nbd.shake_hands(ours, server.is_running)[0] == 4096
            links = links_of(server.pid)
            assert [link for link in links if link == os.readlink(f"/proc/self/fd/{write}")] == []
            assert nbd.is_taken(its)
            ours.close()
            assert not nbd.is_taken(its)
    finally:
        os.close(read)
        os.close(write)
        server.close()
    with Keeper() as keeper:
        none = ImageServer(str(tmp_path / "none"), "blocksnap-test-none", keeper, lambda _: None)
        with pytest.raises(NbdkitError, match="No such file"):
            none.start()
        none.close()


def test_an_aborted_connection_ends_it(blocksnap: CommandLine, backed_up: bytes, tmp_path: Path) -> None:
    path = tmp_path / "nbd"
    with serving(blocksnap, "--socket", path) as (process, url):
        assert fetched(url, tmp_path) == backed_up
        children = children_of(process.pid)
        abort(process.pid, "/sys/fs/fuse/connections/images", tmp_path / "connections")
        out, _ = process.communicate(timeout=60)
        (event,) = [blocksnap_event(line) for line in out.splitlines() if b'"error"' in line]
        assert process.returncode == 1
        assert "is not served any more: its FUSE connection was aborted" in str(event)
    assert gone(children)
    assert not path.exists()


def test_writes_go_into_an_overlay_that_is_thrown_away(
    blocksnap: CommandLine, backed_up: bytes, tmp_path: Path
) -> None:
    with serving(blocksnap, "--writable", "--socket", tmp_path / "nbd") as (process, url):
        call("qemu-io", "-f", "raw", "-c", "write -P 0x77 4096 8192", url)
        expected = backed_up[:4096] + b"\x77" * 8192 + backed_up[12288:]
        assert fetched(url, tmp_path) == expected
        # A clone of the overlay would be a second writer: the same one is seen by all.
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    with serving(blocksnap, "--socket", tmp_path / "nbd") as (_, url):
        assert fetched(url, tmp_path) == backed_up
    assert blocksnap.done("verify", "latest")


def test_what_is_damaged_is_an_error_that_names_the_range(
    blocksnap: CommandLine, backed_up: bytes, tmp_path: Path
) -> None:
    harm_largest_pack(blocksnap.repository)
    with serving(blocksnap, "--socket", tmp_path / "nbd") as (process, url):
        out = tmp_path / "fetched"
        words = ["qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(out)]
        failed = subprocess.run(words, check=False, capture_output=True)
        assert failed.returncode
        read = subprocess.run(
            ["qemu-io", "-f", "raw", "-r", "-c", "read -v 0 512", url], check=False, capture_output=True
        )
        assert backed_up[:16].hex(" ").encode() in read.stdout, read
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0].decode()
    assert ("bytes" in said, "cannot be restored" in said) == (True, True), said


def test_the_socket_of_a_quicker_one_stays(blocksnap: CommandLine, tmp_path: Path) -> None:
    """Of another server of the same backup, that was begun in the same moment."""
    (tmp_path / "raw").write_bytes(os.urandom(4096))
    blocksnap.done("backup", tmp_path / "raw", "-q")
    with serving(blocksnap, "--socket", tmp_path / "nbd") as (process, _):
        (tmp_path / "nbd").unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "nbd"))
            process.terminate()
            process.communicate(timeout=60)
            assert (tmp_path / "nbd").is_socket()


def test_what_is_in_the_way_of_the_socket_stays(
    blocksnap: CommandLine, backed_up: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    outcome = blocksnap("serve", "latest", "--socket", tmp_path / "file")
    assert (outcome.code, "--socket" in outcome.stderr) == (1, True)
    assert (tmp_path / "file").read_bytes() == b"precious"
    with serving(blocksnap, "--socket", tmp_path / "nbd") as (_, url):
        outcome = blocksnap("serve", "latest", "--socket", tmp_path / "nbd")
        assert (outcome.code, "another server" in outcome.stderr) == (1, True)
        assert fetched(url, tmp_path) == backed_up


def free_port() -> int:
    """Return a port that nobody has, of those that the kernel gives to nobody who does not ask for it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(1024, first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def test_a_port_is_one_of_the_loopback_interface(
    blocksnap: CommandLine, backed_up: bytes, tmp_path: Path
) -> None:
    port = free_port()
    with serving(blocksnap, "--port", str(port)) as (_, url):
        assert url == f"nbd://127.0.0.1:{port}"
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        local = [line.split()[1] for line in listening.splitlines() if line.split()[3] == LISTENING]
        assert [place for place in local if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
        assert fetched(url, tmp_path) == backed_up
    assert blocksnap("serve", "latest", "--port", str(port), "--socket", "x").code == 2
