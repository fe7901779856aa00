"""The label of a restored server goes into its own data directory, and into no other."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from blocksnap.errors import UsageError
from blocksnap.operations import label
from blocksnap.operations.describing import describe_records
from blocksnap.operations.label import Label, NotItsDirectoryError, find_label, needs_label, write_label
from blocksnap.repository.documents import Backup

IDENTIFIER = 7234567890123456789
LABEL = Label(
    "server",
    "START WAL LOCATION: 0/2000028\n",
    "16384 /far away\n16385 /two\\\nlines\n",
    "15.8",
    str(IDENTIFIER),
)


def data_directory(folder: Path, identifier: int = IDENTIFIER) -> Path:
    """As much of one as is looked at."""
    data = folder / "data"
    (data / "global").mkdir(parents=True)
    (data / "pg_tblspc").mkdir()
    (data / "PG_VERSION").write_text("15\n")
    (data / "global/pg_control").write_bytes(identifier.to_bytes(8, "little") + bytes(8184))
    return data


def backup_of(*records: dict[str, Any]) -> Backup:
    return Backup.model_validate(
        {
            "id": "ab" * 16,
            "volume": {"name": "vg/data", "key": "key", "kind": "thin"},
            "time": datetime.now(UTC),
            "kind": "full",
            "parent": None,
            "method": "compare",
            "reason": "there is no backup of it yet",
            "size": 4096,
            "chunk_size": 131072,
            "map": {"levels": 1, "root": "hole"},
            "source": {},
            "quiesced": {"state": "application", "records": list(records)},
            "statistics": dict.fromkeys(
                (
                    "changed_bytes",
                    "read_bytes",
                    "new_bytes",
                    "stored_bytes",
                    "metadata_bytes",
                    "new_chunks",
                    "freeze_ms",
                    "skew_ms",
                    "seconds",
                ),
                0,
            ),
        }
    )


def record(name: str, **facts: str) -> dict[str, Any]:
    return {"kind": "postgresql", "name": name, "facts": {"version": "15.8", **facts}}


def test_both_files_are_written_with_the_links_that_are_there(tmp_path: Path) -> None:
    data = data_directory(tmp_path)
    (data / "pg_tblspc/16385").symlink_to("/some\\where\nelse")
    written = write_label(LABEL, str(data))
    assert written == [str(data / name) for name in ("tablespace_map", "backup_label")]
    assert (data / "backup_label").read_text() == LABEL.text
    assert (data / "tablespace_map").read_text() == "16384 /far away\n16385 /some\\\\where\\\nelse\n"
    assert (data / "backup_label").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_is_not_its_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotItsDirectoryError, match="is no data directory: it has no global/pg_control"):
        write_label(LABEL, str(tmp_path))
    with pytest.raises(NotItsDirectoryError, match="cannot be opened"):
        write_label(LABEL, str(tmp_path / "none"))
    data = data_directory(tmp_path, IDENTIFIER + 1)
    with pytest.raises(NotItsDirectoryError, match="is of another server than server"):
        write_label(LABEL, str(data))
    shutil.rmtree(data)
    data = data_directory(tmp_path)
    (data / "PG_VERSION").write_text("1\n")
    with pytest.raises(NotItsDirectoryError, match="is of another server"):
        write_label(LABEL, str(data))
    (data / "PG_VERSION").write_text("15\n")
    (data / "backup_label").write_text("of another backup\n")
    with pytest.raises(NotItsDirectoryError, match="has a backup_label already"):
        write_label(LABEL, str(data))
    (data / "backup_label").unlink()
    (data / "backup_label").symlink_to("nowhere")
    with pytest.raises(NotItsDirectoryError, match="has a backup_label already"):
        write_label(LABEL, str(data))
    assert sorted(os.listdir(data)) == ["PG_VERSION", "backup_label", "global", "pg_tblspc"]


@pytest.mark.parametrize("name", ["PG_VERSION", "global/pg_control", "postmaster.pid"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """A fifo would be waited for until somebody writes to it."""
    data = data_directory(tmp_path)
    (data / name).unlink(missing_ok=True)
    make(data / name)
    if name == "postmaster.pid":
        # It tells of no server.
        assert write_label(LABEL, str(data))
        return
    with pytest.raises(NotItsDirectoryError, match=f"cannot be written to .{name}: it is no regular file"):
        write_label(LABEL, str(data))
    assert not (data / "backup_label").exists()


def test_a_server_in_a_container_is_seen(tmp_path: Path) -> None:
    """What it calls its own number is another process here, most often the first."""
    data = data_directory(tmp_path)
    (data / "postmaster.pid").write_text("1\n")
    script = "open('/proc/self/comm', 'w').write('postgres'); print(flush=True); input()"
    argv = [sys.executable, "-I", "-S", "-c", script]
    with subprocess.Popen(argv, cwd=data, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            with pytest.raises(NotItsDirectoryError, match=f"is in use: process {server.pid}"):
                write_label(LABEL, str(data))
        finally:
            server.kill()
    assert write_label(LABEL, str(data))


def test_names_of_programs_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_directory(tmp_path)
    for pid, name in (("1", b"caf\xc3"), ("2", b"postgres\xc3")):
        folder = tmp_path / "proc" / pid
        folder.mkdir(parents=True)
        (folder / "comm").write_bytes(name + b"\n")
        (folder / "cwd").symlink_to(data)
    monkeypatch.setattr(label, "_PROC", tmp_path / "proc")
    with pytest.raises(NotItsDirectoryError, match="is in use: process 2 "):
        write_label(LABEL, str(data))


def test_the_server_is_named_where_there_are_several() -> None:
    none = backup_of(record("a"), {"kind": "mariadb", "name": "b", "facts": {"gtid": "0-1-2"}})
    assert needs_label(none) == []
    with pytest.raises(UsageError, match="has no label"):
        find_label(none, None)
    one = backup_of(record("a"), record("b", label="L\n", system_identifier="1"))
    assert needs_label(one) == ["b"]
    assert find_label(one, None) == Label("b", "L\n", "", "15.8", "1")
    assert ("postgresql", "version 15.8, system_identifier 1") in describe_records(one)
    two = backup_of(record("a", label="A\n"), record("b", label="B\n"))
    with pytest.raises(UsageError, match="is of several servers"):
        find_label(two, None)
    assert find_label(two, "b").text == "B\n"
    with pytest.raises(UsageError, match="has no label of c"):
        find_label(two, "c")


def test_a_manifest_without_records_is_what_it_was_before_there_were_any() -> None:
    assert "records" not in backup_of().model_dump_json()
    kept = backup_of(record("a", label="A\n"))
    assert Backup.model_validate_json(kept.model_dump_json()) == kept


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    """A limit of file sizes is as good as a full disk: it fails in the middle of the label."""
    data = data_directory(tmp_path)
    long = replace(LABEL, text="x" * 5000)
    before = sorted(os.listdir(data))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NotItsDirectoryError, match="File too large"):
            write_label(long, str(data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(data)) == before
    write_label(long, str(data))
    assert (data / "backup_label").read_text() == long.text


def test_one_that_was_killed_before_the_label_is_gone_on_with(tmp_path: Path) -> None:
    data = data_directory(tmp_path)
    write_label(LABEL, str(data))
    (data / "backup_label").unlink()
    assert len(write_label(LABEL, str(data))) == 2
    (data / "backup_label").unlink()
    (data / "tablespace_map").write_text("another's")
    with pytest.raises(NotItsDirectoryError, match=r"cannot be written to \(tablespace_map: File exists"):
        write_label(LABEL, str(data))
    assert (data / "tablespace_map").read_text() == "another's"
    assert not (data / "backup_label").exists()
    assert not list(data.glob(".*"))
