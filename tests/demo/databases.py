# SPDX-License-Identifier: Apache-2.0
"""The databases that the demo can protect: PostgreSQL, and SQLite where that is not installed.

Both promise that a committed transaction is on the disk, and are set up to keep that promise (fsync on).
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import ledger
from commands import DemoError, run


class Session(Protocol):
    """One connection."""

    def commit(self, statements: Sequence[str]) -> None:
        """Run the statements as one transaction; returns when its commit is acknowledged."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Database(Protocol):
    """A database whose files are all below one directory."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def clients(self) -> int:
        """How many clients write to it at once."""
        ...

    def create(self) -> None:
        """Make an empty database in the directory and start it."""
        ...

    def start(self) -> str:
        """Start it on the files that are there; return what it says about recovering them."""
        ...

    def kill(self) -> None:
        """Stop it, if it runs, without giving it the time to write anything."""
        ...

    def connect(self) -> Session:
        """Connect a client."""
        ...

    def bodies(self) -> dict[int, str]:
        """Return all rows of the ledger."""
        ...

    def check(self) -> list[str]:
        """Let the database check itself, then stop it; return what was checked, or raise DemoError."""
        ...


def open_database(directory: Path, run_directory: Path, *, sqlite: bool) -> Database:
    """Return the best database that is installed here, or SQLite when that is asked for."""
    programs = None if sqlite else Postgres.find_programs()
    if programs is not None:
        return Postgres(programs, directory, run_directory)
    return Sqlite(directory)


_SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "listen_addresses": "''",
    "max_connections": "10",
    "shared_buffers": "16MB",
    # Checkpoints come while the demo runs, so that the data files change as well as the log.
    "checkpoint_timeout": "30s",
    "min_wal_size": "32MB",
    "max_wal_size": "96MB",
}


class Postgres:
    """PostgreSQL as its own user, reachable through a socket only."""

    clients = 2

    def __init__(self, programs: Path, directory: Path, run_directory: Path) -> None:
        self._programs = programs
        self._files = directory / "postgres"
        self._run = run_directory
        self._log = run_directory / "postgres.log"

    @staticmethod
    def find_programs() -> Path | None:
        """Return the directory with the newest installed server's programs."""
        debian = Path("/usr/lib/postgresql").glob("*/bin")
        found = sorted(debian, key=lambda path: float(path.parent.name), reverse=True)
        if (elsewhere := shutil.which("initdb")) is not None:
            found.append(Path(elsewhere).parent)
        return next((path for path in found if (path / "initdb").exists()), None)

    @property
    def name(self) -> str:
        """Name and version."""
        return run(str(self._programs / "postgres"), "--version").strip()

    def create(self) -> None:
        """initdb, settings, start, table."""
        self._files.mkdir()
        shutil.chown(self._files, "postgres", "postgres")
        shutil.chown(self._run, "postgres", "postgres")
        data = f"--pgdata={self._files}"
        self._call("initdb", data, "--auth=trust", "--data-checksums", "--encoding=UTF8", "--no-locale")
        with (self._files / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in _SETTINGS.items())
        self.start()
        with closing(self.connect()) as session:
            session.commit(ledger.CREATE)

    def start(self) -> str:
        """Start the server and wait until it has recovered."""
        self._log.unlink(missing_ok=True)
        options = f"-c unix_socket_directories={self._run}"
        try:
            self._call("pg_ctl", "start", "--wait", f"--pgdata={self._files}", f"--log={self._log}",
                       f"--options={options}")  # fmt: skip
        except DemoError as err:
            raise DemoError(f"{err}\n{self._log.read_text() if self._log.exists() else ''}") from err
        said = [line.partition("LOG:")[2].strip() for line in self._log.read_text().splitlines()]
        recovery = [line for line in said if line.startswith(("database system was not properly", "redo "))]
        return "; ".join(line.partition(" system usage")[0] for line in recovery)

    def kill(self) -> None:
        """Stop in immediate mode, which is a crash to the files."""
        if (self._files / "postmaster.pid").exists():
            self._call("pg_ctl", "stop", "--wait", "--mode=immediate", f"--pgdata={self._files}")

    def connect(self) -> Session:
        """Start a psql that is fed through a pipe."""
        return _Psql(self._psql())

    def bodies(self) -> dict[int, str]:
        """Ask psql for them."""
        lines = self._query(f"COPY ({ledger.ALL_ROWS}) TO STDOUT").splitlines()
        return {int(key): body for key, body in (line.split("\t") for line in lines)}

    def check(self) -> list[str]:
        """Indexes against the table, amcheck where it is installed, and every page's checksum."""
        checked = []
        scans = {
            what: self._query(f"SET enable_seqscan = {'on' if what == 'the table' else 'off'}", query)
            for what, query in ledger.COUNTS.items()
        }
        if len(set(scans.values())) != 1:
            raise DemoError(f"the ledger and its indexes disagree about the number of rows: {scans}")
        checked.append("indexes count as many rows as the table")
        if (self._programs / "pg_amcheck").exists():
            self._call("pg_amcheck", "--username=postgres", f"--host={self._run}", "--database=postgres",
                       "--install-missing", "--heapallindexed")  # fmt: skip
            checked.append("pg_amcheck of all tables and indexes")
        self._call("pg_ctl", "stop", "--wait", "--mode=fast", f"--pgdata={self._files}")
        self._call("pg_checksums", "--check", f"--pgdata={self._files}")
        checked.append("pg_checksums of all pages")
        return checked

    def _call(self, program: str, *arguments: str) -> str:
        return run(str(self._programs / program), *arguments, user="postgres")

    def _psql(self) -> list[str]:
        return [
            str(self._programs / "psql"),
            *("--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1"),
            *(f"--host={self._run}", "--username=postgres", "--dbname=postgres"),
        ]

    def _query(self, *queries: str) -> str:
        return run(*self._psql(), *(f"--command={query}" for query in queries))


class _Psql:
    """A session of psql, which repeats a word once it has done what came before."""

    _WORD = "committed\n"

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def commit(self, statements: Sequence[str]) -> None:
        """Send all statements at once and wait for psql to get past them; it stops at an error."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise DemoError("psql has no pipes")
        # Joined by \; they travel as one message and are answered by one.
        stdin.write("\\; ".join(["BEGIN", *statements, "COMMIT"]) + f";\n\\echo {self._WORD}")
        stdin.flush()
        if stdout.readline() != self._WORD:
            raise DemoError("psql gave up: the database refused a transaction")

    def close(self) -> None:
        """Let psql end."""
        self._process.communicate()


class Sqlite:
    """SQLite with a write-ahead log that is flushed at every commit."""

    clients = 1
    name = f"SQLite {sqlite3.sqlite_version}"

    def __init__(self, directory: Path) -> None:
        self._file = directory / "ledger.sqlite"

    def create(self) -> None:
        """Make the table."""
        with closing(self.connect()) as session:
            session.commit(ledger.CREATE)

    def start(self) -> str:
        """Do nothing: the next connection recovers."""
        log = self._file.with_name(self._file.name + "-wal")
        return f"a write-ahead log of {os.path.getsize(log) if log.exists() else 0} bytes to recover from"

    def kill(self) -> None:
        """Do nothing: there is no server."""

    def connect(self) -> Session:
        """Open the file."""
        return _SqliteSession(self._open())

    def bodies(self) -> dict[int, str]:
        """Read them all."""
        with closing(self._open()) as connection:
            rows: Iterable[tuple[int, str]] = connection.execute(ledger.ALL_ROWS)
            return dict(rows)

    def check(self) -> list[str]:
        """Let SQLite compare tables and indexes."""
        with closing(self._open()) as connection:
            said = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if said != "ok":
            raise DemoError(f"PRAGMA integrity_check: {said}")
        return ["PRAGMA integrity_check"]

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection


class _SqliteSession:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def commit(self, statements: Sequence[str]) -> None:
        try:
            for statement in ["BEGIN", *statements, "COMMIT"]:
                self._connection.execute(statement)
        except sqlite3.Error as err:
            raise DemoError(f"SQLite refused a transaction: {err}") from err

    def close(self) -> None:
        self._connection.close()
