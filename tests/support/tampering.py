"""A small repository with objects of each kind, and what becomes of it when somebody changes its objects."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from blocksnap.backends.base import Backend, Buffer, ObjectInfo, ObjectWriter
from blocksnap.backends.errors import ObjectExistsError, ObjectMissingError
from blocksnap.backends.local import LocalBackend
from blocksnap.errors import BlocksnapError
from blocksnap.extents.mapped_set import MappedSet
from blocksnap.operations.backup import back_up
from blocksnap.operations.catalogue import find_backup, map_root
from blocksnap.operations.mapped import load_mapped, store_mapped
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.storing import BackupOptions
from blocksnap.pipeline.flow import Geometry
from blocksnap.repository.blockmap import MapReader
from blocksnap.repository.check import Checker
from blocksnap.repository.documents import Manifest
from blocksnap.repository.repository import Repository
from blocksnap.repository.stored import StoredBackup
from blocksnap.repository.writer import RepositoryWriter
from blocksnap.restore.engine import restore_to_stream
from blocksnap.volumes.resolve import resolve_volume
from support.repositories import CHUNK, PASSPHRASE, make_repository, open_repository, open_writer

Objects = Mapping[str, bytes]


class Memory(Backend):
    """A backend of objects that somebody else may have made up."""

    place = "memory"

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def create(self) -> None:
        raise NotImplementedError

    def open_writer(self) -> ObjectWriter:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def read(self, name: str) -> bytes:
        try:
            return self._objects[name]
        except KeyError as err:
            raise ObjectMissingError(name) from err

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        found = self.read(name)[offset : offset + len(buffer)]
        if len(found) < len(buffer):
            raise EOFError
        buffer[:] = found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for name, content in self._objects.items():
            if name.startswith(prefix):
                yield ObjectInfo(name, len(content))


class Changing(Memory):
    """The same for whoever adds objects to it."""

    def __init__(self, objects: Objects) -> None:
        self.objects = dict(objects)
        super().__init__(self.objects)

    def open_writer(self) -> ObjectWriter:
        return _Draft(self.objects)

    def delete(self, name: str) -> None:
        if self.objects.pop(name, None) is None:
            raise ObjectMissingError(name)


class _Draft(ObjectWriter):
    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._data += data

    def publish(self, name: str) -> None:
        if self._objects.setdefault(name, content := bytes(self._data)) is not content:
            raise ObjectExistsError(name)

    def abort(self) -> None:
        pass


@dataclass(frozen=True)
class Scene:
    """A repository, what its backups hold, and the set of mapped units of those that have one."""

    objects: dict[str, bytes]
    contents: dict[str, bytes]
    mapped: dict[str, bytes]
    trusted: Repository
    """Opened before anybody touched it: its keys spare the time to derive them."""

    def names(self, folder: str) -> list[str]:
        return [name for name in self.objects if name.startswith(folder)]


@dataclass
class Verdict:
    """What users and ``check --read-data`` were told."""

    refused: str = ""
    """Why the repository did not open."""
    lost: dict[str, str] = field(default_factory=dict)
    """Backups that could not be restored whole, and why; all others were, byte by byte."""
    warnings: list[str] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)
    garbage: dict[str, str] = field(default_factory=dict)

    @property
    def noticed(self) -> bool:
        return bool(self.refused or self.lost or self.warnings or self.damage or self.garbage)

    def names(self, name: str) -> bool:
        """Whether somebody was told this name."""
        told = [self.refused, *self.lost.values(), *self.warnings, *self.damage, *self.garbage]
        return any(name in text for text in [*told, *self.damage.values()])


def make_scene(folder: Path, *, encrypted: bool) -> Scene:
    """Back up two small volumes in a group, one of them again, and store a set of mapped units."""
    folder.mkdir()
    place = folder / "repository"
    repository = make_repository(place, encrypted=encrypted)
    volumes = [folder / name for name in ("a", "b")]
    volumes[0].write_bytes(b"one" * 5000 + bytes(2 * CHUNK) + b"two" * 9000)
    volumes[1].write_bytes(b"one" * 5000 + b"!")
    contents = {}
    for group in (volumes, volumes[:1]):
        repository = open_repository(place)
        found = back_up(
            repository,
            [resolve_volume(str(path)) for path in group],
            str(folder / "state"),
            BackupOptions(),
            Quiet(),
        )
        contents |= {one.backup.id: Path(one.backup.volume.name).read_bytes() for one in found}
        with volumes[0].open("r+b") as file:
            file.seek(CHUNK)
            file.write(b"changed")
    repository = open_repository(place)
    bitmap = b"\x01" + bytes(5000) + b"\x80"
    newest = repository.backups()[-1]
    id_ = _store_with_mapped(repository, newest, MappedSet.of(65536, bitmap))
    contents[id_] = contents[newest.backup.id]
    backend = LocalBackend(str(place))
    objects = {info.name: backend.read(info.name) for info in backend.list("")}
    return Scene(dict(sorted(objects.items())), contents, {id_: bitmap}, open_repository(place))


def _store_with_mapped(repository: Repository, newest: StoredBackup, mapped: MappedSet) -> str:
    with open_writer(repository) as writer:
        stored = store_mapped(repository, writer, mapped, None)
        id_ = blake3(writer.id + bytes(4)).hexdigest()[:32]

        def compose(_: RepositoryWriter) -> Manifest:
            backup = newest.backup.model_copy(update={"id": id_, "mapped": stored})
            return newest.manifest.model_copy(update={"writer": writer.id.hex(), "backups": (backup,)})

        writer.commit(compose)
    return id_


def judge(scene: Scene, objects: Objects) -> Verdict:
    """Restore every backup and check everything; whatever is restored has to be what was backed up."""
    verdict, backend = Verdict(), Memory(objects)
    try:
        if _way_in(objects) == _way_in(scene.objects):
            repository = Repository(backend, scene.trusted.config, scene.trusted.keys)
        else:
            repository = Repository.open(backend, lambda: PASSPHRASE)
        listed = {stored.backup.id for stored in repository.backups()}
    except BlocksnapError as err:
        verdict.refused = str(err)
        return verdict
    assert listed <= scene.contents.keys(), "a backup that nobody made"
    for id_, content in scene.contents.items():
        try:
            assert _restore(repository, id_) == content, "restored something else"
            assert _mapped(repository, id_) == scene.mapped.get(id_), "read another set of mapped units"
        except BlocksnapError as err:
            verdict.lost[id_] = str(err)
    checker = Checker(repository, map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    checker.name_losses()
    for finding in checker.result.findings:
        (verdict.damage if finding.severity == "damage" else verdict.garbage)[finding.object] = (
            finding.message
        )
    verdict.warnings = [str(err) for err in repository.damage]
    return verdict


def _way_in(objects: Objects) -> dict[str, bytes]:
    """What decides how a repository is opened, which takes long."""
    return {name: objects[name] for name in objects if name.startswith(("config", "keys/"))}


def _restore(repository: Repository, id_: str) -> bytes:
    backup, out = find_backup(repository, id_).backup, io.BytesIO()
    geometry = Geometry(backup.size, backup.chunk_size)
    runs = MapReader(repository.load_node).runs(map_root(backup.map), 0, geometry.count)
    restore_to_stream(repository, geometry, runs, out, lambda _: None)
    return out.getvalue()


def _mapped(repository: Repository, id_: str) -> bytes | None:
    found = load_mapped(repository, find_backup(repository, id_).backup.mapped)
    return found.read(0, found.length) if found else None
