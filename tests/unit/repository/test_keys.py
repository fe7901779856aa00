"""Roles are made of keys: what a role may not do, it cannot do even where nobody checks."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import traceback
from datetime import UTC, datetime

import pytest
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from blocksnap.errors import DamageError, PassphraseError
from blocksnap.repository.decoding import backup_id, decode_manifest, encode, encode_signed, open_signed
from blocksnap.repository.documents import (
    Backup,
    Fence,
    KeyAbout,
    KeyMaterial,
    Manifest,
    Root,
    Signed,
    Statistics,
    VolumeRecord,
)
from blocksnap.repository.errors import MissingRightError
from blocksnap.repository.frame import HEADER, SENDER_SIZE, FrameType, Opener, Sealer
from blocksnap.repository.keys import HELD, RIGHTS, KeyRing, Right, Role

MASTER = bytes(range(32))
REPOSITORY = b"repository of 16"
WRITER = "ab" * 16
NAME = f"manifests/{WRITER}"
ADMIN = KeyRing.from_master(MASTER, repository_id=REPOSITORY)
RINGS = {role: KeyRing.of_role(role, ADMIN.held_by(role), repository_id=REPOSITORY) for role in Role}
CHUNK = b"what was in the chunk " * 40
WHERE = "x"
SIGNING = ("commit_secret", "commit_public", "collect_secret", "collect_public")
SECRETS = ("master", "id_key", "meta_key", "data_secret", "data_public", *SIGNING)

every_role = pytest.mark.parametrize("role", list(Role))


def opened(ring: KeyRing, frame: bytes) -> bytes:
    return bytes(Opener(ring).open(memoryview(frame), where=WHERE))


def manifest() -> Manifest:
    figures = dict.fromkeys(Statistics.model_fields, 0)
    backup = Backup(
        id=backup_id(bytes.fromhex(WRITER), 0),
        volume=VolumeRecord(name="v", key="v", kind="file"),
        time=datetime.now(UTC),
        kind="full",
        parent=None,
        method="compare",
        reason="test",
        size=0,
        chunk_size=16384,
        map=Root(levels=1, root="hole"),
        source={},
        statistics=Statistics.model_validate(figures),
    )
    return Manifest(
        writer=WRITER, time=datetime.now(UTC), host="h", hostname="h", program="t", backups=(backup,)
    )


@every_role
def test_a_role_holds_its_keys_and_no_others(role: Role) -> None:
    ring = RINGS[role]
    assert ring.held_by(role).keys() == HELD[role]
    assert ring.role is role
    # A public half comes with its secret, never the other way round.
    holds = set(HELD[role]) | {name.replace("secret", "public") for name in HELD[role]}
    if role is not Role.ADMIN:
        assert {name for name in SECRETS if getattr(ring, name) is not None} == holds
    for name in holds:
        assert getattr(ring, name) == getattr(ADMIN, name)


def test_keys_that_are_not_those_of_the_role_are_refused() -> None:
    for role, other in itertools.permutations(Role, 2):
        with pytest.raises(ValueError, match="not the keys of role"):
            KeyRing.of_role(role, ADMIN.held_by(other), repository_id=REPOSITORY)


@every_role
def test_only_an_admin_can_make_keys_for_other_roles(role: Role) -> None:
    for other in Role:
        if role in (Role.ADMIN, other):
            assert RINGS[role].held_by(other) == ADMIN.held_by(other)
        else:
            with pytest.raises(MissingRightError) as caught:
                RINGS[role].held_by(other)
            assert caught.value.exit_code == 12


@every_role
def test_every_role_reads_and_writes_metadata(role: Role) -> None:
    frame = Sealer(RINGS[role]).seal(FrameType.NODE, CHUNK)
    for ring in RINGS.values():
        assert opened(ring, frame) == CHUNK
        assert ring.identify(FrameType.NODE, CHUNK) == ADMIN.identify(FrameType.NODE, CHUNK)


@pytest.mark.parametrize("writer", [Role.ADMIN, Role.BACKUP])
@pytest.mark.parametrize("reader", [Role.ADMIN, Role.RESTORE])
def test_who_may_read_reads_what_who_may_write_wrote(writer: Role, reader: Role) -> None:
    for compress in (True, False):
        frame = Sealer(RINGS[writer]).seal(FrameType.DATA, CHUNK, compress=compress)
        assert opened(RINGS[reader], frame) == CHUNK


@pytest.mark.parametrize("role", [Role.BACKUP, Role.GC])
def test_who_may_not_read_is_told_so(role: Role) -> None:
    sealer = Sealer(RINGS[Role.BACKUP])
    own = sealer.seal(FrameType.DATA, CHUNK)
    with pytest.raises(MissingRightError, match=f"a {role} key, and reading stored data needs role admin"):
        opened(RINGS[role], own)


@pytest.mark.parametrize("role", [Role.BACKUP, Role.GC])
def test_who_may_not_read_cannot_by_going_around_the_checks(role: Role) -> None:
    """Whatever the role holds is tried as every key there is, on a frame that it sealed itself."""
    ring = RINGS[role]
    frame = memoryview(Sealer(RINGS[Role.BACKUP]).seal(FrameType.DATA, CHUNK))
    sender = bytes(frame[HEADER.size : HEADER.size + SENDER_SIZE])
    material = {key for name in SECRETS if (key := getattr(ring, name))} | {
        ring.index_key,
        sender,
        *(key for key in ring._id_keys if key),
        bytes(32),
    }
    for secret, id_key in itertools.product(material, material):
        cheat = dataclasses.replace(
            ADMIN,
            master=None,
            meta_key=ring.meta_key,
            id_key=id_key,
            data_secret=secret,
            data_public=ring.data_public or sender,
        )
        with pytest.raises(DamageError, match="authentication"):
            Opener(cheat).open(frame, where=WHERE)
    # The run key itself, or what the frame's own key is derived from, is not among them either.
    salt, id_ = bytes(frame[48:72]), bytes(frame[16:48])
    for key in material:
        for frame_key in (key, blake3(salt + id_, key=key).digest()):
            with pytest.raises(InvalidTag):
                AESGCM(frame_key).decrypt(
                    bytes(12), frame[HEADER.size + SENDER_SIZE :], REPOSITORY + bytes(frame[: HEADER.size])
                )


def test_gc_can_neither_store_nor_recognise_data() -> None:
    ring = RINGS[Role.GC]
    with pytest.raises(MissingRightError, match="recognising chunks"):
        ring.identify(FrameType.DATA, CHUNK)
    with pytest.raises(MissingRightError, match="backing up"):
        Sealer(ring).seal_into(FrameType.DATA, bytes(32), CHUNK, memoryview(bytearray(10_000)))
    guessed = {blake3(CHUNK, key=key).digest() for key in ring._id_keys if key}
    assert ADMIN.identify(FrameType.DATA, CHUNK) not in guessed


def test_the_document_s_formulas_open_a_data_frame() -> None:
    frame = Sealer(RINGS[Role.BACKUP]).seal(FrameType.DATA, CHUNK, compress=False)

    def derive(purpose: str, key: bytes) -> bytes:
        return blake3(key, derive_key_context=f"blocksnap 2026-11 v1 {purpose}").digest()

    id_key = derive("id key", MASTER)
    secret = X25519PrivateKey.from_private_bytes(derive("data secret", MASTER))
    public = secret.public_key().public_bytes_raw()
    sender, sealed = frame[72:104], frame[104:]
    shared = secret.exchange(X25519PublicKey.from_public_bytes(sender))
    run_key = blake3(shared + sender + public, key=derive("run key", id_key)).digest()
    frame_key = blake3(frame[48:72] + frame[16:48], key=run_key).digest()
    assert AESGCM(frame_key).decrypt(bytes(12), sealed, REPOSITORY + frame[:72]) == CHUNK
    assert frame[16:48] == blake3(CHUNK, key=derive("id of type 1", id_key)).digest()
    assert struct.unpack_from("<I", frame, 8) == (32 + len(CHUNK),)


def test_a_run_key_is_computed_once_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges: list[int] = []
    inner = KeyRing._run_key

    def counted(self: KeyRing, shared: bytes, sender: bytes) -> bytes:
        exchanges.append(1)
        return inner(self, shared, sender)

    monkeypatch.setattr(KeyRing, "_run_key", counted)
    sealer, opener = Sealer(RINGS[Role.BACKUP]), Opener(RINGS[Role.RESTORE])
    frames = [sealer.seal(FrameType.DATA, bytes([n]) * 100) for n in range(50)]
    assert len(exchanges) == 1
    for frame in frames:
        opener.open(memoryview(frame), where=WHERE)
    assert len(exchanges) == 2
    Sealer(ADMIN).seal(FrameType.NODE, CHUNK)
    assert len(exchanges) == 2


def test_senders_are_never_the_same() -> None:
    frames = [Sealer(ADMIN).seal(FrameType.DATA, CHUNK) for _ in range(30)]
    assert len({frame[72:104] for frame in frames}) == 30


@pytest.mark.parametrize("sender", [bytes(32), b"\1" + bytes(31), b"\xff" * 32, b"\5" * 32])
def test_a_forged_sender_is_damage(sender: bytes) -> None:
    frame = bytearray(Sealer(ADMIN).seal(FrameType.DATA, CHUNK))
    frame[72:104] = sender
    with pytest.raises(DamageError):
        opened(ADMIN, bytes(frame))


def test_a_payload_shorter_than_a_sender_is_damage() -> None:
    frame = bytearray(Sealer(ADMIN).seal(FrameType.DATA, b""))
    for payload in (0, 1, 31):
        frame[8:12] = struct.pack("<I", payload)
        with pytest.raises(DamageError, match="no sense"):
            opened(ADMIN, bytes(frame))


def test_data_sealed_with_the_metadata_key_is_a_forgery() -> None:
    """Those who only prune, or only read, could make such a frame."""
    frame = bytearray(Sealer(ADMIN).seal(FrameType.DATA, CHUNK))
    frame[6] = 1
    with pytest.raises(DamageError, match="not sealed the way"):
        opened(ADMIN, bytes(frame))


@pytest.mark.parametrize(("right", "name"), [(Right.STORE, NAME), (Right.COLLECT, "gc/forget/x")])
@every_role
def test_documents_are_signed_by_who_has_the_right_and_believed_by_all(
    role: Role, right: Right, name: str
) -> None:
    made = manifest()
    if right not in RIGHTS[role]:
        with pytest.raises(MissingRightError, match=f"a {role} key, and {right.value} needs role admin or"):
            encode_signed(made, name, RINGS[role], right)
        return
    stored = encode_signed(made, name, RINGS[role], right)
    for ring in RINGS.values():
        assert open_signed(stored, name, ring, right) == encode(made)
        with pytest.raises(DamageError, match="signature"):
            open_signed(stored, name + "0", ring, right)
        with pytest.raises(DamageError, match="signature"):
            open_signed(stored, name, ring, ({Right.STORE, Right.COLLECT} - {right}).pop())


def test_without_encryption_nothing_is_signed() -> None:
    plain = KeyRing.plain(REPOSITORY)
    stored = encode_signed(manifest(), NAME, plain, Right.STORE)
    assert stored == encode(Manifest.model_validate_json(stored))
    assert decode_manifest(stored, NAME, plain) is not None
    with pytest.raises(DamageError):
        decode_manifest(encode_signed(manifest(), NAME, ADMIN, Right.STORE), NAME, plain)


def test_manifests_that_nobody_or_another_signed_are_damage() -> None:
    stranger = KeyRing.from_master(b"another master of 32 bytes, yes.", repository_id=REPOSITORY)
    elsewhere = KeyRing.from_master(MASTER, repository_id=b"another 16 bytes")
    signed = Signed.model_validate_json(encode_signed(manifest(), NAME, ADMIN, Right.STORE))
    changed = signed.model_copy(update={"document": signed.document.replace('"test"', '"tesT"')})
    other_name = f"manifests/{'00' * 16}"
    forged = [
        encode(manifest()),
        encode_signed(manifest(), NAME, stranger, Right.STORE),
        encode_signed(manifest(), NAME, elsewhere, Right.STORE),
        encode_signed(manifest(), NAME, RINGS[Role.GC], Right.COLLECT),
        encode_signed(manifest(), other_name, ADMIN, Right.STORE),
        encode(changed),
        encode(signed.model_copy(update={"signature": "00" * 64})),
    ]
    for ring in RINGS.values():
        assert decode_manifest(encode(signed), NAME, ring) is not None
        for plain in forged:
            with pytest.raises(DamageError, match="sign"):
                decode_manifest(plain, NAME, ring)
        with pytest.raises(DamageError, match="another run"):
            decode_manifest(encode_signed(manifest(), other_name, ADMIN, Right.STORE), other_name, ring)


def test_a_fence_needs_no_signature_and_is_never_a_backup() -> None:
    fence = encode(Fence(writer=WRITER, time=datetime.now(UTC), fenced=True))
    for ring in RINGS.values():
        assert decode_manifest(fence, NAME, ring) is None
    with pytest.raises(DamageError, match="another run"):
        decode_manifest(fence, f"manifests/{'00' * 16}", ADMIN)


def test_rights_are_named_with_the_roles_that_have_them() -> None:
    for role, right in itertools.product(Role, Right):
        if right in RIGHTS[role]:
            RINGS[role].require(right)
            continue
        with pytest.raises(PassphraseError) as caught:
            RINGS[role].require(right)
        said = str(caught.value)
        assert f"a {role} key" in said
        assert right.value in said
        assert "\n" not in said
        roles = said.rpartition("needs role ")[2].replace(" or ", ", ").split(", ")
        assert set(roles) == {other for other in Role if right in RIGHTS[other]}


def test_nothing_prints_a_key() -> None:
    about = KeyAbout(id="ab" * 16, created=datetime.now(UTC), role=Role.ADMIN, config="cd" * 32)
    material = KeyMaterial(
        about=about,
        keys={name: key.hex() for name, key in ADMIN.held_by(Role.ADMIN).items()},
    )
    shown = repr(material) + str(material)
    for ring in RINGS.values():
        ring.identify(FrameType.NODE, b"x")
        shown += repr(ring) + str(ring) + repr(Sealer(ring)) + repr(Opener(ring))
    try:
        KeyMaterial.model_validate_json(encode(material).replace(b'"keys"', b'"kees"'))
    except ValueError as err:
        shown += "".join(traceback.format_exception(err))
    assert "kees" in shown
    for key in (getattr(ADMIN, name) for name in SECRETS):
        assert key.hex() not in shown
        assert repr(key)[2:-1] not in shown
