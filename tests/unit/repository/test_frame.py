"""Frames: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap.errors import DamageError
from blocksnap.repository.frame import HEADER, OVERHEAD, FrameType, Opener, Sealer
from blocksnap.repository.keys import KeyRing

MASTER = bytes(range(32))
REPOSITORY = bytes(16)
SEALED = KeyRing.from_master(MASTER, repository_id=REPOSITORY)
PLAIN = KeyRing.plain(REPOSITORY)

both = pytest.mark.parametrize("keys", [SEALED, PLAIN], ids=["encrypted", "plain"])


@both
@settings(max_examples=50)
@given(content=st.binary(max_size=3000), compress=st.booleans(), kind=st.sampled_from(FrameType))
def test_round_trip(keys: KeyRing, content: bytes, compress: bool, kind: FrameType) -> None:
    frame = Sealer(keys).seal(kind, content, compress=compress)
    assert len(frame) <= len(content) + OVERHEAD
    assert bytes(Opener(keys).open(memoryview(frame), where="x", kind=kind)) == content


@both
def test_every_flipped_bit_is_found(keys: KeyRing) -> None:
    frame = bytearray(Sealer(keys).seal(FrameType.DATA, b"abc" * 40))
    opener = Opener(keys)
    for bit in range(len(frame) * 8):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamageError):
            opener.open(memoryview(frame), where="x", kind=FrameType.DATA)
        frame[bit // 8] ^= 1 << bit % 8
    opener.open(memoryview(frame), where="x", kind=FrameType.DATA)


@both
def test_a_cut_frame_is_found(keys: KeyRing) -> None:
    frame = Sealer(keys).seal(FrameType.DATA, b"abc" * 40)
    for length in range(len(frame)):
        with pytest.raises(DamageError):
            Opener(keys).open(memoryview(frame)[:length], where="x")


def test_an_unencrypted_frame_is_no_frame_of_an_encrypted_repository() -> None:
    forged = Sealer(PLAIN).seal(FrameType.DATA, b"forged")
    with pytest.raises(DamageError, match="not sealed the way"):
        Opener(SEALED).open(memoryview(forged), where="x")


def test_another_repository_cannot_open_it() -> None:
    frame = Sealer(SEALED).seal(FrameType.DATA, b"mine")
    other = KeyRing.from_master(MASTER, repository_id=b"another id 16 by")
    with pytest.raises(DamageError):
        Opener(other).open(memoryview(frame), where="x")


def test_type_and_id_have_to_be_the_expected_ones() -> None:
    frame = memoryview(Sealer(SEALED).seal(FrameType.NODE, b"node"))
    with pytest.raises(DamageError):
        Opener(SEALED).open(frame, where="x", kind=FrameType.DATA)
    with pytest.raises(DamageError):
        Opener(SEALED).open(frame, where="x", id_=bytes(32))


def test_no_two_frames_share_a_salt() -> None:
    frames = [Sealer(SEALED).seal(FrameType.DATA, b"same") for _ in range(50)]
    sealer = Sealer(SEALED)
    frames += [sealer.seal(FrameType.DATA, b"same") for _ in range(50)]
    assert len({HEADER.unpack_from(frame)[8] for frame in frames}) == 100


def test_ids_differ_by_type_and_key() -> None:
    assert SEALED.identify(FrameType.DATA, b"x") != SEALED.identify(FrameType.NODE, b"x")
    assert SEALED.identify(FrameType.DATA, b"x") != PLAIN.identify(FrameType.DATA, b"x")


@given(st.binary(max_size=400))
def test_hostile_bytes_are_damage(data: bytes) -> None:
    for keys in (SEALED, PLAIN):
        with pytest.raises(DamageError):
            Opener(keys).open(memoryview(b"BSF1" + data), where="x")
