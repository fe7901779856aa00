"""What is asked of which version of a server, and what is decided from where its files lie."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from blocksnap.quiesce import mariadb, mariadb_files, postgresql
from blocksnap.quiesce.errors import AgentError, MisplacedError
from blocksnap.quiesce.login import account_of, password_of
from blocksnap.quiesce.settings import MariadbSettings, PostgresqlSettings

A, B, C = (frozenset({number}) for number in (1, 2, 3))
NONE: frozenset[int] = frozenset()


def plan(
    data: list[frozenset[int]], log: frozenset[int], *, frozen: bool = False, whole: bool = True
) -> postgresql.Plan:
    spaces = {f"/space{number}": devices for number, devices in enumerate(data[1:], 1)}
    return postgresql.decide("server", ("/data", data[0]), spaces, ("/log", log), frozen=frozen, whole=whole)


def test_one_snapshot_needs_no_backup_mode() -> None:
    assert plan([A, A], A).way == "checkpoint"
    assert plan([A, B], C, frozen=True).way == "checkpoint"
    assert plan([A | B], A | B).reason == "one filesystem holds all of it, frozen over all its volumes"
    for found in (plan([A], A), plan([A], B, frozen=True)):
        assert (found.early, found.late) == (NONE, NONE)


def test_volumes_with_log_come_late() -> None:
    assert plan([A], B) == postgresql.Plan("backup", plan([A], B).reason, A, B, A)
    assert (plan([A, C], B).early, plan([A, C], B).late, plan([A, C], B).last) == (A | C, B, A)
    # A tablespace is elsewhere, and the log is where the data is.
    assert (plan([A, B], A).early, plan([A, B], A).late, plan([A, B], A).last) == (B, A, NONE)
    assert (plan([A | C], B).early, plan([A | C], B).late) == (A | C, B)


@pytest.mark.parametrize(
    ("data", "log", "whole", "said"),
    [
        ([A, NONE], B, True, "directory /space1 lies on no volume of this run"),
        ([A], NONE, True, "directory /log lies on no volume of this run"),
        ([A | B], A, True, "the filesystem of /data spans a volume of its log and others"),
        ([A | B], A | B, False, "lies on all its volumes"),
    ],
)
def test_what_cannot_fit_together_is_refused(
    data: list[frozenset[int]], log: frozenset[int], whole: bool, said: str
) -> None:
    with pytest.raises(MisplacedError, match=said):
        plan(data, log, whole=whole)


def test_versions_of_postgresql() -> None:
    assert postgresql.words_of(90500) is None
    for version, start, stop, folder, slots, state in (
        (90624, "pg_start_backup($1, true, false)", "pg_stop_backup(false)", "pg_xlog", False, False),
        (100000, "pg_start_backup($1, true, false)", "pg_stop_backup(false, false)", "pg_wal", True, False),
        (140011, "pg_start_backup($1, true, false)", "pg_stop_backup(false, false)", "pg_wal", True, True),
        (150000, "pg_backup_start($1, true)", "pg_backup_stop(false)", "pg_wal", True, True),
        (170002, "pg_backup_start($1, true)", "pg_backup_stop(false)", "pg_wal", True, True),
    ):
        words = postgresql.words_of(version)
        assert words is not None
        assert words.start == f"SELECT {start}"
        assert words.stop.endswith(f" FROM {stop}")
        assert (words.log_folder, words.has_slots, words.tells_slot_state) == (folder, slots, state)


def test_versions_of_mariadb_and_mysql() -> None:
    for version, lock, position in (
        ("10.11.6-MariaDB-0+deb12u1-log", "BACKUP STAGE BLOCK_COMMIT", "SHOW MASTER STATUS"),
        ("10.4.1-MariaDB", "BACKUP STAGE BLOCK_COMMIT", "SHOW MASTER STATUS"),
        ("10.3.39-MariaDB-1:10.3.39", "FLUSH TABLES WITH READ LOCK", "SHOW MASTER STATUS"),
        ("8.0.36", "FLUSH TABLES WITH READ LOCK", "SHOW MASTER STATUS"),
        ("8.4.2", "FLUSH TABLES WITH READ LOCK", "SHOW BINARY LOG STATUS"),
    ):
        words = mariadb.words_of(version)
        assert (words.lock[-1], words.position) == (lock, position)
        assert words.unlock == ("BACKUP STAGE END" if "BACKUP" in lock else "UNLOCK TABLES")
        assert ("binlog" in words.gtid) == ("MariaDB" in version)


def test_innodb_on_several_volumes_has_to_stand_still() -> None:
    assert "one volume" in mariadb.decide("server", {"/a": A, "/b": A}, frozen=False, whole=True)
    assert "frozen" in mariadb.decide("server", {"/a": A, "/b": B}, frozen=True, whole=True)
    assert "one filesystem" in mariadb.decide("server", {"/a": A | B}, frozen=False, whole=True)
    for folders, whole in (({"/a": A, "/b": B}, True), ({"/a": A | B}, False)):
        with pytest.raises(MisplacedError, match="lie on several volumes"):
            mariadb.decide("server", folders, frozen=False, whole=whole)
    with pytest.raises(MisplacedError, match="/b lies on no volume"):
        mariadb.decide("server", {"/a": A, "/b": NONE}, frozen=True, whole=True)


def test_a_server_says_where_innodb_and_aria_have_their_files(tmp_path: Path) -> None:
    for name in ("data", "home/raw", "log", "undo", "aria", "space"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/ibdata1").touch()
    (tmp_path / "space/ibdata2").touch()
    (tmp_path / "home/raw/ibdata1").touch()
    says = {
        "datadir": f"{tmp_path}/data/",
        "innodb_data_home_dir": "",
        "innodb_log_group_home_dir": "./",
        "innodb_undo_directory": "../undo",
        "innodb_data_file_path": f"ibdata1:12M;{tmp_path}/space/ibdata2:12M:autoextend:max:1G",
    }

    def places(*tablespaces: str, **variables: str) -> list[str]:
        found = mariadb_files.places_of(os.getpid(), {**says, **variables}, tablespaces)
        return [os.path.relpath(path, tmp_path) for path in found]

    assert places() == ["data", "undo", "space"]
    assert places(aria_log_dir_path=f"{tmp_path}/aria") == ["data", "undo", "aria", "space"]
    home = {"innodb_data_home_dir": f"{tmp_path}/home", "innodb_data_file_path": "/raw/ibdata1:12M"}
    assert places(**home) == ["data", "home", "undo", "home/raw"]
    # What MySQL lists: directories, with nothing for those of the data directory itself.
    assert places("", "./", f"{tmp_path}/log/") == ["data", "undo", "space", "log"]
    with pytest.raises(FileNotFoundError):
        places(f"{tmp_path}/nowhere/")


def test_a_data_directory_shows_what_lies_elsewhere(tmp_path: Path) -> None:
    top = tmp_path / "data"
    for name in ("data/shop", "data/.snapshots", "myisam", "linked", "isl", "general", "far"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "myisam/t.MYD").touch()
    (top / "shop/t.MYD").symlink_to("../../myisam/t.MYD")
    (top / "shop/t.frm").touch()
    (top / "other").symlink_to(tmp_path / "linked")
    (tmp_path / "linked/far.isl").write_text(f"{tmp_path}/far/far.ibd\n")
    (top / "shop/s.isl").write_text(f"{tmp_path}/isl/s.ibd")
    (top / "space.isl").write_text(f"{tmp_path}/general/space.ibd")
    (top / ".snapshots/1").symlink_to(tmp_path)
    (top / "shop/dropped.MYD").symlink_to(tmp_path / "dropped.MYD")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "mysqld.sock"))
        (top / "mysql.sock").symlink_to(tmp_path / "mysqld.sock")
        found = mariadb_files.places_of(os.getpid(), {"datadir": str(top)}, ())
    names = sorted(os.path.relpath(path, tmp_path) for path in found)
    assert names == ["data", "far", "general", "isl", "linked", "myisam"]


def test_who_connects() -> None:
    # Every Unix has a root, and nobody is called like this.
    assert account_of(MariadbSettings(user="root")) == "root"
    assert account_of(PostgresqlSettings(user="nobody is called so")) is None
    assert account_of(PostgresqlSettings(user="root", account="daemon")) == "daemon"
    assert account_of(PostgresqlSettings(user="root", password_file="/etc/secret")) is None


def test_a_password_is_read_from_a_file_of_ours(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    settings = PostgresqlSettings(password_file=str(secret))
    with pytest.raises(AgentError, match="No such file"):
        password_of("server", settings)
    secret.write_text("a word\nanything else\n")
    secret.chmod(0o604)
    with pytest.raises(AgentError, match="everybody can read"):
        password_of("server", settings)
    secret.chmod(0o600)
    assert password_of("server", settings) == "a word"
    secret.write_bytes(b"\xff\n")
    with pytest.raises(AgentError, match="is not UTF-8"):
        password_of("server", settings)
    assert password_of("server", PostgresqlSettings()) is None
