# SPDX-License-Identifier: Apache-2.0
"""What every kind of volume has to do, whatever it is: a kind is an adapter, and a class of tests inherits.

    class TestThin(Conformance):
        @pytest.fixture
        def kind(self, pool): yield ThinKind(pool)

What a kind cannot do it says (``tracked`` None, ``has_snapshots`` False), and then the opposite is tested.
"""

from __future__ import annotations

import json
import os
import random
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import VolumeError
from blocksnap.volumes.base import Snapshot, as_image
from blocksnap.volumes.resolve import resolve_volume
from support.in_process import InProcess
from support.killed import killed
from support.lvm_lab import write_at
from support.thin_lab import read_all

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 128 * KIB
SIZE = 16 * MIB
ROUNDS = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "3"))


class Kind(ABC):
    """One volume of 16 MiB of some kind, and what can happen to it."""

    name: str
    """What is typed."""
    path: Path
    """Where its content is read and written."""
    tracked: str | None = None
    """The method of an incremental, where its changes are tracked."""
    has_snapshots = True
    options: tuple[str, ...] = ()
    """How backups of it are asked for, so that changes are tracked."""
    bases = 0
    """How many snapshots stay on the host between two runs."""
    can_shrink = True
    can_grow = True
    in_place = True
    """Whether a backup can be restored over it."""

    @abstractmethod
    def ours(self) -> list[str]:
        """Return the names of the snapshots of ours that are on the host."""

    def lose(self, name: str) -> None:
        """Remove a snapshot of ours, as an administrator might."""
        raise NotImplementedError

    def break_identity(self) -> str:
        """Do something after which the parent backup tells nothing; return what the reason says."""
        raise NotImplementedError

    def resize(self, size: int) -> None:
        """Make it larger or smaller."""
        raise NotImplementedError

    def disturb(self, chance: random.Random) -> None:
        """Do something particular to the kind; here, write what is there already."""
        offset = chance.randrange(self.size - MIB)
        self.write(offset, self.content()[offset : offset + 70 * KIB])

    def write(self, offset: int, data: bytes) -> None:
        """Write, through to the medium."""
        write_at(str(self.path), offset, data)

    def write_meanwhile(self) -> None:
        """Write while it is read as it lies, which has to be noticed."""
        self.write(MIB, os.urandom(KIB))

    def content(self) -> bytes:
        """All of it."""
        with open(self.path, "rb") as file:
            return file.read()

    def read(self, snapshot: Snapshot) -> bytes:
        """Return what a snapshot holds."""
        image = as_image(snapshot)
        content = read_all(image)
        assert image.size == len(content)
        return content

    def restored(self, blocksnap: InProcess) -> bytes:
        """Return what the latest backup restores."""
        return blocksnap.done("restore", "latest", "-", "-q")

    def restored_to(self, blocksnap: InProcess, place: Path) -> bytes:
        """Restore the latest backup to a new place, and return what is there."""
        blocksnap.done("restore", "latest", place, "--verify")
        return place.read_bytes()

    @property
    def size(self) -> int:
        """Its size now."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)


def require_restored(kind: Kind, blocksnap: InProcess) -> None:
    """The latest backup is what is on the volume."""
    assert kind.restored(blocksnap) == kind.content()


def require_clean(kind: Kind, blocksnap: InProcess) -> None:
    """Nothing but bases is left on the host."""
    assert len(kind.ours()) == kind.bases
    assert os.listdir(blocksnap.folder / "state" / "journal") == []


class Conformance:
    """The suite: a subclass has a fixture ``kind``, with some data in the first half of the volume."""

    def test_a_snapshot_is_of_one_instant(self, kind: Kind, state: Path) -> None:
        before = kind.content()
        with SnapshotSession([resolve_volume(kind.name)], "run1", state) as session:
            (snapshot,) = session.snapshots
            assert len(kind.ours()) == (1 if kind.has_snapshots else 0)
            if kind.has_snapshots:
                kind.write(3 * MIB, os.urandom(CHUNK))
            assert kind.read(snapshot) == before
            snapshot.check()
        assert session.warnings == []
        assert kind.ours() == []
        assert os.listdir(state / "journal") == []

    def test_full_then_only_what_changed(self, kind: Kind, blocksnap: InProcess) -> None:
        told = blocksnap.backup(kind.name, *kind.options)
        assert (told["kind"], told["method"] in ("compare", "thin-time")) == ("full", True)
        require_restored(kind, blocksnap)
        require_clean(kind, blocksnap)
        kind.write(2 * MIB + 5, os.urandom(3 * KIB))
        told = blocksnap.backup(kind.name, *kind.options)
        assert (told["kind"], told["method"]) == ("incremental", kind.tracked or "compare"), told["reason"]
        assert told["new_bytes"] == told["changed_bytes"] == CHUNK
        if kind.tracked:
            assert told["read_bytes"] <= 2 * CHUNK
        require_restored(kind, blocksnap)
        require_clean(kind, blocksnap)
        told = blocksnap.backup(kind.name, *kind.options)
        assert (told["changed_bytes"], told["new_bytes"]) == (0, 0)
        if kind.tracked:
            assert (told["method"], told["read_bytes"]) == (kind.tracked, 0)
        require_restored(kind, blocksnap)

    def test_a_parent_that_tells_nothing_means_a_full_compare(self, kind: Kind, blocksnap: InProcess) -> None:
        if not kind.tracked:
            return
        blocksnap.backup(kind.name, *kind.options)
        kind.write(5 * MIB, os.urandom(KIB))
        reason = kind.break_identity()
        told = blocksnap.backup(kind.name, *kind.options)
        assert (told["kind"], told["method"]) == ("incremental", "compare")
        assert reason in told["reason"]
        require_restored(kind, blocksnap)
        require_clean(kind, blocksnap)
        kind.write(6 * MIB, os.urandom(KIB))
        assert blocksnap.backup(kind.name, *kind.options)["method"] == kind.tracked
        require_restored(kind, blocksnap)

    def test_a_base_that_is_lost_is_done_without(self, kind: Kind, blocksnap: InProcess) -> None:
        if not kind.bases:
            return
        blocksnap.backup(kind.name, *kind.options)
        kind.lose(kind.ours()[0])
        kind.write(5 * MIB, os.urandom(KIB))
        told = blocksnap.backup(kind.name, *kind.options)
        assert told["method"] != kind.tracked
        assert "not" in told["reason"] or "gone" in told["reason"]
        require_restored(kind, blocksnap)
        require_clean(kind, blocksnap)

    def test_a_snapshot_that_is_lost_is_never_committed(self, kind: Kind, state: Path) -> None:
        if not kind.has_snapshots:
            return
        with SnapshotSession([resolve_volume(kind.name)], "run1", state) as session:
            kind.lose(kind.ours()[0])
            with pytest.raises(VolumeError, match="cannot be trusted any more"):
                session.snapshots[0].check()
        assert session.warnings == []
        assert kind.ours() == []

    def test_a_volume_that_is_written_to_while_it_is_read(self, kind: Kind, state: Path) -> None:
        if kind.has_snapshots:
            return
        with pytest.raises((VolumeError, OSError)):
            self._write_meanwhile(kind, state)
        assert os.listdir(state / "journal") == []

    def _write_meanwhile(self, kind: Kind, state: Path) -> None:
        with SnapshotSession([resolve_volume(kind.name)], "run1", state) as session:
            kind.write_meanwhile()
            session.snapshots[0].check()

    def test_larger_and_smaller(self, kind: Kind, blocksnap: InProcess) -> None:
        blocksnap.backup(kind.name, *kind.options)
        for size, possible in ((SIZE + 4 * MIB, kind.can_grow), (SIZE - 4 * MIB, kind.can_shrink)):
            if not possible:
                continue
            kind.resize(size)
            kind.write(kind.size - 64 * KIB, os.urandom(64 * KIB))
            told = blocksnap.backup(kind.name, *kind.options)
            assert (told["kind"], told["volume_bytes"]) == ("incremental", kind.size)
            require_restored(kind, blocksnap)
            require_clean(kind, blocksnap)

    def test_restored_to_a_new_place_and_in_place(
        self, kind: Kind, blocksnap: InProcess, tmp_path: Path
    ) -> None:
        blocksnap.backup(kind.name, *kind.options)
        wanted = kind.content()
        assert kind.restored_to(blocksnap, tmp_path / "restored") == wanted
        if not kind.in_place:
            return
        kind.write(MIB, os.urandom(5 * KIB))
        kind.write(9 * MIB, os.urandom(MIB))
        blocksnap.done("restore", "latest", kind.path, "--in-place")
        assert kind.content() == wanted
        told = blocksnap.backup(kind.name, *kind.options)
        assert told["changed_bytes"] == 0
        require_restored(kind, blocksnap)

    @pytest.mark.timeout(1800)
    def test_killed_at_every_step(self, kind: Kind, blocksnap: InProcess) -> None:
        """Nothing of a dead run stays, and the next incremental is the volume itself."""
        blocksnap.backup(kind.name, *kind.options)
        for step in range(40):
            kind.write(step % 16 * CHUNK, os.urandom(KIB))
            if not killed(step, "backup", kind.name, *kind.options, "-q"):
                break
            code, out, err = blocksnap("doctor", "--fix", "--json")
            told = json.loads(out)
            # Other tests have devices on this host too, which doctor tells of and leaves.
            foreign = [each for each in told["findings"] if not each["ours"]]
            assert told["failed"] == [], (step, out, err)
            assert code == 0 or foreign, (step, out, err)
            # A base is kept until the next is committed.
            assert len(kind.ours()) <= kind.bases, step
            assert os.listdir(blocksnap.folder / "state" / "journal") == []
        assert 0 < step < 39
        kind.write(5 * MIB, os.urandom(KIB))
        assert blocksnap.backup(kind.name, *kind.options)["kind"] == "incremental"
        require_restored(kind, blocksnap)
        require_clean(kind, blocksnap)

    @pytest.mark.timeout(3600)
    def test_rounds_of_anything(self, kind: Kind, blocksnap: InProcess) -> None:
        """Whatever happens between two backups: what is restored is what was there, and tracking was used."""
        chance = random.Random(int(os.environ.get("BLOCKSNAP_FIRST_SEED", "1")))
        blocksnap.backup(kind.name, *kind.options)
        for number in range(ROUNDS):
            trusted = kind.tracked
            for _ in range(chance.randint(1, 6)):
                size = kind.size
                length = min(chance.choice([1, 512, 5000, 70000, 300000]), size)
                kind.write(chance.randint(0, size - length), chance.randbytes(length))
            kind.disturb(chance)
            chosen = chance.choice(("nothing", "nothing", "grow", "shrink", "lose"))
            if chosen == "grow" and kind.can_grow and kind.size < 2 * SIZE:
                kind.resize(kind.size + 4 * MIB)
            elif chosen == "shrink" and kind.can_shrink and kind.size > SIZE // 2:
                kind.resize(kind.size - 4 * MIB)
            elif chosen == "lose" and kind.bases:
                kind.lose(kind.ours()[0])
                trusted = None
            told = blocksnap.backup(kind.name, *kind.options)
            if trusted:
                assert told["method"] == trusted, (number, told["reason"])
            require_restored(kind, blocksnap)
            require_clean(kind, blocksnap)
