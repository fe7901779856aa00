"""What is damaged, what of it can be brought back from within the repository, and what is lost.

Nothing is written here. A pack is *bad* when its bytes do not have the hash in its name, and its unharmed
frames are found by scanning it. What backups need and only a bad pack has is copied out of it; packs that no
whole segment lists are listed again. What is left is lost, and named by backup and range (docs/design.md,
3.14).
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from blocksnap.backends.base import ObjectInfo
from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import DamageError
from blocksnap.repository.blockmap import MapRoot
from blocksnap.repository.documents import Backup, Root
from blocksnap.repository.epochs import read_object
from blocksnap.repository.findings import BackupLosses, Loss
from blocksnap.repository.frame_scan import scan_frames
from blocksnap.repository.index import SEGMENT_ROWS, Segment, encode_segment
from blocksnap.repository.losses import LossFinder
from blocksnap.repository.marking import LAST_RESORT, TRUSTED, UNUSABLE, Marker, mark_backups
from blocksnap.repository.missing import missing_manifests
from blocksnap.repository.nodes import NodeLoader
from blocksnap.repository.numbered import NumberedIndex, NumberedRow
from blocksnap.repository.pack import PackId, PackRow, SealedPack, read_footer
from blocksnap.repository.repository import ASIDE, FORGET, Aside, Repository
from blocksnap.repository.scrubbing import hash_without_key

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class BadObject:
    """An object that is damaged or missing, and why that is said."""

    name: str
    reason: str
    is_gone: bool = False


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What there is to do, and what cannot be done.

    ``segments``, ``manifests`` and ``documents`` cannot be read; of each and of ``packs`` only what no repair
    has set aside before is there. ``listed`` are packs to list again, ``rescued`` frames to copy, by
    the pack that has them.
    """

    segments: tuple[BadObject, ...] = ()
    manifests: tuple[BadObject, ...] = ()
    documents: tuple[BadObject, ...] = ()
    packs: tuple[BadObject, ...] = ()
    listed: tuple[str, ...] = ()
    rescued: Mapping[str, tuple[PackRow, ...]] = field(default_factory=dict)
    lost: frozenset[bytes] = frozenset()
    given_up: frozenset[bytes] = frozenset()
    """Of those, what an earlier repair was told to give up."""
    harmed: tuple[BackupLosses, ...] = ()
    unmapped: tuple[str, ...] = ()
    """Backups whose set of mapped chunks is lost, as people call them: the next one compares everything."""
    backups: int = 0
    nodes: int = 0

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The ranges that are listed, of all backups."""
        return tuple(loss for each in self.harmed for loss in each.first)

    @property
    def rescued_bytes(self) -> int:
        """Bytes to copy."""
        return sum(row.length for rows in self.rescued.values() for row in rows)

    @property
    def acts(self) -> bool:
        """Whether there is anything to do, beside giving up what is lost."""
        return bool(self.segments or self.packs or self.listed or self.rescued)

    @property
    def gone(self) -> tuple[str, ...]:
        """Runs whose manifests are gone (``missing_manifests``)."""
        return tuple(bad.name.removeprefix("manifests/") for bad in self.manifests if bad.is_gone)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is lost once it is done."""
        return not self.lost and not self.manifests and not self.documents


class Planner:
    """One look at the repository. ``suspects`` are packs in which a check has found something."""

    def __init__(
        self,
        repository: Repository,
        roots: Callable[[Root], MapRoot],
        suspects: Collection[str] = (),
        condemned: Collection[str] = (),
    ) -> None:
        self._repository = repository
        self._roots = roots
        self._condemned = frozenset(condemned)
        self._suspects = set(suspects)
        self._examined: dict[str, tuple[PackRow, ...] | None] = {}
        """Of each pack that was looked at: None when it is whole, else its unharmed frames."""
        self._proven: dict[str, set[tuple[int, bytes]]] = {}
        self._aside = Aside()
        self._sizes: dict[str, int] = {}
        self._lost: set[bytes] = set()
        self._loose: set[str] = set()
        self._any_manifest = False
        self._made_up: list[Segment] = []

    def plan(self) -> RepairPlan:
        """Look and decide; raises NewerFormatError for what this version must not judge."""
        repository = self._repository
        self._aside = repository.aside()
        documents = list(self._bad_documents())
        forgotten = {id_ for each in repository.forgotten().values() for id_ in each.backups}
        manifests, backups = self._read_manifests(forgotten)
        # What this host remembers of a damaged segment helps nobody else.
        repository.index.reread()
        repository.refresh_index()
        repository.index.replace_made_up(())
        segments = list(self._bad_segments())
        packs = list(repository.backend.list("packs/"))
        manifests += self._gone_manifests(packs)
        self._sizes = {info.name: info.size for info in packs}
        self._suspects |= self._of_wrong_size()
        for _ in range(_ROUNDS):
            self._examine_all()
            known = len(self._suspects), len(self._loose), len(self._examined)
            index = self._numbered_index()
            marker = self._mark(index, backups)
            if self._lost or segments:
                self._find_loose()
            if known == (len(self._suspects), len(self._loose), len(self._examined)):
                rescued = self._choose_rescued(index, marker)
                break
        else:
            raise DamageError("the repository changes faster than it can be looked at")
        harmed, unmapped = self._name_losses(backups)
        return RepairPlan(
            segments=tuple(segments),
            manifests=tuple(manifests),
            documents=tuple(documents),
            packs=tuple(self._bad_packs()),
            listed=tuple(sorted(self._loose)),
            rescued=rescued,
            lost=frozenset(self._lost),
            given_up=frozenset(self._lost & self._aside.lost),
            harmed=harmed,
            unmapped=unmapped,
            backups=len(backups),
            nodes=marker.nodes,
        )

    def _bad_documents(self) -> Iterator[BadObject]:
        for info in self._repository.backend.list("gc/"):
            if info.name.startswith((FORGET, ASIDE)) and info.name not in self._aside.objects:
                problem = _problem_with(partial(read_object, self._repository, info.name))
                if problem:
                    yield BadObject(info.name, problem)

    def _read_manifests(self, forgotten: set[str]) -> tuple[list[BadObject], list[Backup]]:
        bad: list[BadObject] = []
        backups: list[Backup] = []
        for info in self._repository.backend.list("manifests/"):
            if info.name in self._aside.objects:
                continue
            try:
                manifest = self._repository.load_manifest(info.name)
            except ObjectMissingError:
                continue
            except DamageError as err:
                self._any_manifest = True
                bad.append(BadObject(info.name, err.brief))
                continue
            self._any_manifest |= manifest is not None
            backups += [each for each in (manifest.backups if manifest else ()) if each.id not in forgotten]
        return bad, sorted(backups, key=lambda backup: (backup.time, backup.id))

    def _gone_manifests(self, packs: Iterable[ObjectInfo]) -> Iterator[BadObject]:
        runs = missing_manifests(self._repository, packs, datetime.now(UTC), any_manifest=self._any_manifest)
        for run in runs:
            yield BadObject(f"manifests/{run}", "it is gone", is_gone=True)

    def _bad_segments(self) -> Iterator[BadObject]:
        for info in self._repository.backend.list("index/"):
            if info.name not in self._aside.objects:
                problem = _problem_with(partial(self._repository.open_segment, info.name))
                if problem:
                    yield BadObject(info.name, problem)

    def _listed_packs(self) -> dict[str, int]:
        return {pack.name: size for pack, size in self._repository.index.packs().items()}

    def _of_wrong_size(self) -> set[str]:
        listed = self._listed_packs()
        return {name for name, size in self._sizes.items() if listed.get(name, size) != size}

    def _examine_all(self) -> None:
        for name in sorted(self._suspects & self._sizes.keys()):
            self._examine(name)

    def _examine(self, name: str) -> bool:
        """Read a pack whole, once; tell whether it is bad. Its unharmed frames are known then."""
        if name not in self._examined:
            size = self._sizes[name]
            found: tuple[PackRow, ...] | None = None
            # Twice: a storage that failed for a moment has damaged nothing.
            if not self._is_whole(name) and not self._is_whole(name):
                found = tuple(scan_frames(self._repository, name, size))
                self._proven[name] = {(row.offset, row.id) for row in found}
            self._examined[name] = found
        return self._examined[name] is not None

    def _is_whole(self, name: str) -> bool:
        return hash_without_key(self._repository.backend, name, self._sizes[name]).is_good is not False

    def _find_loose(self) -> None:
        """Find what packs hold that no whole segment lists, by their tables or by scanning them."""
        listed = self._listed_packs().keys()
        batch: list[SealedPack] = []
        for name in sorted(self._sizes.keys() - listed - self._loose):
            pack = self.sealed_pack(name)
            if pack is None or not pack.rows:
                continue
            self._loose.add(name)
            batch.append(pack)
            if sum(len(each.rows) for each in batch) >= SEGMENT_ROWS:
                self._make_up(batch)
        self._make_up(batch)

    def sealed_pack(self, name: str) -> SealedPack | None:
        """Return a pack with its table, or the unharmed frames of a bad one; None for what is no pack."""
        try:
            pack = PackId.parse(name)
        except ValueError:
            return None
        size = self._sizes[name]
        try:
            rows = read_footer(self._repository.backend, self._repository.keys, name, size)
        except DamageError:
            self._suspects.add(name)
            self._examine(name)
            rows = self._examined.get(name) or ()
        return SealedPack(pack, size, rows)

    def _make_up(self, packs: list[SealedPack]) -> None:
        """List packs in a segment of this process alone, which costs page cache and no memory."""
        if packs:
            self._made_up.append(self._segment_of(packs))
            packs.clear()

    def _segment_of(self, packs: list[SealedPack]) -> Segment:
        key = self._repository.keys.index_key
        with tempfile.TemporaryFile() as file:
            file.write(encode_segment(packs, key))
            file.flush()
            data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        return Segment(data, name="made up for a repair", index_key=key)

    def _numbered_index(self) -> NumberedIndex:
        """Return the index with all that was found beside it."""
        found = [
            SealedPack(PackId.parse(name), self._sizes[name], rows)
            for name, rows in self._examined.items()
            if rows and name not in self._loose
        ]
        made_up = [*self._made_up, self._segment_of(found)]
        index = self._repository.index
        index.replace_made_up(made_up)
        # Nobody looks at a bad pack first, set aside before or not.
        index.set_aside(self._aside.packs | self._proven.keys())
        return NumberedIndex(index.views)

    def _mark(self, index: NumberedIndex, backups: list[Backup]) -> Marker:
        names = [pack.name for pack in index.packs]
        self._lost.clear()

        def accepts(row: NumberedRow, id_: bytes) -> bool:
            """Take what is proven; a pack that was set aside, or is condemned, is looked at when needed."""
            name = names[row.pack]
            return not self._examine(name) or (row.offset, id_) in self._proven[name]

        def gives_up(id_: bytes) -> bool:
            self._lost.add(id_)
            self._suspects.update(names[row.pack] for row in index.find(id_))
            self._suspects &= self._sizes.keys()
            return True

        trust = [self._trust(name, size) for name, size in zip(names, index.sizes, strict=True)]
        marker = Marker(index, trust, NodeLoader(self._repository), accepts=accepts, gives_up=gives_up)
        mark_backups(marker, backups, self._roots)
        return marker

    def _trust(self, name: str, size: int) -> int:
        if name not in self._sizes:
            return UNUSABLE
        if name in self._aside.packs or name in self._condemned or name in self._proven:
            return LAST_RESORT
        return TRUSTED if self._sizes[name] == size else LAST_RESORT

    def _roots_of(self, backup: Backup) -> Iterator[MapRoot]:
        yield self._roots(backup.map)
        if backup.mapped is not None:
            yield self._roots(backup.mapped.map)

    def _choose_rescued(self, index: NumberedIndex, marker: Marker) -> dict[str, tuple[PackRow, ...]]:
        """Return what backups need and only packs have that cannot be relied on."""
        names = [pack.name for pack in index.packs]
        unreliable = {
            number
            for number, name in enumerate(names)
            if self._trust(name, index.sizes[number]) == LAST_RESORT
        }
        rescued: dict[str, list[PackRow]] = {}
        for id_, number, pack, offset, length, kind in index.entries() if unreliable else ():
            if pack in unreliable and marker.is_marked(number):
                rescued.setdefault(names[pack], []).append(PackRow(id_, offset, length, 0, kind))
        return {
            name: tuple(sorted(rows, key=lambda row: row.offset)) for name, rows in sorted(rescued.items())
        }

    def _bad_packs(self) -> Iterator[BadObject]:
        """Yield what is to be set aside: bad packs, and missing ones that a segment still lists."""
        listed = self._listed_packs()
        for name in sorted((listed.keys() - self._sizes.keys()) - self._aside.packs):
            yield BadObject(name, "it is missing")
        for name in sorted(self._proven.keys() - self._aside.packs):
            found = self._sizes[name]
            if listed.get(name, found) != found:
                yield BadObject(name, f"it has {found} bytes instead of {listed[name]}")
            else:
                yield BadObject(name, "its bytes do not have the hash in its name")

    def _name_losses(self, backups: list[Backup]) -> tuple[tuple[BackupLosses, ...], tuple[str, ...]]:
        """Return what of which backups is lost, and those whose set of mapped chunks is."""
        if not self._lost:
            return (), ()
        finder = LossFinder(self._repository, self._roots, self._lost)
        harmed = filter(None, map(finder.look_at, backups))
        unmapped = filter(finder.has_lost_mapped, backups)
        return tuple(harmed), tuple(f"{each.id[:8]} of {each.volume.name}" for each in unmapped)


def _problem_with(read: Callable[[], object]) -> str | None:
    try:
        read()
    except ObjectMissingError:
        return None
    except DamageError as err:
        return err.brief
    return None
