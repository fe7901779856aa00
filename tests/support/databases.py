"""Servers of databases on directories of the test's own, reachable through a socket only."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pymysql

from support.loops import call
from support.standing import wait_until

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
_STOPPING_SECONDS = 120
_POSTGRES = (
    "shared_buffers=16MB max_wal_size=16MB min_wal_size=2MB checkpoint_timeout=30s max_connections=12 "
    "max_replication_slots=2"
)
_MARIADB = (
    "--innodb-buffer-pool-size=8M --loose-innodb-buffer-pool-size-max=8M --innodb-log-file-size=4M "
    "--innodb-fast-shutdown=2 --aria-pagecache-buffer-size=1M --key-buffer-size=1M --skip-networking "
    "--performance-schema=off --max-connections=50"
)


# A server that is not root has to find its way through `/`, which on some machines only root may pass. So it
# gets a root directory that everybody may, in a mount namespace of its own, as in a container.
_OWN_ROOT = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
for each in /*; do
    if [ -L "$each" ]; then cp -P "$each" /mnt
    elif [ -d "$each" ] && [ "$each" != /mnt ]; then mkdir "/mnt$each"; mount --rbind "$each" "/mnt$each"
    fi
done
exec chroot --userspec=postgres:postgres /mnt "$@"
"""


def as_postgres(*argv: str | Path) -> list[str]:
    """A command as user postgres, in a root directory of its own, which keeps nothing that others unmount."""
    namespace = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _OWN_ROOT, "sh"]
    return [*namespace, *(str(word) for word in argv)]


@contextmanager
def public_folder() -> Iterator[Path]:
    """A folder to which any user finds its way, removed at the end.

    pytest's are its user's alone, and any other run of it makes them so again.
    """
    with tempfile.TemporaryDirectory(prefix="blocksnap-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def make_cluster(data: Path, log: Path | None = None) -> None:
    """Make the data directory of a PostgreSQL server, its log elsewhere if that is said; sockets trust."""
    for folder in (data, *((log,) if log else ())):
        folder.mkdir()
        shutil.chown(folder, "postgres", "postgres")
    elsewhere = ["--waldir", str(log)] if log else []
    options = ["--wal-segsize=1", "--auth=trust", "--data-checksums", "--no-sync", "--no-locale"]
    call(*as_postgres(PROGRAMS / "initdb", "-D", data, *elsewhere, *options))


class Postgres:
    """A PostgreSQL server on a directory, as its own user, in a control group if one is given."""

    def __init__(self, data: Path, run: Path, group: Path | None = None, *settings: str) -> None:
        self.data, self.run = data, run
        if not run.exists():
            run.mkdir()
            shutil.chown(run, "postgres", "postgres")
        options = [f"--{setting}" for setting in (*_POSTGRES.split(), *settings)]
        argv = [str(PROGRAMS / "postgres"), "-D", str(data), "-k", str(run), "-h", "", *options]
        self._log = (run / "log").open("ab")
        self.process = subprocess.Popen(as_postgres(*argv), stdout=self._log, stderr=self._log)
        if group is not None:
            # Before it has children of its own.
            (group / "cgroup.procs").write_text(str(self.process.pid))

    def wait(self) -> None:
        """Wait until it answers."""
        assert wait_until(lambda: self.process.poll() is not None or self.answers()), self.log()
        assert self.process.poll() is None, self.log()

    def answers(self) -> bool:
        done = subprocess.run([PROGRAMS / "pg_isready", "-q", "-h", self.run], check=False)
        return done.returncode == 0

    def argv(self, program: str, *words: str) -> list[str]:
        return [str(PROGRAMS / program), "-h", str(self.run), "-U", "postgres", *words]

    def query(self, *queries: str) -> str:
        words = [word for query in queries for word in ("-c", query)]
        out = call(*self.argv("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *words, "postgres"))
        return out.strip()

    def log(self) -> str:
        return (self.run / "log").read_text()

    def stop(self) -> None:
        """Let go of the files, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(3)
        try:
            self.process.wait(_STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            # It stands still with its control group, which is its owner's to let go on.
            self.process.kill()
            raise
        self._log.close()


@contextmanager
def mariadb(
    data: Path, socket: Path, group: Path | None = None, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A MariaDB server on a directory, which is made into a data directory if it is empty."""
    if not any(data.iterdir()):
        _make_mariadb(data, *options)
    log = socket.with_suffix(".log")
    with log.open("wb") as out:
        argv = [
            "/usr/sbin/mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={socket}",
            # A server that starts removes the temporary tables of all others that have theirs where it has.
            f"--tmpdir={tempfile.mkdtemp(dir=socket.parent)}",
        ]
        server = subprocess.Popen(
            [*argv, f"--pid-file={socket}.pid", *_MARIADB.split(), *options], stdout=out, stderr=out
        )
        if group is not None:
            (group / "cgroup.procs").write_text(str(server.pid))
    try:
        assert wait_until(lambda: server.poll() is not None or "ready for connections" in log.read_text()), (
            log.read_text()
        )
        assert server.poll() is None, log.read_text()
        yield server
    finally:
        server.kill()
        server.wait()


def _make_mariadb(data: Path, *options: str) -> None:
    """What mariadb-install-db does, which needs more packages than it uses."""
    tables = [Path(f"/usr/share/mysql/mysql_system_tables{part}.sql").read_text() for part in ("", "_data")]
    words = ["CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket='root';", *tables]
    argv = ["/usr/sbin/mariadbd", "--no-defaults", "--bootstrap", "--user=root", f"--datadir={data}"]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [*argv, f"--tmpdir={scratch}", *_MARIADB.split(), *options],
            input="\n".join(words),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def connect(socket: Path) -> pymysql.Connection:  # type: ignore[type-arg]
    """A connection of root's, which the server knows by the kernel's word."""
    return pymysql.connect(unix_socket=str(socket), user="root", autocommit=True, read_timeout=300)


def ask(connection: pymysql.Connection, statement: str) -> list[tuple[object, ...]]:  # type: ignore[type-arg]
    """All rows of an answer."""
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall())


class Ledger:
    """Somebody who commits one row after the other, and knows the last that was."""

    def __init__(self, socket: Path) -> None:
        self.committed = 0
        self._going = True
        self._socket = socket
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        with connect(self._socket) as connection:
            while self._going:
                row = f"({self.committed + 1}, REPEAT('x', 500))"
                with suppress(pymysql.MySQLError):
                    ask(connection, f"INSERT INTO shop.ledger VALUES {row}")  # noqa: S608 - a number
                    self.committed += 1

    def stop(self) -> None:
        self._going = False
        self._thread.join()


def is_root() -> bool:
    """Whether a server can be run as another user."""
    return os.geteuid() == 0
