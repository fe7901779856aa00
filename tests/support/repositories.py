"""Repositories for tests: on a temporary directory, with a cheap key derivation."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.operations.sink import DataSink
from blocksnap.pipeline.flow import Flow, Geometry
from blocksnap.repository.documents import Backup, Manifest, Root, Statistics, VolumeRecord
from blocksnap.repository.keys import MINIMUM_COST
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import Author, RepositoryWriter

PASSPHRASE = b"correct horse"
CHUNK = 16 << 10
_NOTHING = Statistics(
    changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
    freeze_ms=0, skew_ms=0, seconds=0,
)  # fmt: skip


def make_repository(path: Path, *, encrypted: bool = True, chunk_size: int = CHUNK) -> Repository:
    """Create a repository and open it as a stranger would."""
    Repository.create(
        LocalBackend(str(path)),
        chunk_size=chunk_size,
        passphrase=PASSPHRASE if encrypted else None,
        cost=MINIMUM_COST,
    )
    return open_repository(path)


def open_repository(path: Path) -> Repository:
    return Repository.open(LocalBackend(str(path)), lambda: PASSPHRASE)


def open_writer(repository: Repository) -> RepositoryWriter:
    return RepositoryWriter(repository, Author("test", "test.example"))


def store_bytes(
    writer: RepositoryWriter, content: bytes, folder: Path, chunk_size: int = CHUNK
) -> list[bytes | None]:
    """Store content through the pipeline and return its chunk ids in order."""
    source = folder / "source"
    source.write_bytes(content)
    fd = os.open(source, os.O_RDONLY)
    geometry = Geometry(len(content), chunk_size)
    try:
        with Flow(fd, geometry, [(0, len(content))] if content else [], DataSink(writer, 1)) as flow:
            results = list(flow.results())
    finally:
        os.close(fd)
    assert [result.number for result in results] == list(range(geometry.count))
    return [result.id for result in results]


def store_empty(
    repository: Repository,
    time: datetime,
    *,
    host: tuple[str, str] = ("id", "web"),
    received: datetime | None = None,
    seconds: float = 0,
) -> str:
    """Store an empty backup that took so long, and return its id.

    By the storage's clock it arrives when it was made, or at ``received``.
    """
    figures = Statistics(
        changed_bytes=0, read_bytes=0, new_bytes=0, stored_bytes=0, metadata_bytes=0, new_chunks=0,
        freeze_ms=0, skew_ms=0, seconds=seconds,
    )  # fmt: skip
    with open_writer(repository) as run:
        backup = Backup(
            id=blake3(run.id + bytes(4)).hexdigest(length=16),
            volume=VolumeRecord(name="vg0/root", key="lvm:VG/LV", kind="thin"), time=time, kind="full",
            parent=None, method="compare", reason="", size=CHUNK, chunk_size=CHUNK,
            map=Root(levels=1, root="hole"), source={}, statistics=figures,
        )  # fmt: skip
        run.commit(
            lambda _: Manifest(
                writer=run.id.hex(), time=time, host=host[0], hostname=host[1], program="p", backups=(backup,)
            )
        )
        arrived = (received or time).timestamp()
        os.utime(Path(repository.backend.place) / "manifests" / run.id.hex(), (arrived, arrived))
    return backup.id


def harm_largest_pack(repository: Path) -> None:
    """Flip a bit in the middle of the largest pack, which is one of data."""
    pack = max((repository / "packs").rglob("*-*"), key=lambda path: path.stat().st_size)
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
