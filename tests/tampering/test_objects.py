"""Changed objects are noticed, by name, and a restore never gives anything but what was backed up.

A verdict is a restore of every backup and ``check --read-data`` (support/tampering.py). Verdicts about every
byte take minutes, so here only some bytes get one, and all are tried on the code that reads the object;
``make soak-tamper`` sets BLOCKSNAP_SOAK and tries everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from blake3 import blake3

from blocksnap.errors import DamageError
from blocksnap.repository.decoding import decode_public
from blocksnap.repository.documents import Config, WriterRecord
from blocksnap.repository.errors import NewerFormatError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.index import Segment
from blocksnap.repository.key_objects import read_key
from blocksnap.repository.pack import HEADER, PackId, check_header, frame_at, read_footer
from blocksnap.repository.repository import Repository
from support import independent_reader
from support.repositories import PASSPHRASE
from support.tampering import Memory, Scene, judge, make_scene

STRIDE = 1 if os.environ.get("BLOCKSNAP_SOAK") else 41
FOLDERS = ["config", "index/", "keys/", "manifests/", "packs/", "writers/"]


@pytest.fixture(scope="module", params=[True, False], ids=["encrypted", "plain"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene") / "made", encrypted=request.param)


def other_scene(scene: Scene, folder: Path) -> Scene:
    """Return another repository with the same passphrase and the same content."""
    return make_scene(folder / "other", encrypted=scene.trusted.keys.encrypted)


def kind_of(name: str) -> str:
    return next(folder for folder in FOLDERS if name.startswith(folder))


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def read_object(scene: Scene, name: str, content: bytes) -> None:
    """Read an object as whoever needs it does; raises DamageError unless all of it is as it was written."""
    backend, keys = Memory({name: content}), scene.trusted.keys
    repository = Repository(backend, scene.trusted.config, keys)
    match kind_of(name):
        case "config":
            decode_public(content, name, FrameType.CONFIG, Config)
        case "keys/":
            read_key(backend, name)
        case "manifests/":
            repository.load_manifest(name)
        case "writers/":
            repository.read_document(name, FrameType.WRITER, WriterRecord)
        case "index/":
            Segment(memoryview(content), name=name, index_key=keys.index_key)
        case "packs/":
            check_header(content[: HEADER.size], PackId.parse(name), keys.repository_id)
            for row in read_footer(backend, keys, name, len(content)):
                frame = memoryview(content)[row.offset : row.offset + row.length]
                frame_at(frame, row, name)
                repository.opener().open(frame, where=name, kind=FrameType(row.type), id_=row.id)


def test_nothing_is_said_of_what_nobody_touched(scene: Scene) -> None:
    assert not judge(scene, scene.objects).noticed
    assert {kind_of(name) for name in scene.objects} == set(FOLDERS) - (
        set() if scene.trusted.keys.encrypted else {"keys/"}
    )
    types = {FrameType.DATA, FrameType.NODE, FrameType.ATTACHMENT}
    backend = Memory(scene.objects)
    for name in scene.names("packs/"):
        size = len(scene.objects[name])
        types -= {row.type for row in read_footer(backend, scene.trusted.keys, name, size)}
    assert not types


def is_noticed(scene: Scene, name: str, content: bytes) -> bool:
    try:
        read_object(scene, name, content)
    except DamageError:
        return True
    except NewerFormatError:
        # Nobody believes the version of a pack before its hash has been found right.
        assert name.startswith("packs/")
    # The random bytes of a pack's header say nothing. What protects them is the hash in the name.
    return name.startswith("packs/") and blake3(content).digest() != PackId.parse(name).hash


def test_every_byte_matters_to_whoever_reads_it(scene: Scene) -> None:
    for name, content in scene.objects.items():
        assert not is_noticed(scene, name, content)
        for position in range(len(content)):
            for bit in range(8) if STRIDE == 1 else (position % 8,):
                assert is_noticed(scene, name, flipped(content, position * 8 + bit)), (name, position, bit)


def test_every_length_matters_to_whoever_reads_it(scene: Scene) -> None:
    for name, content in scene.objects.items():
        for length in range(len(content)):
            assert is_noticed(scene, name, content[:length]), (name, length)
        for more in (b"\0", content[-1:], content):
            assert is_noticed(scene, name, content + more), (name, len(more))


def test_flipped_bytes_are_named(scene: Scene) -> None:
    for name, content in scene.objects.items():
        for position in range(len(name) % STRIDE, len(content), STRIDE):
            changed = {**scene.objects, name: flipped(content, position * 8 + position % 8)}
            verdict = judge(scene, changed)
            assert verdict.names(name), (name, position, verdict)
            require_no_more_lost_than_needed(scene, name, set(verdict.lost))


def require_no_more_lost_than_needed(scene: Scene, name: str, lost: set[str]) -> None:
    match kind_of(name):
        case "index/" | "writers/":
            assert lost == set()
        case "manifests/":
            assert lost == backups_of(scene, name)


def backups_of(scene: Scene, manifest: str) -> set[str]:
    found = scene.trusted.load_manifest(manifest)
    assert found is not None
    return {backup.id for backup in found.backups}


def lengths(content: bytes) -> Iterator[int]:
    yield from range(0, len(content), STRIDE * 2)
    yield len(content) - 1


def test_cut_and_lengthened_objects_are_named(scene: Scene) -> None:
    for name, content in scene.objects.items():
        for changed in (*(content[:length] for length in lengths(content)), content + b"\0", content * 2):
            verdict = judge(scene, {**scene.objects, name: changed})
            assert verdict.names(name), (name, len(changed), verdict)


def test_deleted_objects_are_named(scene: Scene) -> None:
    for name in scene.objects:
        verdict = judge(scene, {n: content for n, content in scene.objects.items() if n != name})
        match kind_of(name):
            case "writers/":
                # What a run said of itself while it was at work. Nothing is lost with it.
                assert not verdict.lost
            case "manifests/":
                # It looks as if the run had never committed, and of that the check tells.
                assert verdict.lost.keys() == backups_of(scene, name)
                assert verdict.names(name.removeprefix("manifests/")), (name, verdict)
            case "config":
                assert "not a blocksnap repository" in verdict.refused
            case "keys/":
                assert verdict.refused
            case "index/":
                writer = name.split("-")[1]
                assert verdict.lost
                assert verdict.names(writer), (name, verdict)
            case "packs/":
                assert verdict.lost
                assert verdict.names(name), (name, verdict)


def test_swapped_objects_are_named(scene: Scene) -> None:
    for folder in FOLDERS:
        for one, other in combinations(scene.names(folder), 2):
            swapped = {**scene.objects, one: scene.objects[other], other: scene.objects[one]}
            verdict = judge(scene, swapped)
            if folder == "index/":
                # What a segment lists is true whatever it is called.
                assert not verdict.lost
            else:
                assert verdict.names(one), (one, other, verdict)
                assert verdict.names(other), (one, other, verdict)


def test_objects_that_are_there_twice_are_named(scene: Scene) -> None:
    """An older object of the same repository, under the name of one that never was."""
    never = "0" * 32
    for name, content in scene.objects.items():
        copy = name.replace(name.split("/")[-1][-32:], never) if "/" in name else ""
        match kind_of(name):
            case "manifests/":
                copy = f"manifests/{never}"
            case "writers/":
                copy = f"writers/{never}.0"
            case "packs/":
                copy = f"packs/00/{never}-{'0' * 64}"
            case _:
                continue
        verdict = judge(scene, {**scene.objects, copy: content})
        assert not verdict.lost
        assert verdict.names(copy), (copy, verdict)


def test_an_older_state_of_the_repository_is_whole_but_the_runs_since_are_missing(scene: Scene) -> None:
    """What was deleted without a trace cannot be told; a trace that is left is."""
    newest = max(scene.contents, key=lambda id_: id_ in scene.mapped)
    (gone,) = [name for name in scene.names("manifests/") if newest in backups_of(scene, name)]
    run = gone.removeprefix("manifests/")
    older = {name: content for name, content in scene.objects.items() if run not in name}
    verdict = judge(scene, older)
    assert verdict.lost.keys() == {newest}
    assert not verdict.damage
    for kept in (name for name in scene.objects if run in name and name != gone):
        assert judge(scene, {**older, kept: scene.objects[kept]}).names(run), kept


def test_objects_of_another_repository_in_the_place_of_one(scene: Scene, tmp_path: Path) -> None:
    other = other_scene(scene, tmp_path)
    for name in scene.objects:
        foreign = other.names(kind_of(name))[0]
        verdict = judge(scene, {**scene.objects, name: other.objects[foreign]})
        if name == "config" and not scene.trusted.keys.encrypted:
            # Nothing authenticates it, but then nothing else belongs to it.
            assert verdict.lost.keys() == scene.contents.keys()
            assert all(verdict.names(manifest) for manifest in scene.names("manifests/"))
        elif name.startswith("keys/"):
            assert verdict.refused
        else:
            assert verdict.names(name), (name, verdict)


def test_objects_of_another_repository_beside_ours(scene: Scene, tmp_path: Path) -> None:
    other = other_scene(scene, tmp_path)
    for name, content in other.objects.items():
        if name == "config":
            continue
        verdict = judge(scene, {**scene.objects, name: content})
        assert not verdict.refused
        assert not verdict.lost, (name, verdict)
        if name.startswith("index/") and not scene.trusted.keys.encrypted:
            # All unencrypted repositories have one index key; but the packs it lists are not there.
            assert verdict.noticed
        elif not name.startswith("keys/"):
            assert verdict.names(name), (name, verdict)


def test_encryption_cannot_be_turned_off(tmp_path: Path) -> None:
    ours = make_scene(tmp_path / "ours", encrypted=True)
    forged = make_scene(tmp_path / "forged", encrypted=False)
    verdict = judge(ours, {**ours.objects, "config": forged.objects["config"]})
    assert verdict.lost.keys() == ours.contents.keys()
    for name in ours.names("manifests/"):
        assert verdict.names(name)


def test_the_independent_reader_notices_too(scene: Scene, tmp_path: Path) -> None:
    place = tmp_path / "place"
    for name, content in scene.objects.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    def restore_everything() -> None:
        repository = independent_reader.Repository(place, PASSPHRASE)
        backups = {backup["id"]: backup for backup in repository.backups()}
        for id_, content in scene.contents.items():
            out = tmp_path / "out"
            out.unlink(missing_ok=True)
            repository.restore(backups[id_], out)
            assert out.read_bytes() == content
        repository.verify()

    restore_everything()
    for name, content in scene.objects.items():
        for position in range(len(name) % STRIDE, len(content), STRIDE * 8):
            (place / name).write_bytes(flipped(content, position * 8))
            with pytest.raises(independent_reader.DamagedError):
                restore_everything()
        (place / name).write_bytes(content)
    restore_everything()
