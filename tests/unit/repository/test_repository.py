"""Create, open, write and read a repository."""

from __future__ import annotations

import errno
import os
import random
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocksnap.backends.errors import BackendAwayError, BackendFailedError
from blocksnap.backends.local import LocalBackend
from blocksnap.errors import NoRepositoryError, PassphraseError, UsageError
from blocksnap.operations.catalogue import find_backup, map_root, root_document
from blocksnap.operations.keys import add_key
from blocksnap.repository import writer as writing
from blocksnap.repository.blockmap import ZERO, MapReader, MapWriter
from blocksnap.repository.check import Checker
from blocksnap.repository.documents import (
    Backup,
    Fence,
    Forgotten,
    Manifest,
    SetAside,
    Statistics,
    VolumeRecord,
)
from blocksnap.repository.epochs import create_forgotten, create_set_aside
from blocksnap.repository.errors import FencedError, NewerFormatError
from blocksnap.repository.frame import FrameType, Sealer
from blocksnap.repository.keys import Role
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter
from support.repositories import CHUNK, PASSPHRASE, make_repository, open_repository, open_writer, store_bytes


def store_backup(repository: Repository, content: bytes, folder: Path, *, volume: str = "v") -> Backup:
    with open_writer(repository) as writer:
        ids = store_bytes(writer, content, folder)
        builder = MapWriter(MapReader(repository.load_node), None, len(ids), writer.store_node)
        for number, id_ in enumerate(ids):
            builder.set(number, id_ or ZERO)
        root = builder.finish()

        def compose(_: RepositoryWriter) -> Manifest:
            now = datetime.now(UTC)
            backup = Backup(
                id=writer.backup_id(0),
                volume=VolumeRecord(name=volume, key=volume, kind="file"),
                time=now,
                kind="full",
                parent=None,
                method="compare",
                reason="test",
                size=len(content),
                chunk_size=CHUNK,
                map=root_document(root),
                source={},
                statistics=Statistics(
                    changed_bytes=0,
                    read_bytes=0,
                    new_bytes=0,
                    stored_bytes=0,
                    metadata_bytes=0,
                    new_chunks=0,
                    freeze_ms=0,
                    skew_ms=0,
                    seconds=0,
                ),
            )
            return Manifest(
                writer=writer.id.hex(), time=now, host="h", hostname="h", program="test", backups=(backup,)
            )

        manifest, _ = writer.commit(compose)
    return manifest.backups[0]


def read_backup(repository: Repository, backup: Backup) -> bytes:
    reader = MapReader(repository.load_node)
    count = -(-backup.size // backup.chunk_size)
    parts = []
    for number, run, entry in reader.runs(map_root(backup.map), 0, count):
        if len(entry) == 32:
            parts.append(repository.load(FrameType.DATA, entry))
        else:
            end = min((number + run) * backup.chunk_size, backup.size)
            parts.append(bytes(end - number * backup.chunk_size))
    return b"".join(parts)


def checked(repository: Repository, *, read_data: bool = True) -> Checker:
    checker = Checker(repository, map_root, lambda _: None)
    checker.check_structure()
    if read_data:
        checker.check_packs()
    checker.name_losses()
    return checker


@pytest.mark.parametrize("encrypted", [True, False])
def test_content_comes_back(tmp_path: Path, *, encrypted: bool) -> None:
    repository = make_repository(tmp_path / "r", encrypted=encrypted)
    noise = random.Random(1).randbytes(CHUNK * 5 + 777)
    content = noise + bytes(CHUNK * 3) + b"text " * CHUNK + noise
    backup = store_backup(repository, content, tmp_path)
    again = open_repository(tmp_path / "r")
    found = find_backup(again, backup.id[:6]).backup
    assert found == backup
    assert read_backup(again, found) == content
    assert checked(again).result.findings == []


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    content = random.Random(2).randbytes(CHUNK * 20)
    store_backup(repository, content, tmp_path)
    with open_writer(open_repository(tmp_path / "r")) as writer:
        store_bytes(writer, content + content[:CHUNK] * 3, tmp_path)
        assert writer.stored.new_chunks == 0


def test_a_run_that_does_not_commit_leaves_no_backup(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    with open_writer(repository) as writer:
        store_bytes(writer, random.Random(3).randbytes(CHUNK * 20), tmp_path)
        writer.flush()
    again = open_repository(tmp_path / "r")
    assert again.backups() == []
    assert not checked(again).result.damaged


def test_a_claim_that_nobody_fulfilled_keeps_a_run_from_committing(tmp_path: Path) -> None:
    def compose(_: RepositoryWriter) -> Manifest:
        raise AssertionError

    repository = make_repository(tmp_path / "repository")
    with open_writer(repository) as writer:
        stored, lost = writer.store_blob(FrameType.ATTACHMENT, b"stored"), bytes(32)
        assert writer.claim(lost)
        assert not writer.claim(lost)
        with pytest.raises(ValueError, match="1 blobs were claimed and never stored"):
            writer.commit(compose)
        writer.start_over()
        assert (writer.claim(stored), writer.claim(lost)) == (False, True)


def test_a_second_try_reads_what_it_relies_on(tmp_path: Path) -> None:
    place = tmp_path / "repository"
    with open_writer(make_repository(place)) as writer:
        ids = [writer.store_blob(FrameType.ATTACHMENT, name) for name in (b"whole", b"harmed")]
        writer.flush()
    location = open_repository(place).locate(FrameType.ATTACHMENT, ids[1])
    content = bytearray((place / location.pack.name).read_bytes())
    content[location.offset + location.length - 1] ^= 1
    (place / location.pack.name).write_bytes(content)
    repository = open_repository(place)
    with open_writer(repository) as writer:
        writer.start_over()
        for _ in range(2):
            assert [writer.store_blob(FrameType.ATTACHMENT, name) for name in (b"whole", b"harmed")] == ids
            writer.flush()
    packs = [path for path in (place / "packs").rglob("*-*") if writer.id.hex() in path.name]
    assert len(packs) == 1
    assert open_repository(place).load(FrameType.ATTACHMENT, ids[1]) == b"harmed"


def test_long_runs_store_their_index_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocksnap.repository.writer.SEGMENT_ROWS", 10)
    monkeypatch.setattr("blocksnap.repository.pack.MIN_TARGET", CHUNK * 4)
    repository = make_repository(tmp_path / "r")
    content = random.Random(4).randbytes(CHUNK * 100)
    backup = store_backup(repository, content * 2, tmp_path)
    again = open_repository(tmp_path / "r")
    assert len(again.segment_names()) > 5
    assert read_backup(again, backup) == content * 2
    assert checked(again).result.findings == []


def test_wrong_and_missing_passphrases(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    backend = LocalBackend(str(tmp_path / "r"))
    with pytest.raises(PassphraseError, match="wrong passphrase"):
        Repository.open(backend, lambda: b"wrong")
    with pytest.raises(PassphraseError, match="no passphrase"):
        Repository.open(backend, lambda: None)
    assert Repository.open(backend, lambda: PASSPHRASE)


def test_places_that_are_no_repository(tmp_path: Path) -> None:
    with pytest.raises(NoRepositoryError):
        open_repository(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NoRepositoryError):
        open_repository(tmp_path / "folder")
    (tmp_path / "folder" / "file").touch()
    with pytest.raises(UsageError):
        make_repository(tmp_path / "folder")
    make_repository(tmp_path / "r")
    with pytest.raises(UsageError):
        make_repository(tmp_path / "r")


def test_an_interrupted_init_can_be_repeated(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    (tmp_path / "r" / "config").unlink()
    repository = make_repository(tmp_path / "r")
    assert repository.keys.encrypted


def test_a_shut_out_writer_cannot_commit(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    with open_writer(repository) as writer:
        fence = Fence(writer=writer.id.hex(), time=datetime.now(UTC), fenced=True)
        sealed = Sealer(repository.keys).seal(FrameType.MANIFEST, fence.model_dump_json().encode())
        repository.backend.put(f"manifests/{writer.id.hex()}", sealed)
        with pytest.raises(FencedError):
            writer.commit(
                lambda w: Manifest(
                    writer=w.id.hex(),
                    time=datetime.now(UTC),
                    host="h",
                    hostname="h",
                    program="t",
                    backups=(store_backup(repository, b"x", tmp_path),),
                )
            )
    assert len(open_repository(tmp_path / "r").backups()) == 1


def test_a_repository_under_garbage_collection_is_left_to_newer_versions(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    repository.backend.put("gc/00000001/begin", b"x")
    with pytest.raises(NewerFormatError):
        open_writer(repository)


def test_backups_are_found_by_volume_and_time(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    one = store_backup(repository, b"one", tmp_path, volume="vg0/a")
    two = store_backup(repository, b"two", tmp_path, volume="vg0/b")
    three = store_backup(repository, b"three", tmp_path, volume="vg0/a")
    assert find_backup(repository, "latest").backup == three
    assert find_backup(repository, "vg0/b@latest").backup == two
    assert find_backup(repository, "/dev/vg0/b@latest").backup == two
    assert find_backup(repository, f"vg0/a@{two.time.isoformat()}").backup == one
    for name in ("vg0/c@latest", "ffff", "vg0/a@2001-01-01", "vg0/a@9999-12-31T23:59:59-12:00", "", "zz"):
        with pytest.raises(UsageError):
            find_backup(repository, name)


def test_a_missing_or_cut_object_is_found(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    store_backup(repository, random.Random(6).randbytes(CHUNK * 6), tmp_path)
    for path in sorted(
        p for folder in ("packs", "index") for p in (tmp_path / "r" / folder).rglob("*") if p.is_file()
    ):
        original = path.read_bytes()
        path.unlink()
        assert checked(open_repository(tmp_path / "r"), read_data=False).result.damaged, path
        path.write_bytes(original[:-20])
        assert checked(open_repository(tmp_path / "r"), read_data=False).result.damaged, path
        path.write_bytes(original)


def test_losses_are_named_by_volume_and_range(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "r")
    backup = store_backup(repository, random.Random(7).randbytes(CHUNK * 6), tmp_path, volume="vg0/db")
    location = repository.locate(
        FrameType.DATA, MapReader(repository.load_node).entry(map_root(backup.map), 4)
    )
    path = tmp_path / "r" / location.pack.name
    data = bytearray(path.read_bytes())
    data[location.offset + 100] ^= 1
    path.write_bytes(data)
    found = checked(open_repository(tmp_path / "r")).result.findings
    assert any(
        f"bytes {4 * CHUNK} to {5 * CHUNK} cannot be restored" in f.message and "vg0/db" in f.object
        for f in found
    )


def test_objects_are_private(tmp_path: Path) -> None:
    make_repository(tmp_path / "r")
    for path in (tmp_path / "r").rglob("*"):
        assert os.stat(path).st_mode & 0o077 == 0, path


class BadSectors(LocalBackend):
    """A disk that cannot read some objects any more."""

    unreadable: frozenset[str] = frozenset()

    def read(self, name: str) -> bytes:
        if name in self.unreadable:
            raise BackendFailedError(f"read {name}", self.place, OSError(errno.EIO, "bad sector"))
        return super().read(name)


@pytest.mark.parametrize("folder", ["manifests", "index", "keys", "gc/aside", "gc/forget", "writers"])
def test_a_bad_sector_under_an_object_costs_no_more_than_damage(tmp_path: Path, folder: str) -> None:
    repository = make_repository(tmp_path / "r")
    kept = store_backup(repository, random.randbytes(3 * CHUNK), tmp_path)
    other = store_backup(repository, random.randbytes(3 * CHUNK), tmp_path)
    now = datetime.now(UTC)
    create_set_aside(repository, SetAside(run="1" * 32, time=now, lost=("0" * 64,)))
    create_forgotten(repository, Forgotten(run="2" * 32, time=now, backups=("3" * 32,)))
    if folder == "keys":
        add_key(repository, b"another", role=Role.ADMIN, label="", host="")
    backend = BadSectors(str(tmp_path / "r"))
    names = sorted(info.name for info in backend.list(folder + "/"))
    # Of the manifests that of the other backup.
    runs = {stored.backup.id: stored.manifest.writer for stored in repository.backups()}
    victim = f"manifests/{runs[other.id]}" if folder == "manifests" else names[0]
    backend.unreadable = frozenset({victim})
    secret = PASSPHRASE if folder != "keys" or not opens(tmp_path / "r", victim) else b"another"
    seen = Repository.open(backend, lambda: secret)
    assert kept.id in {stored.backup.id for stored in seen.backups()}
    (_, _, entry), *_ = MapReader(seen.load_node).runs(map_root(kept.map), 0, 3)
    assert len(seen.load(FrameType.DATA, entry)) == CHUNK
    if folder != "writers":
        (problem,) = seen.damage
        assert "cannot be read: Input/output error" in str(problem)
    checker = Checker(Repository.open(backend, lambda: secret), map_root, lambda _: None, level=2)
    checker.check_structure()
    assert {each.object for each in checker.result.findings if each.severity == "damage"} == {victim}


def opens(path: Path, name: str) -> bool:
    key = open_repository(path).key
    return key is not None and key.name == name


def test_a_storage_that_has_gone_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = make_repository(tmp_path / "r")
    store_backup(repository, b"x", tmp_path)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(BackendAwayError):
        repository.backups()


def test_what_is_stored_while_the_run_says_that_it_is_alive_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(writing, "HEARTBEAT_SECONDS", 0)
    make_repository(tmp_path / "r", encrypted=False)
    dice = random.Random(1)
    words = [dice.randbytes(6) for _ in range(200)]
    stored: dict[bytes, bytes] = {}
    with open_writer(open_repository(tmp_path / "r")) as writer:
        for _ in range(25):
            plain = b"".join(dice.choices(words, k=20_000))
            stored[writer.store_blob(FrameType.ATTACHMENT, plain)] = plain
        writer.flush()
    repository = open_repository(tmp_path / "r")
    assert len([*repository.backend.list("writers/")]) > 10
    assert {id_: repository.load(FrameType.ATTACHMENT, id_) for id_ in stored} == stored


def test_objects_may_go_while_they_are_listed(tmp_path: Path) -> None:
    """Prune deletes beside everybody else, on other hosts too."""
    backend = LocalBackend(str(tmp_path))
    (tmp_path / "packs").mkdir()
    names = [tmp_path / "packs" / f"{number:032x}" for number in range(4000)]
    for name in names:
        name.touch()
    stays = {f"packs/{name.name}" for name in names[::50]}

    def delete() -> None:
        for name in names:
            if f"packs/{name.name}" not in stays:
                name.unlink()

    prune = threading.Thread(target=delete)
    prune.start()
    try:
        while prune.is_alive():
            assert stays <= {info.name for info in backend.list("packs/")}
    finally:
        prune.join()
        backend.close()
