"""The programs that are compared: for each, the commands an administrator would type.

A tool says what it runs and where; it starts nothing itself, except to ask a program for its version. All
tools get the same bare environment, with their caches and temporary files on the filesystem of their
repository, so that nobody's own configuration and no tmpfs takes part.
"""

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from measure import BenchError, Command, CommandFailedError, run
from reference_work import VOLUME_NAME

Operation = Literal["full", "incremental", "restore"]
OPERATIONS: tuple[Operation, ...] = ("full", "incremental", "restore")
# It protects nothing: the repositories hold copies of this machine's public files and are removed at once.
PASSPHRASE = "reference work"


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of one tool in one round. `source` holds the volume and is the same for all tools."""

    root: Path
    source: Path

    @property
    def repository(self) -> Path:
        return self.root / "repository"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def restored(self) -> Path:
        return self.root / "restored"

    @property
    def volume(self) -> Path:
        return self.source / VOLUME_NAME

    @property
    def restored_volume(self) -> Path:
        return self.restored / VOLUME_NAME

    def create(self) -> None:
        """Make the directories; the repository itself is the tool's to make."""
        for directory in (self.state, self.restored):
            directory.mkdir(parents=True)

    def remove(self) -> None:
        """Remove everything the tool has left here."""
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Step:
    """One measured command: which day's image stands under the volume's path, and what it will read."""

    operation: Operation
    day: int
    command: Command
    reads: Path


class Tool(ABC):
    """A backup program with a full backup, an incremental one and a restore to a file."""

    name: ClassVar[str]
    version_words: ClassVar[tuple[str, ...]] = ("--version",)
    settings: ClassVar[str]
    """How it is run, for the report."""
    durability: ClassVar[str]
    """What it flushes before it ends, as seen with strace."""
    is_peer: ClassVar[bool] = True

    def __init__(self, program: str | None = None) -> None:
        self.program = program or self.default_program()

    def default_program(self) -> str:
        return self.name

    def version(self) -> str | None:
        """Return the first line the program prints about its version, or None if there is no such program."""
        if shutil.which(self.program) is None:
            return None
        try:
            lines = run(self.program, *self.version_words).strip().splitlines()
        except CommandFailedError:
            # There but not working yet: the same as not there, for a comparison.
            return None
        return lines[0] if lines else "unknown"

    def environment(self, place: Place) -> dict[str, str]:
        """Return the complete environment of every command of this tool."""
        state = str(place.state)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": state,
            "TMPDIR": state,
            "XDG_CACHE_HOME": f"{state}/cache",
            "XDG_CONFIG_HOME": f"{state}/config",
            "XDG_STATE_HOME": f"{state}/state",
        }

    def command(self, place: Place, *words: str, cwd: Path) -> Command:
        return Command((self.program, *words), cwd, self.environment(place))

    def steps(self, place: Place) -> tuple[Step, ...]:
        """Return what is measured, in order."""
        return (
            Step("full", 1, self.backup(place, day=1), reads=place.source),
            Step("incremental", 2, self.backup(place, day=2), reads=place.source),
            Step("restore", 2, self.restore(place), reads=place.repository),
        )

    def details(self, stdout: Path) -> dict[str, object]:
        """Return what the tool itself reports about a finished backup, for the raw results."""
        del stdout
        return {}

    @abstractmethod
    def create(self, place: Place) -> Command | None:
        """Return the command that makes the repository (not measured), or None if there is none."""

    @abstractmethod
    def backup(self, place: Place, *, day: int) -> Command:
        """Return the command that backs the volume up."""

    @abstractmethod
    def restore(self, place: Place) -> Command:
        """Return the command that makes `place.restored_volume` from the latest backup."""


class Restic(Tool):
    name = "restic"
    version_words = ("version",)
    settings = (
        "repository format 2, compression auto (zstd), content-defined chunks, AES-256-CTR with Poly1305"
    )
    durability = "backup: fsync of every pack; restore: none of the data"

    def __init__(self, program: str | None = None) -> None:
        super().__init__(program)
        self._sparse: tuple[str, ...] | None = None

    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {
            "RESTIC_REPOSITORY": str(place.repository),
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_CACHE_DIR": str(place.state / "restic"),
        }

    def create(self, place: Place) -> Command:
        return self.command(place, "init", "--quiet", "--repository-version", "2", cwd=place.root)

    def backup(self, place: Place, *, day: int) -> Command:
        del day
        return self.command(place, "backup", "--quiet", VOLUME_NAME, cwd=place.source)

    def restore(self, place: Place) -> Command:
        words = ("restore", "--quiet", *self._sparse_option(), "--target", str(place.restored), "latest")
        return self.command(place, *words, cwd=place.root)

    def _sparse_option(self) -> tuple[str, ...]:
        # Came with restic 0.15; asking costs nothing and needs no list of versions.
        if self._sparse is None:
            self._sparse = ("--sparse",) if "--sparse" in run(self.program, "restore", "--help") else ()
        return self._sparse


class Borg(Tool):
    name = "borg"
    settings = "fixed chunks of 128 KiB, zstd level 1, repokey-blake2 (AES-256-CTR with BLAKE2b)"
    durability = "backup: fsync of every segment; restore: none"

    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {
            "BORG_REPO": str(place.repository),
            "BORG_PASSPHRASE": PASSPHRASE,
            "BORG_BASE_DIR": str(place.state / "borg"),
        }

    def create(self, place: Place) -> Command:
        return self.command(place, "init", "--encryption", "repokey-blake2", cwd=place.root)

    def backup(self, place: Place, *, day: int) -> Command:
        words = (
            "create",
            "--compression",
            "zstd,1",
            "--chunker-params",
            "fixed,131072",
            f"::day{day}",
            VOLUME_NAME,
        )
        return self.command(place, *words, cwd=place.source)

    def restore(self, place: Place) -> Command:
        return self.command(place, "extract", "--sparse", "::day2", cwd=place.restored)


class Casync(Tool):
    name = "casync"
    settings = "content-defined chunks of 64 KiB on average, zstd, SHA-512/256, not encrypted"
    durability = "none at all"

    def create(self, place: Place) -> None:
        place.repository.mkdir()

    def backup(self, place: Place, *, day: int) -> Command:
        index = str(place.repository / f"day{day}.caibx")
        words = ("make", self._store(place), "--compression=zstd", "--what=blob-index", index, VOLUME_NAME)
        return self.command(place, *words, cwd=place.source)

    def restore(self, place: Place) -> Command:
        words = (
            "extract",
            self._store(place),
            str(place.repository / "day2.caibx"),
            str(place.restored_volume),
        )
        return self.command(place, *words, cwd=place.root)

    def _store(self, place: Place) -> str:
        return f"--store={place.repository / 'chunks.castr'}"


class Blocksnap(Tool):
    name = "blocksnap"
    settings = "the defaults: chunks of 128 KiB, zstd level 1, encrypted"
    durability = "backup: fsync of every object; restore: fsync of the target"
    is_peer = False

    def default_program(self) -> str:
        """Return the command installed beside this Python, that is, in the same virtual environment."""
        return str(Path(sys.executable).parent / "blocksnap")

    def environment(self, place: Place) -> dict[str, str]:
        return super().environment(place) | {
            "BLOCKSNAP_PASSPHRASE": PASSPHRASE,
            "BLOCKSNAP_CACHE": f"{place.state}/cache",
        }

    def create(self, place: Place) -> Command:
        return self.command(place, "init", "--repo", str(place.repository), cwd=place.root)

    def backup(self, place: Place, *, day: int) -> Command:
        del day
        words = ("backup", "--repo", str(place.repository), "--json", str(place.volume))
        return self.command(place, *words, cwd=place.root)

    def restore(self, place: Place) -> Command:
        words = ("restore", "--repo", str(place.repository), "latest", str(place.restored_volume))
        return self.command(place, *words, cwd=place.root)

    def details(self, stdout: Path) -> dict[str, object]:
        for line in reversed(stdout.read_text(encoding="utf-8").splitlines()):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") == "done" and event.get("backups"):
                return {key: value for key, value in event["backups"][0].items() if key != "host"}
        return {}


class Copy(Tool):
    """`cp` of the image: the reference for restores, not a peer."""

    name = "cp"
    settings = "--reflink=never, sparse as the source is"
    durability = "none"
    is_peer = False

    def steps(self, place: Place) -> tuple[Step, ...]:
        return (Step("restore", 2, self.restore(place), reads=place.source),)

    def create(self, place: Place) -> None:
        del place

    def backup(self, place: Place, *, day: int) -> Command:
        raise BenchError(f"cp makes no backups (asked for day {day} in {place.root.name})")

    def restore(self, place: Place) -> Command:
        return self.command(
            place, "--reflink=never", str(place.volume), str(place.restored_volume), cwd=place.root
        )


TOOLS: tuple[type[Tool], ...] = (Blocksnap, Restic, Borg, Casync, Copy)
