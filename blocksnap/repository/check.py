"""Is the repository sound? In four levels, each with all that is below it.

1. Every document opens, every index segment is whole, and every pack it lists exists with its size.
2. Every node of every map opens, and every chunk is in a pack.
3. Every pack's bytes have the hash in its name.
4. Every frame opens and has its id, and the pack's own table says the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

from blocksnap.backends.base import ObjectInfo
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.checked import CHECKS, read_checked
from blocksnap.repository.checked_index import CheckedIndex
from blocksnap.repository.documents import Backup, Root, WriterRecord
from blocksnap.repository.drills import DRILLS, read_drilled
from blocksnap.repository.epochs import read_object
from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.findings import CheckResult, named
from blocksnap.repository.frame import FrameType
from blocksnap.repository.key_objects import read_key
from blocksnap.repository.keys import Right
from blocksnap.repository.losses import LossFinder
from blocksnap.repository.marking import Marker, mark_backups, mistaken_backups
from blocksnap.repository.missing import missing_manifests
from blocksnap.repository.repository import Repository, load_config
from blocksnap.repository.scrubbing import ALL, CONTENTS, HASHES, Budget, PackVerdict, check_pack, read_packs
from blocksnap.repository.stored import StoredBackup

INDEX, MAPS = 1, 2
"""The levels of a check that read no data."""
_ATTEMPTS = 5
FOLDERS = ("keys/", "writers/", "manifests/", "index/", "packs/", "gc/", CHECKS, DRILLS)
"""Where the objects of a repository are, but for its config."""
_PASSING = ("writers/", "keys/", CHECKS, DRILLS)
"""What may go while a check is under way, without a trace in ``gc/``."""


class Checker:
    """One check; ``advance`` is told how many bytes of packs have been read."""

    def __init__(
        self,
        repository: Repository,
        roots: Callable[[Root], MapRoot],
        advance: Callable[[int], None],
        *,
        level: int = CONTENTS,
    ) -> None:
        self._level = level
        self._repository = repository
        self._root = roots
        self._advance = advance
        self._sizes: dict[str, int] = {}
        self._index = CheckedIndex(repository)
        self._listed: list[StoredBackup] = []
        self._any_manifest = False
        self._config_hash = ""
        self._aside: frozenset[str] = frozenset()
        self._unread: set[bytes] = set()
        """Nodes and pages that could not be read where a map has them."""
        self.result = CheckResult(level=level)

    def check_structure(self) -> None:
        """Look at everything but the data; raises NewerFormatError where this version cannot check.

        What is removed by a garbage collection that goes on meanwhile is no damage: then it looks again.
        """
        self._repository.require("check")
        for _ in range(_ATTEMPTS):
            self.result = CheckResult(level=self._level)
            before = self._collections()
            self._look()
            is_sound = not self.result.damaged and not self.result.bad_ids
            if is_sound or self._collections() == before:
                return

    def _collections(self) -> list[str]:
        return sorted(info.name for info in self._repository.backend.list("gc/"))

    def _look(self) -> None:
        # Manifests first: what they need was stored before them, so what is listed later holds it.
        self._listed = list(self._backups())
        self._documents()
        self._load_segments()
        packs = list(self._repository.backend.list("packs/"))
        self._sizes = {info.name: info.size for info in packs}
        self._packs_against_index()
        self._missing_manifests(packs)
        if self._level >= MAPS:
            self._maps([stored.backup for stored in self._listed])

    def check_packs(
        self,
        names: Sequence[str] | None = None,
        budget: Budget = ALL,
        note: Callable[[PackVerdict], None] = lambda _: None,
    ) -> None:
        """Read these packs, or all, whole, as far as the budget goes; call after ``check_structure``.

        ``note`` is told of each when it is through. Raises MissingRightError at level 4 when the repository's
        key may not read data.
        """
        if self._level >= CONTENTS:
            self._repository.keys.require(Right.READ)
        level, sizes, result = max(self._level, HASHES), self._sizes, self.result
        names = sorted(sizes.keys() - self._aside) if names is None else names
        result.packs_left = len(names)
        for verdict in read_packs(
            names, budget, sizes, lambda name: check_pack(self._repository, name, sizes[name], level)
        ):
            result.packs_left -= 1
            result.packs_read += 1
            result.read_bytes += verdict.size
            result.findings += verdict.findings
            result.bad_ids |= verdict.bad_ids
            note(verdict)
            self._advance(verdict.size)

    def name_losses(self) -> None:
        """Say which byte ranges of which backups the damage touches; call last."""
        lost = {id_ for id_ in self.result.bad_ids if self._is_lost(id_)}
        # What is whole may stand where it does not belong: then only the backups that have it there lose it.
        if not lost and not self._unread:
            return
        finder = LossFinder(self._repository, self._root, lost)
        for stored in self._listed:
            harmed = finder.look_at(stored.backup)
            if harmed is not None:
                self.result.lose(harmed)
            if finder.has_lost_mapped(stored.backup):
                message = "its set of mapped chunks is lost: the next backup compares everything"
                self.result.damage(named(stored.backup), message)

    def _is_lost(self, id_: bytes) -> bool:
        """Tell whether no place has a blob unharmed; a data chunk that the key cannot open counts as lost."""
        # Rows may say of one id that it is this and that.
        kinds = {location.type for location in self._repository.index.find_all(id_)}
        if not self._repository.keys.may(Right.READ):
            kinds.discard(FrameType.DATA)
        return not any(self._opens(kind, id_) for kind in FrameType if kind in kinds)

    def _opens(self, kind: FrameType, id_: bytes) -> bool:
        try:
            self._repository.load(kind, id_)
        except DamageError:
            return False
        return True

    @property
    def sizes(self) -> Mapping[str, int]:
        """All packs with their sizes."""
        return self._sizes

    def _backups(self) -> Iterator[StoredBackup]:
        forgotten = {id_ for each in self._repository.forgotten().values() for id_ in each.backups}
        aside = self._repository.aside().objects
        for info in sorted(self._repository.backend.list("manifests/"), key=lambda info: info.name):
            if info.name in aside:
                self.result.garbage(info.name, "damaged, and given up")
                continue
            try:
                manifest = self._repository.load_manifest(info.name)
            except BlocksnapError as err:
                self._any_manifest = True
                self.result.trouble(info.name, err)
                continue
            if manifest is None:
                continue
            self._any_manifest = True
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
        aside = self._repository.aside().objects
        for info in backend.list("gc/"):
            if info.name in aside:
                self.result.garbage(info.name, "damaged, and given up")
                continue
            self._try(info.name, partial(read_object, self._repository, info.name))
        for info in backend.list(CHECKS):
            self._try(info.name, partial(read_checked, self._repository, info.name))
        for info in backend.list(DRILLS):
            self._try(info.name, partial(read_drilled, self._repository, info.name))
        for info in backend.list(""):
            if info.name != "config" and not info.name.startswith(FOLDERS):
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
        aside = self._repository.aside()
        self._aside = aside.packs
        for info in self._repository.backend.list("index/"):
            if info.name in aside.objects:
                self.result.garbage(info.name, "damaged, and replaced by a repair")
        self._index = CheckedIndex(self._repository, aside.objects)
        self._index.load(self.result.trouble)

    def _packs_against_index(self) -> None:
        listed = {pack.name for pack, _ in self._index.packs()}
        aside = self._repository.aside().packs
        for name in sorted(aside & self._sizes.keys()):
            self.result.garbage(name, "damaged, and set aside by a repair")
        for pack, size in self._index.packs():
            found = self._sizes.get(pack.name)
            if pack.name in aside:
                continue
            if found is None:
                self.result.damage(pack.name, "the index lists it, but it is missing")
            elif found != size:
                self.result.damage(pack.name, f"it has {found} bytes instead of {size}")
        for name in sorted(self._sizes.keys() - listed) if self._index.is_whole else []:
            self.result.garbage(name, "no index segment lists it: an interrupted run left it")
        self.result.packs = len(self._sizes)

    def _missing_manifests(self, packs: Iterable[ObjectInfo]) -> None:
        try:
            gone = missing_manifests(
                self._repository, packs, datetime.now(UTC), any_manifest=self._any_manifest
            )
        except BlocksnapError:
            # An epoch that cannot be read is told of with the documents.
            return
        for run in gone:
            self.result.damage(f"manifests/{run}", "it is gone, and no garbage collection has deleted it")

    def _maps(self, backups: Sequence[Backup]) -> None:
        newer: dict[bytes, BlocksnapError] = {}
        self._unread.clear()

        def note(id_: bytes, err: BlocksnapError) -> None:
            if isinstance(err, NewerFormatError):
                newer[id_] = err
                return
            self._unread.add(id_)
            self.result.bad_ids.add(id_)
            self.result.trouble(f"map node {id_.hex()[:16]}", err)

        marker = self._marker(note)
        mark_backups(marker, backups, self._root)
        self.result.nodes, self.result.chunks = marker.nodes, marker.leaves
        self.result.bad_ids |= marker.lost - marker.lost_nodes
        if marker.mistaken:
            self._name_mistaken(backups, marker.mistaken)
        if newer:
            self._name_newer(backups, newer)

    def _marker(self, note: Callable[[bytes, BlocksnapError], None]) -> Marker:
        return self._index.marker(self._sizes.keys() - self._aside, note)

    def _name_mistaken(self, backups: Sequence[Backup], ids: Container[bytes]) -> None:
        """Name the backups that have these ids where they are wrong, not those where they are right."""
        finder = LossFinder(self._repository, self._root, ids)
        new_marker = partial(self._marker, lambda _id, _err: None)
        # Walked more than once, so only those that have any of them; all, should it lie behind their ends.
        for some in (list(filter(finder.is_touched, backups)), backups):
            wrong = list(mistaken_backups(some, new_marker, self._root))
            for backup in wrong:
                self.result.damage(
                    named(backup), "its map leads to what is stored as something else: it cannot be restored"
                )
            if wrong:
                return

    def _name_newer(self, backups: Iterable[Backup], newer: Mapping[bytes, BlocksnapError]) -> None:
        finder = LossFinder(self._repository, self._root, newer)
        for backup in backups:
            if finder.is_touched(backup):
                self.result.trouble(named(backup), next(iter(newer.values())))

    def _try(self, name: str, read: Callable[[], object]) -> None:
        try:
            read()
        except BlocksnapError as err:
            if name.startswith(_PASSING) and not self._repository.backend.exists(name):
                return
            self.result.trouble(name, err)
