"""A repository: created once, opened with a passphrase, read by anyone who holds nothing.

Readers take no lock. They list manifests before the index, so that every blob a manifest needs is in the
index they then load (docs/design.md, "Order of writes").
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from blake3 import blake3
from pydantic import BaseModel, ValidationError

from blocksnap.backends.base import Backend
from blocksnap.backends.errors import ObjectExistsError, ObjectMissingError
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository import documents
from blocksnap.repository.documents import Backup, Config, Fence, Kdf, Key, KeyMaterial, Manifest, Operation
from blocksnap.repository.errors import (
    DamagedObjectError,
    MissingChunkError,
    NewerFormatError,
    NoPassphraseError,
    NotARepositoryError,
    RepositoryExistsError,
    WrongPassphraseError,
)
from blocksnap.repository.frame import NO_REPOSITORY, FrameHeader, FrameType, Opener, Sealer
from blocksnap.repository.index import Index, Location, Segment, encode_segment
from blocksnap.repository.keys import (
    DEFAULT_COST,
    MAXIMUM_COST,
    MINIMUM_COST,
    KdfCost,
    KeyRing,
    new_master,
    passphrase_key,
    unwrap,
    wrap,
)
from blocksnap.repository.pack import PackId, SealedPack, read_footer

_REFRESH_SECONDS = 2.0
_SALVAGED = "salvaged from the packs"
_Model = TypeVar("_Model", bound=BaseModel)
_PUBLIC = KeyRing.plain(NO_REPOSITORY)
ASKED = Callable[[], bytes | None]
"""Returns the passphrase, or None when the user gave none; called only when one is needed."""


@dataclass(frozen=True, slots=True)
class StoredBackup:
    """A backup together with the run that stored it."""

    backup: Backup
    manifest: Manifest
    manifest_bytes: int


class Repository:
    """An open repository."""

    def __init__(self, backend: Backend, config: Config, keys: KeyRing) -> None:
        self.backend = backend
        self.config = config
        self.keys = keys
        self._index: Index | None = None
        self._refreshed = 0.0
        self.damage: list[BlocksnapError] = []
        """What was found damaged, or too new, and could be passed over; commands warn of it."""
        self.bad_ids: set[bytes] = set()
        """Blobs that could not be read; a writer stores them anew when it meets their content."""
        self._thread = threading.local()

    @classmethod
    def create(
        cls, backend: Backend, *, chunk_size: int, passphrase: bytes | None, cost: KdfCost = DEFAULT_COST
    ) -> Repository:
        """Create a repository; without a passphrase it is not encrypted.

        The config object is written last: what is interrupted before is no repository yet, and may be
        created again. That creation never replaces is tried out on the config itself.
        """
        backend.create()
        if any(not info.name.startswith("keys/") for info in backend.list("")):
            raise RepositoryExistsError(backend.place)
        config = Config(
            format=documents.FORMAT_VERSION,
            id=os.urandom(16).hex(),
            created=datetime.now(UTC),
            chunk_size=chunk_size,
            encryption="none" if passphrase is None else "aes-256-gcm",
        )
        stored = Sealer(_PUBLIC).seal(FrameType.CONFIG, _to_json(config))
        repository_id = bytes.fromhex(config.id)
        keys = KeyRing.plain(repository_id)
        if passphrase is not None:
            master = new_master()
            keys = KeyRing.from_master(master, repository_id=repository_id)
            material = KeyMaterial(master=master.hex(), config=blake3(stored).hexdigest())
            _put_key(backend, material, passphrase, cost)
        try:
            backend.put("config", stored)
        except ObjectExistsError as err:
            raise RepositoryExistsError(backend.place) from err
        try:
            backend.put("config", b"")
        except ObjectExistsError:
            return cls(backend, config, keys)
        raise DamagedObjectError(
            "config", "the storage replaces objects, which a repository cannot live with"
        )

    @classmethod
    def open(cls, backend: Backend, passphrase: ASKED) -> Repository:
        """Open a repository.

        Raises NoRepositoryError, PassphraseError, DamageError, NewerFormatError.
        """
        try:
            stored = backend.read("config")
        except ObjectMissingError as err:
            raise NotARepositoryError(backend.place) from err
        config = _open_document(_PUBLIC, stored, "config", FrameType.CONFIG, Config)
        _require_features(backend.place, config, "read")
        repository_id = bytes.fromhex(config.id)
        if config.encryption == "none":
            return cls(backend, config, KeyRing.plain(repository_id))
        secret = passphrase()
        if secret is None:
            raise NoPassphraseError(backend.place)
        master = _find_master(backend, secret, blake3(stored).hexdigest())
        return cls(backend, config, KeyRing.from_master(master, repository_id=repository_id))

    def require(self, operation: Operation) -> None:
        """Raise NewerFormatError when this version must not do that to this repository."""
        _require_features(self.backend.place, self.config, operation)

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk, fixed when the repository was created."""
        return self.config.chunk_size

    @property
    def index(self) -> Index:
        """The index, loaded on first use."""
        if self._index is None:
            self._index = Index()
            self.refresh_index()
        return self._index

    def refresh_index(self) -> None:
        """Add segments that were stored since the index was loaded.

        A segment that is damaged or too new is passed over, and what it listed is read from the packs' own
        tables.
        """
        index = self._index = self._index or Index()
        self._refreshed = time.monotonic()
        known = {segment.name for segment in index.segments}
        damaged = False
        for info in sorted(self.backend.list("index/"), key=lambda info: info.name):
            if info.name not in known:
                try:
                    index.add(self.open_segment(info.name))
                except (DamagedObjectError, NewerFormatError) as err:
                    damaged = True
                    self._note(err)
        if damaged and _SALVAGED not in known:
            self._salvage(index)

    def _salvage(self, index: Index) -> None:
        listed = {pack.name for segment in index.segments for pack, _ in segment.packs}
        packs = []
        for info in self.backend.list("packs/"):
            if info.name in listed:
                continue
            try:
                rows = read_footer(self.backend, self.keys, info.name, info.size)
                packs.append(SealedPack(PackId.parse(info.name), info.size, rows))
            except (DamagedObjectError, NewerFormatError, ValueError):
                continue
        key = self.keys.index_key
        index.add(Segment(memoryview(encode_segment(packs, key)), name=_SALVAGED, index_key=key))

    def _note(self, err: BlocksnapError) -> None:
        if all(str(known) != str(err) for known in self.damage):
            self.damage.append(err)

    def open_segment(self, name: str) -> Segment:
        """Map one segment of the index and check it."""
        return Segment(self.backend.view(name), name=name, index_key=self.keys.index_key)

    def opener(self) -> Opener:
        """Return this thread's opener."""
        found: Opener | None = getattr(self._thread, "opener", None)
        if found is None:
            found = self._thread.opener = Opener(self.keys)
        return found

    def locate(self, kind: FrameType, id_: bytes) -> Location:
        """Return where a blob lies; raises MissingChunkError."""
        found = self.index.find(id_)
        if found is None and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            # A run that finished meanwhile may have stored it.
            self.refresh_index()
            found = self.index.find(id_)
        if found is None or found.type != kind:
            raise MissingChunkError({FrameType.DATA: "chunk"}.get(kind, "map node"), id_)
        return found

    def load(self, kind: FrameType, id_: bytes) -> bytes:
        """Return a blob, from any place that has it unharmed; raises DamageError."""
        self.locate(kind, id_)
        problem: DamageError | None = None
        for location in self.index.find_all(id_):
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
        try:
            self.backend.read_range_into(pack, offset, buffer)
        except EOFError as err:
            raise DamagedObjectError(pack, "cut short") from err
        except ObjectMissingError as err:
            raise DamagedObjectError(pack, "the index lists it, but it is missing") from err

    def load_node(self, id_: bytes) -> bytes:
        """Return a map node."""
        return self.load(FrameType.NODE, id_)

    def manifests(self) -> Iterator[tuple[Manifest, int]]:
        """Yield every manifest with the size of its object.

        Shut-out writers' places are passed over, and so is what is damaged or too new (``damage``).
        """
        for info in self.backend.list("manifests/"):
            try:
                manifest = self.load_manifest(info.name)
            except (DamageError, NewerFormatError) as err:
                self._note(err)
                continue
            if manifest is not None:
                yield manifest, info.size

    def load_manifest(self, name: str) -> Manifest | None:
        """Return one manifest, or None for a fence; raises DamagedObjectError, NewerFormatError."""
        plain = self._open_plain(name, FrameType.MANIFEST)
        writer = name.removeprefix("manifests/")
        _require_format(plain, name)
        try:
            manifest = Manifest.model_validate_json(bytes(plain))
        except ValidationError as err:
            try:
                fence = Fence.model_validate_json(bytes(plain))
            except ValidationError:
                raise DamagedObjectError(name, f"it is not a manifest: {_first(err)}") from err
            if fence.writer != writer:
                raise DamagedObjectError(name, "it belongs to another run") from err
            return None
        if manifest.writer != writer:
            raise DamagedObjectError(name, "it belongs to another run")
        return manifest

    def backups(self) -> list[StoredBackup]:
        """Return all backups, oldest first."""
        found = [
            StoredBackup(backup, manifest, size)
            for manifest, size in self.manifests()
            for backup in manifest.backups
        ]
        return sorted(found, key=lambda stored: (stored.backup.time, stored.backup.id))

    def read_document(self, name: str, kind: FrameType, model: type[_Model]) -> _Model:
        """Return a document that is not a manifest; raises DamagedObjectError."""
        return _validate(self._open_plain(name, kind), name, model)

    def close(self) -> None:
        """Let go of the backend."""
        self.backend.close()

    def _open_plain(self, name: str, kind: FrameType) -> bytes | memoryview:
        try:
            stored = self.backend.read(name)
        except ObjectMissingError as err:
            raise DamagedObjectError(name, "it is missing") from err
        return _open_frame(self.opener(), stored, name, kind)


def open_public(backend: Backend, name: str, kind: FrameType, model: type[_Model]) -> _Model:
    """Return a document that is readable without a key: the config, or a wrapped key."""
    return _open_document(_PUBLIC, backend.read(name), name, kind, model)


def _open_document(keys: KeyRing, stored: bytes, name: str, kind: FrameType, model: type[_Model]) -> _Model:
    return _validate(_open_frame(Opener(keys), stored, name, kind), name, model)


def _open_frame(opener: Opener, stored: bytes, name: str, kind: FrameType) -> bytes | memoryview:
    view = memoryview(stored)
    plain = opener.open(view, where=name, kind=kind)
    if FrameHeader.parse(view, where=name).frame_length != len(stored):
        raise DamagedObjectError(name, "it is longer than it should be")
    return plain


def _require_format(plain: bytes | memoryview, name: str) -> None:
    """A document of a later format is not damage, whatever else it says."""
    try:
        document = json.loads(bytes(plain))
    except ValueError as err:
        raise DamagedObjectError(name, "it is no document") from err
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > documents.FORMAT_VERSION:
        raise NewerFormatError(name, f"format {version}")


def _validate(plain: bytes | memoryview, name: str, model: type[_Model]) -> _Model:
    _require_format(plain, name)
    try:
        return model.model_validate_json(bytes(plain))
    except ValidationError as err:
        raise DamagedObjectError(name, f"it does not say what it should: {_first(err)}") from err


def _first(err: ValidationError) -> str:
    problem = err.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}"


def _to_json(document: BaseModel) -> bytes:
    return document.model_dump_json().encode()


def _require_features(place: str, config: Config, operation: Operation) -> None:
    needed: tuple[str, ...] = getattr(config.features, operation)
    unknown = sorted(set(needed) - documents.FEATURES)
    if unknown:
        doing = {"gc": "collect garbage in"}.get(operation, operation)
        raise NewerFormatError(f"to {doing} repository {place}", f"feature {', '.join(unknown)}")


def _put_key(backend: Backend, material: KeyMaterial, passphrase: bytes, cost: KdfCost) -> str:
    salt = os.urandom(32)
    wrapping = passphrase_key(passphrase, salt=salt, cost=cost)
    kdf = Kdf(memory_kib=cost.memory_kib, passes=cost.passes, lanes=cost.lanes, salt=salt.hex())
    wrapped = wrap(_to_json(material), wrapping_key=wrapping, associated=salt)
    key = Key(created=datetime.now(UTC), kdf=kdf, wrapped=wrapped.hex())
    name = f"keys/{os.urandom(16).hex()}"
    backend.put(name, Sealer(_PUBLIC).seal(FrameType.KEY, _to_json(key)))
    return name


def _find_master(backend: Backend, passphrase: bytes, config_hash: str) -> bytes:
    """Try every key; a damaged one does not stand in the way of another."""
    damage: DamageError | None = None
    for info in sorted(backend.list("keys/"), key=lambda info: info.name):
        try:
            key = open_public(backend, info.name, FrameType.KEY, Key)
            secret = _unwrap_key(key, info.name, passphrase)
        except DamageError as err:
            damage = err
            continue
        if secret is None:
            continue
        material = _validate(secret, info.name, KeyMaterial)
        if material.config == config_hash:
            return bytes.fromhex(material.master)
        damage = DamagedObjectError("config", "it is not the one this repository was created with")
    raise damage or WrongPassphraseError(backend.place)


def _unwrap_key(key: Key, name: str, passphrase: bytes) -> bytes | None:
    cost = KdfCost(key.kdf.memory_kib, key.kdf.passes, key.kdf.lanes)
    for field in ("memory_kib", "passes", "lanes"):
        if not getattr(MINIMUM_COST, field) <= getattr(cost, field) <= getattr(MAXIMUM_COST, field):
            raise DamagedObjectError(name, f"its {field} is out of bounds")
    salt = bytes.fromhex(key.kdf.salt)
    wrapping = passphrase_key(passphrase, salt=salt, cost=cost)
    return unwrap(bytes.fromhex(key.wrapped), wrapping_key=wrapping, associated=salt)
