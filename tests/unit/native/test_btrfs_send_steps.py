"""The reader of send streams in C agrees with the one in Python, about right streams and wrong ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocksnap import _native
from support import send_stream
from support.send_stream import RULES, SIZES, StreamError, Writer

KINDS = {
    _native.STEP_CREATE: "create",
    _native.STEP_CREATE_DIRECTORY: "create directory",
    _native.STEP_RENAME: "rename",
    _native.STEP_LINK: "link",
    _native.STEP_REMOVE: "remove",
    _native.STEP_DATA: "data",
    _native.STEP_HOLE: "hole",
    _native.STEP_RESIZE: "resize",
    _native.STEP_TOUCH: "touch",
}

VERSIONS = st.sampled_from([1, 2])
NAMES = st.sampled_from([b"", b"a", b"b", b"a/c", b"o257-8-0", b"..", b"a//b", b"x" * 256, b"\xff\n", b"a/"])
NUMBERS = st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1))


def native_steps(stream: bytes) -> list[send_stream.Step] | None:
    try:
        found = _native.btrfs_send_steps(stream)
    except ValueError as err:
        assert str(err).startswith("send stream, byte ")
        return None
    return [(KINDS[kind], *rest) for kind, *rest in found]  # type: ignore[misc]


def reference_steps(stream: bytes) -> list[send_stream.Step] | None:
    try:
        return send_stream.steps(send_stream.read(stream))
    except StreamError:
        return None


def value_of(data: st.DataObject, attribute: str) -> bytes | int:
    size = SIZES.get(attribute, 8)
    if size is not None:
        return data.draw(NUMBERS) % (1 << 32 if size == 4 else 1 << 64) if size <= 8 else bytes(size)
    if attribute in ("DATA", "XATTR_DATA"):
        return data.draw(st.binary(max_size=20))
    return data.draw(NAMES)


def add_commands(data: st.DataObject, writer: Writer, version: int) -> None:
    names = [name for name in RULES if version == 2 or name not in ("FALLOCATE", "FILEATTR", "ENCODED_WRITE")]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=12)):
        must, may = RULES[name]
        chosen = (
            sorted(must) + sorted(data.draw(st.sets(st.sampled_from(sorted(may))))) if may else sorted(must)
        )
        # The data is last: in version 2 it has no length.
        chosen.sort(key=lambda attribute: attribute == "DATA")
        writer.add(name, **{attribute: value_of(data, attribute) for attribute in chosen})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), version=VERSIONS)
def test_any_commands(data: st.DataObject, version: int) -> None:
    writer = Writer(version).snapshot()
    add_commands(data, writer, version)
    stream = bytes(writer.add("END"))
    assert native_steps(stream) == reference_steps(stream)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), version=VERSIONS)
def test_commands_that_are_all_right(data: st.DataObject, version: int) -> None:
    """The same with paths and numbers that can be, so that long streams get through."""
    writer = Writer(version).snapshot()
    path = st.sampled_from([b"a", b"b", b"a/c"])
    for _ in range(data.draw(st.integers(0, 20))):
        offset, length = data.draw(st.integers(0, 5)) * 4096, data.draw(st.integers(0, 2)) * 4096
        match data.draw(
            st.sampled_from(["UPDATE_EXTENT", "FALLOCATE", "RENAME", "CHMOD", "UNLINK", "TRUNCATE"])
        ):
            case "FALLOCATE" if version == 2:
                mode = data.draw(st.sampled_from([0, 1, 3]))
                writer.add(
                    "FALLOCATE", PATH=data.draw(path), FILE_OFFSET=offset, SIZE=length, FALLOCATE_MODE=mode
                )
            case "RENAME":
                writer.add("RENAME", PATH=data.draw(path), PATH_TO=data.draw(path))
            case "CHMOD":
                writer.add("CHMOD", PATH=data.draw(path), MODE=0o600)
            case "UNLINK":
                writer.add("UNLINK", PATH=data.draw(path))
            case "TRUNCATE":
                writer.add("TRUNCATE", PATH=data.draw(path), SIZE=offset)
            case _:
                writer.add("UPDATE_EXTENT", PATH=data.draw(path), FILE_OFFSET=offset, SIZE=length)
    stream = bytes(writer.add("END"))
    expected = reference_steps(stream)
    assert expected is not None
    assert native_steps(stream) == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data(), version=VERSIONS)
def test_damage(data: st.DataObject, version: int) -> None:
    """Whatever is changed, cut out or put in: both see the same in what is left."""
    stream = bytearray(bytes(Writer(version).everything()))
    at = data.draw(st.integers(0, len(stream)))
    end = data.draw(st.integers(at, min(at + 12, len(stream))))
    stream[at:end] = data.draw(st.binary(max_size=12))
    assert native_steps(bytes(stream)) == reference_steps(bytes(stream))


def test_a_stream_of_everything() -> None:
    found = native_steps(bytes(Writer(2).everything()))
    assert found is not None
    assert {kind for kind, *_ in found} == set(KINDS.values())
    assert ("hole", b"b", b"", 0, (0).to_bytes(8, "little") + (4096).to_bytes(8, "little")) in found


def test_what_is_wrong_and_where_is_told() -> None:
    stream = bytes(Writer(1).snapshot())
    with pytest.raises(ValueError, match=f"send stream, byte {len(stream)}: the stream ends early"):
        _native.btrfs_send_steps(stream)
    with pytest.raises(ValueError, match="send stream, byte 0: it does not begin like a send stream"):
        _native.btrfs_send_steps(b"x" * 100)


def test_what_is_no_btrfs_cannot_be_sent() -> None:
    with pytest.raises(OSError, match="BTRFS_IOC_SEND: Bad file descriptor"):
        _native.btrfs_send(-1, 5, 1)
