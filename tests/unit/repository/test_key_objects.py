"""Adding, changing and removing keys: whatever fails or dies, somebody can still open the repository."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.backends.base import Backend
from blocksnap.backends.errors import BackendFailedError
from blocksnap.backends.local import LocalBackend
from blocksnap.errors import BlocksnapError, DamageError, PassphraseError, StorageError, UsageError
from blocksnap.operations.keys import (
    KeyNotRemovedError,
    LastKeyError,
    NotEncryptedError,
    PassphraseInUseError,
    add_key,
    change_passphrase,
    remove_key,
)
from blocksnap.repository import key_objects
from blocksnap.repository import keys as keys_module
from blocksnap.repository.decoding import seal_public
from blocksnap.repository.documents import Key
from blocksnap.repository.errors import (
    DamagedObjectError,
    MissingRightError,
    NoKeysError,
    NoSuchKeyError,
    NotEnoughMemoryError,
    WrongPassphraseError,
)
from blocksnap.repository.frame import NO_REPOSITORY, FrameType, Sealer
from blocksnap.repository.key_objects import create_key, list_keys
from blocksnap.repository.keys import KdfCost, KeyRing, Role
from blocksnap.repository.repository import Repository
from support.faulty_backend import FAULTS, Fault, FaultyBackend, Killed

CHEAP = KdfCost(memory_kib=64, passes=1, lanes=1)
ADMIN, NEW = b"admin's passphrase", b"a new passphrase"


@pytest.fixture(autouse=True)
def cheap_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a cost at which some hundred guesses take no time, and guess anew each time."""
    monkeypatch.setattr(key_objects, "passphrase_key", keys_module.passphrase_key)
    monkeypatch.setattr(keys_module, "DEFAULT_COST", CHEAP)
    monkeypatch.setattr(key_objects, "MINIMUM_COST", CHEAP)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "r"
    Repository.create(LocalBackend(str(path)), chunk_size=16384, passphrase=ADMIN, host="one")
    return path


def opened(place: Path | Backend, passphrase: bytes = ADMIN, *, key: str = "", host: str = "") -> Repository:
    backend = place if isinstance(place, Backend) else LocalBackend(str(place))
    return Repository.open(backend, lambda: passphrase, key=key, host=host)


def add(place: Path, passphrase: bytes, role: Role = Role.BACKUP, *, host: str = "", label: str = "") -> Key:
    return add_key(opened(place), passphrase, role=role, label=label, host=host)


def opens(place: Path, *passphrases: bytes) -> list[bytes]:
    """Return those of some passphrases that open the repository."""
    found = []
    for passphrase in passphrases:
        try:
            opened(place, passphrase)
        except WrongPassphraseError:
            continue
        found.append(passphrase)
    return found


def key_file(place: Path, key: Key) -> Path:
    return place / "keys" / key.about.id


def rewrite(place: Path, key: Key) -> None:
    """Replace a key object, as whoever holds the storage could."""
    key_file(place, key).write_bytes(seal_public(FrameType.KEY, key))


@pytest.mark.parametrize("role", list(Role))
def test_a_passphrase_opens_in_its_role(place: Path, role: Role) -> None:
    made = add(place, NEW, role, host="two", label="for tests")
    assert (made.about.role, made.about.host, made.about.label) == (role, "two", "for tests")
    repository = opened(place, NEW)
    assert repository.keys.role is role
    assert repository.key is not None
    assert repository.key.about == made.about
    assert opened(place).keys.role is Role.ADMIN
    assert repository.damage == []


def test_the_key_of_init_is_an_admin_s(place: Path) -> None:
    (only,) = list_keys(LocalBackend(str(place)), pytest.fail)
    assert (only.about.role, only.about.host) == (Role.ADMIN, "one")


@pytest.mark.parametrize("role", [Role.RESTORE, Role.BACKUP, Role.GC])
def test_only_admins_add_and_remove(place: Path, role: Role) -> None:
    made = add(place, NEW, role)
    with pytest.raises(MissingRightError):
        add_key(opened(place, NEW), b"third", role=role, label="", host="")
    with pytest.raises(MissingRightError):
        remove_key(opened(place, NEW), made.about.id, force=True)
    assert len(list((place / "keys").iterdir())) == 2


@pytest.mark.parametrize("role", list(Role))
def test_every_role_changes_its_own_passphrase(place: Path, role: Role) -> None:
    old = add(place, b"old", role, host="two", label="x")
    about, removed = change_passphrase(opened(place, b"old"), NEW)
    assert removed == old.about.id != about.id
    assert (about.role, about.host, about.label) == (role, "two", "x")
    assert opened(place, NEW).keys == opened(place, NEW, key=about.id).keys
    assert opens(place, ADMIN, b"old", NEW) == [ADMIN, NEW]


def test_a_passphrase_has_one_key(place: Path) -> None:
    add(place, NEW)
    for taken in (ADMIN, NEW):
        with pytest.raises(PassphraseInUseError):
            add(place, taken, Role.RESTORE)
    for passphrase in (ADMIN, NEW):
        for taken in (ADMIN, NEW):
            with pytest.raises(PassphraseInUseError):
                change_passphrase(opened(place, passphrase), taken)
    assert len(list((place / "keys").iterdir())) == 2


def test_two_keys_with_one_passphrase(place: Path) -> None:
    """Two who added at the same time may have made them; the host's own comes first, --key chooses."""
    admin = opened(place)
    assert admin.key is not None
    made = [
        create_key(admin.backend, admin.keys, role, NEW, config=admin.key.about.config, host=host)
        for role, host in ((Role.GC, "two"), (Role.RESTORE, "three"))
    ]
    assert opened(place, NEW, host="two").keys.role is Role.GC
    assert opened(place, NEW, host="three").keys.role is Role.RESTORE
    assert opened(place, NEW).key is not None
    for key in made:
        repository = opened(place, NEW, key=key.about.id[:6])
        assert repository.keys.role is key.about.role


def test_keys_are_tried_in_an_order_and_only_as_long_as_needed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        add(place, b"%d" % number, host=f"host {number}")
    tries: list[bytes] = []
    inner = keys_module.passphrase_key

    def counted(passphrase: bytes, *, salt: bytes, cost: KdfCost) -> bytes:
        tries.append(salt)
        return inner(passphrase, salt=salt, cost=cost)

    monkeypatch.setattr(key_objects, "passphrase_key", counted)

    def cost_of(call: Callable[[], object]) -> int:
        tries.clear()
        call()
        return len(tries)

    third = list_keys(LocalBackend(str(place)), pytest.fail)[3].about
    assert cost_of(lambda: opened(place, b"2", host="host 2")) == 1
    assert cost_of(lambda: opened(place, b"2", key=third.id)) == 1
    assert cost_of(lambda: opened(place, b"2", host="elsewhere")) == 4
    with pytest.raises(WrongPassphraseError):
        opened(place, b"wrong", key=third.id)
    assert len(tries) == 5


def test_wrong_passphrases_and_names(place: Path) -> None:
    made = add(place, NEW)
    with pytest.raises(WrongPassphraseError):
        opened(place, b"wrong")
    with pytest.raises(WrongPassphraseError, match=made.about.id[:8]):
        opened(place, ADMIN, key=made.about.id)
    for name in ("0" * 33, "xyz", "../config"):
        with pytest.raises(NoSuchKeyError):
            opened(place, ADMIN, key=name)
        with pytest.raises(NoSuchKeyError):
            remove_key(opened(place), name, force=True)
    with pytest.raises(NoSuchKeyError, match="names 2 keys"):
        remove_key(opened(place), "", force=True)


def test_the_last_admin_goes_only_by_force(place: Path) -> None:
    repository = opened(place)
    assert repository.key is not None
    first = repository.key.about.id
    with pytest.raises(LastKeyError, match="last key"):
        remove_key(repository, first, force=False)
    backup = add(place, NEW)
    with pytest.raises(LastKeyError, match="last admin key"):
        remove_key(repository, first[:8], force=False)
    assert remove_key(repository, backup.about.id, force=False) == backup.about.id
    add(place, b"other admin", Role.ADMIN)
    assert remove_key(repository, first, force=False) == first
    assert opens(place, ADMIN, NEW, b"other admin") == [b"other admin"]
    last = opened(place, b"other admin")
    assert last.key is not None
    remove_key(last, last.key.about.id, force=True)
    with pytest.raises(NoKeysError):
        opened(place, b"other admin")


def test_two_admins_who_remove_each_other(place: Path) -> None:
    """Each sees the other's key, then both delete, then both look again: one is put back."""
    other = add(place, NEW, Role.ADMIN)
    first = opened(place)
    assert first.key is not None
    mine = first.key.about.id

    class Interleaved(FaultyBackend):
        def delete(self, name: str) -> None:
            super().delete(name)
            (place / "keys" / mine).rename(place / "stolen")

    with pytest.raises(LastKeyError):
        remove_key(opened(Interleaved(LocalBackend(str(place)))), other.about.id, force=False)
    assert opens(place, ADMIN, NEW) == [NEW]
    assert opened(place, NEW).key is not None


def test_an_append_only_storage_keeps_its_keys(place: Path) -> None:
    """Adding needs nothing but put-if-absent; what needs to delete says so and leaves what works."""
    made = add(place, b"second", Role.ADMIN)
    backend = FaultyBackend(LocalBackend(str(place)), append_only=True)
    add_key(opened(backend), b"third", role=Role.BACKUP, label="", host="")
    with pytest.raises(KeyNotRemovedError, match="could not be removed and still opens") as caught:
        remove_key(opened(backend), made.about.id, force=False)
    assert "append-only" in str(caught.value.details)
    with pytest.raises(KeyNotRemovedError, match="the new passphrase works, but key") as caught:
        change_passphrase(opened(backend, b"second"), NEW)
    assert made.about.id[:8] in str(caught.value.resolution)
    assert opens(place, ADMIN, b"second", b"third", NEW) == [ADMIN, b"second", b"third", NEW]
    # Where it may be deleted from, the change is finished.
    change_passphrase(opened(place, b"second"), NEW)
    assert opens(place, b"second", NEW) == [NEW]


def test_a_damaged_key_is_passed_over_with_a_warning(place: Path) -> None:
    made = add(place, NEW)
    path = key_file(place, made)
    original = path.read_bytes()
    for content in (
        original[:-1],
        original[:10],
        b"",
        original + b"x",
        original[:200] + b"\0" + original[201:],
        Sealer(KeyRing.plain(NO_REPOSITORY)).seal(FrameType.KEY, b"[" * 100_000),
    ):
        path.write_bytes(content)
        repository = opened(place)
        assert [type(err) for err in repository.damage] == [DamagedObjectError]
        assert made.about.id in str(repository.damage[0])
        with pytest.raises(WrongPassphraseError) as caught:
            opened(place, NEW)
        assert "1 damaged" in str(caught.value.details)
    remove_key(opened(place), made.about.id, force=False)
    assert opened(place).damage == []


def test_where_all_keys_are_damaged_it_is_damage(place: Path) -> None:
    (path,) = (place / "keys").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamageError):
        opened(place)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_kib", 63),
        ("memory_kib", (4 << 20) + 1),
        ("passes", 0),
        ("passes", 65),
        ("lanes", 0),
        ("lanes", 65),
        ("memory_kib", 1 << 62),
        ("passes", -1),
    ],
)
def test_a_cost_that_is_too_cheap_or_too_dear_is_never_paid(
    place: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: int
) -> None:
    made = add(place, NEW)
    rewrite(place, made.model_copy(update={"kdf": made.kdf.model_copy(update={field: value})}))
    assert f"its {field} is out of bounds" in str(opened(place).damage[0])

    def never(*_: object, **__: object) -> bytes:
        pytest.fail("argon2id was run")

    monkeypatch.setattr(key_objects, "passphrase_key", never)
    with pytest.raises(DamageError, match="out of bounds"):
        opened(place, NEW, key=made.about.id)


def test_the_bounds_are_the_real_ones(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost below what OWASP asks for at least is refused when the test does not allow it."""
    monkeypatch.setattr(key_objects, "MINIMUM_COST", keys_module.MINIMUM_COST)
    with pytest.raises(DamageError, match="memory_kib is out of bounds"):
        opened(place)


def test_a_key_of_another_repository_opens_nothing(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    Repository.create(LocalBackend(str(other)), chunk_size=16384, passphrase=NEW)
    (path,) = (other / "keys").iterdir()
    shutil.copy(path, place / "keys")
    assert opened(place).damage == []
    with pytest.raises(WrongPassphraseError):
        opened(place, NEW)
    with pytest.raises(DamagedObjectError, match="another repository"):
        opened(place, NEW, key=path.name)
    repository = opened(place)
    assert repository.key is not None
    # It counts as no admin's, and can be removed; its passphrase is free.
    with pytest.raises(LastKeyError, match="last key"):
        remove_key(repository, repository.key.about.id, force=False)
    add(place, NEW)
    remove_key(repository, path.name, force=False)
    (place / "keys" / repository.key.about.id).unlink()
    shutil.copy(path, place / "keys")
    for key in list_keys(repository.backend, pytest.fail):
        if key.about.role is Role.BACKUP:
            key_file(place, key).unlink()
    with pytest.raises(DamagedObjectError, match="another repository"):
        opened(place, NEW)


def test_what_an_interrupted_init_left_is_no_trouble(place: Path) -> None:
    (place / "config").unlink()
    Repository.create(LocalBackend(str(place)), chunk_size=16384, passphrase=ADMIN)
    repository = opened(place)
    assert repository.damage == []
    assert len(list_keys(repository.backend, pytest.fail)) == 2


def test_the_storage_cannot_relabel_or_rename_a_key(place: Path) -> None:
    made = add(place, NEW, Role.BACKUP, label="web")
    for change in ({"role": Role.ADMIN}, {"label": "db"}, {"host": "evil"}):
        rewrite(place, made.model_copy(update={"about": made.about.model_copy(update=change)}))
        with pytest.raises(DamagedObjectError, match="in the clear"):
            opened(place, NEW)
    rewrite(place, made)
    key_file(place, made).rename(place / "keys" / ("0" * 32))
    assert "another key's object" in str(opened(place).damage[0])


def test_parts_of_two_keys_do_not_mix(place: Path) -> None:
    one, two = add(place, NEW), add(place, b"two", Role.RESTORE)
    for kdf, wrapped in itertools.product((one, two), (one, two)):
        if kdf is not wrapped:
            rewrite(place, one.model_copy(update={"kdf": kdf.kdf, "wrapped": wrapped.wrapped}))
            with pytest.raises(WrongPassphraseError):
                opened(place, NEW)
    rewrite(place, one.model_copy(update={"kdf": two.kdf, "wrapped": two.wrapped}))
    with pytest.raises(DamagedObjectError, match="in the clear"):
        opened(place, b"two", key=one.about.id)


def test_a_replaced_config_is_noticed_by_every_key(place: Path) -> None:
    add(place, NEW)
    repository = opened(place)
    smaller = repository.config.model_copy(update={"chunk_size": 1 << 20})
    (place / "config").write_bytes(seal_public(FrameType.CONFIG, smaller))
    for passphrase in (ADMIN, NEW):
        with pytest.raises(DamagedObjectError, match="config was replaced"):
            opened(place, passphrase)


def test_without_encryption_there_are_no_keys(tmp_path: Path) -> None:
    backend = LocalBackend(str(tmp_path / "r"))
    repository = Repository.create(backend, chunk_size=16384, passphrase=None)
    with pytest.raises(NotEncryptedError):
        add_key(repository, NEW, role=Role.BACKUP, label="", host="")
    with pytest.raises(NotEncryptedError):
        change_passphrase(repository, NEW)
    with pytest.raises(NotEncryptedError):
        remove_key(repository, "abc", force=True)
    assert not (tmp_path / "r" / "keys").exists()


def test_too_little_memory_is_an_error_of_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives.kdf import argon2

    class Exhausted:
        def __init__(self, **_: object) -> None:
            """Take what Argon2id takes."""

        def derive(self, _: bytes) -> bytes:
            raise MemoryError

    monkeypatch.setattr(argon2, "Argon2id", Exhausted)
    with pytest.raises(BlocksnapError, match="MiB of memory"):
        opened(place)


def test_a_key_that_takes_too_much_memory_does_not_stand_in_the_way(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = add(place, NEW)
    dear = made.kdf.model_copy(update={"memory_kib": 128})
    about = made.about.model_copy(update={"host": "two"})
    rewrite(place, made.model_copy(update={"kdf": dear, "about": about}))
    derive = key_objects.passphrase_key

    def little_memory(passphrase: bytes, *, salt: bytes, cost: KdfCost) -> bytes:
        if cost.memory_kib == dear.memory_kib:
            raise NotEnoughMemoryError(cost.memory_kib << 10)
        return derive(passphrase, salt=salt, cost=cost)

    monkeypatch.setattr(key_objects, "passphrase_key", little_memory)
    assert [type(err) for err in opened(place, host="two").damage] == [NotEnoughMemoryError]
    with pytest.raises(NotEnoughMemoryError):
        opened(place, NEW)


def test_the_passphrase_is_in_no_exception(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what is raised nor in what it was raised from, whatever fails inside."""
    secret = b"unguessable-6f1c"
    add(place, secret, Role.RESTORE)

    def everything_of(err: BaseException | None) -> str:
        if err is None:
            return ""
        own = repr(err) + str(err) + repr(vars(err)) + repr(err.args)
        return own + everything_of(err.__cause__) + everything_of(err.__context__)

    calls: list[Callable[[], object]] = [
        lambda: add(place, secret),
        lambda: opened(place, secret + b"x"),
        lambda: opened(place, secret, key="nope"),
        lambda: change_passphrase(opened(place, secret), ADMIN),
        lambda: add_key(opened(place, secret), b"x", role=Role.GC, label="", host=""),
        lambda: remove_key(opened(place, secret), "x", force=False),
    ]
    for call in calls:
        with pytest.raises(BlocksnapError) as caught:
            call()
        assert "unguessable" not in everything_of(caught.value)
    for name in ("unwrap", "wrap", "passphrase_key", "encode"):
        with monkeypatch.context() as patch:

            def broken(*arguments: object, **named: object) -> bytes:
                raise BackendFailedError("do it", "somewhere", OSError(5, "inside"))

            patch.setattr(key_objects, name, broken)
            with pytest.raises(StorageError) as failed:
                add(place, b"another" + secret)
            assert "unguessable" not in everything_of(failed.value)
    # Key material that does not make sense is not quoted either.
    admin = opened(place)
    assert admin.key is not None
    with monkeypatch.context() as patch:
        patch.setattr(key_objects, "encode", lambda document: b'{"about": "%s", "x' % secret)
        create_key(admin.backend, admin.keys, Role.GC, NEW, config=admin.key.about.config)
    with pytest.raises(DamagedObjectError, match="makes no sense") as damaged:
        opened(place, NEW)
    assert "unguessable" not in everything_of(damaged.value)


def change(backend: Backend) -> object:
    return change_passphrase(opened(backend), NEW)


def add_backup(backend: Backend) -> object:
    return add_key(opened(backend), NEW, role=Role.BACKUP, label="", host="")


def add_admin_and_remove(backend: Backend) -> object:
    repository = opened(backend)
    assert repository.key is not None
    add_key(repository, NEW, role=Role.ADMIN, label="", host="")
    return remove_key(repository, repository.key.about.id, force=False)


@pytest.mark.parametrize("work", [change, add_backup, add_admin_and_remove])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_call_fails_or_is_the_last_an_admin_can_open_it(
    place: Path, tmp_path: Path, work: Callable[[Backend], object], fault: Fault
) -> None:
    """Every call of the backend in turn; afterwards the same work, done again, comes to its end."""
    whole = FaultyBackend(LocalBackend(str(shutil.copytree(place, tmp_path / "whole"))))
    work(whole)
    assert any(call.startswith("publish keys/") for call in whole.calls)
    assert work is add_backup or any(call.startswith("delete keys/") for call in whole.calls)
    for number in range(len(whole.calls)):
        copy = shutil.copytree(place, tmp_path / f"copy-{number}")
        with pytest.raises((StorageError, Killed)):
            work(FaultyBackend(LocalBackend(str(copy)), fault=fault, at=number))
        found = opens(copy, ADMIN, NEW)
        admins = [passphrase for passphrase in found if opened(copy, passphrase).keys.role is Role.ADMIN]
        assert admins, (number, whole.calls[number])
        for passphrase in found:
            assert opened(copy, passphrase).damage == []
        _finish(copy, work, found)


def _finish(copy: Path, work: Callable[[Backend], object], found: list[bytes]) -> None:
    backend = LocalBackend(str(copy))
    if work is change:
        if ADMIN in found:
            change(backend)
        assert opens(copy, ADMIN, NEW) == [NEW]
        assert len(list((copy / "keys").iterdir())) == 1
    elif NEW not in found:
        work(backend)
    elif work is add_backup:
        with pytest.raises(PassphraseInUseError):
            work(backend)
        assert found == [ADMIN, NEW]


def test_errors_are_of_the_documented_families() -> None:
    assert issubclass(PassphraseInUseError, UsageError)
    assert issubclass(LastKeyError, UsageError)
    assert issubclass(KeyNotRemovedError, StorageError)
    assert {PassphraseError.exit_code, MissingRightError.exit_code, NoKeysError.exit_code} == {12}
