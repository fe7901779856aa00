"""The client's part of the NBD handshake, and how requests to the kernel's client are written."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

from blocksnap.system import nbd
from blocksnap.system.nbd import NbdError


@pytest.mark.parametrize(("server_flags", "padding"), [(3, 0), (1, 124)])
def test_the_default_export_is_opened(server_flags: int, padding: int) -> None:
    ours, its = socket.socketpair()
    heard: list[bytes] = []
    greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", server_flags)

    def work() -> None:
        with its:
            its.sendall(greeting)
            heard.append(its.recv(100))
            its.sendall(struct.pack(">QH", 1 << 40, 0x507) + bytes(padding))

    thread = threading.Thread(target=work)
    thread.start()
    with ours:
        assert nbd.shake_hands(ours) == (1 << 40, 0x507)
        # Nothing of the handshake is left for the kernel to stumble over.
        assert ours.recv(1) == b""
    thread.join()
    assert heard == [struct.pack(">I8sII", server_flags, b"IHAVEOPT", 1, 0)]


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2p1", b"NBDMAGIC", bytes(18)])
def test_what_is_no_server_is_refused(greeting: bytes) -> None:
    ours, its = socket.socketpair()
    its.sendall(greeting)
    its.close()
    with ours, pytest.raises(NbdError):
        nbd.shake_hands(ours)


def test_nothing_is_found_where_nothing_is_connected() -> None:
    assert nbd.find("blocksnap-nobody-has-this") is None
