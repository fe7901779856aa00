"""What is done in a simulated world, and what has to be true of it whatever happens."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocksnap.backends.base import ObjectInfo
from blocksnap.errors import DamageError
from blocksnap.operations.catalogue import map_root, newest_of, root_document
from blocksnap.repository import cache, lookup, sweeping, victims, writer
from blocksnap.repository.blockmap import ZERO, MapReader, MapWriter
from blocksnap.repository.collector import Collector
from blocksnap.repository.documents import Backup, Forgotten, Manifest, Statistics, VolumeRecord
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import Author, RepositoryWriter
from support.simulated_world import InlineExecutor, SimulatedBackend, World

CHUNK = 16 << 10
CHUNKS = 70
"""More than one leaf of a map."""
_NOTHING = Statistics(
    changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
    freeze_ms=0, skew_ms=0, seconds=0,
)  # fmt: skip


class Clock(datetime):
    """The time of the world that is being played."""

    world: World

    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return cls.world.now

    @classmethod
    def urandom(cls, count: int) -> bytes:
        """Return bytes that the seed decides, too."""
        return cls.world.luck.randbytes(count)


def small_world(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Packs of a few frames, segments and tables of a few rows, and no thread but the processes'."""
    monkeypatch.setattr(Story, "cache", folder / "cache")
    monkeypatch.setattr(lookup, "SMALL_ROWS", 8)
    monkeypatch.setattr(lookup, "_AT_ONCE", 40)
    monkeypatch.setattr(writer, "ThreadPoolExecutor", InlineExecutor)
    monkeypatch.setattr(writer, "threading", SimpleNamespace(Event=threading.Event, Thread=Still))
    monkeypatch.setattr(writer, "pack_target", lambda _: 2000)
    monkeypatch.setattr(victims, "pack_target", lambda _: 2000)
    monkeypatch.setattr(writer, "SEGMENT_ROWS", 8)
    monkeypatch.setattr(sweeping, "SHARD_ROWS", 12)
    monkeypatch.setattr(sweeping, "MANY_SEGMENTS", 3)
    monkeypatch.setattr(writer, "datetime", Clock)
    monkeypatch.setattr(os, "urandom", Clock.urandom)
    # It asks the system for its numbers, and which of two tables is looked at first goes by their names.
    monkeypatch.setattr(cache, "secrets", SimpleNamespace(token_hex=lambda count: Clock.urandom(count).hex()))


class Still:
    """The thread that says that a run is alive, in a world where chance decides who is thought to be dead."""

    def __init__(self, **_: object) -> None:
        """Take what a thread takes."""

    def start(self) -> None:
        """It never beats."""

    def join(self) -> None:
        """It is at its end."""


def content_of(number: int) -> bytes:
    return random.Random(number).randbytes(64)


def tear(folder: Path) -> None:
    """Harm everything that a cache holds: what is open in a process, too."""
    for file in sorted(folder.rglob("index-*")):
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.seek(size // 3)
            opened.write(b"torn")


class Story:
    """What a world is made of, and what has to be true of it."""

    cache = Path()
    """The cache of the one host on which all processes run."""

    def __init__(self, seed: int, world: World | None = None) -> None:
        self.world = Clock.world = world or World(seed)
        self.always_gone = False
        shutil.rmtree(self.cache, ignore_errors=True)
        self.luck = random.Random(seed)
        self.contents: dict[str, dict[int, bytes]] = {}
        """Of every backup that was reported done: what it has to give back."""
        self.forgotten: set[str] = set()
        Repository.create(SimulatedBackend(self.world), chunk_size=CHUNK, passphrase=None)
        self.world.after_change = self.check_sometimes
        self.collected = 0

    def open(self) -> Repository:
        chance = self.luck.random()
        if chance < 0.1:
            tear(self.cache)
        cache = str(self.cache) if chance < 0.9 else None
        return Repository.open(SimulatedBackend(self.world), lambda: None, cache=cache)

    def gone(self, _: object) -> bool:
        """Whether a run is thought to be dead has nothing to do with whether it is."""
        return self.always_gone or self.luck.random() < 0.3

    def back_up(self, volume: str) -> None:
        repository = self.open()
        with RepositoryWriter(repository, Author("host", "host"), self.gone) as run:
            parent = newest_of(repository.backups(), volume)
            now = self.world.now
            content = dict(self.contents.get(parent.id, {})) if parent else {}
            if parent and parent.id not in self.contents:
                # Committed by a run that did not live to see it.
                content = self.read(repository, parent)
            changes = {self.luck.randrange(CHUNKS): content_of(self.luck.randrange(12)) for _ in range(4)}
            content.update(changes)
            root = map_root(parent.map) if parent else None
            builder = MapWriter(MapReader(repository.load_node), root, CHUNKS, run.store_node)
            for number in sorted(changes):
                builder.set(number, run.store_blob(FrameType.DATA, changes[number]))
            document = root_document(builder.finish())
            backup = Backup(
                id=run.backup_id(0),
                volume=VolumeRecord(name=volume, key=volume, kind="file"),
                time=now,
                kind="incremental" if parent else "full",
                parent=parent.id if parent else None,
                method="compare",
                reason="simulated",
                size=CHUNKS * CHUNK,
                chunk_size=CHUNK,
                map=document,
                source={},
                statistics=_NOTHING,
            )
            run.commit(
                lambda _: Manifest(
                    writer=run.id.hex(), time=now, host="h", hostname="h", program="p", backups=(backup,)
                )
            )
            self.contents[backup.id] = content

    def forget(self) -> None:
        repository = self.open()
        backups = repository.backups()
        if len(backups) > 1:
            chosen = self.luck.sample(backups[:-1], self.luck.randint(1, len(backups) - 1))
            ids = tuple(sorted(stored.backup.id for stored in chosen))
            # From the attempt on nothing is promised of them.
            self.forgotten.update(ids)
            run = self.luck.randbytes(16).hex()
            create_forgotten(repository, Forgotten(run=run, time=self.world.now, backups=ids))

    def prune(self) -> None:
        repository = self.open()
        collector = Collector(
            repository, map_root, Limits(dead_percent=10), now=lambda: self.world.now, advance=lambda _: None
        )
        with RepositoryWriter(repository, Author("host", "host"), collects=True) as run:
            outcome = collector.collect(run, self.gone)
        self.collected += outcome.state == "done"

    def restore(self) -> None:
        """Read a backup while everything goes on; what is given up meanwhile may be gone."""
        repository = self.open()
        for stored in repository.backups():
            try:
                content = self.read(repository, stored.backup)
            except DamageError:
                assert stored.backup.id in self.forgotten
            else:
                assert content == self.contents.get(stored.backup.id, content)

    def read(self, repository: Repository, backup: Backup) -> dict[int, bytes]:
        reader = MapReader(repository.load_node)
        content = {}
        for number, count, entry in reader.runs(map_root(backup.map), 0, CHUNKS):
            if len(entry) == 32:
                content[number] = bytes(repository.load(FrameType.DATA, entry))
            assert count >= 1
            assert entry != ZERO
        return content

    def check_sometimes(self) -> None:
        if self.luck.random() < 0.03:
            self.check()

    def check(self) -> None:
        """Every backup that was reported done and not given up is there, and gives back what went in."""
        backend = Outside(self.world)
        repository = Repository.open(backend, lambda: None)
        visible = {stored.backup.id: stored.backup for stored in repository.backups()}
        assert not repository.damage
        for id_ in self.contents.keys() - self.forgotten:
            assert id_ in visible, f"{id_} is gone"
        for id_, backup in visible.items():
            content = self.read(repository, backup)
            assert content == self.contents.get(id_, content), f"{id_} has another content"


class Outside(SimulatedBackend):
    """Looks at the storage without taking a turn."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._objects = world

    def read(self, name: str) -> bytes:
        return self._object(name)

    def read_range_into(self, name: str, offset: int, buffer: memoryview) -> None:
        data = self._object(name)[offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise EOFError
        buffer[:] = data

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        objects = self._objects.objects
        return iter(
            [ObjectInfo(name, len(objects[name])) for name in sorted(objects) if name.startswith(prefix)]
        )
