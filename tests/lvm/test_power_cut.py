"""The power is cut under a repository: whenever that is, everything that was committed is there.

Backups are made, given up and collected on an ext4 file system, and the log tells which writes had reached
the medium at which moment. A medium is then written again as far as each of these moments, mounted, and
looked at, as after a power cut.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from blocksnap.backends.local import LocalBackend
from blocksnap.operations.backup import back_up
from blocksnap.operations.check import CheckOptions, check_repository
from blocksnap.operations.forget import execute_forget, plan_by_name
from blocksnap.operations.prune import prune
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.restore import execute_restore, plan_restore
from blocksnap.operations.storing import BackupOptions
from blocksnap.repository.repository import Repository
from blocksnap.repository.victims import Limits
from blocksnap.volumes.resolve import resolve_volume
from support.log_writes import SECTOR, Entry, log_entries, target
from support.lvm_lab import scratch_disks, tool

MIB = 1 << 20
MEDIUM = 96 * MIB
COW = 32 * MIB
LIMITS = Limits(dead_percent=10)
CHUNK = 16 << 10
VOLUME = 1 * MIB
ROUNDS = 6
EVERY = int(os.environ.get("BLOCKSNAP_SOAK_EVERY", "40"))
"""Each so many flushes one is looked at."""


@dataclass
class Promised:
    """What has been reported done, and not given up: the content of each backup, by its id."""

    contents: dict[str, bytes] = field(default_factory=dict)

    def heed(self, mark: str) -> None:
        """Take what a mark in the log says."""
        word, id_, *content = mark.split(":")
        if word == "done":
            self.contents[id_] = bytes.fromhex(content[0])
        else:
            self.contents.pop(id_, None)


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    tool("mount", "-t", "ext4", device, str(folder))
    try:
        yield folder
    finally:
        tool("umount", str(folder))


def apart(work: Callable[[], None]) -> None:
    """Do it in a process of its own: what it had open and mapped of a file system ends with it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def opened(folder: Path) -> Repository:
    return Repository.open(LocalBackend(str(folder / "repository")), lambda: None)


def write_volume(path: Path, luck: random.Random) -> bytes:
    """Change some chunks, and return the hash of the whole."""
    content = bytearray(path.read_bytes() if path.exists() else random.Random(1).randbytes(VOLUME))
    for number in luck.sample(range(VOLUME // CHUNK), 8):
        content[number * CHUNK : (number + 1) * CHUNK] = luck.randbytes(CHUNK)
    path.write_bytes(content)
    return blake3(content).digest()


def work(folder: Path, beside: Path, mark: Callable[[str], None]) -> None:
    """Back up again and again, give up and collect what is old, and mark in the log what was reported."""
    Repository.create(LocalBackend(str(folder / "repository")), chunk_size=CHUNK, passphrase=None)
    luck = random.Random(3)
    volume = beside / "volume.img"
    ids: list[str] = []
    for number in range(ROUNDS):
        content = write_volume(volume, luck)
        (stored,) = back_up(
            opened(folder), [resolve_volume(str(volume))], str(beside / "state"), BackupOptions(), Quiet()
        )
        ids.append(stored.backup.id)
        mark(f"done:{ids[-1]}:{content.hex()}")
        if number % 3 == 2:
            mark(f"forget:{ids[-2]}")
            repository = opened(folder)
            execute_forget(repository, plan_by_name(repository, [ids[-2]], arriving={}, force=True))
            assert prune(opened(folder), LIMITS, Quiet(), wait_seconds=0).state == "done"


def content_of(repository: Repository, id_: str) -> bytes:
    (stored,) = [each for each in repository.backups() if each.backup.id == id_]
    plan = plan_restore(stored.backup, "-")
    out = io.BytesIO()
    execute_restore(repository, plan, out, Quiet(), verify=False)
    return blake3(out.getvalue()).digest()


def look(folder: Path, promised: Promised, beside: Path, *, thoroughly: bool) -> None:
    """Everything promised is there; and the next run succeeds."""
    repository = opened(folder)
    for id_, content in promised.contents.items():
        assert content_of(repository, id_) == content
    if thoroughly:
        checked = check_repository(opened(folder), str(beside / "checks"), CheckOptions(level=4), Quiet())
        assert not [finding for finding in checked.findings if finding.severity == "damage"], checked.findings
        volume = beside / "after.img"
        content = write_volume(volume, random.Random(len(promised.contents)))
        (stored,) = back_up(
            opened(folder), [resolve_volume(str(volume))], str(beside / "after"), BackupOptions(), Quiet()
        )
        prune(opened(folder), LIMITS, Quiet(), wait_seconds=0)
        repository = opened(folder)
        for id_, expected in {**promised.contents, stored.backup.id: content}.items():
            assert content_of(repository, id_) == expected


def apply(medium: int, entry: Entry) -> None:
    if entry.discards:
        os.pwrite(medium, bytes(entry.length), entry.offset)
    elif entry.data and entry.mark is None:
        os.pwrite(medium, entry.data, entry.offset)


def clear(path: str, offset: int, length: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for at in range(offset, offset + length, MIB):
            os.pwrite(fd, bytes(MIB), at)
        os.fsync(fd)
    finally:
        os.close(fd)


def moments(log: str, medium: str) -> Iterator[Promised]:
    """Write the medium as far as each moment that is looked at; what was promised by then is yielded."""
    promised = Promised()
    flushes = 0
    begun = False
    fd = os.open(medium, os.O_RDWR | os.O_CLOEXEC)
    try:
        for entry in log_entries(log):
            if entry.mark is not None:
                begun = True
                # Others are the kernel's.
                if ":" in entry.mark:
                    promised.heed(entry.mark)
                continue
            apply(fd, entry)
            if begun and entry.settles:
                flushes += 1
                if flushes % EVERY == 0:
                    os.fsync(fd)
                    yield promised
    finally:
        os.close(fd)
    print(f"{flushes} flushes")
    assert len(promised.contents) == ROUNDS - 2


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("_lab")
def test_no_committed_backup_is_lost(tmp_path: Path) -> None:
    first, second = scratch_disks()[:2]
    with (
        target("log", 1024 * MIB, f"linear {second} 0") as log,
        target("medium", MEDIUM, f"linear {second} {1024 * MIB // SECTOR}") as medium,
        target("overlay", COW, f"linear {second} {1280 * MIB // SECTOR}") as overlay,
    ):
        clear(first, 0, MEDIUM)
        with target("logged", MEDIUM, f"log-writes {first} {log}") as logged:
            tool("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", logged)
            with mounted(logged, tmp_path / "mounted") as folder:
                mark = partial(tool, "dmsetup", "message", logged, "0", "mark")
                mark("begin")
                apart(partial(work, folder, tmp_path, mark))
        clear(medium, 0, MEDIUM)
        looked = 0
        with closing(moments(log, medium)) as cuts:
            for promised in cuts:
                clear(overlay, 0, MIB)
                with (
                    target("cut", MEDIUM, f"snapshot {medium} {overlay} N 8") as cut,
                    mounted(cut, tmp_path / "cut") as folder,
                ):
                    if promised.contents:
                        apart(partial(look, folder, promised, tmp_path, thoroughly=looked % 4 == 0))
                        looked += 1
        print(f"{looked} of them looked at")
        assert looked > 2
