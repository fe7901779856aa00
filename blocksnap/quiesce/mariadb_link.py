"""A connection to a server of MariaDB or MySQL on this host."""

from __future__ import annotations

import contextlib
import socket

from blocksnap.quiesce.errors import AgentError, MissingDriverError
from blocksnap.quiesce.login import account_of, password_of, process_behind
from blocksnap.quiesce.settings import MariadbSettings
from blocksnap.system import peers

Row = tuple[str, ...]
_CONNECT_SECONDS = 10.0
_LOCK_WAIT_TIMEOUT = 1205
_STATEMENT_TIMEOUT = 1969
_BUSY = (
    "SELECT id, user, time, state FROM information_schema.processlist "
    "WHERE command NOT IN ('Sleep', 'Daemon') AND id <> connection_id() ORDER BY time DESC LIMIT 5"
)


class MariadbLink:
    """The connection."""

    def __init__(self, server: str, settings: MariadbSettings) -> None:
        """Connect; raises AgentError, MissingDriverError, NoAccountError."""
        try:
            import pymysql
        except ImportError as err:
            raise MissingDriverError("PyMySQL") from err
        self._server = server
        self._driver_error = pymysql.MySQLError
        self._wait = settings.lock_wait_seconds
        password = password_of(server, settings) or ""
        # PyMySQL does without a timeout of its own for each statement: one that may wait for a lock waits
        # for no longer than that, twice, and anything else takes no time.
        patience = 2 * settings.lock_wait_seconds + _CONNECT_SECONDS
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_CONNECT_SECONDS)
            with peers.acting_as(account_of(settings)):
                self._socket.connect(settings.socket)
            self._connection = pymysql.Connection(
                user=settings.user,
                password=password,
                unix_socket=settings.socket,
                read_timeout=patience,
                write_timeout=_CONNECT_SECONDS,
                autocommit=True,
                program_name="blocksnap",
                defer_connect=True,
            )
            self._connection.connect(self._socket)
        except (OSError, pymysql.MySQLError) as err:
            self._socket.close()
            said = str(err.args[-1]) if err.args else ""
            raise AgentError(
                server,
                f"lets nobody in as {settings.user!r}: {said}",
                advice="docs/operations.md says which rights it needs",
            ) from err
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._socket.fileno()

    def process(self) -> int:
        """Return the server's process; raises AgentError."""
        return process_behind(self._server, self.fileno())

    def ask(self, statement: str) -> list[Row]:
        """Return what the server answers, as text; raises AgentError."""
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(statement)
                rows = cursor.fetchall()
        except (OSError, self._driver_error) as err:
            code, said = (err.args[0], err.args[-1]) if err.args else (0, "")
            if code in (_LOCK_WAIT_TIMEOUT, _STATEMENT_TIMEOUT):
                raise AgentError(
                    self._server,
                    f"did not get its lock within {self._wait} s ({statement}): others are at work",
                    self._who_is_busy(),
                    advice="wait for them, or raise lock_wait_seconds if others may wait so long",
                ) from err
            raise AgentError(self._server, f"failed at {statement}: {said}") from err
        return [tuple("" if each is None else str(each) for each in row) for row in rows]

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        if self._connection.open:
            with contextlib.suppress(OSError, self._driver_error):
                self._connection.close()
        self._socket.close()

    def _who_is_busy(self) -> str:
        """Say who is at work, without their statements, which may have secrets in them."""
        with contextlib.suppress(OSError, self._driver_error), self._connection.cursor() as cursor:
            cursor.execute(_BUSY)
            return "\n".join(
                f"connection {number} of {user}, for {seconds} s: {state or 'at work'}"
                for number, user, seconds, state in cursor.fetchall()
            )
        return ""
