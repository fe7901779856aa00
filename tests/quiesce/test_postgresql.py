"""A real PostgreSQL whose parts lie on several volumes: what its agent makes of it, and what comes back.

The snapshots are copies of loop devices here; tests/lvm has the same under pgbench with those of LVM.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import QuiesceError
from blocksnap.operations.label import Label, NotItsDirectoryError, write_label
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Outcome
from blocksnap.system import freeze
from blocksnap.volumes.subvolume import SubvolumeVolume
from support.btrfs_lab import require_btrfs
from support.copied_volume import CopiedVolume, restored
from support.databases import PROGRAMS, Postgres, as_postgres, is_root, make_cluster, public_folder
from support.loops import call, loop_device
from support.require import require
from support.standing import holding, wait_until

SIZE = 112 << 20


class World:
    """Volumes, and a server on them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.run = folder / "run"
        self.server: Postgres

    def volume(self, name: str) -> CopiedVolume:
        return CopiedVolume(self.folder, name, SIZE, self.stack)

    def start(
        self, data: Path, *settings: str, group: Path | None = None, run: Path | None = None
    ) -> Postgres:
        self.server = Postgres(data, run or self.run, group, *settings)
        self.stack.callback(self.server.stop)
        self.server.wait()
        return self.server

    def back_up(self, *volumes: CopiedVolume, **settings: object) -> Outcome:
        """Take the snapshots of one run."""
        asked = {"socket": str(self.run), **settings}
        policy = {
            name: asked.pop(name) for name in ("on_failure", "cgroups", "deadline_seconds") if name in asked
        }
        quiesce = QuiesceSettings.model_validate({"deadline_seconds": 60, "postgresql": [asked], **policy})
        request = QuiesceRequest(quiesce, (), "job")
        with SnapshotSession(volumes, "run", self.folder / "state", request) as session:  # type: ignore[arg-type]
            assert session.snapshots == volumes
        assert session.quiesced is not None
        return session.quiesced


@pytest.fixture
def world() -> Iterator[World]:
    require("postgres", PROGRAMS.exists() and is_root(), "postgresql is not installed, or we are not root")
    with public_folder() as folder, ExitStack() as stack:
        yield World(folder, stack)


def label_in(outcome: Outcome) -> Label:
    (record,) = outcome.records
    facts = record.facts
    return Label(
        record.name, facts["label"], facts["tablespace_map"], facts["version"], facts["system_identifier"]
    )


def amcheck(server: Postgres) -> None:
    """Read all of it, as far as the tools that are there do."""
    call(*server.argv("pg_dump", "-f", os.devnull, "postgres"))
    if (PROGRAMS / "pg_amcheck").exists():
        call(*server.argv("pg_amcheck", "--install-missing", "--heapallindexed", "postgres"))


def load(world: World, wal: CopiedVolume, data: CopiedVolume, space: CopiedVolume) -> list[str]:
    """A server with everything on a volume of its own, under a load; return what was committed."""
    make_cluster(data.folder / "pg", wal.folder / "pg")
    (space.folder / "pg").mkdir()
    os.chown(space.folder / "pg", *(os.stat(data.folder / "pg")[4:6]))
    # An archive that never takes anything is waited for by a backup that asks for it, and ours does not.
    server = world.start(data.folder / "pg", "archive_mode=on", "archive_command=/bin/false")
    server.query(
        f"CREATE TABLESPACE far LOCATION '{space.folder / 'pg'}'",
        "CREATE TABLE ledger (number integer PRIMARY KEY, words text) TABLESPACE far",
    )
    call(*server.argv("pgbench", "-i", "-q", "-s", "1", "--tablespace", "far", "postgres"))
    # Paced: the log that it writes is kept, and its volume is small.
    bench = world.stack.enter_context(
        subprocess.Popen(
            server.argv("pgbench", "-n", "-c", "2", "-R", "50", "-T", "600", "postgres"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )
    world.stack.callback(bench.kill)
    server.query("INSERT INTO ledger SELECT n, 'committed' FROM generate_series(1, 50) n")
    return server.query("SELECT number FROM ledger ORDER BY 1").splitlines()


def test_log_data_and_tablespace_of_three_volumes_fit_together(world: World) -> None:
    wal, data, space = (world.volume(name) for name in ("wal", "data", "space"))
    committed = load(world, wal, data, space)
    server = world.server

    def go_on() -> None:
        # The log of all this is needed, and is long; and a checkpoint would give some of it up.
        server.query("UPDATE pgbench_accounts SET abalance = abalance", "CHECKPOINT")

    data.meanwhile = go_on
    outcome = world.back_up(wal, data, space)
    assert outcome.state == "application"
    facts = outcome.records[0].facts
    assert (facts["way"], facts["role"]) == ("backup", "primary")
    assert facts["label"].startswith("START WAL LOCATION: ")
    assert wal.timing.taken_at > data.timing.taken_at > space.timing.taken_at
    assert server.query("SELECT count(*) FROM pg_replication_slots") == "0"
    world.stack.close()

    with restored(wal, data, space) as (wal_folder, data_folder, space_folder), ExitStack() as stack:
        world.stack = stack
        folder = data_folder / "pg"
        (folder / "pg_wal").unlink()
        (folder / "pg_wal").symlink_to(wal_folder / "pg")
        (link,) = (folder / "pg_tblspc").iterdir()
        link.unlink()
        link.symlink_to(space_folder / "pg")
        label = label_in(outcome)
        written = write_label(label, str(folder))
        assert written == [str(folder / "tablespace_map"), str(folder / "backup_label")]
        assert (folder / "backup_label").read_text() == label.text
        assert (folder / "backup_label").owner() == "postgres"
        # Not where it was, but where whoever restores has led it.
        assert (folder / "tablespace_map").read_text() == f"{link.name} {space_folder}/pg\n"
        with pytest.raises(NotItsDirectoryError, match="has a backup_label already"):
            write_label(label, str(folder))
        (folder / "postmaster.pid").unlink()
        again = world.start(folder, run=world.folder / "again")
        assert "consistent recovery state reached" in again.log()
        assert (folder / "backup_label.old").exists()
        assert again.query("SELECT number FROM ledger ORDER BY 1").splitlines() == committed
        balances = {"accounts": "abalance", "branches": "bbalance", "tellers": "tbalance"}
        sums = [again.query(f"SELECT sum({of}) FROM pgbench_{table}") for table, of in balances.items()]  # noqa: S608
        assert len(set(sums)) == 1
        amcheck(again)
        with pytest.raises(NotItsDirectoryError, match="is in use"):
            write_label(label, str(folder))


def test_one_volume_needs_a_checkpoint_and_few_rights(world: World) -> None:
    everything = world.volume("everything")
    data = everything.folder / "pg"
    make_cluster(data)
    (data / "pg_hba.conf").write_text("local all keeper scram-sha-256\nlocal all all peer\n")
    server = world.start(data)
    words = ["CREATE ROLE keeper LOGIN PASSWORD 'ours alone'"]
    words.append("GRANT pg_read_all_settings, pg_checkpoint TO keeper")
    psql = [word for statement in words for word in ("-c", statement)]
    call(*as_postgres(*server.argv("psql", "-q", *psql)))
    secret = world.folder / "secret"
    secret.write_text("ours alone\n")
    secret.chmod(0o600)
    # Root is not postgres to the server, and may become it.
    with_password = {"user": "keeper", "password_file": str(secret)}
    for way in ({}, with_password, {**with_password, "account": "nobody"}):
        outcome = world.back_up(everything, **way)
        assert outcome.state == "application"
        facts = outcome.records[0].facts
        assert (facts["way"], facts["reason"]) == ("checkpoint", "one volume holds all of it")
        assert "label" not in facts
    assert server.log().count("checkpoint starting: immediate force wait") >= 2
    with pytest.raises(QuiesceError, match="Peer authentication failed"):
        world.back_up(everything, account="nobody")
    secret.write_text("not ours\n")
    with pytest.raises(QuiesceError, match="password authentication failed") as refused:
        world.back_up(everything, user="keeper", password_file=str(secret))
    assert "not ours" not in f"{refused.value.details}{refused.value}"


_LINK = """
import sys, time
from blocksnap.quiesce.postgresql_link import PostgresqlLink
from blocksnap.quiesce.settings import PostgresqlSettings
run, secret = sys.argv[1:]
settings = PostgresqlSettings(socket=run, user="keeper", account="nobody", password_file=secret)
PostgresqlLink("server", settings, time.monotonic() + 30)
"""


def test_the_account_of_a_connection_does_not_read_the_password(tmp_path: Path) -> None:
    """Root may read what others' are while it is one of them, but for a root that is held to the modes."""
    require("setpriv", shutil.which("setpriv") is not None and is_root(), "setpriv is missing, or not root")
    secret = tmp_path / "secret"
    secret.write_text("ours alone\n")
    secret.chmod(0o600)
    held = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c", _LINK)
    done = subprocess.run([*held, tmp_path, secret], check=False, capture_output=True, text=True)
    # That nobody listens there comes after the password.
    assert "server lets nobody in as 'keeper'" in done.stderr


def test_what_is_not_in_the_run_and_what_is_frozen(group: Path, world: World) -> None:
    data, wal = world.volume("data"), world.volume("wal")
    make_cluster(data.folder / "pg", wal.folder / "pg")
    world.start(data.folder / "pg", group=group)
    with pytest.raises(QuiesceError, match=r"its directory /.*/wal/pg lies on no volume of this run"):
        world.back_up(data)
    outcome = world.back_up(data, wal, cgroups=[str(group)])
    facts = outcome.records[0].facts
    assert (facts["way"], facts["reason"]) == (
        "checkpoint",
        "its processes are frozen for the instant of all snapshots",
    )


def test_subvolumes_are_snapshotted_one_by_one(world: World) -> None:
    require_btrfs()
    device = world.stack.enter_context(loop_device(world.folder / "btrfs.img", size=300 << 20))
    call("mkfs.btrfs", "-q", device)
    top = world.stack.enter_context(holding(device, world.folder / "top"))
    for name in ("data", "wal"):
        call("btrfs", "subvolume", "create", top / name)
    make_cluster(top / "data/pg", top / "wal/pg")
    server = world.start(top / "data/pg")
    server.query("CREATE TABLE ledger AS SELECT generate_series(1, 1000) AS number")
    wal, data = (SubvolumeVolume(str(top / name)) for name in ("wal", "data"))
    quiesce = QuiesceSettings.model_validate(
        {"deadline_seconds": 120, "postgresql": [{"socket": str(world.run)}]}
    )
    with SnapshotSession([wal, data], "run", world.folder / "state", QuiesceRequest(quiesce)) as session:
        later, earlier = session.snapshots
        assert later.timing.taken_at > earlier.timing.taken_at
        for path in top.glob(".blocksnap-*"):
            name = "data" if (path / "pg/PG_VERSION").exists() else "wal"
            call("cp", "-a", "--reflink=always", path, top / f"restored {name}")
    assert session.quiesced is not None
    assert session.quiesced.records[0].facts["way"] == "backup"
    server.stop()
    folder = top / "restored data/pg"
    (folder / "pg_wal").unlink()
    (folder / "pg_wal").symlink_to(top / "restored wal/pg")
    (folder / "postmaster.pid").unlink()
    write_label(label_in(session.quiesced), str(folder))
    again = world.start(folder, run=world.folder / "again")
    assert again.query("SELECT count(*) FROM ledger") == "1000"


def test_what_we_freeze_ourselves_is_not_frozen_while_the_server_is_asked(world: World) -> None:
    volumes = [world.volume(name) for name in ("data", "wal")]
    inner = []
    for volume in volumes:
        device = world.stack.enter_context(loop_device(volume.folder / "inner.img", size=80 << 20))
        call("mkfs.ext4", "-q", device)
        inner.append(world.stack.enter_context(holding(device, world.folder / f"in {volume.name}")))
    data, wal = inner
    make_cluster(data / "pg", wal / "pg")
    world.start(data / "pg")
    frozen: list[str] = []

    def look() -> None:
        # What can be frozen was not, and is thawed again.
        for folder in inner:
            fd = os.open(folder, os.O_RDONLY)
            try:
                freeze.freeze(fd)
                freeze.thaw(fd)
            except OSError:
                frozen.append(folder.name)
            finally:
                os.close(fd)

    for volume in volumes:
        volume.meanwhile = look
    outcome = world.back_up(*volumes)
    assert outcome.by[1:] == (f"filesystem on {data}", f"filesystem on {wal}")
    assert outcome.records[0].facts["way"] == "backup"
    # Each for its own stage, since a server whose log is frozen could not have ended its backup.
    assert frozen == ["in data", "in wal"]


@pytest.mark.parametrize(
    ("settings", "statement", "found"),
    [
        # The connection is gone, and backup mode with it.
        ((), "SELECT pg_terminate_backend(pid) FROM {us}", "was lost while ending the backup"),
        # It does not answer any more.
        ((), "STOP", "did not answer in time while ending the backup|the watchdog ended the standstill"),
        # A checkpoint gives up log, and nothing holds it.
        (("max_replication_slots=0", "max_wal_senders=0"), "CHECKPOINT", "may have removed log"),
    ],
    ids=["terminated", "stopped", "no slot"],
)
def test_a_backup_that_does_not_come_to_its_end(
    world: World, settings: tuple[str, ...], statement: str, found: str
) -> None:
    data, wal = world.volume("data"), world.volume("wal")
    make_cluster(data.folder / "pg", wal.folder / "pg")
    server = world.start(data.folder / "pg", *settings)
    us = "pg_stat_activity WHERE application_name = 'blocksnap'"

    def disturb() -> None:
        if statement == "STOP":
            pid = int(server.query(f"SELECT pid FROM {us}"))  # noqa: S608
            os.kill(pid, signal.SIGSTOP)
            world.stack.callback(os.kill, pid, signal.SIGCONT)
        else:
            server.query("CREATE TABLE t ()", statement.format(us=us), "DROP TABLE t")

    data.meanwhile = disturb
    # A new cluster is written out first: the time counts from before the freeze of its filesystems on.
    for volume in (data, wal):
        call("sync", "-f", volume.folder)
    deadline = 15 if statement == "STOP" else 60
    with pytest.raises(QuiesceError, match=found):
        world.back_up(data, wal, deadline_seconds=deadline)
    if not settings:
        return
    outcome = world.back_up(data, wal, on_failure="crash-consistent")
    assert (outcome.state, outcome.records) == ("failed", ())


def test_a_standby(world: World) -> None:
    primary = world.folder / "primary"
    make_cluster(primary)
    first = world.start(primary, run=world.folder / "first")
    data, wal = world.volume("data"), world.volume("wal")
    for volume in (data, wal):
        (volume.folder / "pg").mkdir(mode=0o700)
        os.chown(volume.folder / "pg", *(os.stat(primary)[4:6]))
    call(
        *first.argv(
            "pg_basebackup",
            "-R",
            "-c",
            "fast",
            "-D",
            str(data.folder / "pg"),
            "--waldir",
            str(wal.folder / "pg"),
        )
    )
    for path in (data.folder / "pg", wal.folder / "pg"):
        call("chown", "-R", "postgres:postgres", path)
    second = world.start(data.folder / "pg")
    first.query("CREATE TABLE ledger AS SELECT generate_series(1, 1000) AS number")

    def caught_up(count: int) -> Callable[[], bool]:
        return lambda: (
            second.query("SELECT to_regclass('ledger')") != ""
            and second.query("SELECT count(*) FROM ledger") == str(count)
        )

    assert wait_until(caught_up(1000))

    def go_on() -> None:
        first.query("INSERT INTO ledger SELECT generate_series(1001, 2000)")
        assert wait_until(caught_up(2000))

    data.meanwhile = go_on
    outcome = world.back_up(data, wal)
    facts = outcome.records[0].facts
    assert (facts["role"], facts["way"]) == ("standby", "backup")
    assert "BACKUP FROM: standby" in facts["label"]
    world.stack.close()
    with restored(data, wal) as (data_folder, wal_folder), ExitStack() as stack:
        world.stack = stack
        folder = data_folder / "pg"
        (folder / "pg_wal").unlink()
        (folder / "pg_wal").symlink_to(wal_folder / "pg")
        (folder / "postmaster.pid").unlink()
        write_label(label_in(outcome), str(folder))
        again = world.start(folder, run=world.folder / "again")
        again.query("SELECT pg_promote()")
        assert int(again.query("SELECT count(*) FROM ledger")) in (1000, 2000)
        amcheck(again)
