"""A real MariaDB under a write load: nobody commits between the first snapshot and the last.

The snapshots are copies of loop devices here; tests/lvm has the same with those of LVM.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pymysql
import pytest

from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import QuiesceError
from blocksnap.quiesce import mariadb as mariadb_agent
from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.places import Target
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Outcome
from support.btrfs_lab import require_btrfs
from support.copied_volume import CopiedVolume, restored
from support.databases import Ledger, ask, connect, is_root, mariadb
from support.loops import call, loop_device
from support.require import require
from support.standing import holding, wait_until

SIZE = 128 << 20


class World:
    """Volumes, and a server on them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.socket = folder / "socket"

    def volume(self, name: str) -> CopiedVolume:
        volume = CopiedVolume(self.folder, name, SIZE, self.stack)
        shutil.rmtree(volume.folder / "lost+found")
        return volume

    def start(self, data: Path, *options: str, group: Path | None = None) -> pymysql.Connection:  # type: ignore[type-arg]
        self.stack.enter_context(mariadb(data, self.socket, group, *options))
        return self.stack.enter_context(connect(self.socket))

    def back_up(self, *volumes: CopiedVolume, **settings: object) -> Outcome:
        """Take the snapshots of one run."""
        asked = {"socket": str(self.socket), **settings}
        policy = {
            name: asked.pop(name) for name in ("on_failure", "cgroups", "deadline_seconds") if name in asked
        }
        quiesce = QuiesceSettings.model_validate({"deadline_seconds": 60, "mariadb": [asked], **policy})
        request = QuiesceRequest(quiesce, (), "job")
        with SnapshotSession(volumes, "run", self.folder / "state", request) as session:  # type: ignore[arg-type]
            pass
        assert session.quiesced is not None
        return session.quiesced


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    available = shutil.which("mariadbd") is not None and is_root()
    require("mariadb", available, "mariadb-server-core is not installed, or we are not root")
    with ExitStack() as stack:
        yield World(tmp_path, stack)


def test_what_was_committed_before_is_there_and_the_position_is_that_of_the_snapshot(world: World) -> None:
    data, logs = world.volume("data"), world.volume("logs")
    binary_log = f"--log-bin={logs.folder}/binary"
    root = world.start(data.folder, binary_log, "--server-id=7")
    ask(root, "CREATE DATABASE shop")
    ask(root, "CREATE TABLE shop.ledger (number INTEGER PRIMARY KEY, words TEXT) ENGINE=InnoDB")
    ask(root, "CREATE TABLE shop.notes (number INTEGER PRIMARY KEY) ENGINE=MyISAM")
    ledger = Ledger(world.socket)
    world.stack.callback(ledger.stop)
    assert wait_until(lambda: ledger.committed > 50)
    ask(root, "INSERT INTO shop.notes VALUES (1), (2), (3)")
    committed: list[int] = []

    def look() -> None:
        # Whoever waits has been told of all that it sent before.
        assert wait_until(lambda: is_anybody(world.socket, "Waiting for backup lock"))
        committed.append(ledger.committed)

    data.meanwhile = logs.meanwhile = look
    outcome = world.back_up(data, logs)
    assert outcome.state == "application"
    assert committed[0] == committed[1]
    assert wait_until(lambda: ledger.committed > committed[0] + 10)
    facts = outcome.records[0].facts
    assert facts["way"] == "BACKUP STAGE START; BACKUP STAGE BLOCK_COMMIT"
    assert facts["binary_log_file"] == "binary.000001"
    assert facts["gtid"].startswith("0-7-")
    ledger.stop()
    world.stack.close()

    with restored(data, logs) as (data_folder, log_folder), ExitStack() as stack:
        world.stack = stack
        assert (log_folder / "binary.000001").stat().st_size == int(facts["binary_log_position"])
        (log_folder / "binary.index").write_text(f"{log_folder}/binary.000001\n")
        again = world.start(data_folder, f"--log-bin={log_folder}/binary", "--server-id=7")
        assert ask(again, "SELECT COUNT(*), MAX(number) FROM shop.ledger") == [(committed[0], committed[0])]
        assert ask(again, "SELECT COUNT(*) FROM shop.notes") == [(3,)]
        assert ask(again, "SELECT @@GLOBAL.gtid_binlog_pos") == [(facts["gtid"],)]
        for row in ask(again, "CHECK TABLE shop.ledger, shop.notes EXTENDED"):
            assert row[3] == "OK"


def test_a_statement_in_the_way_is_not_waited_for_longer_than_others_may_wait(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = world.volume("data")
    root = world.start(data.folder)
    ask(root, "CREATE DATABASE shop")
    ask(root, "CREATE TABLE shop.notes (number INTEGER) ENGINE=MyISAM")
    ask(root, "CREATE TABLE shop.ledger (number INTEGER PRIMARY KEY, words TEXT) ENGINE=InnoDB")
    ask(root, "LOCK TABLES shop.notes WRITE")
    # It is at work until somebody else lets go of a lock of its own.
    other = connect(world.socket)
    ask(other, "SELECT GET_LOCK('all the while', 0)")
    slow = threading.Thread(
        target=ask, args=(root, "INSERT INTO shop.notes SELECT GET_LOCK('all the while', 100)")
    )
    slow.start()
    assert wait_until(lambda: is_anybody(world.socket, "User lock"))
    ledger = Ledger(world.socket)
    try:
        began = time.monotonic()
        with pytest.raises(QuiesceError, match="did not get its lock within 1 s") as refused:
            world.back_up(data, lock_wait_seconds=1)
        assert time.monotonic() - began < 30
        assert "for " in str(refused.value.details)
        assert "all the while" not in f"{refused.value}{refused.value.details}"
        before = ledger.committed
        assert wait_until(lambda: ledger.committed > before + 10)
        # Servers before 10.4.1, and MySQL, have another lock, which this one has too.
        old = mariadb_agent.words_of("10.3.39-MariaDB")
        monkeypatch.setattr(mariadb_agent, "words_of", lambda version: old)
        outcome = world.back_up(data, lock_wait_seconds=1, on_failure="crash-consistent")
        assert (outcome.state, outcome.records) == ("failed", ())
        assert "within 1 s (FLUSH TABLES WITH READ LOCK): others are at work" in str(outcome.reason)
        assert slow.is_alive()
        ask(other, "DO RELEASE_LOCK('all the while')")
        slow.join()
        ask(root, "UNLOCK TABLES")
        before = ledger.committed
        assert wait_until(lambda: ledger.committed > before)
        outcome = world.back_up(data, lock_wait_seconds=1)
        assert outcome.records[0].facts["way"] == "FLUSH TABLES WITH READ LOCK"
    finally:
        ledger.stop()
        other.close()
        slow.join()


def is_anybody(socket: Path, state: str) -> bool:
    """Whether a connection to the server is in a state."""
    with connect(socket) as connection:
        return bool(ask(connection, f"SELECT id FROM information_schema.processlist WHERE state = '{state}'"))  # noqa: S608


def test_a_lock_that_is_lost_is_noticed(world: World, tmp_path: Path) -> None:
    data = world.volume("data")
    root = world.start(data.folder)
    names = "SELECT id FROM information_schema.processlist WHERE command = 'Sleep' AND id <> connection_id()"

    def kill() -> None:
        # Who has just been answered may not be asleep yet.
        assert wait_until(lambda: ask(root, names))
        for (number,) in ask(root, names):
            ask(root, f"KILL {number}")

    data.meanwhile = kill
    with pytest.raises(QuiesceError, match="failed at BACKUP STAGE END"):
        world.back_up(data)


def test_the_watchdog_ends_the_lock_of_a_run_that_takes_too_long(world: World) -> None:
    data = world.volume("data")
    root = world.start(data.folder)
    ask(root, "CREATE DATABASE shop")
    ask(root, "CREATE TABLE shop.ledger (number INTEGER PRIMARY KEY, words TEXT) ENGINE=InnoDB")
    ledger = Ledger(world.socket)
    try:
        seen: list[int] = []

        def dawdle() -> None:
            before = ledger.committed
            assert wait_until(lambda: ledger.committed > before + 10)
            seen.append(before)

        data.meanwhile = dawdle
        with pytest.raises(QuiesceError, match="the watchdog ended the standstill"):
            world.back_up(data, deadline_seconds=10)
        assert seen
    finally:
        ledger.stop()


def test_files_on_no_volume_of_the_run_are_noticed_wherever_the_server_has_them(world: World) -> None:
    data = world.volume("data")
    places = {name: world.folder / "elsewhere" / name for name in ("isam", "innodb", "space", "aria")}
    for place in places.values():
        place.mkdir(parents=True)

    def refused(place: Path) -> None:
        with pytest.raises(QuiesceError, match=f"its directory {place} lies on no volume of this run"):
            world.back_up(data)

    root = world.start(data.folder)
    # As MySQL's configuration on some distributions has it.
    (data.folder / "mysql.sock").symlink_to(world.socket)
    ask(root, "CREATE DATABASE shop")
    assert world.back_up(data).state == "application"
    elsewhere = f"DATA DIRECTORY='{places['isam']}' INDEX DIRECTORY='{places['isam']}'"
    for engine, words in (
        ("MyISAM", elsewhere),
        ("Aria", elsewhere),
        ("MyISAM", f"PARTITION BY HASH (number) (PARTITION one {elsewhere})"),
    ):
        ask(root, f"CREATE TABLE shop.notes (number INTEGER) ENGINE={engine} {words}")
        refused(places["isam"])
        ask(root, "DROP TABLE shop.notes")
    ask(root, f"CREATE TABLE shop.ledger (number INTEGER) ENGINE=InnoDB DATA DIRECTORY='{places['innodb']}'")
    refused(places["innodb"] / "shop")
    ask(root, "DROP TABLE shop.ledger")
    disk = world.stack.enter_context(loop_device(world.folder / "mounted.img", size=8 << 20))
    call("mkfs.ext4", "-q", disk)
    with holding(disk, data.folder / "mounted") as mounted:
        refused(mounted)
    assert world.back_up(data).state == "application"


def test_what_innodb_and_aria_have_elsewhere_by_the_configuration_is_noticed(world: World) -> None:
    data, space, aria = world.volume("data"), world.volume("space"), world.volume("aria")
    files = f"ibdata1:12M;{space.folder}/ibdata2:12M:autoextend"
    world.start(
        data.folder,
        "--innodb-data-home-dir=",
        f"--innodb-data-file-path={files}",
        f"--aria-log-dir-path={aria.folder}",
    )
    for there, missing in (((data, aria), space), ((data, space), aria)):
        with pytest.raises(QuiesceError, match=f"its directory {missing.folder} lies on no volume"):
            world.back_up(*there)
    with pytest.raises(QuiesceError, match="lie on several volumes"):
        world.back_up(data, space, aria)


def test_a_filesystem_over_two_volumes_is_only_enough_if_it_is_frozen(world: World) -> None:
    """It is not where this host needs it: then there would be two instants, and pages without their log."""
    require_btrfs()
    devices = [
        world.stack.enter_context(loop_device(world.folder / f"{name}.img", size=SIZE)) for name in "ab"
    ]
    call("mkfs.btrfs", "-q", "-d", "raid0", "-m", "raid1", *devices)
    top = world.stack.enter_context(holding(devices[0], world.folder / "top"))
    (top / "data").mkdir()
    world.start(top / "data")
    targets = [Target(device, os.stat(device).st_rdev) for device in devices]
    server = {"mariadb": [{"socket": str(world.socket)}]}

    def stand_still(*protected: str, **settings: object) -> Outcome:
        asked = QuiesceSettings.model_validate({**server, **settings, "deadline_seconds": 60})
        standstill = assemble(asked, targets, protected)
        try:
            with Path(os.devnull).open("wb") as journal:
                standstill.attend(journal.fileno(), {})
            standstill.begin()
            standstill.end()
            return standstill.conclude()
        finally:
            standstill.close()

    outcome = stand_still()
    assert outcome.by[1:] == (f"filesystem on {top}",)
    whole = "one filesystem holds all its tables and their log, frozen over all its volumes"
    assert outcome.records[0].facts["reason"] == whole
    for refused in (lambda: stand_still(str(top / "state")), lambda: stand_still(filesystems="never")):
        with pytest.raises(QuiesceError, match="lie on several volumes, and InnoDB writes to them"):
            refused()


def test_tables_and_their_log_on_two_volumes_need_the_freezer(group: Path, world: World) -> None:
    data, log = world.volume("data"), world.volume("log")
    world.start(data.folder, f"--innodb-log-group-home-dir={log.folder}", group=group)
    with pytest.raises(QuiesceError, match="lie on several volumes, and InnoDB writes to them"):
        world.back_up(data, log)
    with pytest.raises(QuiesceError, match=f"its directory {log.folder} lies on no volume of this run"):
        world.back_up(data)
    outcome = world.back_up(data, log, cgroups=[str(group)])
    assert outcome.records[0].facts["reason"] == "its processes are frozen for the instant of all snapshots"
    assert os.path.exists(log.copy)
