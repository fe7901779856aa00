"""Databases whose parts lie on several LVM volumes, backed up and restored by commands, under a load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.databases import (
    PROGRAMS,
    Ledger,
    Postgres,
    ask,
    connect,
    make_cluster,
    mariadb,
    public_folder,
)
from support.in_process import InProcess
from support.loops import call, loop_device
from support.lvm_lab import ThinPool
from support.require import require
from support.standing import control_group, holding, wait_until

ENOUGH = 20
CONFIGURATION = """
[jobs.shop]
volumes = ["{group}/wal", "{group}/data"]

[jobs.shop.quiesce]
deadline_seconds = 600
{freezing}
[[jobs.shop.quiesce.{kind}]]
socket = "{socket}"
"""


class Volumes:
    """Two thin volumes with a filesystem each, and what comes back of them."""

    def __init__(self, pool: ThinPool, folder: Path, stack: ExitStack, blocksnap: InProcess) -> None:
        self.pool, self.folder, self.blocksnap = pool, folder, blocksnap
        self.paths = {}
        for name in ("data", "wal"):
            pool.create(name, "96M")
            stack.callback(pool.remove, name)
            call("mkfs.ext4", "-q", pool.node(name))
            self.paths[name] = stack.enter_context(holding(pool.node(name), folder / name))

    def back_up(self, kind: str, socket: Path, freezing: str = "") -> dict[str, str]:
        """Run the job; return the ids of its backups, by volume."""
        text = CONFIGURATION.format(group=self.pool.group, kind=kind, socket=socket, freezing=freezing)
        (self.blocksnap.folder / "blocksnap.toml").write_text(text)
        out = self.blocksnap.done("backup", "--json", "--job", "shop")
        found = {}
        for each in json.loads(out.splitlines()[-1])["backups"]:
            assert each["consistency"] == "application"
            found[each["volume"].rpartition("/")[2]] = each["id"]
        return found

    def restore(self, ids: dict[str, str], stack: ExitStack) -> tuple[dict[str, Path], str]:
        """Restore them to files, mounted; return where, and what was said."""
        restored, said = {}, ""
        for name, id_ in ids.items():
            image = self.folder / f"{id_}.img"
            code, _, err = self.blocksnap("restore", id_, str(image))
            assert code == 0, err
            said += err
            device = stack.enter_context(loop_device(image))
            restored[name] = stack.enter_context(holding(device, self.folder / f"restored {id_}"))
        return restored, said


@pytest.fixture
def folder() -> Iterator[Path]:
    with public_folder() as made:
        yield made


@pytest.fixture
def group() -> Iterator[Path]:
    with control_group() as made:
        yield made


def check_restored(server: Postgres, *, every_row: bool) -> None:
    """All that was committed is there, what pgbench does is done to all tables or none, all can be read."""
    assert server.query("SELECT count(*) FROM ledger") == str(ENOUGH)
    balances = {"accounts": "abalance", "branches": "bbalance", "tellers": "tbalance"}
    sums = {
        server.query(f"SELECT sum({of}) FROM pgbench_{table}")  # noqa: S608 - our own words
        for table, of in balances.items()
    }
    assert len(sums) == 1
    call(*server.argv("pg_dump", "-f", os.devnull, "postgres"))
    if every_row and (PROGRAMS / "pg_amcheck").exists():
        call(*server.argv("pg_amcheck", "--install-missing", "--heapallindexed", "postgres"))


def test_postgresql_with_its_log_on_another_volume(
    pool: ThinPool, blocksnap: InProcess, group: Path, folder: Path
) -> None:
    require("postgres", PROGRAMS.exists(), "postgresql is not installed")
    with ExitStack() as stack:
        volumes = Volumes(pool, folder, stack, blocksnap)
        data, log = (volumes.paths[name] / "pg" for name in ("data", "wal"))
        make_cluster(data, log)
        server = Postgres(data, folder / "run", group)
        stack.callback(server.stop)
        server.wait()
        server.query("CREATE TABLE ledger (number integer PRIMARY KEY, words text)")
        call(*server.argv("pgbench", "-i", "-q", "-s", "1", "postgres"))
        load = server.argv("pgbench", "-n", "-c", "2", "-T", "3600", "postgres")
        bench = stack.enter_context(
            subprocess.Popen(load, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        stack.callback(bench.kill)
        server.query(f"INSERT INTO ledger SELECT n, 'committed' FROM generate_series(1, {ENOUGH}) n")  # noqa: S608
        asked = volumes.back_up("postgresql", server.run)
        frozen = volumes.back_up("postgresql", server.run, f'cgroups = ["{group}"]')
        shown = json.loads(blocksnap.done("show", "--json", asked["data"]))["quiesced"]
        assert shown["records"][0]["facts"]["way"] == "backup"
        assert (
            "way backup, reason its log lies on another volume"
            in blocksnap.done("show", asked["wal"]).decode()
        )
        bench.kill()
    for ids, needs_label in ((asked, True), (frozen, False)):
        with ExitStack() as stack:
            restored, said = volumes.restore(ids, stack)
            data = restored["data"] / "pg"
            (data / "pg_wal").unlink()
            (data / "pg_wal").symlink_to(restored["wal"] / "pg")
            (data / "postmaster.pid").unlink()
            word = f"blocksnap label {ids['data'][:8]} DATA-DIRECTORY"
            assert (word in said) == needs_label
            if needs_label:
                label = blocksnap.done("label", ids["wal"])
                assert label.startswith(b"START WAL LOCATION: ")
                assert b"may be started" in blocksnap.done("label", ids["data"], data)
                assert (data / "backup_label").read_bytes() == label
            server = Postgres(data, folder / f"run {ids['data']}")
            stack.callback(server.stop)
            server.wait()
            assert ("consistent recovery state reached" in server.log()) == needs_label
            check_restored(server, every_row=needs_label)
    assert blocksnap("label", frozen["data"])[0] == 2


def test_mariadb_with_its_binary_log_on_another_volume(
    pool: ThinPool, blocksnap: InProcess, folder: Path
) -> None:
    require("mariadb", shutil.which("mariadbd") is not None, "mariadb-server-core is not installed")
    socket = folder / "socket"
    with ExitStack() as stack:
        volumes = Volumes(pool, folder, stack, blocksnap)
        data, log = (volumes.paths[name] / "db" for name in ("data", "wal"))
        data.mkdir()
        log.mkdir()
        stack.enter_context(mariadb(data, socket, None, f"--log-bin={log}/binary"))
        root = stack.enter_context(connect(socket))
        ask(root, "CREATE DATABASE shop")
        ask(root, "CREATE TABLE shop.ledger (number INTEGER PRIMARY KEY, words TEXT) ENGINE=InnoDB")
        ledger = Ledger(socket)
        stack.callback(ledger.stop)
        assert wait_until(lambda: ledger.committed > ENOUGH, 300)
        before = ledger.committed
        ids = volumes.back_up("mariadb", socket)
        after = ledger.committed
        facts = json.loads(blocksnap.done("show", "--json", ids["data"]))["quiesced"]["records"][0]["facts"]
    with ExitStack() as stack:
        restored, said = volumes.restore(ids, stack)
        assert "blocksnap label" not in said
        log = restored["wal"] / "db"
        assert (log / facts["binary_log_file"]).stat().st_size == int(facts["binary_log_position"])
        (log / "binary.index").write_text(f"{log}/{facts['binary_log_file']}\n")
        stack.enter_context(mariadb(restored["data"] / "db", socket, None, f"--log-bin={log}/binary"))
        root = stack.enter_context(connect(socket))
        (found,) = ask(root, "SELECT COUNT(*), MAX(number) FROM shop.ledger")
        assert found[0] == found[1]
        assert before <= int(str(found[0])) <= after + 1
        assert ask(root, "SELECT @@GLOBAL.gtid_binlog_pos") == [(facts["gtid"],)]
        assert all(row[3] == "OK" for row in ask(root, "CHECK TABLE shop.ledger EXTENDED"))
