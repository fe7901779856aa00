"""Network block devices: the server's child process, and the kernel's client, set up through netlink.

``nbdkit`` serves, one connection on a socket that it inherits; the kernel is the client. Neither is ours.
nbd-client(8) does not do here: it cannot say that requests are to wait for another server when one is gone
(``NBD_ATTR_DEAD_CONN_TIMEOUT``), nor hand a device to a new one (``NBD_CMD_RECONFIGURE``).

Sources: linux/nbd-netlink.h, linux/genetlink.h, drivers/block/nbd.c; the NBD protocol's proto.md.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from blocksnap.errors import BlocksnapError
from blocksnap.system import sysfs
from blocksnap.system.command import run

_NETLINK_GENERIC = 16
_GENL_ID_CTRL = 16
_CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 3, 1, 2
_NLM_F_REQUEST, _NLM_F_ACK = 1, 4
_NLMSG_ERROR = 2
_NESTED = 0x8000
_CONNECT, _DISCONNECT, _RECONFIGURE = 1, 2, 3
_INDEX, _SIZE_BYTES, _BLOCK_SIZE_BYTES, _TIMEOUT, _SERVER_FLAGS = 1, 2, 3, 4, 5
_SOCKETS, _DEAD_CONN_TIMEOUT, _BACKEND_IDENTIFIER = 7, 8, 10
_SOCK_ITEM, _SOCK_FD = 1, 1
_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_SYS_BLOCK = Path("/sys/block")
_FOREVER_SECONDS = 10 * 365 * 86400
"""How long requests wait for another server when one is gone."""
_LOOK_AGAIN_MS = 1000
"""How soon requests that a dead server had already taken are sent to the next one."""
_SECTOR = 512
_SILENCE_MS = 50
"""After so much of it the server is looked at."""

_MAGIC = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE, _NO_ZEROES, _OPT_EXPORT_NAME = 1, 2, 1


class NbdError(BlocksnapError):
    """A network block device cannot be set up (exit code 1)."""

    def __init__(self, doing: str, reason: str) -> None:
        super().__init__(
            f"cannot {doing} a network block device: {reason}",
            resolution="it needs root and the kernel module nbd: modprobe nbd",
        )


def shake_hands(connection: socket.socket, is_running: Callable[[], bool] = lambda: True) -> tuple[int, int]:
    """Open the default export of a server; return its size in bytes and its flags.

    Raises NbdError, also when the server says nothing and ``is_running`` tells that it has ended.
    """
    try:
        greeting = _receive(connection, len(_MAGIC) + 2, is_running)
        if not greeting.startswith(_MAGIC):
            raise NbdError("open", "the server speaks another protocol")
        wanted = int.from_bytes(greeting[-2:], "big") & (_FIXED_NEWSTYLE | _NO_ZEROES)
        request = struct.pack(">I8sII", wanted, _MAGIC[8:], _OPT_EXPORT_NAME, 0)
        connection.sendall(request)
        size, flags = struct.unpack(">QH", _receive(connection, 10, is_running))
    except OSError as err:
        raise NbdError("open", os.strerror(err.errno or 0)) from err
    if not wanted & _NO_ZEROES:
        _receive(connection, 124, is_running)
    return size, flags


def connect(connection: socket.socket, size: int, flags: int, identifier: str) -> int:
    """Make a device of an open export and return its index; the kernel keeps the connection.

    When the server is gone its requests wait for ``reconnect``. ``identifier`` tells the device from others.
    Raises NbdError.
    """
    if not Path("/sys/module/nbd").exists():
        # Devices are made when they are wanted; the module's own sixteen only slow udev down.
        run("modprobe", "nbd", "nbds_max=1")
    answer = _Netlink("connect").ask(
        _CONNECT,
        _number(_SIZE_BYTES, size),
        _number(_BLOCK_SIZE_BYTES, _SECTOR),
        # A server that is slow is not dead: it waits for the repository.
        _number(_TIMEOUT, 0),
        _number(_SERVER_FLAGS, flags),
        _number(_DEAD_CONN_TIMEOUT, _FOREVER_SECONDS),
        _sockets(connection),
        _attribute(_BACKEND_IDENTIFIER, identifier.encode() + b"\0"),
    )
    index = int.from_bytes(dict(_attributes(answer))[_INDEX], "little")
    (_SYS_BLOCK / f"nbd{index}/queue/io_timeout").write_text(f"{_LOOK_AGAIN_MS}\n")
    return index


def reconnect(index: int, connection: socket.socket, identifier: str) -> None:
    """Hand a device whose server is gone to another one; what waits goes on. Raises NbdError.

    While the kernel does not know yet that the server before is gone it says that this was done as well, and
    has not taken the connection (nbd.c, nbd_genl_reconfigure). So close it and ask ``is_taken``.
    """
    _Netlink("hand over").ask(
        _RECONFIGURE,
        _attribute(_INDEX, struct.pack("=I", index)),
        _sockets(connection),
        _attribute(_BACKEND_IDENTIFIER, identifier.encode() + b"\0"),
    )


def is_taken(server_end: socket.socket) -> bool:
    """Tell by the server's end of a connection whether somebody has the other, which was closed here."""
    poll = select.poll()
    poll.register(server_end, select.POLLRDHUP)
    return not poll.poll(0)


def disconnect(index: int) -> None:
    """Take a device away; what still waits fails. Raises NbdError."""
    _Netlink("disconnect").ask(_DISCONNECT, _attribute(_INDEX, struct.pack("=I", index)))


def find(identifier: str) -> int | None:
    """Return the index of the device with this identifier."""
    for backend in sysfs.find(_SYS_BLOCK, "nbd*/backend"):
        if sysfs.text_of(backend) == identifier:
            return int(backend.parent.name.removeprefix("nbd"))
    return None


def device_number(index: int) -> int:
    """Return the number of a device."""
    major, minor = sysfs.exact_text(_SYS_BLOCK / f"nbd{index}/dev").strip().split(":")
    return os.makedev(int(major), int(minor))


class _Netlink:
    """One request to the kernel's nbd client."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def ask(self, command: int, *attributes: bytes) -> bytes:
        """Return the attributes of the answer; raises NbdError."""
        try:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC) as link:
                link.bind((0, 0))
                name = _attribute(_CTRL_ATTR_FAMILY_NAME, b"nbd\0")
                found = dict(_attributes(self._exchange(link, _GENL_ID_CTRL, _CTRL_CMD_GETFAMILY, name)))
                family = int.from_bytes(found[_CTRL_ATTR_FAMILY_ID], "little")
                return self._exchange(link, family, command, b"".join(attributes))
        except OSError as err:
            raise NbdError(self._doing, os.strerror(err.errno or 0)) from err

    def _exchange(self, link: socket.socket, family: int, command: int, body: bytes) -> bytes:
        message = _GENERIC.pack(command, 1, 0) + body
        length = _HEADER.size + len(message)
        link.send(_HEADER.pack(length, family, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0) + message)
        answer = b""
        while True:
            # An answer, if there is one, comes before the acknowledgement.
            data = link.recv(1 << 16)
            while data:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, _HEADER.size)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return answer
                answer = data[_HEADER.size + _GENERIC.size : size]
                data = data[-(-size // 4) * 4 :]


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=Q", value))


def _sockets(connection: socket.socket) -> bytes:
    item = _attribute(_SOCK_FD, struct.pack("=I", connection.fileno()))
    return _attribute(_SOCKETS | _NESTED, _attribute(_SOCK_ITEM | _NESTED, item))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind & ~_NESTED, data[_ATTRIBUTE.size : length]
        data = data[-(-length // 4) * 4 :]


def _receive(connection: socket.socket, count: int, is_running: Callable[[], bool]) -> bytes:
    data = b""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while len(data) < count:
        if not poll.poll(_SILENCE_MS):
            if is_running():
                continue
            raise NbdError("open", "the server has ended")
        part = connection.recv(count - len(data))
        if not part:
            raise NbdError("open", "the server has ended")
        data += part
    return data
