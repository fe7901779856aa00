"""A repository: created once, opened with a passphrase, read by anyone who holds nothing.

Readers take no lock. They list manifests before the index, so that every blob a manifest needs is in the
index they then load (docs/design.md, "Order of writes").
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TypeVar

from blake3 import blake3
from pydantic import BaseModel

from blocksnap.backends.base import Backend, ObjectInfo
from blocksnap.backends.errors import ObjectExistsError, ObjectMissingError
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository import documents
from blocksnap.repository.cache import LocalCache
from blocksnap.repository.decoding import (
    decode_manifest,
    decode_public,
    open_frame,
    open_signed,
    seal_public,
    validate,
)
from blocksnap.repository.documents import Config, Fence, Forgotten, Manifest, Operation, SetAside
from blocksnap.repository.errors import (
    DamagedObjectError,
    MissingChunkError,
    NewerFormatError,
    NoPassphraseError,
    NotARepositoryError,
    RepositoryExistsError,
    WrongPassphraseError,
)
from blocksnap.repository.frame import FrameType, Opener
from blocksnap.repository.index import Segment, encode_segment
from blocksnap.repository.key_objects import (
    FOLDER,
    OpenKey,
    create_key,
    find_key_name,
    find_open_key,
    open_key,
    read_key,
)
from blocksnap.repository.keys import KdfCost, KeyRing, Right, Role, new_master
from blocksnap.repository.known_manifests import KnownManifests
from blocksnap.repository.lookup import Index, Location
from blocksnap.repository.pack import PackId, SealedPack, read_footer, read_object, read_pack_range
from blocksnap.repository.stored import StoredBackup, dated

_REFRESH_SECONDS = 2.0
FORGET = "gc/forget/"
ASIDE = "gc/aside/"
_Model = TypeVar("_Model", bound=BaseModel)
ASKED = Callable[[], bytes | None]
"""Returns the passphrase, or None when the user gave none; called only when one is needed."""


@dataclass(frozen=True, slots=True)
class Aside:
    """What repairs have set aside: see SetAside. ``runs`` are those of the repairs."""

    runs: frozenset[str] = frozenset()
    packs: frozenset[str] = frozenset()
    objects: frozenset[str] = frozenset()
    lost: frozenset[bytes] = frozenset()


class Repository:
    """An open repository."""

    def __init__(
        self,
        backend: Backend,
        config: Config,
        keys: KeyRing,
        *,
        key: OpenKey | None = None,
        cache: str | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.keys = keys
        self.key = key
        """The key that opened it; None where there is no encryption."""
        self._cache_root = cache
        self._index: Index | None = None
        self._refreshed = 0.0
        self._is_behind = False
        self._set_aside: dict[str, SetAside] = {}
        self._replaced: frozenset[str] = frozenset()
        self.damage: list[BlocksnapError] = []
        """What was found damaged, or too new, and could be passed over; commands warn of it."""
        self.bad_ids: set[bytes] = set()
        """Blobs that could not be read; a writer stores them anew when it meets their content."""
        self._thread = threading.local()

    @classmethod
    def create(
        cls,
        backend: Backend,
        *,
        chunk_size: int,
        passphrase: bytes | None,
        host: str = "",
        cost: KdfCost | None = None,
    ) -> Repository:
        """Create a repository; without a passphrase it is not encrypted, with one it has an admin key.

        The config object is written last: what is interrupted before is no repository yet, and may be
        created again. That creation never replaces is tried out on the config itself.
        """
        backend.create()
        if any(not info.name.startswith(FOLDER) for info in backend.list("")):
            raise RepositoryExistsError(backend.place)
        config = Config(
            format=documents.FORMAT_VERSION,
            id=os.urandom(16).hex(),
            created=datetime.now(UTC),
            chunk_size=chunk_size,
            encryption="none" if passphrase is None else "aes-256-gcm",
        )
        stored = seal_public(FrameType.CONFIG, config)
        repository_id = bytes.fromhex(config.id)
        keys, key = KeyRing.plain(repository_id), None
        if passphrase is not None:
            keys = KeyRing.from_master(new_master(), repository_id=repository_id)
            digest = blake3(stored).hexdigest()
            made = create_key(backend, keys, Role.ADMIN, passphrase, config=digest, host=host, cost=cost)
            key = OpenKey(made.about, keys)
        try:
            backend.put("config", stored)
        except ObjectExistsError as err:
            raise RepositoryExistsError(backend.place) from err
        try:
            backend.put("config", b"")
        except ObjectExistsError:
            return cls(backend, config, keys, key=key)
        raise DamagedObjectError(
            "config", "the storage replaces objects, which a repository cannot live with"
        )

    @classmethod
    def open(
        cls,
        backend: Backend,
        passphrase: ASKED,
        *,
        key: str = "",
        host: str = "",
        cache: str | None = None,
    ) -> Repository:
        """Open a repository with the key whose id begins with ``key``, or any; those for ``host`` come first.

        ``cache`` is the folder of this host in which what is derived from the repository may be kept.

        Raises NoRepositoryError, PassphraseError, DamageError, NewerFormatError, NoSuchKeyError.
        """
        config, digest = load_config(backend)
        repository_id = bytes.fromhex(config.id)
        if config.encryption == "none":
            return cls(backend, config, KeyRing.plain(repository_id), cache=cache)
        secret = passphrase()
        if secret is None:
            raise NoPassphraseError(backend.place)
        damage: list[BlocksnapError] = []
        if key:
            named = read_key(backend, find_key_name(backend, key))
            opened = open_key(named, secret, config=digest, repository_id=repository_id)
            if opened is None:
                raise WrongPassphraseError(backend.place, key=named.about.id)
        else:
            opened = find_open_key(
                backend, secret, config=digest, repository_id=repository_id, host=host, note=damage.append
            )
        repository = cls(backend, config, opened.ring, key=opened, cache=cache)
        repository.damage += damage
        return repository

    def require(self, operation: Operation) -> None:
        """Raise NewerFormatError when this version must not do that to this repository."""
        _require_features(self.backend.place, self.config, operation)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk, fixed when the repository was created."""
        return self.config.chunk_size

    @cached_property
    def _cache(self) -> LocalCache | None:
        return LocalCache(self._cache_root, self.keys) if self._cache_root else None

    @cached_property
    def _known_manifests(self) -> KnownManifests:
        return KnownManifests(self._cache, self.keys)

    @property
    def index(self) -> Index:
        """The index, loaded on first use."""
        found = self._index
        if found is None:
            found = self._index = Index(self, self.keys, self._cache)
            self.refresh_index()
        return found

    def refresh_index(self) -> None:
        """Take in the segments that were stored since the index was looked at; raises StorageError.

        A segment that is damaged or too new is passed over, and what it listed is read from the packs' own
        tables.
        """
        if self._index is None:
            # Which comes back here.
            _ = self.index
            return
        aside = self.aside()
        self._replaced = aside.objects
        self._index.set_aside(aside.packs)
        self._refreshed, self._is_behind = time.monotonic(), False
        self._index.refresh()

    def segment_names(self) -> list[str]:
        """List the segments that there are now, without those that a repair has replaced."""
        return [info.name for info in self.backend.list("index/") if info.name not in self._replaced]

    def salvage(self, listed: Container[PackId]) -> Segment:
        """Make up a segment of the tables of the packs that none lists."""
        packs = []
        for info in self.backend.list("packs/"):
            try:
                pack = PackId.parse(info.name)
                if pack not in listed:
                    rows = read_footer(self.backend, self.keys, info.name, info.size)
                    packs.append(SealedPack(pack, info.size, rows))
            except (DamagedObjectError, NewerFormatError, ValueError):
                continue
        key = self.keys.index_key
        return Segment(memoryview(encode_segment(packs, key)), name="made up", index_key=key)

    def note(self, err: BlocksnapError) -> None:
        """Remember something damaged, or too new, that could be passed over."""
        if all(str(known) != str(err) for known in self.damage):
            self.damage.append(err)

    def open_segment(self, name: str) -> Segment:
        """Fetch one segment of the index and check it."""
        # Read rather than mapped: a bad sector under a mapping would kill the process.
        stored = memoryview(read_object(self.backend, name))
        return Segment(stored, name=name, index_key=self.keys.index_key)

    def opener(self) -> Opener:
        """Return this thread's opener."""
        found: Opener | None = getattr(self._thread, "opener", None)
        if found is None:
            found = self._thread.opener = Opener(self.keys)
        return found

    def locate(self, kind: FrameType, id_: bytes) -> Location:
        """Return where a blob lies; raises MissingChunkError."""
        return self._places(kind, id_)[0]

    def _places(self, kind: FrameType, id_: bytes) -> list[Location]:
        found = self._rows(kind, id_)
        if not found and (self._is_behind or time.monotonic() - self._refreshed > _REFRESH_SECONDS):
            # A run that finished meanwhile may have stored it.
            self.refresh_index()
            found = self._rows(kind, id_)
        if not found:
            raise MissingChunkError({FrameType.DATA: "chunk"}.get(kind, "map node"), id_)
        return found

    def _rows(self, kind: FrameType, id_: bytes) -> list[Location]:
        return [found for found in self.index.find_all(id_) if found.type == kind]

    def load(self, kind: FrameType, id_: bytes) -> bytes:
        """Return a blob, from any place that has it unharmed; raises DamageError.

        A pack that is missing may have been emptied by garbage collection: then the index has a new place.
        """
        places = self._places(kind, id_)
        problem: DamageError | None = None
        for attempt in range(2):
            if attempt:
                self.refresh_index()
                places = self._rows(kind, id_)
            for location in places:
                try:
                    return self._load_from(location, kind, id_)
                except DamageError as err:
                    problem = err
        self.bad_ids.add(id_)
        raise problem or MissingChunkError("blob", id_)

    def _load_from(self, location: Location, kind: FrameType, id_: bytes) -> bytes:
        name = location.pack.name
        frame = bytearray(location.length)
        self.read_range(name, location.offset, memoryview(frame))
        where = f"frame at {location.offset} of {name}"
        return bytes(self.opener().open(memoryview(frame), where=where, kind=kind, id_=id_))

    def read_range(self, pack: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a pack; raises DamagedObjectError when the pack does not have these bytes."""
        read_pack_range(self.backend, pack, offset, buffer)

    def load_node(self, id_: bytes) -> bytes:
        """Return a map node."""
        return self.load(FrameType.NODE, id_)

    def manifests(self) -> Iterator[tuple[Manifest, ObjectInfo]]:
        """Yield every manifest with what the storage says of its object.

        Shut-out writers' places are passed over, and so is what is damaged or too new (``damage``).
        """
        # What was committed since the index was loaded is not in it.
        self._is_behind = True
        aside = self.aside()
        for info in self.backend.list("manifests/"):
            if info.name in aside.objects:
                continue
            try:
                manifest = self._recognise_manifest(info.name)
            except ObjectMissingError:
                continue
            except (DamageError, NewerFormatError) as err:
                self.note(err)
                continue
            if manifest is not None:
                yield manifest, info
        self._known_manifests.save()

    def _recognise_manifest(self, name: str) -> Manifest | None:
        stored = read_object(self.backend, name)
        known = self._known_manifests.find(name, stored)
        if known:
            return known[0]
        manifest = self._open_manifest(name, stored)
        self._known_manifests.add(name, stored, manifest)
        return manifest

    def load_manifest(self, name: str) -> Manifest | None:
        """Return one manifest, or None for a fence; raises DamagedObjectError, NewerFormatError."""
        return self._open_manifest(name, read_object(self.backend, name))

    def _open_manifest(self, name: str, stored: bytes) -> Manifest | None:
        plain = open_frame(self.opener(), stored, name, FrameType.MANIFEST)
        return decode_manifest(plain, name, self.keys)

    def read_signed(self, name: str, kind: FrameType, model: type[_Model]) -> _Model:
        """Return a document that a key with the right to collect garbage has signed."""
        plain = open_signed(self._open_plain(name, kind), name, self.keys, Right.COLLECT)
        return validate(plain, name, model)

    def find_fence(self, run: str) -> Fence | None:
        """Return the fence of a run that was shut out."""
        try:
            return self.read_document(f"manifests/{run}", FrameType.MANIFEST, Fence)
        except DamageError:
            return None

    def forgotten(self) -> dict[str, Forgotten]:
        """Return what was given up, by the name of the object that says so.

        One that cannot be read is damage, and what it gave up is there again.
        """
        found: dict[str, Forgotten] = {}
        aside = self.aside()
        for info in self.backend.list(FORGET):
            if info.name in aside.objects:
                continue
            try:
                found[info.name] = self.read_forgotten(info.name)
            except DamageError as err:
                # A garbage collection removes what is of no use any more.
                if self.backend.exists(info.name):
                    self.note(err)
        return found

    def read_forgotten(self, name: str) -> Forgotten:
        """Return one act of forgetting; raises DamageError."""
        return self.read_signed(name, FrameType.COLLECTION, Forgotten)

    def aside(self) -> Aside:
        """Return what repairs have set aside; one record that cannot be read is damage and done without."""
        found: dict[str, SetAside] = {}
        problems: dict[str, DamageError] = {}
        for info in self.backend.list(ASIDE):
            try:
                known = self._set_aside.get(info.name)
                found[info.name] = known or self.read_signed(info.name, FrameType.COLLECTION, SetAside)
            except DamageError as err:
                problems[info.name] = err
        self._set_aside = found
        records = found.values()
        objects = frozenset(name for record in records for name in record.objects)
        for name in sorted(problems.keys() - objects):
            if self.backend.exists(name):
                self.note(problems[name])
        return Aside(
            runs=frozenset(record.run for record in records),
            packs=frozenset(name for record in records for name in record.packs),
            objects=objects,
            lost=frozenset(bytes.fromhex(id_) for record in records for id_ in record.lost),
        )

    def aside_records(self) -> dict[str, SetAside]:
        """Return what says so, by the names of the objects."""
        self.aside()
        return dict(self._set_aside)

    def known_losses(self, backup: str) -> list[tuple[int, int, int]]:
        """Return the ranges (offset, length, inode) of a backup that a repair could not bring back."""
        self.aside()
        return sorted(
            {
                (each.offset, each.length, each.inode)
                for record in self._set_aside.values()
                for each in record.ranges
                if each.backup == backup
            }
        )

    def backups(self) -> list[StoredBackup]:
        """Return all backups that are not forgotten, oldest first, by ``StoredBackup.moment``."""
        # In this order: a backup is forgotten after it was committed.
        stored = list(self.manifests())
        forgotten = {id_ for document in self.forgotten().values() for id_ in document.backups}
        found = [
            StoredBackup(backup, manifest, info.size, info.received)
            for manifest, info in stored
            for backup in manifest.backups
            if backup.id not in forgotten
        ]
        return sorted(dated(found), key=lambda stored: (stored.moment, stored.backup.time, stored.backup.id))

    def read_document(self, name: str, kind: FrameType, model: type[_Model]) -> _Model:
        """Return a document that is not a manifest; raises DamagedObjectError."""
        return validate(self._open_plain(name, kind), name, model)

    def close(self) -> None:
        """Let go of the backend."""
        self.backend.close()

    def _open_plain(self, name: str, kind: FrameType) -> bytes | memoryview:
        try:
            stored = read_object(self.backend, name)
        except ObjectMissingError as err:
            raise DamagedObjectError(name, "it is missing") from err
        return open_frame(self.opener(), stored, name, kind)


def load_config(backend: Backend) -> tuple[Config, str]:
    """Return the config of a repository, and the BLAKE3 of its object.

    Nothing vouches for it until a key has been opened. Raises NoRepositoryError, DamageError,
    NewerFormatError.
    """
    try:
        stored = read_object(backend, "config")
    except ObjectMissingError as err:
        raise NotARepositoryError(backend.place) from err
    config = decode_public(stored, "config", FrameType.CONFIG, Config)
    _require_features(backend.place, config, "read")
    return config, blake3(stored).hexdigest()


def _require_features(place: str, config: Config, operation: Operation) -> None:
    needed: tuple[str, ...] = getattr(config.features, operation)
    unknown = sorted(set(needed) - documents.FEATURES)
    if unknown:
        doing = {"gc": "collect garbage in"}.get(operation, operation)
        raise NewerFormatError(f"to {doing} repository {place}", f"feature {', '.join(unknown)}")
