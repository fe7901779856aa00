"""A connection to a PostgreSQL server on this host, on which no question takes longer than its deadline.

psycopg's own cursors wait for as long as the server takes. Here a hook or a frozen unit waits too, so its
libpq is asked directly, and polled (libpq, "Asynchronous Command Processing").
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from blocksnap.quiesce.errors import AgentError, MissingDriverError
from blocksnap.quiesce.login import account_of, password_of, process_behind
from blocksnap.quiesce.settings import PostgresqlSettings
from blocksnap.system import peers

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.pq.abc import PGconn, PGresult

Row = tuple[str, ...]
_TICK_SECONDS = 0.001
"""The watchdog counts in milliseconds."""


class PostgresqlLink:
    """The connection."""

    def __init__(self, server: str, settings: PostgresqlSettings, deadline: float) -> None:
        """Connect before ``deadline``; raises AgentError, MissingDriverError, NoAccountError."""
        try:
            import psycopg
        except ImportError as err:
            raise MissingDriverError("psycopg") from err
        self._server = server
        self._driver_error = psycopg.Error
        # Read as who we are: it is no file of the account's.
        password = password_of(server, settings)
        try:
            with peers.acting_as(account_of(settings)):
                connection: Connection[Row] = psycopg.connect(
                    host=settings.socket,
                    port=settings.port,
                    user=settings.user,
                    dbname=settings.database,
                    password=password,
                    application_name="blocksnap",
                    connect_timeout=max(2, round(deadline - time.monotonic())),
                    gssencmode="disable",
                    autocommit=True,
                )
        except psycopg.Error as err:
            said = str(err).strip() or "no reason given"
            raise AgentError(
                server,
                f"lets nobody in as {settings.user!r}: {said.splitlines()[-1]}",
                said,
                advice="docs/operations.md says which rights it needs",
            ) from err
        self._connection: Connection[Row] | None = connection

    def fileno(self) -> int:
        """Return the descriptor of the socket."""
        return self._open().socket

    def process(self) -> int:
        """Return the server's process; raises AgentError."""
        return process_behind(self._server, self.fileno())

    def limit(self, deadline: float, *, while_: str = "") -> None:
        """Have the server itself give up what is asked from now on at ``deadline``; raises AgentError."""
        left = str(max(1, round((deadline - time.monotonic()) * 1000)))
        self.ask("SELECT set_config('statement_timeout', $1, false)", left, deadline=deadline, while_=while_)

    def ask(self, query: str, *parameters: str, deadline: float, while_: str = "") -> list[Row]:
        """Return what the server answers, as text; raises AgentError, and hangs up if it was too slow."""
        from psycopg.pq import ConnStatus

        link = self._open()
        doing = f" while {while_}" if while_ else ""
        try:
            link.send_query_params(query.encode(), [each.encode() for each in parameters])
            self._await(link, deadline, doing)
            results = []
            while (result := link.get_result()) is not None:
                results.append(result)
        except self._driver_error as err:
            self.close()
            # The watchdog hangs up at the same moment, and may be the first to.
            late = time.monotonic() >= deadline - _TICK_SECONDS
            problem = "did not answer in time" if late else "was lost"
            raise AgentError(self._server, f"{problem}{doing}", str(err)) from err
        if link.status != ConnStatus.OK:
            # The last words of a session that was ended from elsewhere look like an answer.
            said = link.error_message.decode(errors="replace").strip()
            self.close()
            raise AgentError(self._server, f"was lost{doing}", said)
        return self._rows(results, doing)

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> PGconn:
        if self._connection is None:
            raise AgentError(self._server, "is not connected any more")
        return self._connection.pgconn

    def _await(self, link: PGconn, deadline: float, doing: str) -> None:
        polled = select.poll()
        while True:
            waiting = select.POLLIN | (select.POLLOUT if link.flush() else 0)
            polled.register(link.socket, waiting)
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise AgentError(self._server, f"did not answer in time{doing}")
            polled.poll(min(left, 1.0) * 1000)
            link.consume_input()
            if not link.is_busy():
                return

    def _rows(self, results: list[PGresult], doing: str) -> list[Row]:
        from psycopg.pq import ExecStatus

        rows: list[Row] = []
        for result in results:
            if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                said = result.error_message.decode(errors="replace").strip()
                brief = said.splitlines()[0] if said else "no reason given"
                raise AgentError(self._server, f"refused{doing}: {brief}", said)
            rows += [
                tuple((result.get_value(row, column) or b"").decode() for column in range(result.nfields))
                for row in range(result.ntuples)
            ]
        return rows
