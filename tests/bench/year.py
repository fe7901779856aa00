"""A year of daily backups of 1 TiB: real maps, a real index, real garbage collection, but no data.

Everything is what backups would leave behind, but for the content of data packs: those are files of the right
size that are one hole, because nothing that is measured here reads them. Ids of chunks are invented. Each
measurement is a process of its own; its memory is what is resident and not backed by a file, at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.operations.catalogue import map_root, root_document
from blocksnap.repository.blockmap import MapReader, MapRoot, MapWriter
from blocksnap.repository.check import MAPS, Checker
from blocksnap.repository.collector import Collector
from blocksnap.repository.documents import Backup, Forgotten, Manifest, Statistics, VolumeRecord
from blocksnap.repository.epochs import create_forgotten
from blocksnap.repository.fencing import nobody_is_gone
from blocksnap.repository.frame import FrameType
from blocksnap.repository.keys import MINIMUM_COST
from blocksnap.repository.pack import PackId, PackRow, SealedPack, pack_target
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.repository.writer import Author, RepositoryWriter

CHUNK = 128 << 10
FRAME_BYTES = 80_000
"""Of a chunk that compresses as usual."""
PASSPHRASE = b"a year"
AUTHOR = Author("bench", "bench.example")
KEPT = 30
LOOK_UPS = 100_000
COMMAND_ROUNDS = 7
MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """How large it all is."""

    chunks: int
    days: int
    changed: int


class Year:
    """The repository of a year, in a folder."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder
        self.shape = shape
        self.repository = folder / "repository"
        self.cache = folder / "cache"

    def open(self, *, cache: Path | None) -> Repository:
        backend = LocalBackend(str(self.repository))
        return Repository.open(backend, lambda: PASSPHRASE, cache=str(cache) if cache else None)

    def build(self) -> None:
        """Make what is missing, day after day."""
        if not (self.repository / "config").exists():
            Repository.create(
                LocalBackend(str(self.repository)), chunk_size=CHUNK, passphrase=PASSPHRASE, cost=MINIMUM_COST
            )
        repository, memory = self.open(cache=self.cache), Memory()
        done = len(repository.backups())
        for day in range(done, self.shape.days + 1):
            began = time.monotonic()
            # As a command does: nothing is remembered but what the cache has.
            repository = Repository(
                repository.backend, repository.config, repository.keys, cache=str(self.cache)
            )
            stored = self.back_up(repository, day)
            print(
                f"day {day}: {time.monotonic() - began:.2f} s, {stored / MIB:.2f} MiB of metadata, "
                f"peak so far {memory.peak / 1024:.0f} MiB",
                flush=True,
            )

    def back_up(self, repository: Repository, day: int) -> int:
        count = self.shape.chunks
        with RepositoryWriter(repository, AUTHOR) as run:
            known = repository.backups()
            parent = known[-1].backup if known else None
            numbers: Iterable[int] = range(count)
            if parent:
                numbers = sorted(random.Random(day).sample(range(count), self.shape.changed))
            run.adopt(self._packs(run, day, numbers))
            root = map_root(parent.map) if parent else None
            builder = MapWriter(MapReader(repository.load_node), root, count, run.store_node)
            for number in numbers:
                builder.set(number, chunk_id(number, day))
            new = builder.finish()
            run.commit(lambda _: self._manifest(run, day, new, parent))
            return run.stored.metadata_bytes

    def _packs(self, run: RepositoryWriter, day: int, numbers: Iterable[int]) -> Iterator[SealedPack]:
        rows: list[PackRow] = []
        packs = sum(1 for _ in (self.repository / "packs").glob("*/*")) if day else 0
        for number in numbers:
            offset = 64 + len(rows) * FRAME_BYTES
            rows.append(PackRow(chunk_id(number, day), offset, FRAME_BYTES, CHUNK, FrameType.DATA))
            if len(rows) * FRAME_BYTES >= pack_target(packs):
                yield self._pack(run, rows)
                packs += 1
        if rows:
            yield self._pack(run, rows)

    def _pack(self, run: RepositoryWriter, rows: list[PackRow]) -> SealedPack:
        """Make a pack that has a name and a size."""
        pack = PackId(run.id, os.urandom(32))
        size = 64 + len(rows) * (FRAME_BYTES + 48) + 104
        path = self.repository / pack.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        sealed = SealedPack(pack, size, tuple(rows))
        rows.clear()
        return sealed

    def _manifest(self, run: RepositoryWriter, day: int, root: MapRoot, parent: Backup | None) -> Manifest:
        when = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day)
        statistics = Statistics(
            changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=run.stored.total_bytes,
            metadata_bytes=run.stored.metadata_bytes, new_chunks=0, freeze_ms=0, skew_ms=0, seconds=0,
        )  # fmt: skip
        backup = Backup(
            id=run.backup_id(0),
            volume=VolumeRecord(name="vg0/year", key="vg0/year", kind="thin"),
            time=when,
            kind="incremental" if parent else "full",
            parent=parent.id if parent else None,
            method="thin-time",
            reason="invented",
            size=self.shape.chunks * CHUNK,
            chunk_size=CHUNK,
            map=root_document(root),
            source={},
            statistics=statistics,
        )
        return Manifest(
            writer=run.id.hex(), time=when, host="bench", hostname="bench.example", program="bench",
            backups=(backup,),
        )  # fmt: skip


def chunk_id(number: int, day: int) -> bytes:
    """Return the invented id of a chunk as it is from a day on."""
    return blake3(number.to_bytes(8, "little") + day.to_bytes(8, "little")).digest()


class Memory:
    """The peak of resident memory that is no page cache, looked at every 20 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.look()
            if self._ended.wait(0.02):
                return

    def look(self) -> None:
        with open("/proc/self/status") as status:
            found = {line.split(":")[0]: line for line in status}
        self.peak = max(self.peak, int(found["RssAnon"].split()[1]) + int(found["RssShmem"].split()[1]))

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        self.look()
        return self.peak / 1024


def measure_start(year: Year) -> dict[str, object]:
    """What every command does that needs the index, with the cache of the day before."""
    repository = year.open(cache=year.cache)
    began = time.monotonic()
    repository.refresh_index()
    opened = time.monotonic() - began
    sizes = {info.name: info.size for info in repository.backend.list("packs/")}
    repository.index.pass_over(frozenset(), sizes)
    index_seconds = time.monotonic() - began
    tables = [table.rows for table in repository.index.tables]
    return {
        "index s": opened, "with packs listed s": index_seconds, "rows": sum(tables), "tables": tables,
        "packs": len(sizes), "segments": len(repository.segment_names()),
    }  # fmt: skip


def measure_cold_start(year: Year) -> dict[str, object]:
    """The first start on a new host: all segments are fetched and merged."""
    cold = year.folder / "cold-cache"
    shutil.rmtree(cold, ignore_errors=True)
    repository = year.open(cache=cold)
    began = time.monotonic()
    repository.refresh_index()
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in cold.rglob("*") if file.is_file())
    rows = sum(table.rows for table in repository.index.tables)
    shutil.rmtree(cold)
    return {"seconds": seconds, "cache MiB": size / MIB, "bytes a row": size / rows}


def measure_look_ups(year: Year) -> dict[str, object]:
    """Ids that are there and ids that are not, at random places."""
    repository = year.open(cache=year.cache)
    index = repository.index
    luck = random.Random(1)
    hits = [chunk_id(luck.randrange(year.shape.chunks), 0) for _ in range(LOOK_UPS)]
    misses = [luck.randbytes(32) for _ in range(LOOK_UPS)]
    result: dict[str, object] = {}
    for name, ids in (("miss", misses), ("hit", hits)):
        began = time.process_time()
        found = sum(map(index.stays, ids))
        result[f"{name} us"] = (time.process_time() - began) / LOOK_UPS * 1e6
        assert found == (LOOK_UPS if name == "hit" else 0), found
    held = sum(table.memory_bytes for table in index.tables)
    result["index bytes in memory a row"] = held / sum(table.rows for table in index.tables)
    return result


def measure_check(year: Year) -> dict[str, object]:
    """The default level: every document, every node, every chunk has a row."""
    repository = year.open(cache=year.cache)
    began = time.monotonic()
    checker = Checker(repository, map_root, lambda _: None, level=MAPS)
    checker.check_structure()
    result = checker.result
    assert not result.damaged, result.findings[:3]
    return {"seconds": time.monotonic() - began, "nodes": result.nodes, "chunks": result.chunks}


def new_collector(repository: Repository) -> Collector:
    limits = Limits(dead_percent=100)
    return Collector(repository, map_root, limits, now=lambda: datetime.now(UTC), advance=lambda _: None)


def measure_prune_plan(year: Year) -> dict[str, object]:
    """Marking, and the fate of every pack, while all backups are kept."""
    repository = year.open(cache=year.cache)
    began = time.monotonic()
    plan = new_collector(repository).plan()
    seconds = time.monotonic() - began
    repository.refresh_index()
    from blocksnap.repository.numbered import NumberedIndex

    index = NumberedIndex(repository.index.views)
    unique = sum(kind == FrameType.NODE for _, _, _, _, _, kind in index.entries())
    return {"seconds": seconds, "nodes visited": plan.nodes, "unique nodes": unique, "backups": plan.backups}


def measure_prune(year: Year) -> dict[str, object]:
    """All but the last thirty backups are forgotten: what is wholly dead goes, the index is written anew."""
    # Objects never change, so links to them are a copy.
    copy = Year(year.folder / "pruned", year.shape)
    shutil.rmtree(copy.folder, ignore_errors=True)
    copy.folder.mkdir()
    subprocess.run(["cp", "-al", str(year.repository), str(copy.repository)], check=True)
    shutil.copytree(year.cache, copy.cache)
    repository = copy.open(cache=copy.cache)
    ids = tuple(stored.backup.id for stored in repository.backups()[:-KEPT])
    create_forgotten(repository, Forgotten(run=os.urandom(16).hex(), time=datetime.now(UTC), backups=ids))
    began = time.monotonic()
    with RepositoryWriter(repository, AUTHOR, collects=True) as run:
        outcome = new_collector(repository).collect(run, nobody_is_gone)
    seconds = time.monotonic() - began
    assert outcome.state == "done", outcome
    assert outcome.plan
    left = len(list(repository.manifests()))
    shutil.rmtree(copy.folder)
    return {"seconds": seconds, "nodes visited": outcome.plan.nodes, "manifests left": left}


def measure_list(year: Year) -> dict[str, object]:
    """The manifests of all backups, verified."""
    repository = year.open(cache=year.cache)
    began = time.monotonic()
    backups = repository.backups()
    return {"seconds": time.monotonic() - began, "backups": len(backups)}


def measure_list_command(year: Year) -> dict[str, object]:
    """The command as it is typed, start-up included."""
    argv = [sys.executable, "-m", "blocksnap", "list", "--repo", str(year.repository)]
    environment = {**os.environ, "BLOCKSNAP_PASSPHRASE": PASSPHRASE.decode()}
    seconds, began_cpu = [], _children_cpu()
    for _ in range(COMMAND_ROUNDS):
        began = time.monotonic()
        subprocess.run(
            [*argv, "--cache-dir", str(year.cache)], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        seconds.append(time.monotonic() - began)
    cpu = (_children_cpu() - began_cpu) / COMMAND_ROUNDS
    return {"seconds": statistics.median(seconds), "CPU s of one": cpu}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


MEASURES: dict[str, Callable[[Year], dict[str, object]]] = {
    "start": measure_start,
    "cold start": measure_cold_start,
    "look-ups": measure_look_ups,
    "list": measure_list,
    "list, the command": measure_list_command,
    "prune, all kept": measure_prune_plan,
    "check, level 2": measure_check,
    "prune, 30 kept": measure_prune,
}


def run_measure(year: Year, name: str) -> None:
    memory = Memory()
    result = MEASURES[name](year)
    result |= {"CPU s": time.process_time(), "peak MiB": memory.end()}
    print(json.dumps(result))


def main() -> None:
    """Build, measure in processes of their own, and print what docs/benchmarks.md has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/year"))
    parser.add_argument("--volume-bytes", type=int, default=1 << 40)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--changed", type=int, default=10_000)
    parser.add_argument("--only", choices=[*MEASURES, "build"], action="append")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    year = Year(options.folder, Shape(options.volume_bytes // CHUNK, options.days, options.changed))
    if options.measure:
        run_measure(year, options.measure)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    year.build()
    for name in options.only or MEASURES:
        if name != "build":
            argv = [a for a in sys.argv if a != "--only" and a not in MEASURES]
            done = subprocess.run(
                [sys.executable, *argv, "--measure", name], check=True, stdout=subprocess.PIPE, text=True
            )
            print(f"{name}: {done.stdout.strip()}", flush=True)
    backups = year.open(cache=None).backups()[1:]
    metadata = sorted(stored.backup.statistics.metadata_bytes for stored in backups)
    print(f"metadata of an incremental: median {metadata[len(metadata) // 2] / MIB:.2f} MiB")


if __name__ == "__main__":
    main()
