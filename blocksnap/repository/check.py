"""Is the repository sound? Structure first, then every byte.

Structure: every document opens, every index segment is whole, every pack it lists exists with its size, every
node of every map opens, and every chunk is in a pack. Reading the data adds: every pack's bytes have the hash
in its name, every frame opens and has its id, and the pack's own table says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository.blockmap import MapReader, MapRoot
from blocksnap.repository.documents import Root, WriterRecord
from blocksnap.repository.epochs import read_object
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.index import Segment
from blocksnap.repository.key_objects import read_key
from blocksnap.repository.keys import Right
from blocksnap.repository.pack import HEADER, PackId, PackRow, check_header, frame_at, hash_pack, read_footer
from blocksnap.repository.repository import Repository, StoredBackup, load_config

_THREADS = 2
_ATTEMPTS = 5
_BLOCK = 5 << 20
"""Larger than the frame of the largest chunk."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (``damage``), of no use (``garbage``), or of a later version (``newer``)."""

    severity: str
    object: str
    message: str


@dataclass(slots=True)
class CheckResult:
    """What a check has looked at and found."""

    findings: list[Finding] = field(default_factory=list)
    backups: int = 0
    nodes: int = 0
    chunks: int = 0
    packs: int = 0
    read_bytes: int = 0
    bad_ids: set[bytes] = field(default_factory=set)

    @property
    def damaged(self) -> bool:
        """Whether anything is wrong."""
        return any(finding.severity == "damage" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether everything could be looked at: what a later version wrote could not."""
        return all(finding.severity != "newer" for finding in self.findings)

    def damage(self, name: str, message: str) -> None:
        """Note damage."""
        self.findings.append(Finding("damage", name, message))

    def trouble(self, name: str, err: BlocksnapError) -> None:
        """Note what an error says: damage, unless it is only this version that is too old."""
        self.findings.append(_finding(name, err))

    def garbage(self, name: str, message: str) -> None:
        """Note something that no backup needs."""
        self.findings.append(Finding("garbage", name, message))


class Checker:
    """One check; ``advance`` is told how many bytes of packs have been read."""

    def __init__(
        self, repository: Repository, roots: Callable[[Root], MapRoot], advance: Callable[[int], None]
    ) -> None:
        self._repository = repository
        self._root = roots
        self._advance = advance
        self._sizes: dict[str, int] = {}
        self._segments: list[Segment] = []
        self._listed: list[StoredBackup] = []
        self._whole_index = True
        self._config_hash = ""
        self.result = CheckResult()

    def check_structure(self) -> None:
        """Look at everything but the data; raises NewerFormatError where this version cannot check.

        What is removed by a garbage collection that goes on meanwhile is no damage: then it looks again.
        """
        self._repository.require("check")
        for _ in range(_ATTEMPTS):
            self.result = CheckResult()
            before = self._collections()
            self._look()
            if not self.result.damaged or self._collections() == before:
                return

    def _collections(self) -> list[str]:
        return sorted(info.name for info in self._repository.backend.list("gc/"))

    def _look(self) -> None:
        # Manifests first: what they need was stored before them, so what is listed later holds it.
        self._listed = list(self._backups())
        self._documents()
        self._load_segments()
        self._sizes = {info.name: info.size for info in self._repository.backend.list("packs/")}
        self._packs_against_index()
        self._maps(self._listed)

    def check_data(self) -> None:
        """Read every pack whole; call after ``check_structure``.

        Raises MissingRightError when the repository's key may not read data.
        """
        self._repository.keys.require(Right.READ)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="blocksnap-check") as pool:
            for findings, bad in pool.map(self._read_pack, sorted(self._sizes)):
                self.result.findings.extend(findings)
                self.result.bad_ids.update(bad)

    def name_losses(self) -> None:
        """Say which byte ranges of which backups the damage touches; call last."""
        if not self.result.bad_ids:
            return
        reader = MapReader(self._repository.load_node)
        for stored in self._listed:
            backup = stored.backup
            size, count = backup.chunk_size, -(-backup.size // backup.chunk_size)
            for begin, end in _merged(reader.losses(self._root(backup.map), count, self.result.bad_ids)):
                self.result.damage(
                    f"backup {backup.id[:8]} of {backup.volume.name}",
                    f"bytes {begin * size} to {min(end * size, backup.size)} cannot be restored",
                )
            mapped = backup.mapped
            if mapped and next(reader.losses(self._root(mapped.map), 1 << 40, self.result.bad_ids), None):
                self.result.damage(
                    f"backup {backup.id[:8]} of {backup.volume.name}",
                    "its set of mapped chunks is lost: the next backup compares everything",
                )

    @property
    def total_bytes(self) -> int:
        """Size of all packs."""
        return sum(self._sizes.values())

    def _backups(self) -> Iterator[StoredBackup]:
        forgotten = {id_ for each in self._repository.forgotten().values() for id_ in each.backups}
        for info in sorted(self._repository.backend.list("manifests/"), key=lambda info: info.name):
            try:
                manifest = self._repository.load_manifest(info.name)
            except BlocksnapError as err:
                self.result.trouble(info.name, err)
                continue
            if manifest is None:
                continue
            for backup in manifest.backups:
                if backup.id in forgotten:
                    # Whatever it needs may be gone already.
                    continue
                self.result.backups += 1
                yield StoredBackup(backup, manifest, info.size)

    def _documents(self) -> None:
        backend = self._repository.backend
        self._try("config", self._config)
        for info in backend.list("keys/"):
            self._try(info.name, partial(self._key, info.name))
        self._writers()
        for info in backend.list("gc/"):
            self._try(info.name, partial(read_object, self._repository, info.name))
        known = ("keys/", "writers/", "manifests/", "index/", "packs/", "gc/")
        for info in backend.list(""):
            if info.name != "config" and not info.name.startswith(known):
                self.result.garbage(info.name, "it is no part of a repository that this version knows")

    def _config(self) -> None:
        _, self._config_hash = load_config(self._repository.backend)

    def _key(self, name: str) -> None:
        key = read_key(self._repository.backend, name)
        if self._config_hash and key.about.config != self._config_hash:
            self.result.garbage(name, "it opens another repository, or what an interrupted init began")

    def _writers(self) -> None:
        backend = self._repository.backend
        records = [info.name for info in backend.list("writers/")]
        # Listed after the records, or a run that commits meanwhile would seem not to have.
        ended = {info.name.removeprefix("manifests/") for info in backend.list("manifests/")}
        for name in sorted(records):
            self._try(name, partial(self._writer_record, name, ended))

    def _writer_record(self, name: str, ended: set[str]) -> None:
        record = self._repository.read_document(name, FrameType.WRITER, WriterRecord)
        if name != f"writers/{record.writer}.{record.sequence}":
            raise DamagedObjectError(name, "it is another run's record")
        if record.sequence == 0 and record.writer not in ended:
            self.result.garbage(
                name,
                f"the run of {record.hostname} that began at {record.time:%Y-%m-%d %H:%M:%S %Z} has no "
                "manifest: it is at work, was interrupted, or somebody has removed the manifest",
            )

    def _load_segments(self) -> None:
        for info in self._repository.backend.list("index/"):
            try:
                self._segments.append(self._repository.open_segment(info.name))
            except BlocksnapError as err:
                self._whole_index = False
                self.result.trouble(info.name, err)
        if not self._whole_index:
            # Readers find what a damaged segment listed in the packs' own tables, and so does this.
            self._segments = list(self._repository.index.segments)

    def _packs_against_index(self) -> None:
        listed: set[str] = set()
        for segment in self._segments:
            for pack, size in segment.packs:
                listed.add(pack.name)
                found = self._sizes.get(pack.name)
                if found is None:
                    self.result.damage(pack.name, "the index lists it, but it is missing")
                elif found != size:
                    self.result.damage(pack.name, f"it has {found} bytes instead of {size}")
        for name in sorted(self._sizes.keys() - listed) if self._whole_index else []:
            self.result.garbage(name, "no index segment lists it: an interrupted run left it")
        self.result.packs = len(self._sizes)

    def _maps(self, backups: Iterable[StoredBackup]) -> None:
        seen: set[bytes] = set()
        reader = MapReader(self._repository.load_node)
        for stored in backups:
            backup = stored.backup
            try:
                self._walk(reader, self._root(backup.map), FrameType.DATA, seen)
                if backup.mapped:
                    self._walk(reader, self._root(backup.mapped.map), FrameType.ATTACHMENT, seen)
            except NewerFormatError as err:
                self.result.trouble(f"backup {backup.id[:8]} of {backup.volume.name}", err)

    def _walk(self, reader: MapReader, root: MapRoot, leaf: FrameType, seen: set[bytes]) -> None:
        def note(id_: bytes, err: DamageError) -> None:
            self.result.bad_ids.add(id_)
            self.result.damage(f"map node {id_.hex()[:16]}", err.brief)

        for id_, level in reader.walk(root, seen, note):
            if level >= 0:
                self.result.nodes += 1
                continue
            self.result.chunks += 1
            if self._find(id_) != leaf:
                self.result.bad_ids.add(id_)

    def _find(self, id_: bytes) -> int | None:
        for segment in reversed(self._segments):
            found = segment.find(id_)
            if found is not None and found.pack.name in self._sizes:
                return found.type
        return None

    def _read_pack(self, name: str) -> tuple[list[Finding], set[bytes]]:
        findings: list[Finding] = []
        bad: set[bytes] = set()
        try:
            pack = PackId.parse(name)
        except ValueError:
            return [Finding("garbage", name, "its name is not that of a pack")], bad
        size = self._sizes[name]
        buffer = memoryview(bytearray(_BLOCK))
        whole = False
        try:
            whole = hash_pack(self._repository.read_range, name, size)
            if not whole:
                findings.append(Finding("damage", name, "its bytes do not have the hash in its name"))
            self._repository.read_range(name, 0, buffer[: HEADER.size])
            check_header(bytes(buffer[: HEADER.size]), pack, self._repository.keys.repository_id)
            for row in read_footer(self._repository.backend, self._repository.keys, name, size):
                self._read_frame(row, name, buffer, findings, bad)
        except BlocksnapError as err:
            if not self._repository.backend.exists(name):
                # Removed since the structure was looked at, as a garbage collection does.
                return [], set()
            # What does not have its hash is not believed to be of a later version.
            findings.append(_finding(name, err) if whole else Finding("damage", name, err.brief))
        self._advance(size)
        return findings, bad

    def _read_frame(
        self, row: PackRow, name: str, buffer: memoryview, findings: list[Finding], bad: set[bytes]
    ) -> None:
        try:
            if row.length > len(buffer):
                raise DamagedObjectError(name, "a frame is longer than any may be")
            frame = buffer[: row.length]
            self._repository.read_range(name, row.offset, frame)
            frame_at(frame, row, name)
            self._repository.opener().open(
                frame, where=f"frame at {row.offset} of {name}", kind=row.type, id_=row.id
            )
        except DamageError as err:
            findings.append(_finding(name, err))
            bad.add(row.id)
        except NewerFormatError as err:
            findings.append(_finding(name, err))

    def _try(self, name: str, read: Callable[[], object]) -> None:
        try:
            read()
        except BlocksnapError as err:
            self.result.trouble(name, err)


def _finding(name: str, err: BlocksnapError) -> Finding:
    return Finding("newer" if isinstance(err, NewerFormatError) else "damage", name, err.brief)


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begin = end = -1
    for first, last in ranges:
        if first != end:
            if end > begin:
                yield begin, end
            begin = first
        end = last
    if end > begin:
        yield begin, end
