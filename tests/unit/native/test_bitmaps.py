"""bitmap_extents and bitmap_subtract equal their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksnap import _native
from blocksnap.extents.model import ExtentList

# Long runs of equal bytes beside random ones: both the words that are skipped and those that are not.
SAME_BYTES = st.builds(lambda byte, n: byte * n, st.sampled_from([b"\0", b"\xff"]), st.integers(0, 40))
BITMAPS = st.lists(st.binary(max_size=9) | SAME_BYTES).map(b"".join)
UNITS = st.sampled_from([1, 7, 4096, 65536, 1 << 30])


def set_bits(bitmap: bytes) -> list[int]:
    return [at for at in range(len(bitmap) * 8) if bitmap[at // 8] >> at % 8 & 1]


@given(bitmap=BITMAPS, unit=UNITS)
def test_extents_are_the_set_bits(bitmap: bytes, unit: int) -> None:
    expected = ExtentList.of((bit * unit, unit) for bit in set_bits(bitmap))
    assert ExtentList(_native.bitmap_extents(bitmap, unit)) == expected


@given(bitmap=BITMAPS, cut=st.integers(0, 20))
def test_extents_of_unaligned_views(bitmap: bytes, cut: int) -> None:
    view = memoryview(bytearray(bitmap))[cut:]
    assert _native.bitmap_extents(view, 3) == _native.bitmap_extents(bitmap[cut:], 3)


@given(a=BITMAPS, b=BITMAPS)
def test_subtract_keeps_bits_only_in_a(a: bytes, b: bytes) -> None:
    difference = _native.bitmap_subtract(a, bytearray(b))
    assert len(difference) == len(a)
    assert set(set_bits(difference)) == set(set_bits(a)) - set(set_bits(b))


EXTENTS = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 300)), max_size=6).map(ExtentList.of)


@given(
    bitmap=BITMAPS, bits=st.integers(0, 500), unit=st.sampled_from([1, 7, 64]), set_=EXTENTS, clear=EXTENTS
)
def test_update_is_what_it_says(
    bitmap: bytes, bits: int, unit: int, set_: ExtentList, clear: ExtentList
) -> None:
    def touched(extents: ExtentList) -> set[int]:
        return {bit for at, length in extents.pairs() for bit in range(at // unit, -(-(at + length) // unit))}

    updated = _native.bitmap_update(bitmap, bits, unit, set_.packed, clear.packed)
    assert len(updated) == -(-bits // 8)
    expected = (set(set_bits(bitmap)) - touched(clear)) | touched(set_)
    assert set(set_bits(updated)) == {bit for bit in expected if bit < bits}


def test_a_bitmap_beyond_64_bits_of_bytes() -> None:
    assert len(_native.bitmap_extents(b"\x80", 1 << 60)) == 16
    assert list(ExtentList(_native.bitmap_extents(b"\x80", 5, 100)).pairs()) == [(535, 5)]
    with pytest.raises(OverflowError):
        _native.bitmap_extents(b"\x80", 1, (1 << 64) - 7)
    with pytest.raises(OverflowError):
        _native.bitmap_extents(b"\x80", 1 << 61)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="unit has to be positive"):
        _native.bitmap_extents(b"\x01", 0)
    with pytest.raises(OverflowError):
        _native.bitmap_extents(b"\x01", -1)
    with pytest.raises(TypeError):
        _native.bitmap_extents("text", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _native.bitmap_subtract(b"")  # type: ignore[call-arg]
    with pytest.raises(BufferError):
        _native.bitmap_extents(memoryview(b"abcd")[::2], 1)


def test_buffers_are_given_back() -> None:
    bitmap = bytearray(8)
    _native.bitmap_extents(bitmap, 1)
    _native.bitmap_subtract(bitmap, bitmap)
    with pytest.raises(ValueError, match="unit"):
        _native.bitmap_extents(bitmap, 0)
    # A buffer that is still exported cannot be resized.
    bitmap.append(1)
