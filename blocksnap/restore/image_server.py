"""An image as a network block device whose reads wait when nobody serves it.

Whoever serves it again, this process or a later one, finds the device by its identifier, and what waited is
answered. nbdkit is started again when it dies.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from blocksnap.errors import BlocksnapError
from blocksnap.restore.keeper import Keeper
from blocksnap.system import nbd
from blocksnap.system.nbdkit import Nbdkit, serve_connection

_LOOK_SECONDS = 0.2
_KILLED_SECONDS = 30.0


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
        self._thread = threading.Thread(target=self._watch, name="blocksnap-nbdkit", daemon=True)
        self._index = -1

    def start(self) -> int:
        """Serve and return the number of the device; raises NbdError, NbdkitError."""
        self._keeper.hold_images()
        self._index = self._serve()
        self._thread.start()
        return nbd.device_number(self._index)

    def close(self) -> None:
        """Serve no more, without an answer to what is asked now; a second call does nothing."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._server is not None:
            self._server.kill()
            self._server.wait(_KILLED_SECONDS)
            self._server.close()
            self._server = None

    def disconnect(self) -> None:
        """Take the device away, which nobody uses any more, and serve no more."""
        self._ending.set()
        self._thread.join()
        nbd.disconnect(self._index)
        self.close()

    def _serve(self) -> int:
        server, connection = serve_connection(self._image)
        self._server = server
        try:
            with connection:
                self._keeper.watch(server.pid)
                size, flags = nbd.shake_hands(connection)
                index = nbd.find(self._identifier)
                if index is None:
                    return nbd.connect(connection, size, flags, self._identifier)
                nbd.reconnect(index, connection, self._identifier)
                return index
        except BaseException:
            server.kill()
            raise

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            if self._server is None or not self._server.wait(0):
                continue
            said = self._server.said()
            self._server.close()
            try:
                self._tell(BlocksnapError(f"nbdkit has died and is started again: {said}"))
                self._serve()
            except BlocksnapError as err:
                self._tell(err)
            except OSError as err:
                self._tell(BlocksnapError(f"nbdkit cannot be started: {os.strerror(err.errno or 0)}"))
