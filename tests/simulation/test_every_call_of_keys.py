"""Each call of adding, removing and changing a key fails, is the last one, or waits while others come and go.

Whatever it is, some passphrase opens the repository as an admin afterwards, a passphrase that was reported to
work does, one that was reported to be gone does not, no backup is touched, and the same command, given again,
succeeds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3
from simulated_story import Clock, Outside, small_world
from trap import Trap

from blocksnap.backends.errors import ObjectMissingError
from blocksnap.errors import BlocksnapError, PassphraseError, StorageError
from blocksnap.operations import keys as keys_module
from blocksnap.operations.keys import (
    KeyNotRemovedError,
    PassphraseInUseError,
    add_key,
    change_passphrase,
    remove_key,
)
from blocksnap.repository import key_objects
from blocksnap.repository.errors import NoSuchKeyError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.key_objects import list_keys
from blocksnap.repository.keys import KdfCost, Role
from blocksnap.repository.repository import Repository
from blocksnap.repository.writer import Author, RepositoryWriter
from support.simulated_world import Died, SimulatedBackend

WAYS = ("fails", "dies before", "dies after", "waits")
ADMIN, SECOND, HOST, NEW = b"first", b"second", b"host", b"new"


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_world(monkeypatch, tmp_path)

    def cheap(passphrase: bytes, *, salt: bytes, cost: KdfCost) -> bytes:
        """Stands for argon2id, whose cost is its purpose: it is tried on every key at every opening."""
        assert cost.passes
        return blake3(salt + passphrase).digest()

    monkeypatch.setattr(key_objects, "passphrase_key", cheap)
    monkeypatch.setattr(key_objects, "datetime", Clock)


class Play:
    """An encrypted repository with two admins, a host, and a chunk that has to stay readable."""

    def __init__(self) -> None:
        self.trap = Clock.world = Trap(seconds=1)
        backend = SimulatedBackend(self.trap)
        repository = Repository.create(backend, chunk_size=16 << 10, passphrase=ADMIN)
        for passphrase, role in ((SECOND, Role.ADMIN), (HOST, Role.BACKUP)):
            add_key(repository, passphrase, role=role, label="", host="")
        with RepositoryWriter(repository, Author("host", "host")) as writer:
            self.chunk = writer.store_blob(FrameType.DATA, b"content")
            writer.flush()
        self._objects = dict(self.trap.objects)

    def begin(self) -> None:
        self.trap.reset()
        self.trap.objects.clear()
        self.trap.objects.update(self._objects)

    def open(self, passphrase: bytes) -> Repository:
        return Repository.open(SimulatedBackend(self.trap), lambda: passphrase)

    def role_of(self, passphrase: bytes) -> Role | None:
        """Return what a passphrase opens, seen from outside."""
        try:
            return Repository.open(Outside(self.trap), lambda: passphrase).keys.role
        except PassphraseError:
            return None

    def id_of(self, passphrase: bytes) -> str:
        key = Repository.open(Outside(self.trap), lambda: passphrase).key
        assert key
        return key.about.id

    def require_content(self, passphrase: bytes) -> None:
        repository = Repository.open(Outside(self.trap), lambda: passphrase)
        assert repository.load(FrameType.DATA, self.chunk) == b"content"

    def others(self) -> None:
        """Another admin adds and removes a key of their own, and a host backs up."""
        with_second = self.open(SECOND)
        key = add_key(with_second, b"short-lived", role=Role.GC, label="", host="")
        remove_key(with_second, key.about.id, force=False)
        # The host's key may have been removed by now.
        with suppress(PassphraseError), RepositoryWriter(self.open(HOST), Author("b", "b")) as writer:
            writer.flush()


@dataclass(frozen=True)
class Act:
    """What is done, what it needs to be asked again, and what has to be true when it was reported done."""

    do: Callable[[Play], None]
    done: Callable[[Play], bool]


def add(play: Play) -> None:
    add_key(play.open(ADMIN), NEW, role=Role.RESTORE, label="", host="")


def remove_host(play: Play) -> None:
    remove_key(play.open(ADMIN), play.id_of(HOST), force=False)


def change(play: Play) -> None:
    change_passphrase(play.open(ADMIN), NEW)


ACTS = {
    "add": Act(add, lambda play: play.role_of(NEW) is Role.RESTORE),
    "remove": Act(remove_host, lambda play: play.role_of(HOST) is None),
    "change": Act(change, lambda play: play.role_of(NEW) is Role.ADMIN and play.role_of(ADMIN) is None),
}


@pytest.mark.timeout(0)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ACTS)
def test_whichever_call_goes_wrong(name: str, way: str) -> None:
    play, act = Play(), ACTS[name]
    number = -1
    while True:
        number += 1
        play.begin()
        play.trap.set(number, way, play.others)
        done = attempt(act, play)
        if not play.trap.sprung:
            assert done
            break
        assert not done or act.done(play)
        require_a_way_in(play)
        again(name, act, play)
        assert act.done(play), number
        require_a_way_in(play)
    assert number > 5


def attempt(act: Act, play: Play) -> bool:
    """Do it with one call going wrong; tell whether it was reported done."""
    try:
        act.do(play)
    except (Died, StorageError):
        return False
    finally:
        play.trap.disarm()
    return True


def again(name: str, act: Act, play: Play) -> None:
    """Give the same command again; that it was done already is an answer too."""
    try:
        act.do(play)
    except PassphraseInUseError:
        assert name == "add"
    except PassphraseError:
        # The old passphrase is gone, so the change was complete.
        assert name in ("change", "remove")
    except (NoSuchKeyError, ObjectMissingError):
        assert name == "remove"


def require_a_way_in(play: Play) -> None:
    """An admin can get in, and read what was stored; all that lies under keys/ is whole."""
    ways_in = [passphrase for passphrase in (ADMIN, NEW) if play.role_of(passphrase) is Role.ADMIN]
    assert ways_in
    assert play.role_of(SECOND) is Role.ADMIN
    play.require_content(ways_in[0])
    damage: list[BlocksnapError] = []
    assert list(list_keys(Outside(play.trap), damage.append))
    assert not damage


def test_two_admins_who_remove_each_other_at_any_moment() -> None:
    """Whenever the second comes, an admin key is left."""
    play, number = Play(), -1
    while True:
        number += 1
        play.begin()
        first, second = play.id_of(ADMIN), play.id_of(SECOND)
        results: list[str] = []

        def other(first: str = first, results: list[str] = results) -> None:
            try:
                remove_key(play.open(SECOND), first, force=False)
            except BlocksnapError as err:
                results.append(type(err).__name__)

        play.trap.set(number, "waits", other)
        try:
            remove_key(play.open(ADMIN), second, force=False)
        except (keys_module.LastKeyError, KeyNotRemovedError, NoSuchKeyError, PassphraseError):
            results.append("refused")
        play.trap.disarm()
        if not play.trap.sprung:
            break
        assert {play.role_of(ADMIN), play.role_of(SECOND)} >= {Role.ADMIN}, number
    assert number > 5
