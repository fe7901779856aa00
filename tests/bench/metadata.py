"""What an incremental backup writes besides data: map nodes and index rows, for scattered changes.

Counts bytes, not seconds: the result is the same on every machine. The volume has 1 TiB in chunks
of 128 KiB, all of them data; the changed chunks are spread evenly at random, which is the worst
case.
"""

from __future__ import annotations

import argparse
import hashlib
import random

from blocksnap.repository.blockmap import MapReader, MapRoot, MapWriter
from blocksnap.repository.frame import OVERHEAD, SENDER_SIZE
from blocksnap.repository.index import ROW as INDEX_ROW
from blocksnap.repository.pack import ROW as PACK_ROW

TIB, CHUNK = 1 << 40, 128 << 10
GOAL_BYTES = 6 << 20


class Nodes:
    """Stores map nodes, and counts what their frames take."""

    def __init__(self) -> None:
        self.plain: dict[bytes, bytes] = {}
        self.frame_bytes = self.count = 0

    def store(self, plain: bytes) -> bytes:
        """Store a node unless it is known."""
        id_ = hashlib.blake2b(plain, digest_size=32).digest()
        if id_ not in self.plain:
            self.plain[id_] = plain
            self.frame_bytes += len(plain) + OVERHEAD - SENDER_SIZE
            self.count += 1
        return id_

    def reset(self) -> None:
        """Count from nothing again."""
        self.frame_bytes = self.count = 0


def full_map(nodes: Nodes, chunks: int) -> MapRoot:
    """Build the map of a first backup."""
    writer = MapWriter(MapReader(nodes.plain.__getitem__), None, chunks, nodes.store)
    for number in range(chunks):
        writer.set(number, number.to_bytes(32, "big"))
    return writer.finish()


def incremental(nodes: Nodes, parent: MapRoot, chunks: int, changed: int) -> int:
    """Return the metadata bytes of a backup with so many scattered changed chunks."""
    nodes.reset()
    writer = MapWriter(MapReader(nodes.plain.__getitem__), parent, chunks, nodes.store)
    for number in sorted(random.Random(changed).sample(range(chunks), changed)):
        writer.set(number, (chunks + number).to_bytes(32, "big"))
    writer.finish()
    return nodes.frame_bytes + (nodes.count + changed) * (INDEX_ROW.size + PACK_ROW.size)


def main() -> None:
    """Print the table of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume-bytes", type=int, default=TIB)
    chunks = parser.parse_args().volume_bytes // CHUNK
    nodes = Nodes()
    root = full_map(nodes, chunks)
    print(f"full: {nodes.count} nodes, {nodes.frame_bytes / 2**20:.1f} MiB for {chunks} chunks\n")
    print("| scattered changed chunks | nodes | metadata |")
    print("|---|---|---|")
    for changed in (1, 10, 100, 1000, 10_000):
        size = incremental(nodes, root, chunks, changed)
        goal = f" (goal <= {GOAL_BYTES >> 20} MiB: {'met' if size <= GOAL_BYTES else 'missed'})"
        print(f"| {changed} | {nodes.count} | {size / 2**20:.2f} MiB{goal if changed == 1000 else ''} |")


if __name__ == "__main__":
    main()
