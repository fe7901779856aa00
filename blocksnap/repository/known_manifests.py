"""Manifests that this host has opened and proven before: told by the hash of what the storage has now.

Opening one takes a decryption and a signature, which is most of what a list of hundreds of backups costs. The
object is read all the same, so whatever has happened to it is noticed; only what has this very hash is
not proven again. What is remembered is sealed with the cache key, like all that a host keeps.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import TYPE_CHECKING

from blake3 import blake3
from pydantic import ValidationError

from blocksnap.repository.cache import LocalCache
from blocksnap.repository.documents import Manifest
from blocksnap.repository.keys import KeyRing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FILE = "manifests"
_NONCE_SIZE = 12


class KnownManifests:
    """What is remembered, in memory and in the cache."""

    def __init__(self, cache: LocalCache | None, keys: KeyRing) -> None:
        self._cache = cache
        self._keys = keys
        self._met: dict[str, tuple[str, str | None]] = {}
        self._is_new = False

    def find(self, name: str, stored: bytes) -> tuple[Manifest | None] | None:
        """Return the manifest in an object's bytes, or None for a fence; nothing when it is not known."""
        known = self._known.get(name)
        if known is None or known[0] != self._hash(name, stored):
            return None
        try:
            manifest = None if known[1] is None else Manifest.model_validate_json(known[1])
        except ValidationError:
            # Another version remembered it: what it is for this one, its object says.
            return None
        self._met[name] = known
        return (manifest,)

    def add(self, name: str, stored: bytes, manifest: Manifest | None) -> None:
        """Remember what was opened and proven just now."""
        document = None if manifest is None else manifest.model_dump_json()
        self._met[name] = self._hash(name, stored), document
        self._is_new = True

    def save(self) -> None:
        """Keep what was met, and nothing else, for the next command; call when all were met."""
        if self._cache and (self._is_new or len(self._met) != len(self._known)):
            from zstandard import ZstdCompressor

            packed = ZstdCompressor(level=1).compress(json.dumps(self._met).encode())
            nonce = os.urandom(_NONCE_SIZE)
            self._cache.save(FILE, nonce + self._cipher.encrypt(nonce, packed, None))
        self._known.update(self._met)
        self._met, self._is_new = {}, False

    @cached_property
    def _known(self) -> dict[str, tuple[str, str | None]]:
        data = self._cache.load(FILE) if self._cache else None
        if not data:
            return {}
        from cryptography.exceptions import InvalidTag
        from zstandard import ZstdDecompressor

        try:
            packed = self._cipher.decrypt(data[:_NONCE_SIZE], data[_NONCE_SIZE:], None)
        except (InvalidTag, ValueError):
            # Torn, or of another repository: as good as none.
            return {}
        found = json.loads(ZstdDecompressor().decompress(packed))
        return {name: (digest, document) for name, (digest, document) in found.items()}

    @cached_property
    def _cipher(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(blake3(FILE.encode(), key=self._keys.cache_key).digest())

    def _hash(self, name: str, stored: bytes) -> str:
        return blake3(name.encode() + b"\0" + stored, key=self._keys.cache_key).hexdigest()
