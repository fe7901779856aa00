"""What blocksnap stores, a reader that was written from docs/design.md alone restores byte-identical."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.extents.mapped_set import MappedSet
from blocksnap.operations.mapped import load_mapped, store_mapped
from blocksnap.repository.documents import Document
from support import independent_reader
from support.in_process import PASSPHRASE, InProcess
from support.repositories import make_repository, open_repository, open_writer

KIB, MIB = 1 << 10, 1 << 20
Shape = Callable[[Path, random.Random], None]


@pytest.fixture
def blocksnap(in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    # Durability is proven elsewhere; here it would only take time.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return in_process


def write(path: Path, offset: int, content: bytes, *, size: int | None = None) -> None:
    with open(path, "r+b" if path.exists() else "xb") as file:
        file.seek(offset)
        file.write(content)
        if size is not None:
            file.truncate(size)


def write_noise(path: Path, dice: random.Random) -> None:
    """A short last chunk, repeated content, text that compresses, and noise that does not."""
    noise = dice.randbytes(300 * KIB)
    write(path, 0, noise + b"text that compresses " * 9000 + noise + dice.randbytes(5 * KIB + 7))


def write_holes(path: Path, dice: random.Random) -> None:
    """Three levels at 16 KiB: data here and there, holes, and zeros that are allocated."""
    for offset in (0, 17 * MIB + 5, 65 * MIB):
        write(path, offset, dice.randbytes(40 * KIB))
    write(path, 33 * MIB, bytes(3 * MIB))
    write(path, 70 * MIB, b"\0", size=80 * MIB + 1)


def write_zeros(path: Path, dice: random.Random) -> None:
    write(path, 0, bytes(2 * MIB))


def write_nothing(path: Path, dice: random.Random) -> None:
    path.touch()


def write_byte(path: Path, dice: random.Random) -> None:
    write(path, 0, b"x")


SHAPES: list[Shape] = [write_noise, write_holes, write_zeros, write_nothing, write_byte]


def open_independently(blocksnap: InProcess) -> independent_reader.Repository:
    return independent_reader.Repository(blocksnap.folder / "repository", PASSPHRASE.encode())


def read_all(blocksnap: InProcess) -> dict[str, bytes]:
    """Verify everything, restore every backup, and return what they hold."""
    repository = open_independently(blocksnap)
    repository.verify()
    contents = {}
    for backup in repository.backups():
        out = blocksnap.folder / f"out-{backup['id']}"
        repository.restore(backup, out)
        contents[backup["id"]] = out.read_bytes()
        assert out.stat().st_blocks * 512 <= out.stat().st_size + backup["chunk_size"]
        out.unlink()
    return contents


@pytest.mark.parametrize("encryption", ["encrypted", "plain"])
@pytest.mark.parametrize("chunk_size", ["16K", "128K", "4M"])
def test_every_shape_is_restored(blocksnap: InProcess, chunk_size: str, encryption: str) -> None:
    blocksnap.done(
        "init", "--chunk-size", chunk_size, *(["--no-encryption"] if encryption == "plain" else [])
    )
    expected = {}
    for shape in SHAPES:
        path = blocksnap.folder / shape.__name__
        shape(path, random.Random(shape.__name__))
        expected[blocksnap.backup(str(path))["id"]] = path.read_bytes()
    assert read_all(blocksnap) == expected


def test_what_a_backup_key_stores_a_restore_key_reads(
    blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocksnap.done("init")
    path = blocksnap.folder / "volume"
    write_noise(path, random.Random(3))
    for role in ("backup", "restore", "gc"):
        monkeypatch.setenv("BLOCKSNAP_NEW_PASSPHRASE", role)
        blocksnap.done("key", "add", "--role", role)
    monkeypatch.setenv("BLOCKSNAP_PASSPHRASE", "backup")
    stored = blocksnap.backup(str(path))["id"]
    repository = independent_reader.Repository(blocksnap.folder / "repository", b"restore")
    repository.verify()
    (backup,) = repository.backups()
    assert backup["id"] == stored
    repository.restore(backup, blocksnap.folder / "out")
    assert (blocksnap.folder / "out").read_bytes() == path.read_bytes()
    for role in (b"backup", b"gc"):
        with pytest.raises(independent_reader.DamagedError, match="may not read"):
            independent_reader.Repository(blocksnap.folder / "repository", role)


def test_incrementals_of_a_volume_that_grows_and_shrinks(blocksnap: InProcess) -> None:
    blocksnap.done("init", "--chunk-size", "16K")
    dice, path, expected = random.Random(2), blocksnap.folder / "volume", {}
    write_noise(path, dice)
    for size in (None, 3 * MIB + 3, 70 * MIB, 600 * KIB, 1, 1500 * KIB):
        if size is not None:
            os.truncate(path, size)
            write(path, size // 2, dice.randbytes(99))
        expected[blocksnap.backup(str(path))["id"]] = path.read_bytes()
    backups = open_independently(blocksnap).backups()
    assert [backup["kind"] for backup in backups] == ["full"] + ["incremental"] * 5
    assert [backup["parent"] for backup in backups] == [None, *(backup["id"] for backup in backups[:-1])]
    assert read_all(blocksnap) == expected


def test_a_group(blocksnap: InProcess) -> None:
    blocksnap.done("init", "--chunk-size", "16K")
    paths = [blocksnap.folder / f"volume-{number}" for number in range(3)]
    for number, path in enumerate(paths):
        write_noise(path, random.Random(number))
    blocksnap.done("backup", *paths)
    backups = open_independently(blocksnap).backups()
    names = {backup["id"]: backup["volume"]["name"] for backup in backups}
    assert {names[id_]: content for id_, content in read_all(blocksnap).items()} == {
        str(path): path.read_bytes() for path in paths
    }


def test_many_packs_and_segments(blocksnap: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocksnap.repository.writer.SEGMENT_ROWS", 10)
    monkeypatch.setattr("blocksnap.repository.pack.MIN_TARGET", 100 * KIB)
    blocksnap.done("init", "--chunk-size", "16K")
    path = blocksnap.folder / "volume"
    write_holes(path, random.Random(5))
    write_noise(path, random.Random(6))
    backup = blocksnap.backup(str(path))
    repository = open_independently(blocksnap)
    assert len(repository.names("packs")) > 5
    assert len(repository.names("index")) > 2
    assert read_all(blocksnap) == {backup["id"]: path.read_bytes()}


@pytest.mark.parametrize("length", [1, 4096, 4096 * 65 + 3, 0])
@pytest.mark.parametrize("encrypted", [True, False])
def test_mapped_sets(tmp_path: Path, length: int, *, encrypted: bool) -> None:
    """As a source with a mapped set stores them: some pages empty, some equal, the last one short."""
    repository = make_repository(tmp_path / "r", encrypted=encrypted)
    bitmap = bytearray(length)
    for at in range(0, length, 4096 * 3):
        bitmap[at] = 0x80
    mapped = MappedSet.of(65536, bytes(bitmap))
    with open_writer(repository) as writer:
        stored = store_mapped(repository, writer, mapped, None)
        writer.flush()
    loaded = load_mapped(open_repository(tmp_path / "r"), stored)
    assert loaded
    assert (loaded.unit, loaded.read(0, loaded.length)) == (65536, bytes(bitmap))
    reader = independent_reader.Repository(tmp_path / "r", b"correct horse")
    assert reader.mapped({"mapped": stored.model_dump()}) == mapped.read(0, mapped.length)
    assert reader.mapped({"mapped": None}) is None


def test_by_hand(blocksnap: InProcess) -> None:
    """As an administrator would run it, in a process that could not find blocksnap."""
    blocksnap.done("init", "--chunk-size", "16K")
    path, out = blocksnap.folder / "volume", blocksnap.folder / "out"
    write_noise(path, random.Random(7))
    id_ = blocksnap.backup(str(path))["id"]
    script = independent_reader.__file__

    def run(*words: str | Path) -> str:
        argv = [sys.executable, "-P", script, str(blocksnap.folder / "repository"), *map(str, words)]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd="/")
        return done.stdout

    assert id_ in run()
    run(id_[:8], out)
    assert out.read_bytes() == path.read_bytes()
    assert "frames are sound" in run("verify")


def test_it_imports_nothing_of_blocksnap() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(independent_reader.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"blake3", "cryptography", "zstandard"}


def test_the_design_names_every_field_of_every_document() -> None:
    design = (Path(__file__).parents[3] / "docs" / "design.md").read_text()
    section = design[design.index("### 3.7 ") : design.index("### 3.8 ")]
    for model in Document.__subclasses__():
        for name in model.model_fields:
            assert f"`{name}`" in section, f"{model.__name__}.{name}"


def test_it_refuses_a_wrong_passphrase(blocksnap: InProcess) -> None:
    blocksnap.done("init")
    with pytest.raises(independent_reader.DamagedError, match="opens no key"):
        independent_reader.Repository(blocksnap.folder / "repository", b"wrong")
