"""Manifests that were proven before are told by their bytes, and by nothing else."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from blocksnap.backends.local import LocalBackend
from blocksnap.repository.documents import Backup, Manifest, Root, Statistics, VolumeRecord
from blocksnap.repository.fencing import fence
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.known_manifests import FILE
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import RepositoryWriter
from support.repositories import CHUNK, PASSPHRASE, make_repository, open_repository, open_writer

_NOTHING = Statistics(
    changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
    freeze_ms=0, skew_ms=0, seconds=0,
)  # fmt: skip


def back_up(path: Path) -> str:
    with open_writer(open_repository(path)) as writer:

        def compose(run: RepositoryWriter) -> Manifest:
            now = datetime.now(UTC)
            backup = Backup(
                id=run.backup_id(0), volume=VolumeRecord(name="v", key="v", kind="file"), time=now,
                kind="full",
                parent=None, method="compare", reason="test", size=CHUNK, chunk_size=CHUNK,
                map=Root(levels=1, root="zero"), source={}, statistics=_NOTHING,
            )  # fmt: skip
            return Manifest(
                writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,)
            )

        return writer.commit(compose)[0].writer


class Place:
    """A repository of three backups, and the cache of a host."""

    def __init__(self, folder: Path, *, encrypted: bool) -> None:
        self.path = folder / "repository"
        self.cache = folder / "cache"
        make_repository(self.path, encrypted=encrypted)
        self.runs = sorted(back_up(self.path) for _ in range(3))

    def open(self) -> Repository:
        return Repository.open(LocalBackend(str(self.path)), lambda: PASSPHRASE, cache=str(self.cache))

    def list(self) -> list[str]:
        return sorted(manifest.writer for manifest, _ in self.open().manifests())

    @property
    def file(self) -> Path:
        return next(self.cache.glob(f"*/{FILE}"))


@pytest.fixture(params=[True, False], ids=["encrypted", "plain"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(tmp_path, encrypted=request.param)


def test_what_was_proven_is_not_proven_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [manifest for manifest, _ in place.open().manifests()]
    opened: list[str] = []
    monkeypatch.setattr(Repository, "_open_manifest", lambda _, name, stored: opened.append(name))
    repository = place.open()
    assert [manifest for manifest, _ in repository.manifests()] == first
    assert opened == []
    monkeypatch.undo()
    place.runs = sorted([*place.runs, back_up(place.path)])
    assert place.list() == place.list() == place.runs


def test_a_manifest_that_was_changed_is_noticed(place: Place) -> None:
    assert place.list() == place.runs
    path = place.path / "manifests" / place.runs[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    repository = place.open()
    assert len(list(repository.manifests())) == 2
    assert repository.damage


def test_one_in_the_place_of_another_is_noticed(place: Place) -> None:
    assert place.list() == place.runs
    content = (place.path / "manifests" / place.runs[1]).read_bytes()
    (place.path / "manifests" / place.runs[0]).write_bytes(content)
    repository = place.open()
    assert len(list(repository.manifests())) == 2
    assert repository.damage


def test_a_fence_in_the_place_of_a_manifest(place: Place) -> None:
    assert place.list() == place.runs
    (place.path / "manifests" / place.runs[0]).unlink()
    fence(place.open(), place.runs[0], datetime.now(UTC))
    assert place.list() == place.list() == place.runs[1:]


@pytest.mark.parametrize("size", [0, 5, 40])
def test_a_torn_file_is_none(place: Place, size: int) -> None:
    assert place.list() == place.runs
    place.file.write_bytes(place.file.read_bytes()[:size])
    assert place.list() == place.runs
    content = bytearray(place.file.read_bytes())
    content[30] ^= 1
    place.file.write_bytes(content)
    assert place.list() == place.runs


def test_what_a_stranger_remembers_is_not_believed(place: Place) -> None:
    repository = place.open()
    repository.keys = KeyRing.from_master(b"x" * 32, repository_id=repository.keys.repository_id)
    forged = place.open()
    assert len(list(forged.manifests())) == 3
    manifest = next(iter(forged.manifests()))[0]
    name = f"manifests/{place.runs[0]}"
    repository._known_manifests.add(name, b"forged", manifest)
    repository._known_manifests.save()
    (place.path / name).write_bytes(b"forged")
    assert len(place.list()) == 2


def test_what_another_version_remembers_is_not_believed(place: Place) -> None:
    repository = place.open()
    assert len(list(repository.manifests())) == 3
    known = repository._known_manifests
    name = f"manifests/{place.runs[0]}"
    digest, document = known._known[name]
    assert document
    known._met = {**known._known, name: (digest, document.replace("{", '{"colour": "red", ', 1))}
    known._is_new = True
    known.save()
    assert place.list() == place.runs


def test_without_a_cache(place: Place) -> None:
    repository = open_repository(place.path)
    assert len(list(repository.manifests())) == len(list(repository.manifests())) == 3
    assert not place.cache.exists()
