"""PostgreSQL with its log on another volume than its data, frozen for an instant under load, and restored."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.volumes.resolve import resolve_volume
from support.loops import call, loop_device
from support.lvm_lab import ThinPool
from support.require import require
from support.standing import control_group, holding, wait_until
from support.thin_lab import read_all

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nowhere"))
SETTINGS = "shared_buffers=16MB max_wal_size=16MB min_wal_size=2MB checkpoint_timeout=30s max_connections=8"
ENOUGH = 20


class Server:
    """A server on a directory, as its own user, reachable through a socket only, in a control group."""

    def __init__(self, data: Path, run: Path, group: Path) -> None:
        self.data, self._run = data, run
        options = [f"--{setting}" for setting in SETTINGS.split()]
        argv = [str(PROGRAMS / "postgres"), "-D", str(data), "-k", str(run), "-h", "", *options]
        self._log = (run / "log").open("ab")
        self._process = subprocess.Popen(
            argv, user="postgres", group="postgres", stdout=self._log, stderr=self._log
        )
        # Before it has children of its own.
        (group / "cgroup.procs").write_text(str(self._process.pid))

    def wait(self) -> None:
        """Wait until it answers."""
        assert wait_until(lambda: self._process.poll() is not None or self.answers(), 120), self.log()
        assert self._process.poll() is None, self.log()

    def answers(self) -> bool:
        done = subprocess.run([PROGRAMS / "pg_isready", "-q", "-h", self._run], check=False)
        return done.returncode == 0

    def argv(self, program: str, *words: str) -> list[str]:
        return [str(PROGRAMS / program), "-h", str(self._run), "-U", "postgres", *words]

    def query(self, *queries: str) -> str:
        words = [word for query in queries for word in ("-c", query)]
        return call(*self.argv("psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *words, "postgres"))

    def log(self) -> str:
        return (self._run / "log").read_text()

    def stop(self) -> None:
        """Let go of the files, whatever it does."""
        self._process.send_signal(3)
        self._process.wait()
        self._log.close()


@pytest.fixture
def group() -> Iterator[Path]:
    with control_group() as folder:
        yield folder


def test_data_and_log_of_two_volumes_fit_together(
    pool: ThinPool, group: Path, tmp_path: Path, state: Path
) -> None:
    require("postgres", PROGRAMS.exists(), "postgresql is not installed")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    with ExitStack() as stack:
        mounts = {}
        for name in ("data", "wal"):
            pool.create(name, "96M")
            stack.callback(pool.remove, name)
            call("mkfs.ext4", "-q", pool.node(name))
            mounts[name] = stack.enter_context(holding(pool.node(name), tmp_path / name))
            (mounts[name] / "pg").mkdir()
            shutil.chown(mounts[name] / "pg", "postgres", "postgres")
        run = tmp_path / "run"
        run.mkdir()
        shutil.chown(run, "postgres", "postgres")
        initdb = [PROGRAMS / "initdb", "-D", mounts["data"] / "pg", "--waldir", mounts["wal"] / "pg"]
        options = ["--wal-segsize=1", "--auth=trust", "--data-checksums", "--no-sync", "--no-locale"]
        subprocess.run(
            [*initdb, *options], user="postgres", group="postgres", check=True, capture_output=True, cwd="/"
        )
        server = Server(mounts["data"] / "pg", run, group)
        stack.callback(server.stop)
        server.wait()
        server.query("CREATE TABLE ledger (number integer PRIMARY KEY, words text)")
        call(*server.argv("pgbench", "-i", "-q", "-s", "1", "postgres"))
        load = server.argv("pgbench", "-n", "-c", "2", "-T", "600", "postgres")
        bench = stack.enter_context(
            subprocess.Popen(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        stack.callback(bench.kill)
        for number in range(ENOUGH):
            server.query(f"INSERT INTO ledger VALUES ({number}, 'committed')")  # noqa: S608 - a number
        settings = QuiesceSettings.model_validate({"cgroups": [str(group)], "deadline_seconds": 120})
        volumes = [resolve_volume(f"{pool.group}/{name}") for name in ("data", "wal")]
        with SnapshotSession(volumes, "pg", state, QuiesceRequest(settings)) as session:
            assert session.quiesced is not None
            assert session.quiesced.state == "frozen"
            for name, snapshot in zip(("data", "wal"), session.snapshots, strict=True):
                (tmp_path / f"{name}.img").write_bytes(read_all(snapshot))
        assert session.warnings == []
        assert server.query("SELECT count(*) FROM ledger").strip() == str(ENOUGH)
        bench.kill()
    with ExitStack() as stack:
        restored = {}
        for name in ("data", "wal"):
            device = stack.enter_context(loop_device(tmp_path / f"{name}.img"))
            restored[name] = stack.enter_context(holding(device, tmp_path / f"restored {name}"))
        (restored["data"] / "pg" / "pg_wal").unlink()
        (restored["data"] / "pg" / "pg_wal").symlink_to(restored["wal"] / "pg")
        (restored["data"] / "pg" / "postmaster.pid").unlink()
        server = Server(restored["data"] / "pg", run, group)
        stack.callback(server.stop)
        server.wait()
        assert "database system was not properly shut down" in server.log()
        assert server.query("SELECT count(*) FROM ledger").strip() == str(ENOUGH)
        # What a transaction of pgbench does to three tables it does to all or none.
        balances = {"accounts": "abalance", "branches": "bbalance", "tellers": "tbalance"}
        sums = {
            server.query(f"SELECT sum({of}) FROM pgbench_{table}")  # noqa: S608 - our own words
            for table, of in balances.items()
        }
        assert len(sums) == 1
        call(*server.argv("pg_dump", "-f", os.devnull, "postgres"))
        amcheck = PROGRAMS / "pg_amcheck"
        if amcheck.exists():
            call(*server.argv("pg_amcheck", "--install-missing", "--heapallindexed", "postgres"))
