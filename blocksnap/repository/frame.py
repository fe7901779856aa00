"""Frames: one blob as it is stored, compressed and sealed, with all that is needed to open it.

A frame is a 72-byte header, the payload, and a 16-byte tag (docs/design.md, "Frames"):

    0  4s  magic ``BSF1``          8  u32  payload length        48  24s  salt
    4  u8  type                   12  u32  plaintext length      72       payload
    5  u8  codec: 0 raw, 1 zstd   16  32s  id of the plaintext            tag, 16 bytes
    6  u8  cipher: 0 none, 1 AES-256-GCM
    7  u8  zero

All integers are little endian. The header is authenticated with the payload, together with the
repository's id. Frames do not depend on where they lie, so garbage collection may move them as they are.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import count

from blake3 import blake3

from blocksnap.repository.errors import DamagedObjectError, NewerFormatError
from blocksnap.repository.keys import KeyRing

MAGIC = b"BSF1"
HEADER = struct.Struct("<4sBBBBII32s24s")
TAG_SIZE = 16
OVERHEAD = HEADER.size + TAG_SIZE
ID_SIZE = 32
MAX_PLAIN = 64 << 20
"""No blob is larger; a header that claims more is damage, not a reason to allocate."""

CODEC_RAW, CODEC_ZSTD = 0, 1
CIPHER_NONE, CIPHER_AES_256_GCM = 0, 1
_NONCE = bytes(12)
NO_REPOSITORY = bytes(16)
"""Stands for the repository's id in frames that are read before it is known."""


class FrameType(IntEnum):
    """What a frame holds."""

    DATA = 1
    NODE = 2
    ATTACHMENT = 3
    CONFIG = 16
    KEY = 17
    MANIFEST = 18
    WRITER = 19
    FOOTER = 20


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
        return OVERHEAD + self.payload_length

    @classmethod
    def parse(cls, data: memoryview, *, where: str) -> FrameHeader:
        """Read a header; raises DamagedObjectError when it makes no sense."""
        if len(data) < HEADER.size:
            raise DamagedObjectError(where, "cut short")
        magic, kind, codec, cipher, zero, payload, plain, id_, salt = HEADER.unpack_from(data)
        if magic != MAGIC or zero:
            raise DamagedObjectError(where, "no frame begins there")
        if cipher > CIPHER_AES_256_GCM or payload > MAX_PLAIN or plain > MAX_PLAIN:
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
        cipher = CIPHER_AES_256_GCM if self._keys.encrypted else CIPHER_NONE
        HEADER.pack_into(out, 0, MAGIC, kind, codec, cipher, 0, len(body), len(plain), id_, salt)
        end = HEADER.size + len(body) + TAG_SIZE
        _protect(self._keys, kind, bytes(out[: HEADER.size]), body, out[HEADER.size : end])
        return end

    def seal(self, kind: FrameType, plain: bytes, *, compress: bool = True) -> bytes:
        """Return the frame of a blob whose id is not known yet."""
        out = bytearray(len(plain) + OVERHEAD)
        end = self.seal_into(
            kind, self._keys.identify(kind, plain), plain, memoryview(out), compress=compress
        )
        return bytes(out[:end])


def _protect(
    keys: KeyRing, kind: FrameType, header: bytes, body: bytes | memoryview, out: memoryview
) -> None:
    associated = keys.repository_id + header
    if keys.encrypted:
        cipher = keys.frame_cipher(kind, salt=header[48:72], id_=header[16:48])
        cipher.encrypt_into(_NONCE, body, associated, out)
        return
    out[: len(body)] = body
    out[len(body) :] = plain_tag(associated, body)


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

    def open(
        self, frame: memoryview, *, where: str, kind: int | None = None, id_: bytes | None = None
    ) -> bytes | memoryview:
        """Return the plaintext of a frame, of the type and with the id that were expected.

        The result may be a view of a buffer that the next call overwrites. Raises DamagedObjectError, and
        NewerFormatError for a frame of an unknown type or codec that is authentic.
        """
        header = FrameHeader.parse(frame, where=where)
        if len(frame) < header.frame_length:
            raise DamagedObjectError(where, "cut short")
        if (kind is not None and header.type != kind) or (id_ is not None and header.id != id_):
            raise DamagedObjectError(where, "another frame lies there")
        # A frame without encryption in an encrypted repository is a forgery.
        if header.cipher != (CIPHER_AES_256_GCM if self._keys.encrypted else CIPHER_NONE):
            raise DamagedObjectError(where, "the frame is not sealed the way this repository is")
        body = self._unseal(header, frame, where)
        # Only now is it sure that these bytes were meant to be what they are.
        if header.type not in _TYPES:
            raise NewerFormatError(where, f"frames of type {header.type}")
        if header.codec > CODEC_ZSTD:
            raise NewerFormatError(where, f"codec {header.codec}")
        plain = self._decompress(header, body, where)
        if len(plain) != header.plain_length:
            raise DamagedObjectError(where, "the content has another length than it should have")
        if self._keys.identify(header.type, plain) != header.id:
            raise DamagedObjectError(where, "the content does not match its id")
        return plain

    def _unseal(self, header: FrameHeader, frame: memoryview, where: str) -> memoryview:
        sealed = frame[HEADER.size : header.frame_length]
        associated = self._keys.repository_id + bytes(frame[: HEADER.size])
        if not self._keys.encrypted:
            body = sealed[:-TAG_SIZE]
            if plain_tag(associated, body) != sealed[-TAG_SIZE:]:
                raise DamagedObjectError(where, "its checksum is wrong")
            return body
        if len(self._scratch) < header.payload_length:
            self._scratch = bytearray(header.payload_length)
        out = memoryview(self._scratch)[: header.payload_length]
        cipher = self._keys.frame_cipher(header.type, salt=header.salt, id_=header.id)
        from cryptography.exceptions import InvalidTag

        try:
            cipher.decrypt_into(_NONCE, sealed, associated, out)
        except InvalidTag as err:
            raise DamagedObjectError(where, "it does not pass authentication") from err
        return out

    def _decompress(self, header: FrameHeader, body: memoryview, where: str) -> bytes | memoryview:
        if header.codec == CODEC_RAW:
            return body
        from zstandard import ZstdError, frame_content_size

        try:
            # The length comes first, so that a forged frame cannot expand without bounds.
            if frame_content_size(body) != header.plain_length:
                raise DamagedObjectError(
                    where, "the compressed content has another length than it should have"
                )
            return self._decompressor.decompress(body)
        except ZstdError as err:
            raise DamagedObjectError(where, f"it cannot be decompressed: {err}") from err
