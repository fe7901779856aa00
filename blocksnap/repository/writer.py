"""One run that stores backups: announced, fed, and committed by the creation of one object.

Order (docs/design.md, "Order of writes"): the writer's record, then a look at the index, then packs,
then index segments for packs that are durable, then the manifest, whose creation is the commit, then a last
record that names it. A run that ends before the commit leaves blobs that nobody refers to, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from blocksnap.backends.errors import ObjectExistsError
from blocksnap.errors import BlocksnapError, DamageError
from blocksnap.repository.decoding import backup_id, encode_signed
from blocksnap.repository.documents import Manifest, WriterRecord
from blocksnap.repository.epochs import Epoch, read_epoch
from blocksnap.repository.errors import FencedError
from blocksnap.repository.fencing import IsGone, nobody_is_gone
from blocksnap.repository.frame import OVERHEAD, FrameType, Sealer
from blocksnap.repository.index import SEGMENT_ROWS, Segment, encode_segment, segment_name
from blocksnap.repository.keys import Right
from blocksnap.repository.pack import PackWriter, SealedPack, pack_target
from blocksnap.repository.repository import Repository
from blocksnap.repository.resume import find_adoptable

HEARTBEAT_SECONDS = 300
LONGEST_RUN_SECONDS = 90 * 86400
LONGEST_BY_CALENDAR_SECONDS = 300 * 86400
"""By the other clock, which may also have been set right meanwhile; less than fences are kept."""
_DOCUMENT_LEVEL = 3
_STORED = object()
"""Of a claim that was fulfilled."""


@dataclass(slots=True)
class Stored:
    """What a run has put into the repository, in bytes as stored; ``new_bytes`` are plain.

    Metadata is everything but the frames of data chunks.
    """

    data_bytes: int = 0
    metadata_bytes: int = 0
    new_bytes: int = 0
    new_chunks: int = 0

    @property
    def total_bytes(self) -> int:
        """Data and metadata together."""
        return self.data_bytes + self.metadata_bytes

    def plus(self, other: Stored) -> Stored:
        """Return both together."""
        return Stored(
            self.data_bytes + other.data_bytes,
            self.metadata_bytes + other.metadata_bytes,
            self.new_bytes + other.new_bytes,
            self.new_chunks + other.new_chunks,
        )

    def since(self, earlier: Stored) -> Stored:
        """Return what was added after ``earlier``."""
        return Stored(
            self.data_bytes - earlier.data_bytes,
            self.metadata_bytes - earlier.metadata_bytes,
            self.new_bytes - earlier.new_bytes,
            self.new_chunks - earlier.new_chunks,
        )


@dataclass(frozen=True, slots=True)
class Author:
    """Who runs: a host by its id and name, and a process that no later one is mistaken for."""

    host: str
    hostname: str
    pid: int = 0
    boot: str = ""
    started: int = 0


@dataclass(slots=True)
class _Flow:
    """Packs of one sort, data or metadata: the one that is open."""

    open: PackWriter | None = None


class RepositoryWriter:
    """A context manager; leaving it without ``commit`` drops what is open.

    ``claim`` and ``identify`` may be called from any thread; ``store`` and the rest from one.
    """

    def __init__(
        self,
        repository: Repository,
        author: Author,
        is_gone: IsGone = nobody_is_gone,
        *,
        collects: bool = False,
        right: Right | None = None,
    ) -> None:
        """Announce the run, then learn what is stored (in this order: see the design, 3.9).

        ``is_gone`` tells of which earlier runs of this host the packs may be taken over. Nobody waits for a
        run that ``collects`` garbage. Raises NewerFormatError for a repository that this version must not
        write to, and MissingRightError when the repository's key has not the ``right`` to it, by default
        that to collect or to store.
        """
        repository.require("gc" if collects else "write")
        repository.keys.require(right or (Right.COLLECT if collects else Right.STORE))
        self._repository = repository
        self._author = author
        self._collects = collects
        self._epoch: int | None = None
        self._began, self._began_on = time.clock_gettime(time.CLOCK_BOOTTIME), time.time()
        self.adopted = 0
        self.id = os.urandom(16)
        self.stored = Stored()
        self._sealer = Sealer(repository.keys, level=_DOCUMENT_LEVEL)
        # Of the thread that announces: a compressor that two threads use at once kills the process, or worse.
        self._announcer = Sealer(repository.keys, level=_DOCUMENT_LEVEL)
        self._claimed: dict[bytes, object] = {}
        self._doubts = False
        self._data = _Flow()
        self._meta = _Flow()
        self._uploads: list[Future[SealedPack]] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="blocksnap-publish")
        self._durable: list[SealedPack] = []
        self._unreported: list[str] = []
        self._manifest: str | None = None
        self._segments = 0
        self._sequence = 0
        self._announce()
        self._packs = self._learn_index(self._heed(read_epoch(repository)), is_gone)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="blocksnap-heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._tell_of_commit()

    def stop(self) -> None:
        """Drop what is open and end the thread; what is committed stays."""
        for flow in (self._data, self._meta):
            if flow.open:
                flow.open.abort()
                flow.open = None
        self._ended.set()
        self._heart.join()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def backup_id(self, number: int) -> str:
        """Return the id that the n-th backup of this run has to have, counted from 0."""
        return backup_id(self.id, number)

    def identify(self, kind: FrameType, plain: bytes | memoryview) -> bytes:
        """Return the id of a blob."""
        return self._repository.keys.identify(kind, plain)

    def claim(self, id_: bytes) -> bool:
        """Tell whether the caller has to store this blob; says so once for each id.

        Others rely on it from then on, so a claim that nobody fulfils keeps the run from committing.
        """
        if id_ in self._claimed:
            return False
        if self._repository.index.stays(id_) and id_ not in self._repository.bad_ids:
            return False
        token = object()
        return self._claimed.setdefault(id_, token) is token

    def start_over(self) -> None:
        """Prepare for a second try, after damage ended a first one whose threads have ended too.

        What was claimed and never stored may be claimed again. What ``store_blob`` finds there already is
        read before it is relied on: the damage that was met is seldom all there is.
        """
        for id_ in [id_ for id_, state in self._claimed.items() if state is not _STORED]:
            del self._claimed[id_]
        self._doubts = True

    def sealer(self, level: int) -> Sealer:
        """Return a sealer for one worker thread."""
        return Sealer(self._repository.keys, level=level)

    def store(self, kind: FrameType, id_: bytes, frame: memoryview, plain_length: int) -> None:
        """Append a sealed frame of a claimed id to the open pack of its kind."""
        flow = self._data if kind == FrameType.DATA else self._meta
        if flow.open is None:
            flow.open = PackWriter(self._repository.backend, self._repository.keys, self.id)
        flow.open.add(frame, id_=id_, kind=kind, plain_length=plain_length)
        self._claimed[id_] = _STORED
        if kind == FrameType.DATA:
            self.stored.data_bytes += len(frame)
            self.stored.new_bytes += plain_length
            self.stored.new_chunks += 1
        else:
            self.stored.metadata_bytes += len(frame)
        if flow.open.size >= pack_target(self._packs):
            self._publish(flow)

    def store_blob(self, kind: FrameType, plain: bytes) -> bytes:
        """Store a blob unless it is there already, and return its id."""
        id_ = self.identify(kind, plain)
        if self._doubts:
            self._look_at(kind, id_)
        if self.claim(id_):
            self.store_again(kind, id_, plain)
        return id_

    def store_again(self, kind: FrameType, id_: bytes, plain: bytes) -> None:
        """Store a blob whatever is said to be there."""
        # Nodes are ids, and ids do not compress.
        buffer = memoryview(bytearray(len(plain) + OVERHEAD))
        end = self._sealer.seal_into(kind, id_, plain, buffer, compress=kind != FrameType.NODE)
        self.store(kind, id_, buffer[:end], len(plain))

    def store_node(self, plain: bytes) -> bytes:
        """Store a map node and return its id."""
        return self.store_blob(FrameType.NODE, plain)

    def adopt(self, packs: Iterable[SealedPack]) -> None:
        """List packs that others have stored, and that no segment lists."""
        for pack in packs:
            self._repository.backend.flush(pack.id.name)
            self._durable.append(pack)
            self.adopted += pack.size
            if sum(len(each.rows) for each in self._durable) >= SEGMENT_ROWS:
                self._write_segment()
        self._write_segment()

    def flush(self) -> None:
        """Make everything stored so far durable and indexed."""
        for flow in (self._data, self._meta):
            self._publish(flow)
        self._collect(leave=0)
        self._write_segment()

    def commit(self, compose: Callable[[RepositoryWriter], Manifest]) -> tuple[Manifest, int]:
        """Flush, and publish the manifest that ``compose`` returns once all sizes are known.

        Returns it with the size of its object. Raises FencedError when this writer was shut out.
        """
        self.flush()
        # What is stored and indexed is no claim any more.
        if self._claimed:
            raise ValueError(f"{len(self._claimed)} blobs were claimed and never stored")
        manifest = compose(self)
        name = f"manifests/{self.id.hex()}"
        plain = encode_signed(manifest, name, self._repository.keys, Right.STORE)
        sealed = self._sealer.seal(FrameType.MANIFEST, plain)
        self.require_young()
        try:
            self._repository.backend.put(name, sealed)
        except ObjectExistsError as err:
            # A retried creation may meet its own first try.
            if self._repository.backend.read(name) != sealed:
                raise FencedError(self.id.hex()) from err
        self._manifest = name
        return manifest, len(sealed)

    def _tell_of_commit(self) -> None:
        """Name the manifest in a last record: should it be lost, the run does not look as if it had died.

        When all is done that follows from the commit: nothing of that must wait for the storage once more.
        """
        if self._manifest is None:
            return
        self._unreported.append(self._manifest)
        self._manifest = None
        # It is committed, whatever the storage says now.
        with contextlib.suppress(BlocksnapError):
            self._announce()

    def require_young(self) -> None:
        """Raise FencedError when the run has lasted longer than any may.

        The fence of a run that is shut out, and what an epoch has decided, are kept for a year, not for ever.
        """
        # The clock of the machine stands still while its virtual machine is paused, that of the day does not.
        lasted = time.clock_gettime(time.CLOCK_BOOTTIME) - self._began
        if lasted > LONGEST_RUN_SECONDS or time.time() - self._began_on > LONGEST_BY_CALENDAR_SECONDS:
            raise FencedError(self.id.hex())

    def _look_at(self, kind: FrameType, id_: bytes) -> None:
        """Read what is there already; of what cannot be read the repository remembers that it is bad."""
        if id_ not in self._claimed and self._repository.index.stays(id_):
            with contextlib.suppress(DamageError):
                self._repository.load(kind, id_)

    def _heed(self, epoch: Epoch) -> frozenset[str]:
        """Return the condemned packs, and say that they are known: then nobody has to wait for this run."""
        # A collector has to see what it is to decide about.
        if epoch.condemned is None or epoch.done or self._collects:
            return frozenset()
        self._epoch = epoch.number
        self._announce()
        return frozenset(epoch.condemned.packs)

    def _learn_index(self, condemned: frozenset[str], is_gone: IsGone) -> int:
        """Load the index, without what must not be believed, and return the number of packs."""
        repository = self._repository
        repository.refresh_index()
        # A lost pack's chunks have to be stored again. Packs are listed last: a run that was shut out can
        # still create a segment for packs that are gone.
        sizes = {info.name: info.size for info in repository.backend.list("packs/")}
        repository.index.pass_over(condemned, sizes)
        if not self._collects:
            adopted = find_adoptable(
                repository, self._author.host, sizes, condemned, is_gone, datetime.now(UTC)
            )
            self.adopt(adopted)
        return len(sizes)

    def _announce(self) -> None:
        record = WriterRecord(
            writer=self.id.hex(),
            sequence=self._sequence,
            host=self._author.host,
            hostname=self._author.hostname,
            pid=self._author.pid,
            boot=self._author.boot,
            started=self._author.started,
            time=datetime.now(UTC),
            packs=tuple(self._unreported),
            epoch=self._epoch,
            collects=self._collects,
        )
        sealed = self._announcer.seal(FrameType.WRITER, record.model_dump_json().encode())
        # Before it is tried: a creation that failed may have taken the name all the same.
        self._sequence += 1
        self._repository.backend.put(f"writers/{self.id.hex()}.{record.sequence}", sealed)
        self.stored.metadata_bytes += len(sealed)
        del self._unreported[: len(record.packs)]

    def _publish(self, flow: _Flow) -> None:
        pack, flow.open = flow.open, None
        if pack is None:
            return
        self._packs += 1
        self._uploads.append(self._executor.submit(_seal, pack))
        # One pack is flushed to disk while the next one grows; a second waits.
        self._collect(leave=1)

    def _collect(self, *, leave: int) -> None:
        while len(self._uploads) > leave or (self._uploads and self._uploads[0].done()):
            pack = self._uploads.pop(0).result()
            self._durable.append(pack)
            self._unreported.append(pack.id.name)
            self.stored.metadata_bytes += pack.size - sum(row.length for row in pack.rows)
        if sum(len(pack.rows) for pack in self._durable) >= SEGMENT_ROWS:
            self._write_segment()

    def _beat(self) -> None:
        """Say now and then that the run is alive, and what it has stored, whatever it is busy with."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # Storage that fails for a while may work again; if not, the run itself will notice.
            with contextlib.suppress(BlocksnapError):
                self._announce()

    def _write_segment(self) -> None:
        if not self._durable:
            return
        data = encode_segment(self._durable, self._repository.keys.index_key)
        name = segment_name(0, self.id, self._segments)
        self._repository.backend.put(name, data)
        key = self._repository.keys.index_key
        self._repository.index.add(Segment(memoryview(data), name=name, index_key=key))
        self._segments += 1
        self.stored.metadata_bytes += len(data)
        for pack in self._durable:
            for row in pack.rows:
                self._repository.bad_ids.discard(row.id)
                self._claimed.pop(row.id, None)
        self._durable.clear()


def _seal(pack: PackWriter) -> SealedPack:
    try:
        return pack.seal()
    finally:
        pack.abort()
