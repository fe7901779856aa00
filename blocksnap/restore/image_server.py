"""An image as a network block device whose reads wait when nobody serves it.

Whoever serves it again, this process or a later one, finds the device by its identifier, and what waited is
answered. nbdkit is started again when it dies.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

from blocksnap.errors import BlocksnapError
from blocksnap.restore.keeper import Keeper
from blocksnap.system import nbd
from blocksnap.system.nbdkit import Nbdkit, NbdkitError, serve_connection

_LOOK_SECONDS = 0.2
_KILLED_SECONDS = 30.0
_BEFORE_SECONDS = 30.0
"""How long the end of the server before may take, which has been killed."""


class ImageServer:
    """Serves from ``start`` to ``close``; the device stays until ``disconnect``."""

    def __init__(
        self, image: str, identifier: str, keeper: Keeper, tell: Callable[[BlocksnapError], None]
    ) -> None:
        self._image = image
        self._identifier = identifier
        self._keeper = keeper
        self._tell = tell
        self._server: Nbdkit | None = None
        self._ending = threading.Event()
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="blocksnap-nbdkit", daemon=True)
        self._index = -1

    def start(self) -> int:
        """Serve and return the number of the device; raises NbdError, NbdkitError.

        Waits for the end of the server that an earlier process has left, which may be dying still.
        """
        self._keeper.hold_images()
        self._index = self._serve()
        self._thread.start()
        return nbd.device_number(self._index)

    def close(self) -> None:
        """Serve no more, without answers to what is asked now; a second call does nothing, by any thread."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._closing:
            server, self._server = self._server, None
        if server is not None:
            _kill(server)

    def silence(self) -> None:
        """Answer nothing any more, and wait for no server to end: it may wait for the image itself."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._closing:
            if self._server is not None:
                self._server.kill()

    def disconnect(self) -> None:
        """Take the device away, which nobody uses any more, and serve no more."""
        self._ending.set()
        self._thread.join()
        nbd.disconnect(self._index)
        self.close()

    def _serve(self) -> int:
        deadline = time.monotonic() + _BEFORE_SECONDS
        while True:
            index = self._offer()
            if index is not None:
                return index
            if time.monotonic() > deadline or self._ending.wait(_LOOK_SECONDS):
                raise NbdkitError("the one before it has not ended")

    def _offer(self) -> int | None:
        """Start a server and give it the device; None where the kernel has not taken it."""
        server, connection, server_end = serve_connection(self._image)
        try:
            # Its end is open here until it is known whether the kernel has the other.
            with server_end:
                with connection:
                    self._keeper.watch(server.pid)
                    index = self._connect(server, connection)
                if nbd.is_taken(server_end) and server.is_running():
                    self._server = server
                    return index
        except BaseException:
            _kill(server)
            raise
        _kill(server)
        return None

    def _connect(self, server: Nbdkit, connection: socket.socket) -> int:
        try:
            size, flags = nbd.shake_hands(connection, server.is_running)
        except nbd.NbdError as err:
            if server.is_running():
                raise
            raise NbdkitError(server.said()) from err
        index = nbd.find(self._identifier)
        if index is None:
            return nbd.connect(connection, size, flags, self._identifier)
        nbd.reconnect(index, connection, self._identifier)
        return index

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            server = self._server
            if server is not None and not server.wait(0):
                continue
            try:
                if server is not None:
                    self._server = None
                    said = server.said()
                    server.close()
                    self._tell(BlocksnapError(f"nbdkit has died and is started again: {said}"))
                self._serve()
            except BlocksnapError as err:
                if not self._ending.is_set():
                    self._tell(err)
            except OSError as err:
                self._tell(BlocksnapError(f"nbdkit cannot be started: {os.strerror(err.errno or 0)}"))


def _kill(server: Nbdkit) -> None:
    server.kill()
    server.wait(_KILLED_SECONDS)
    server.close()
