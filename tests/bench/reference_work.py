"""Make the reference work: one ext4 image as it is on day one and on day two.

Day one holds real files of this machine, an SQLite database and random data. Day two is the same image after
some scattered row updates and one added file, made through a mounted filesystem as a server would.
Everything that is chosen is chosen by a seed or by sorted order, so the same machine builds the same work
again; what the files contain is the machine's, so numbers compare within one run only.
"""

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG

from measure import BenchError, run

MIB = 1 << 20
GIB = 1 << 30
BLOCK_BYTES = 4096
SEED = 20261121
# Changing what build() does makes an older work directory stale; so count up with every such change.
FORMAT = 1
FILESYSTEM_UUID = "b10c5a9b-0000-4000-8000-000000000001"
HASH_SEED = "b10c5a9b-0000-4000-8000-000000000002"
DATABASE_ROW_BYTES = 900
SPARE_INODES = 2048
VOLUME_NAME = "volume.img"


@dataclass(frozen=True, slots=True)
class WorkSize:
    """How much there is of everything. `content_bytes` is files, database and random data together."""

    image_bytes: int
    content_bytes: int
    database_rows: int
    random_bytes: int
    updated_rows: int
    added_bytes: int

    @classmethod
    def scaled(cls, scale: float) -> "WorkSize":
        """Return the reference work of the design, with everything multiplied by `scale`."""

        def blocks(size_bytes: float) -> int:
            return int(size_bytes * scale) // BLOCK_BYTES * BLOCK_BYTES

        return cls(
            image_bytes=blocks(4 * GIB),
            content_bytes=blocks(3.4 * GIB),
            database_rows=int(300_000 * scale),
            random_bytes=blocks(300 * MIB),
            updated_rows=int(3_000 * scale),
            added_bytes=blocks(20 * MIB),
        )

    @property
    def needed_bytes(self) -> int:
        """Free space for two images, one repository and one restored image, with room to breathe."""
        return self.image_bytes * 4


@dataclass(frozen=True, slots=True)
class ReferenceWork:
    """A built work: `day1` and `day2` are complete images; the numbers say what is in them."""

    size: WorkSize
    day1: Path
    day2: Path
    files: int
    files_bytes: int
    database_bytes: int

    def image(self, day: int) -> Path:
        return self.day2 if day == 2 else self.day1

    @contextmanager
    def presented(self, day: int, source: Path) -> Iterator[Path]:
        """Let the day's image stand under the one path that all tools back up, and put it back afterwards.

        It is moved, not copied or linked: every tool sees a file with one name, and its pages stay cached.
        """
        source.mkdir(parents=True, exist_ok=True)
        volume = source / VOLUME_NAME
        image = self.image(day)
        image.rename(volume)
        try:
            yield volume
        finally:
            volume.rename(image)


def prepare(work: Path, size: WorkSize, sources: tuple[Path, ...]) -> ReferenceWork:
    """Return the work in this directory, building it when it is missing, damaged or of another kind."""
    description = work / "reference.json"
    wanted = {"format": FORMAT, "size": asdict(size), "sources": [str(source) for source in sources]}
    built = _load(work, description, wanted)
    if built is None:
        description.unlink(missing_ok=True)
        built = build(work, size, sources)
        state = {
            "files": built.files,
            "files_bytes": built.files_bytes,
            "database_bytes": built.database_bytes,
            "images": _identities(built),
        }
        description.write_text(json.dumps(wanted | state, indent=2) + "\n", encoding="utf-8")
    return built


def build(work: Path, size: WorkSize, sources: tuple[Path, ...]) -> ReferenceWork:
    """Build both images anew. Needs root, for loop devices and mounts; both are given back in any case."""
    _require_space(work, size)
    day1, day2, mount_point = work / "day1.img", work / "day2.img", work / "mnt"
    for image in (day1, day2):
        image.unlink(missing_ok=True)
    mount_point.mkdir(parents=True, exist_ok=True)
    files_bytes = size.content_bytes - size.random_bytes - size.database_rows * 1024
    if files_bytes <= 0:
        raise BenchError("the database and the random data leave no room for files: raise --scale")
    _make_filesystem(day1, size, inodes=sum(1 for _ in _select(sources, files_bytes)) + SPARE_INODES)
    with _mounted(day1, mount_point):
        files, copied_bytes = _copy_files(sources, mount_point / "files", files_bytes)
        database_bytes = _create_database(mount_point / "mail.sqlite", size.database_rows)
        _write_random(mount_point / "random.bin", size.random_bytes, seed=SEED + 1)
    run("cp", "--reflink=auto", "--sparse=always", str(day1), str(day2))
    with _mounted(day2, mount_point):
        _update_database(mount_point / "mail.sqlite", rows=size.database_rows, updates=size.updated_rows)
        _write_random(mount_point / "added.bin", size.added_bytes, seed=SEED + 3)
    mount_point.rmdir()
    return ReferenceWork(
        size, day1, day2, files=files, files_bytes=copied_bytes, database_bytes=database_bytes
    )


def _load(work: Path, description: Path, wanted: dict[str, object]) -> ReferenceWork | None:
    try:
        state = json.loads(description.read_text(encoding="utf-8"))
        built = ReferenceWork(
            size=WorkSize(**state["size"]),
            day1=work / "day1.img",
            day2=work / "day2.img",
            files=state["files"],
            files_bytes=state["files_bytes"],
            database_bytes=state["database_bytes"],
        )
        same = all(state[key] == value for key, value in wanted.items()) and state["images"] == _identities(
            built
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if same else None


def _identities(work: ReferenceWork) -> list[list[int]]:
    return [[image.stat().st_size, image.stat().st_mtime_ns] for image in (work.day1, work.day2)]


def _require_space(work: Path, size: WorkSize) -> None:
    free = shutil.disk_usage(work).free
    if free < size.needed_bytes:
        raise BenchError(
            f"{free / GIB:.1f} GiB are free for --work, {size.needed_bytes / GIB:.1f} GiB are needed: "
            "choose another directory or a smaller --scale"
        )


def _select(sources: tuple[Path, ...], wanted_bytes: int) -> Iterator[tuple[Path, int]]:
    """Yield regular files and directories in sorted order with the space they take, until there is enough."""
    total = 0
    for source in sources:
        for directory, names, files in os.walk(source):
            names.sort()
            total += BLOCK_BYTES
            yield Path(directory), BLOCK_BYTES
            for name in sorted(files):
                path = Path(directory, name)
                status = path.lstat()
                if not S_ISREG(status.st_mode):
                    continue
                blocks_bytes = -(-status.st_size // BLOCK_BYTES) * BLOCK_BYTES
                if total + blocks_bytes > wanted_bytes:
                    return
                total += blocks_bytes
                yield path, blocks_bytes


def _copy_files(sources: tuple[Path, ...], target: Path, wanted_bytes: int) -> tuple[int, int]:
    """Copy the selection below `target`; return how many files and how many bytes of blocks there are."""
    files, total = 0, 0
    for path, blocks_bytes in _select(sources, wanted_bytes):
        copy = target.joinpath(*path.parts[1:])
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        else:
            shutil.copyfile(path, copy)
            files += 1
        total += blocks_bytes
    if total < wanted_bytes * 0.9:
        raise BenchError(f"only {total / GIB:.2f} GiB of files found: name more directories with --source")
    return files, total


def _make_filesystem(image: Path, size: WorkSize, *, inodes: int) -> None:
    with image.open("wb") as stream:
        stream.truncate(size.image_bytes)
    # Nothing lazy: a kernel thread that goes on initialising would write into the image while it is mounted.
    extended = f"hash_seed={HASH_SEED},lazy_itable_init=0,lazy_journal_init=0"
    run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-m",
        "0",
        "-b",
        str(BLOCK_BYTES),
        "-N",
        str(inodes),
        "-U",
        FILESYSTEM_UUID,
        "-E",
        extended,
        str(image),
    )


@contextmanager
def _mounted(image: Path, mount_point: Path) -> Iterator[None]:
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        run("mount", "-t", "ext4", "-o", "noatime", device, str(mount_point))
        try:
            yield
        finally:
            run("umount", str(mount_point))
    finally:
        run("losetup", "--detach", device)


def _texts(seed: int) -> Iterator[str]:
    """Yield endless row texts of one length: made-up words, so they compress about as prose does."""
    chosen = random.Random(seed)
    words = [
        "".join(chosen.choices("etaoinshrdlucmfwypvbgkjqxz", k=chosen.randint(2, 11))) for _ in range(20_000)
    ]
    pool = " ".join(chosen.choices(words, k=700_000))
    while True:
        begin = chosen.randrange(len(pool) - DATABASE_ROW_BYTES)
        yield pool[begin : begin + DATABASE_ROW_BYTES]


def _create_database(path: Path, rows: int) -> int:
    texts = _texts(SEED)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        # It is built once and thrown away on a crash, so it needs no journal yet.
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute(f"PRAGMA page_size = {BLOCK_BYTES}")
        database.execute(
            "CREATE TABLE mail (id INTEGER PRIMARY KEY, updated INTEGER NOT NULL, body TEXT NOT NULL)"
        )
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO mail VALUES (?, 1, ?)", ((row + 1, next(texts)) for row in range(rows))
        )
        database.execute("COMMIT")
    return path.stat().st_size


def _update_database(path: Path, *, rows: int, updates: int) -> None:
    texts = _texts(SEED + 2)
    chosen = random.Random(SEED + 2).sample(range(1, rows + 1), updates)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("BEGIN")
        database.executemany(
            "UPDATE mail SET updated = 2, body = ? WHERE id = ?", ((next(texts), row) for row in chosen)
        )
        database.execute("COMMIT")


def _write_random(path: Path, size_bytes: int, *, seed: int) -> None:
    source = random.Random(seed)
    with path.open("wb") as stream:
        left = size_bytes
        while left:
            block = min(left, MIB)
            stream.write(source.randbytes(block))
            left -= block
