"""This version as the older one: what a later one wrote is no damage, and costs no more than it must."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.repository import documents
from blocksnap.repository.blockmap import encode_node
from blocksnap.repository.documents import Operation
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import HEADER, NO_REPOSITORY, FrameType, Opener, Sealer, plain_tag
from blocksnap.repository.index import Segment
from blocksnap.repository.keys import KeyRing
from blocksnap.repository.pack import PackWriter
from blocksnap.repository.repository import Repository
from support import independent_reader
from support.in_process import InProcess
from support.repositories import open_repository, open_writer

PUBLIC = KeyRing.plain(NO_REPOSITORY)


@pytest.fixture
def blocksnap(in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run = in_process
    run.done("init", "--no-encryption", "--chunk-size", "16K")
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(100_000))
        run.done("backup", tmp_path / name)
    return run


def rewrite(path: Path, keys: KeyRing, kind: FrameType, change: Callable[[dict[str, Any]], None]) -> None:
    """Store a document again as a later version might."""
    plain = Opener(keys).open(memoryview(path.read_bytes()), where="x", kind=kind)
    document = json.loads(bytes(plain))
    change(document)
    path.write_bytes(Sealer(keys).seal(kind, json.dumps(document).encode()))


def need(run: InProcess, operation: str) -> None:
    def change(config: dict[str, Any]) -> None:
        config["features"][operation] = ["parity"]

    rewrite(run.folder / "repository" / "config", PUBLIC, FrameType.CONFIG, change)


def keys_of(run: InProcess) -> KeyRing:
    return open_repository(run.folder / "repository").keys


def newest(run: InProcess, folder: str) -> Path:
    return max((run.folder / "repository" / folder).iterdir(), key=lambda path: path.stat().st_mtime_ns)


def codes(run: InProcess) -> dict[str, int]:
    commands = {
        "list": ["list"],
        "restore": ["restore", f"{run.folder / 'a'}@latest", "-"],
        "verify": ["verify", f"{run.folder / 'a'}@latest"],
        "check": ["check", "--read-data"],
        "backup": ["backup", str(run.folder / "a")],
    }
    return {name: run(*words)[0] for name, words in commands.items()}


ALL_WORK = {"list": 0, "restore": 0, "verify": 0, "check": 0, "backup": 0}


@pytest.mark.parametrize(
    ("operation", "refused"),
    [("read", {*ALL_WORK}), ("write", {"backup"}), ("check", {"check"}), ("gc", set())],
)
def test_an_unknown_feature_refuses_what_needs_it_and_nothing_else(
    blocksnap: InProcess, operation: Operation, refused: set[str]
) -> None:
    need(blocksnap, operation)
    assert codes(blocksnap) == {name: int(name in refused) for name in ALL_WORK}
    if operation == "write":
        _, _, said = blocksnap("backup", blocksnap.folder / "a")
        place = blocksnap.folder / "repository"
        assert f"to write repository {place} needs a newer blocksnap: feature parity" in said
        assert "fix:" in said


def test_each_operation_asks_for_its_own_features(
    blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(blocksnap, "gc")
    repository = open_repository(blocksnap.folder / "repository")
    for operation in ("read", "write", "check"):
        repository.require(operation)
    with pytest.raises(NewerFormatError, match=r"to collect garbage in .*: feature parity"):
        repository.require("gc")
    monkeypatch.setattr(documents, "FEATURES", frozenset({"parity"}))
    repository.require("gc")


def test_nothing_is_stored_by_a_run_that_is_refused(blocksnap: InProcess) -> None:
    need(blocksnap, "write")
    before = sorted((blocksnap.folder / "repository").rglob("*"))
    assert blocksnap("backup", blocksnap.folder / "a")[0] == 1
    assert sorted((blocksnap.folder / "repository").rglob("*")) == before


def next_format(document: dict[str, Any]) -> None:
    document["format"] += 1
    document["something new"] = True


def test_a_config_of_a_later_format(blocksnap: InProcess) -> None:
    rewrite(blocksnap.folder / "repository" / "config", PUBLIC, FrameType.CONFIG, next_format)
    assert codes(blocksnap) == dict.fromkeys(ALL_WORK, 1)
    assert "needs a newer blocksnap: format 2" in blocksnap("list")[2]


def test_the_independent_reader_refuses_it_too(blocksnap: InProcess) -> None:
    place = blocksnap.folder / "repository"
    for operation in ("write", "check", "gc"):
        need(blocksnap, operation)
    independent_reader.Repository(place).verify()
    rewrite(newest(blocksnap, "manifests"), keys_of(blocksnap), FrameType.MANIFEST, next_format)
    with pytest.raises(independent_reader.NewerError, match="format 2"):
        independent_reader.Repository(place).backups()
    need(blocksnap, "read")
    with pytest.raises(independent_reader.NewerError, match="parity"):
        independent_reader.Repository(place)


def test_a_manifest_of_a_later_format_does_not_hide_the_others(blocksnap: InProcess) -> None:
    path = newest(blocksnap, "manifests")
    rewrite(path, keys_of(blocksnap), FrameType.MANIFEST, next_format)
    assert codes(blocksnap) == dict.fromkeys(ALL_WORK, 3)
    _, out, said = blocksnap("list", "--json")
    assert {one["volume"] for one in json.loads(out)["backups"]} == {str(blocksnap.folder / "a")}
    assert f"manifests/{path.name} needs a newer blocksnap: format 2" in said
    assert blocksnap("restore", f"{blocksnap.folder / 'b'}@latest", "-")[0] == 1
    assert findings(blocksnap) == {("newer", f"manifests/{path.name}")}


def findings(run: InProcess, *words: str) -> set[tuple[str, str]]:
    code, out, _ = run("check", "--json", *words)
    found = {(one["severity"], one["object"]) for one in json.loads(out)["findings"]}
    assert code == (13 if "damage" in dict(found) else 3 if found else 0)
    return found


def test_a_writer_record_of_a_later_format(blocksnap: InProcess) -> None:
    path = newest(blocksnap, "writers")
    rewrite(path, keys_of(blocksnap), FrameType.WRITER, next_format)
    assert codes(blocksnap) == {**ALL_WORK, "check": 3}
    assert findings(blocksnap) == {("newer", f"writers/{path.name}")}
    # Its run is at work, or was interrupted, and has packs that no segment lists yet.
    repository = open_repository(blocksnap.folder / "repository")
    writer = bytes.fromhex(path.name.partition(".")[0])
    pack = PackWriter(repository.backend, repository.keys, writer)
    pack.seal()
    assert codes(blocksnap) == {**ALL_WORK, "check": 3}


def test_a_segment_of_a_later_version_is_done_without(blocksnap: InProcess) -> None:
    keys = keys_of(blocksnap)
    for path in (blocksnap.folder / "repository" / "index").iterdir():
        body = bytearray(path.read_bytes()[:-32] + b"something new")
        body[8:12] = (2).to_bytes(4, "little")
        path.write_bytes(body + blake3(body, key=keys.index_key).digest())
        with pytest.raises(NewerFormatError, match="index segments of version 2"):
            Segment(memoryview(path.read_bytes()), name="x", index_key=keys.index_key)
    # This host remembers what they said.
    shutil.rmtree(blocksnap.folder / "cache")
    # A list needs no index.
    assert codes(blocksnap) == {**dict.fromkeys(ALL_WORK, 3), "list": 0}
    assert {severity for severity, _ in findings(blocksnap)} == {"newer"}
    assert blocksnap("restore", "latest", "-")[1] == (blocksnap.folder / "a").read_bytes()


def frame_of_the_future(keys: KeyRing, plain: bytes, *, kind: int = 1, codec: int = 0) -> bytes:
    header = HEADER.pack(
        b"BSF1", kind, codec, 0, 0, len(plain), len(plain), keys.identify(kind, plain), os.urandom(24)
    )
    return header + plain + plain_tag(keys.repository_id + header, plain)


@pytest.mark.parametrize("change", [{"kind": 5}, {"codec": 2}])
def test_an_authentic_frame_of_an_unknown_kind(change: dict[str, int]) -> None:
    keys = KeyRing.plain(bytes(16))
    frame = frame_of_the_future(keys, b"content", **change)
    with pytest.raises(NewerFormatError):
        Opener(keys).open(memoryview(frame), where="x")
    with pytest.raises(NewerFormatError):
        Opener(keys).open(memoryview(frame), where="x", kind=change.get("kind", 1))


def test_blobs_of_a_later_version_beside_ours(blocksnap: InProcess) -> None:
    repository = open_repository(blocksnap.folder / "repository")
    frame = frame_of_the_future(repository.keys, b"what is this?", kind=5)
    with open_writer(repository) as writer:
        writer.store(5, frame[16:48], memoryview(frame), 13)  # type: ignore[arg-type]
        writer.flush()
        run = writer.id.hex()
    (pack,) = [path for path in (blocksnap.folder / "repository" / "packs").rglob("*") if run in path.name]
    name = str(pack.relative_to(blocksnap.folder / "repository"))
    assert codes(blocksnap) == {**ALL_WORK, "check": 3}
    assert ("newer", name) in findings(blocksnap, "--read-data")
    # Its neighbours are found by those who have no index too.
    shutil.rmtree(blocksnap.folder / "cache")
    for path in (blocksnap.folder / "repository" / "index").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert blocksnap("restore", f"{blocksnap.folder / 'b'}@latest", "-")[0] == 3


def test_a_pack_of_a_later_version(blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = open_repository(blocksnap.folder / "repository")
    append = PackWriter._append

    def begin_otherwise(self: PackWriter, data: bytes | memoryview) -> None:
        if self.size == 0:
            data = bytes(data[:8]) + (2).to_bytes(4, "little") + bytes(data[12:])
        append(self, data)

    monkeypatch.setattr(PackWriter, "_append", begin_otherwise)
    with open_writer(repository) as writer:
        writer.store_node(encode_node(0, [b"x" * 32] * 64))
        writer.flush()
    monkeypatch.undo()
    monkeypatch.setenv("BLOCKSNAP_REPOSITORY", str(blocksnap.folder / "repository"))
    monkeypatch.setenv("BLOCKSNAP_STATE_DIRECTORY", str(blocksnap.folder / "state"))
    monkeypatch.setenv("BLOCKSNAP_CACHE", str(blocksnap.folder / "cache"))
    assert codes(blocksnap) == {**ALL_WORK, "check": 3}


def test_a_node_of_a_later_version(blocksnap: InProcess) -> None:
    repository = open_repository(blocksnap.folder / "repository")
    stored = repository.backups()[-1]
    node = bytearray(encode_node(0, [b"x" * 32] * 64))
    node[1] = 2
    with open_writer(repository) as writer:
        id_ = writer.store_node(bytes(node))

        def compose(_: object) -> documents.Manifest:
            map_ = stored.backup.map.model_copy(update={"root": id_.hex()})
            backup = stored.backup.model_copy(update={"id": writer.backup_id(0), "map": map_})
            return stored.manifest.model_copy(update={"writer": writer.id.hex(), "backups": (backup,)})

        writer.commit(compose)
    id_ = writer.backup_id(0)
    for words in (["restore", id_, "-"], ["verify", id_]):
        code, _, said = blocksnap(*words)
        assert code == 1
        assert "needs a newer blocksnap: map nodes of version 2" in said
    assert findings(blocksnap) == {("newer", f"backup {id_[:8]} of {stored.backup.volume.name}")}
    assert Repository.open(LocalBackend(str(blocksnap.folder / "repository")), lambda: None).backups()
