"""Frames: one blob as it is stored, compressed and sealed, with all that is needed to open it.

A frame is a 72-byte header, the payload, and a 16-byte tag (docs/design.md, "Frames"):

    0  4s  magic ``BSF1``          8  u32  payload length        48  24s  salt
    4  u8  type                   12  u32  plaintext length      72       payload
    5  u8  codec: 0 raw, 1 zstd   16  32s  id of the plaintext            tag, 16 bytes
    6  u8  cipher: 0 none, 1 AES-256-GCM, 2 the same after X25519
    7  u8  zero

All integers are little endian. The header is authenticated with the payload, together with the
repository's id. Frames do not depend on where they lie, so garbage collection may move them as they are.

The payload of a data chunk (cipher 2) begins with the sender, 32 bytes: a public key of the thread that
sealed it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import count

from blake3 import blake3

from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.keys import KeyRing, frame_cipher

MAGIC = b"BSF1"
HEADER = struct.Struct("<4sBBBBII32s24s")
TAG_SIZE = 16
SENDER_SIZE = 32
OVERHEAD = HEADER.size + SENDER_SIZE + TAG_SIZE
"""A frame is longer than its plaintext by no more."""
ID_SIZE = 32
MAX_PLAIN = 64 << 20
"""No blob is larger; a header that claims more is damage, not a reason to allocate."""

CODEC_RAW, CODEC_ZSTD = 0, 1
CIPHER_NONE, CIPHER_AES_256_GCM, CIPHER_X25519_AES_256_GCM = 0, 1, 2
_NONCE = bytes(12)
_REMEMBERED_SENDERS = 4096
NO_REPOSITORY = bytes(16)
"""Stands for the repository's id in frames that are read before it is known."""


class FrameType(IntEnum):
    """What a frame holds."""

    DATA = 1
    NODE = 2
    ATTACHMENT = 3
    INODES = 4
    CONFIG = 16
    KEY = 17
    MANIFEST = 18
    WRITER = 19
    FOOTER = 20
    COLLECTION = 21


_TYPES = frozenset(FrameType)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The parsed header of a frame; its type and codec may be ones that only a later version knows."""

    type: int
    codec: int
    cipher: int
    payload_length: int
    plain_length: int
    id: bytes
    salt: bytes

    @property
    def frame_length(self) -> int:
        """Bytes of the whole frame."""
        return HEADER.size + self.payload_length + TAG_SIZE

    @classmethod
    def parse(cls, data: memoryview, *, where: str) -> FrameHeader:
        """Read a header; raises DamagedObjectError when it makes no sense."""
        if len(data) < HEADER.size:
            raise DamagedObjectError(where, "cut short")
        magic, kind, codec, cipher, zero, payload, plain, id_, salt = HEADER.unpack_from(data)
        if magic != MAGIC or zero:
            raise DamagedObjectError(where, "no frame begins there")
        sender = SENDER_SIZE if cipher == CIPHER_X25519_AES_256_GCM else 0
        if cipher > CIPHER_X25519_AES_256_GCM or plain > MAX_PLAIN:
            raise DamagedObjectError(where, "the frame's header makes no sense")
        if not sender <= payload <= MAX_PLAIN + sender:
            raise DamagedObjectError(where, "the frame's header makes no sense")
        return cls(kind, codec, cipher, payload, plain, id_, salt)


class Sealer:
    """Compresses and seals blobs into buffers the caller reuses; one for each thread."""

    def __init__(self, keys: KeyRing, *, level: int = 1) -> None:
        from zstandard import ZstdCompressor

        self._keys = keys
        self._compressor = ZstdCompressor(level=level)
        # A key is used once: it is derived from the id and a salt that no other frame has.
        self._salt_prefix = os.urandom(16)
        self._salt_count = count()
        self._sender: tuple[bytes, bytes] | None = None

    def seal_into(
        self,
        kind: FrameType,
        id_: bytes,
        plain: bytes | memoryview,
        out: memoryview,
        *,
        compress: bool = True,
    ) -> int:
        """Write the frame of ``plain`` to ``out`` and return its length.

        ``out`` has room for ``len(plain) + OVERHEAD`` bytes.
        """
        body: bytes | memoryview = plain
        codec = CODEC_RAW
        if compress:
            packed = self._compressor.compress(plain)
            if len(packed) < len(plain):
                body, codec = packed, CODEC_ZSTD
        salt = self._salt_prefix + next(self._salt_count).to_bytes(8, "little")
        cipher = _cipher_of(self._keys, kind)
        sender, key = self._key_for(cipher)
        begin = HEADER.size + len(sender)
        end = begin + len(body) + TAG_SIZE
        payload = len(sender) + len(body)
        HEADER.pack_into(out, 0, MAGIC, kind, codec, cipher, 0, payload, len(plain), id_, salt)
        out[HEADER.size : begin] = sender
        associated = self._keys.repository_id + bytes(out[: HEADER.size])
        if cipher == CIPHER_NONE:
            out[begin : end - TAG_SIZE] = body
            out[end - TAG_SIZE : end] = plain_tag(associated, body)
        else:
            frame_cipher(key, salt=salt, id_=id_).encrypt_into(_NONCE, body, associated, out[begin:end])
        return end

    def _key_for(self, cipher: int) -> tuple[bytes, bytes]:
        """Return the sender that goes into the frame, and the key that the frame's own is derived from."""
        if cipher != CIPHER_X25519_AES_256_GCM:
            return b"", self._keys.meta_key
        if self._sender is None:
            self._sender = self._keys.new_sender()
        return self._sender

    def seal(self, kind: FrameType, plain: bytes, *, compress: bool = True) -> bytes:
        """Return the frame of a blob whose id is not known yet."""
        out = bytearray(len(plain) + OVERHEAD)
        end = self.seal_into(
            kind, self._keys.identify(kind, plain), plain, memoryview(out), compress=compress
        )
        return bytes(out[:end])


def _cipher_of(keys: KeyRing, kind: int) -> int:
    """Return how frames of a type are sealed: a frame that is not is a forgery."""
    if not keys.encrypted:
        return CIPHER_NONE
    return CIPHER_X25519_AES_256_GCM if kind == FrameType.DATA else CIPHER_AES_256_GCM


def plain_tag(associated: bytes, body: bytes | memoryview) -> bytes:
    """Return the tag of an unencrypted frame: it finds accidents, not attackers."""
    return blake3(associated).update(body).digest(TAG_SIZE)


class Opener:
    """Opens frames: unseals, decompresses, and proves the id; one for each thread."""

    def __init__(self, keys: KeyRing) -> None:
        from zstandard import ZstdDecompressor

        self._keys = keys
        self._decompressor = ZstdDecompressor()
        self._scratch = bytearray(1 << 18)
        self._run_keys: dict[bytes, bytes] = {}

    def open(
        self, frame: memoryview, *, where: str, kind: int | None = None, id_: bytes | None = None
    ) -> bytes | memoryview:
        """Return the plaintext of a frame, of the type and with the id that were expected.

        The result may be a view of a buffer that the next call overwrites. Raises DamagedObjectError, and
        MissingRightError for a data chunk when the keys are of a role that may not read, NewerFormatError for
        a frame of an unknown type or codec that is authentic.
        """
        header = self._accept(frame, where, kind, id_)
        body = self._unseal(header, frame, where, self._room(header))
        self._require_known(header, where)
        plain = body
        if header.codec == CODEC_ZSTD:
            plain = memoryview(bytearray(header.plain_length))
            self._decompress_into(header, body, plain, where)
        self._prove(header, plain, where)
        return plain

    def open_into(self, frame: memoryview, out: memoryview, *, where: str, kind: int, id_: bytes) -> int:
        """Open a frame as ``open`` does, into a buffer of the caller's; return the plaintext's length.

        What is in ``out`` after an error is nobody's content.
        """
        header = self._accept(frame, where, kind, id_)
        if header.plain_length > len(out):
            raise DamagedObjectError(where, "the content has another length than it should have")
        plain = out[: header.plain_length]
        if header.codec == CODEC_RAW and _body_length(header) == header.plain_length:
            self._unseal(header, frame, where, plain)
            self._require_known(header, where)
        else:
            body = self._unseal(header, frame, where, self._room(header))
            self._require_known(header, where)
            if header.codec == CODEC_RAW:
                raise DamagedObjectError(where, "the content has another length than it should have")
            self._decompress_into(header, body, plain, where)
        self._prove(header, plain, where)
        return header.plain_length

    def _accept(self, frame: memoryview, where: str, kind: int | None, id_: bytes | None) -> FrameHeader:
        header = FrameHeader.parse(frame, where=where)
        if len(frame) < header.frame_length:
            raise DamagedObjectError(where, "cut short")
        if (kind is not None and header.type != kind) or (id_ is not None and header.id != id_):
            raise DamagedObjectError(where, "another frame lies there")
        if header.cipher != _cipher_of(self._keys, header.type):
            raise DamagedObjectError(where, "the frame is not sealed the way this repository is")
        return header

    def _require_known(self, header: FrameHeader, where: str) -> None:
        # Only when it was unsealed is it sure that these bytes were meant to be what they are.
        if header.type not in _TYPES:
            raise NewerFormatError(where, f"frames of type {header.type}")
        if header.codec > CODEC_ZSTD:
            raise NewerFormatError(where, f"codec {header.codec}")

    def _prove(self, header: FrameHeader, plain: memoryview, where: str) -> None:
        if len(plain) != header.plain_length:
            raise DamagedObjectError(where, "the content has another length than it should have")
        if self._keys.identify(header.type, plain) != header.id:
            raise DamagedObjectError(where, "the content does not match its id")

    def _room(self, header: FrameHeader) -> memoryview:
        length = _body_length(header)
        if len(self._scratch) < length:
            self._scratch = bytearray(length)
        return memoryview(self._scratch)[:length]

    def _unseal(self, header: FrameHeader, frame: memoryview, where: str, out: memoryview) -> memoryview:
        """Return the body of a frame in ``out``, which is as long."""
        sealed = frame[HEADER.size : header.frame_length]
        associated = self._keys.repository_id + bytes(frame[: HEADER.size])
        if not self._keys.encrypted:
            body = sealed[:-TAG_SIZE]
            if plain_tag(associated, body) != sealed[-TAG_SIZE:]:
                raise DamagedObjectError(where, "its checksum is wrong")
            out[:] = body
            return out
        key = self._keys.meta_key
        if header.cipher == CIPHER_X25519_AES_256_GCM:
            key = self._run_key(bytes(sealed[:SENDER_SIZE]), where)
            sealed = sealed[SENDER_SIZE:]
        cipher = frame_cipher(key, salt=header.salt, id_=header.id)
        from cryptography.exceptions import InvalidTag

        try:
            cipher.decrypt_into(_NONCE, sealed, associated, out)
        except InvalidTag as err:
            raise DamagedObjectError(where, "it does not pass authentication") from err
        return out

    def _run_key(self, sender: bytes, where: str) -> bytes:
        known = self._run_keys.get(sender)
        if known is None:
            try:
                known = self._keys.run_key(sender)
            except ValueError as err:
                raise DamagedObjectError(where, "its sender is no public key") from err
            if len(self._run_keys) >= _REMEMBERED_SENDERS:
                self._run_keys.clear()
            self._run_keys[sender] = known
        return known

    def _decompress_into(self, header: FrameHeader, body: memoryview, plain: memoryview, where: str) -> None:
        """Fill ``plain``, which has the length that the header tells."""
        from zstandard import ZstdError, frame_content_size

        try:
            # The length comes first, so that a forged frame cannot expand without bounds.
            if frame_content_size(body) != header.plain_length:
                raise DamagedObjectError(
                    where, "the compressed content has another length than it should have"
                )
            # With all of the frame and room for all of its content, zstd decompresses in one pass, straight
            # into the buffer.
            count = self._decompressor.stream_reader(body, closefd=False).readinto(plain)
        except ZstdError as err:
            raise DamagedObjectError(where, f"it cannot be decompressed: {err}") from err
        if count != header.plain_length:
            raise DamagedObjectError(where, "the compressed content is cut short")


def _body_length(header: FrameHeader) -> int:
    sender = SENDER_SIZE if header.cipher == CIPHER_X25519_AES_256_GCM else 0
    return header.payload_length - sender
