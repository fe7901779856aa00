"""Reads a blocksnap repository without blocksnap: written from docs/design.md, section 3, and nothing else.

It proves that the document is enough, and it is what to reach for when blocksnap itself is gone:

    python independent_reader.py REPOSITORY                     list the backups
    python independent_reader.py REPOSITORY BACKUP OUT          restore one to a sparse file, a
                                                                subvolume's files to a directory
    python independent_reader.py REPOSITORY BACKUP OUT mapped   write its set of mapped units
    python independent_reader.py REPOSITORY verify              read and prove every byte

BACKUP is an id or the beginning of one; the passphrase is taken from BLOCKSNAP_PASSPHRASE, and its key has
to be of role admin or restore. It needs the packages blake3, cryptography and zstandard, takes nothing on
trust, and keeps the index in memory.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

DATA, NODE, ATTACHMENT, INODES = 1, 2, 3, 4
CONFIG, KEY, MANIFEST, WRITER, FOOTER, COLLECTION = 16, 17, 18, 19, 20, 21
CHARACTER, DIRECTORY, BLOCK, REGULAR, LINK = 2, 4, 6, 8, 10
SUBVOLUME = 8
"""What an inode is: the upper bits of its mode."""
FRAME, OVERHEAD, MOST = struct.Struct("<4sBBBBII32s24s"), 72 + 16, 64 << 20
HOLE, ZERO = "hole", "zero"
FEATURES: frozenset[str] = frozenset()


class DamagedError(Exception):
    """A stored thing is not what the document says it is."""


class NewerError(Exception):
    """A stored thing is of a version that this reader does not know."""


class Row(NamedTuple):
    """Where a frame lies."""

    pack: str
    offset: int
    length: int
    type: int


def require(truth: bool, what: str) -> None:
    """Like assert, which -O removes."""
    if not truth:
        raise DamagedError(what)


def derive(key: bytes, purpose: str) -> bytes:
    return blake3(key, derive_key_context=f"blocksnap 2026-11 v1 {purpose}").digest()


class Keys:
    """What names, opens and checks (3.3); with no keys held, that of a repository without encryption."""

    def __init__(self, repository_id: bytes, held: dict[str, bytes] | None) -> None:
        self.repository_id, self.encrypted = repository_id, held is not None
        if held and "master" in held:
            for name in ("id key", "meta key", "data secret", "commit secret", "collect secret"):
                held[name.replace(" ", "_")] = derive(held["master"], name)
            for name in ("commit", "collect"):
                signer = Ed25519PrivateKey.from_private_bytes(held[f"{name}_secret"])
                held[f"{name}_public"] = signer.public_key().public_bytes_raw()
        self.held = held or {"id_key": bytes(32), "meta_key": bytes(32)}
        self.index_key = derive(self.held["meta_key"] + repository_id, "index key")
        self.run_keys: dict[bytes, bytes] = {}

    def run_key(self, sender: bytes, what: str) -> bytes:
        """Return the key that a sender stands for (3.2)."""
        if sender not in self.run_keys:
            secret = X25519PrivateKey.from_private_bytes(self.held["data_secret"])
            try:
                shared = secret.exchange(X25519PublicKey.from_public_bytes(sender))
            except ValueError as err:
                raise DamagedError(f"{what}: its sender is no key") from err
            public = secret.public_key().public_bytes_raw()
            key = derive(self.held["id_key"], "run key")
            self.run_keys[sender] = blake3(shared + sender + public, key=key).digest()
        return self.run_keys[sender]

    def signed(self, document: dict[str, Any], name: str, key: str) -> bytes:
        """Return what a Signed vouches for (3.7)."""
        require("signature" in document, f"{name}: not signed")
        text = str(document["document"]).encode()
        message = b"blocksnap 2026-11 v1 signed" + self.repository_id + name.encode() + b"\0" + text
        signer = Ed25519PublicKey.from_public_bytes(self.held[key])
        try:
            signer.verify(bytes.fromhex(document["signature"]), message)
        except InvalidSignature as err:
            raise DamagedError(f"{name}: not signed by who may") from err
        return text

    def open(self, frame: bytes, type_: int, what: str, id_: bytes | None = None) -> bytes:
        """Open a frame that has to be all of ``frame`` (3.2)."""
        require(len(frame) >= OVERHEAD, f"{what}: cut short")
        magic, kind, codec, cipher, zero, payload, length, id_here, salt = FRAME.unpack_from(frame)
        require(magic == b"BSF1" and zero == 0, f"{what}: no frame")
        if kind not in (1, 2, 3, 4, *range(16, 22)) or codec > 1 or cipher > 2:
            raise NewerError(f"{what}: frame of type {kind}, codec {codec}, cipher {cipher}")
        require(kind == type_ and id_ in (None, id_here), f"{what}: another frame")
        require(cipher == (0, 1 + (kind == DATA))[self.encrypted], f"{what}: sealed in another way")
        require(payload + OVERHEAD == len(frame) and length <= MOST, f"{what}: wrong length")
        header, body = frame[:72], frame[72:]
        if cipher:
            key = self.held["meta_key"]
            if cipher == 2:
                key, body = self.run_key(body[:32], what), body[32:]
            key = blake3(salt + id_here, key=key).digest()
            try:
                plain = AESGCM(key).decrypt(bytes(12), body, self.repository_id + header)
            except InvalidTag as err:
                raise DamagedError(f"{what}: not authentic") from err
        else:
            plain, tag = body[:-16], body[-16:]
            require(blake3(self.repository_id + header + plain).digest(16) == tag, f"{what}: wrong checksum")
        if codec == 1:
            try:
                require(zstandard.frame_content_size(plain) == length, f"{what}: wrong content size")
                plain = zstandard.ZstdDecompressor().decompress(plain)
            except zstandard.ZstdError as err:
                raise DamagedError(f"{what}: {err}") from err
        require(len(plain) == length, f"{what}: wrong content size")
        id_key = derive(self.held["id_key" if kind == DATA else "meta_key"], f"id of type {kind}")
        require(blake3(plain, key=id_key).digest() == id_here, f"{what}: not what its id names")
        return plain


def document(plain: bytes, what: str) -> dict[str, Any]:
    """Parse a document; one of a later format is not damaged (3.7)."""
    try:
        found = json.loads(plain)
    except ValueError as err:
        raise DamagedError(f"{what}: no JSON") from err
    require(isinstance(found, dict) and isinstance(found.get("format"), int), f"{what}: no document")
    if found["format"] > 1:
        raise NewerError(f"{what}: format {found['format']}")
    return dict(found)


Place = tuple[int, "str | bytes"]
"""The levels of a map in a record, and its root."""


class Value(NamedTuple):
    """A value of a record: in it, or in blocks (3.4.1)."""

    length: int
    inline: bytes | None
    places: int = 0
    root: Place = (0, HOLE)


class Bytes:
    """Takes a record apart (3.4.1)."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data, self.at, self.what = data, 0, what

    def rest(self) -> int:
        return len(self.data) - self.at

    def end(self) -> None:
        require(self.rest() == 0, f"{self.what}: too long")

    def take(self, length: int) -> bytes:
        require(length <= self.rest(), f"{self.what}: cut short")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def difference(self) -> int:
        folded = self.number()
        return folded >> 1 if folded % 2 == 0 else -(folded >> 1) - 1

    def root(self) -> Place:
        levels, kind = divmod(self.take(1)[0], 4)
        require(kind <= 2, f"{self.what}: no root")
        return levels, self.take(32) if kind == 2 else (HOLE, ZERO)[kind]

    def value(self) -> Value:
        length = self.number()
        if length <= 1024:
            return Value(length, self.take(length))
        return Value(length, None, self.number(), self.root())


class Repository:
    """A repository that lies in a directory."""

    def __init__(self, place: str | Path, passphrase: bytes | None = None) -> None:
        self.place = Path(place)
        public = Keys(bytes(16), None)
        stored = self.read("config")
        self.config = document(public.open(stored, CONFIG, "config"), "config")
        if unknown := set(self.config["features"]["read"]) - FEATURES:
            raise NewerError(f"reading needs {sorted(unknown)}")
        held = None
        if self.config["encryption"] != "none":
            require(self.config["encryption"] == "aes-256-gcm", "config: unknown encryption")
            held = self._held(public, passphrase or b"", blake3(stored).hexdigest())
        self.keys = Keys(bytes.fromhex(self.config["id"]), held)
        # Manifests before the index: what they lead to was listed before they came to be (3.8).
        self._manifests = [(name, self.read(name)) for name in self.names("manifests")]
        self.rows = {id_: row for name in self.names("index") for id_, row in self.segment(name)}

    def read(self, name: str) -> bytes:
        try:
            return (self.place / name).read_bytes()
        except OSError as err:
            raise DamagedError(f"{name}: {err.strerror}") from err

    def names(self, folder: str) -> list[str]:
        found = (path for path in (self.place / folder).rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.place)) for path in found)

    def _held(self, public: Keys, passphrase: bytes, config_hash: str) -> dict[str, bytes]:
        for name in self.names("keys"):
            key = document(public.open(self.read(name), KEY, name), name)
            kdf, salt = key["kdf"], bytes.fromhex(key["kdf"]["salt"])
            cost = {"iterations": kdf["passes"], "lanes": kdf["lanes"], "memory_cost": kdf["memory_kib"]}
            wrapping = Argon2id(salt=salt, length=32, **cost).derive(passphrase)
            try:
                unwrapped = AESGCM(wrapping).decrypt(bytes(12), bytes.fromhex(key["wrapped"]), salt)
            except InvalidTag:
                continue
            material = json.loads(unwrapped)
            require(material["about"] == key["about"], f"{name}: relabelled")
            require(name == f"keys/{key['about']['id']}", f"{name}: another key's")
            require(key["about"]["config"] == config_hash, "config: not the one the repository was made with")
            held = {part: bytes.fromhex(value) for part, value in material["keys"].items()}
            require("master" in held or "data_secret" in held, f"{name}: its role may not read")
            return held
        raise DamagedError("the passphrase opens no key")

    def segment(self, name: str) -> Iterator[tuple[bytes, Row]]:
        """Check an index segment and yield its rows (3.6)."""
        data = self.read(name)
        require(len(data) >= 64, f"{name}: cut short")
        magic, version, rows, packs, row_size, _ = struct.unpack_from("<8sIIIIQ", data)
        require(magic == b"BSINDEX1", f"{name}: no index segment")
        # In every version a segment ends with the checksum of what comes before.
        checksum = blake3(data[:-32], key=self.keys.index_key).digest()
        require(checksum == data[-32:], f"{name}: wrong checksum")
        if version != 1:
            raise NewerError(f"{name}: version {version}")
        table, end = 32 + rows * 44, 32 + rows * 44 + packs * 56
        require(row_size == 44 and end + 32 == len(data), f"{name}: wrong length")
        listed, present = [], []
        for writer, hash_, size in struct.iter_unpack("<16s32sQ", data[table:end]):
            listed.append(f"packs/{hash_.hex()[:2]}/{writer.hex()}-{hash_.hex()}")
            found = self.place / listed[-1]
            # Nobody believes a row whose pack is missing (3.9).
            present.append(found.is_file() and found.stat().st_size == size)
        before = b""
        for id_, ordinal, offset, packed in struct.iter_unpack("<32sIII", data[32:table]):
            require(before <= id_ and ordinal < packs, f"{name}: a row makes no sense")
            before = id_
            if present[ordinal]:
                yield id_, Row(listed[ordinal], offset, packed & 0xFFFFFF, packed >> 24)

    def backups(self) -> list[dict[str, Any]]:
        """Return the backups that are not forgotten, oldest first; a fence has none (3.7, 3.9)."""
        forgotten = self._forgotten()
        found = []
        for name, stored in self._manifests:
            manifest = document(self.keys.open(stored, MANIFEST, name), name)
            if self.keys.encrypted and "fenced" not in manifest:
                manifest = document(self.keys.signed(manifest, name, "commit_public"), name)
            require(f"manifests/{manifest['writer']}" == name, f"{name}: another run's")
            for number, backup in enumerate(manifest.get("backups", ())):
                seed = bytes.fromhex(manifest["writer"]) + struct.pack("<I", number)
                require(backup["id"] == blake3(seed).hexdigest()[:32], f"{name}: a wrong id")
                found += [backup] if backup["id"] not in forgotten else []
        return sorted(found, key=lambda backup: backup["time"])

    def _forgotten(self) -> set[str]:
        found: set[str] = set()
        for path in sorted((self.place / "gc" / "forget").glob("*")):
            name = f"gc/forget/{path.name}"
            given_up = document(self.keys.open(path.read_bytes(), COLLECTION, name), name)
            if self.keys.encrypted:
                given_up = document(self.keys.signed(given_up, name, "collect_public"), name)
            found.update(given_up["backups"])
        return found

    def blob(self, type_: int, id_: bytes) -> bytes:
        """Return a chunk, node or attachment."""
        row = self.rows.get(id_)
        require(row is not None and row.type == type_, f"{id_.hex()[:16]}: in no pack")
        with (self.place / row.pack).open("rb") as file:
            file.seek(row.offset)
            return self.keys.open(file.read(row.length), type_, f"{row.pack} at {row.offset}", id_)

    def entries(self, root: dict[str, Any], count: int) -> Iterator[tuple[int, int, str | bytes]]:
        """Yield (first chunk, number of chunks, hole, zero or id) of a map, in order (3.4)."""
        levels = next(n for n in range(1, 64) if 64**n >= count)
        require(root["levels"] == levels, "a map has another number of levels than its chunks ask for")
        entry = root["root"] if root["root"] in (HOLE, ZERO) else bytes.fromhex(root["root"])
        yield from self._below(entry, levels, 0, count)

    def _below(
        self, entry: str | bytes, level: int, at: int, count: int
    ) -> Iterator[tuple[int, int, str | bytes]]:
        if at >= count:
            require(entry == HOLE, "a map goes on beyond its end")
        elif level == 0 or isinstance(entry, str):
            yield at, min(64**level, count - at), entry
        else:
            for slot, child in enumerate(self._node(entry, level - 1)):
                yield from self._below(child, level - 1, at + slot * 64 ** (level - 1), count)

    def _node(self, id_: bytes, level: int) -> list[str | bytes]:
        plain, what = self.blob(NODE, id_), f"node {id_.hex()[:16]}"
        require(len(plain) >= 72, f"{what}: cut short")
        found_level, version, ids, zero = struct.unpack_from("<BBHI", plain)
        if version != 1:
            raise NewerError(f"{what}: version {version}")
        kinds, body = plain[8:72], plain[72:]
        require((found_level, zero, max(kinds) <= 2) == (level, 0, True), f"{what}: of another level")
        require(kinds.count(2) == ids and len(body) == ids * 32, f"{what}: contradicts itself")
        require(kinds not in (bytes(64), b"\1" * 64), f"{what}: should not have been stored")
        rest = iter(body[at : at + 32] for at in range(0, len(body), 32))
        return [next(rest) if kind == 2 else (HOLE, ZERO)[kind] for kind in kinds]

    def restore(self, backup: dict[str, Any], out: str | Path) -> None:
        """Write the volume to a new sparse file."""
        size, chunk = backup["size"], backup["chunk_size"]
        with Path(out).open("xb") as file:
            for first, _, entry in self.entries(backup["map"], -(-size // chunk)):
                if isinstance(entry, bytes):
                    plain = self.blob(DATA, entry)
                    require(len(plain) == min(chunk, size - first * chunk), f"chunk {first}: wrong length")
                    file.seek(first * chunk)
                    file.write(plain)
            file.truncate(size)

    def mapped(self, backup: dict[str, Any]) -> bytes | None:
        """Return the bitmap of mapped units, if one was stored (3.7)."""
        record = backup["mapped"]
        if record is None:
            return None
        pages = []
        for _, count, entry in self.entries(record["map"], max(-(-record["length"] // 4096), 1)):
            pages.append(self.blob(ATTACHMENT, entry) if isinstance(entry, bytes) else bytes(4096) * count)
            require(len(pages[-1]) == 4096 * count, "a page of a mapped set has another length")
        return b"".join(pages)[: record["length"]]

    def inodes(self, backup: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the inode records of a subvolume, ascending (3.4.1)."""
        for number, _, entry in self.entries(backup["map"], backup["inodes"]["pages"]):
            if isinstance(entry, str):
                require(entry == HOLE, f"page {number} of inodes: zeros")
                continue
            page = Bytes(self.blob(INODES, entry), f"page {number} of inodes")
            if (version := page.take(1)[0]) != 1:
                raise NewerError(f"{page.what}: version {version}")
            count, before = page.take(1)[0], -1
            require(count > 0, f"{page.what}: empty")
            for _ in range(count):
                slot = page.take(1)[0]
                require(before < slot < 16, f"{page.what}: out of order")
                before = slot
                yield self._inode(number * 16 + slot, Bytes(page.take(page.number()), page.what))
            page.end()

    def _inode(self, number: int, record: Bytes) -> dict[str, Any]:
        names = ("generation", "mode", "uid", "gid", "nlink", "flags", "size")
        found: dict[str, Any] = {"number": number, **{name: record.number() for name in names}}
        found["mtime"] = record.difference()
        for name in ("atime", "ctime", "otime"):
            found[name] = found["mtime"] + record.difference()
        kind = found["mode"] >> 12
        xattrs, found["xattrs"] = Bytes(self._value(record.value()), record.what), []
        while xattrs.rest():
            name = xattrs.take(xattrs.number())
            found["xattrs"].append((name, xattrs.take(xattrs.number())))
        if kind == DIRECTORY:
            found["listing"] = record.value()
        elif kind in (REGULAR, LINK):
            found["detail"] = self._value(record.value())
        if kind == REGULAR:
            found["content"] = record.root()
        found["device"] = (record.number(), record.number()) if kind in (CHARACTER, BLOCK) else (0, 0)
        record.end()
        return found

    def _value(self, value: Value) -> bytes:
        """Return the bytes of a value that is no listing."""
        if value.inline is not None:
            return value.inline
        blocks = [self.blob(ATTACHMENT, entry) for *_, entry in self._leaves(value.root, value.places)]
        require(all(len(block) == 65536 for block in blocks[:-1]), "a block of a value is short")
        require(sum(map(len, blocks)) == value.length, "a value has another length")
        return b"".join(blocks)

    def _leaves(self, root: Place, places: int) -> Iterator[tuple[int, int, Any]]:
        """Yield what a map in a record leads to; one with a single place is what stands there."""
        levels, entry = root
        require(levels == (0 if places <= 1 else next(n for n in range(1, 64) if 64**n >= places)), "levels")
        yield from self._below(entry, levels, 0, places)

    def listing(self, record: dict[str, Any]) -> list[tuple[int, int, int, bytes]]:
        """Return (index, inode, kind, name) of all names in a directory (3.4.1, 4.5)."""
        value, found = record["listing"], []
        blocks = [value.inline] if value.inline is not None else []
        for _, _, entry in self._leaves(value.root, value.places) if not blocks else ():
            blocks += [self.blob(ATTACHMENT, entry)] if isinstance(entry, bytes) else []
        for block in filter(None, blocks):
            names, index, inode = Bytes(block, "listing"), 0, 0
            require(names.take(1) == b"\x81", "listing: another version")
            while names.rest():
                index, inode = index + names.number(), inode + names.difference()
                kind, length = names.take(2)
                found.append((index, inode, kind, names.take(length)))
        require(len({entry[3] for entry in found}) == len(found), "a directory has a name twice")
        return found

    def contents(self, backup: dict[str, Any], record: dict[str, Any]) -> Iterator[bytes]:
        """Yield the content of a file, chunk by chunk."""
        size, chunk = record["size"], backup["chunk_size"]
        for first, count, entry in self._leaves(record["content"], -(-size // chunk)):
            length = min(count * chunk, size - first * chunk)
            plain = self.blob(DATA, entry) if isinstance(entry, bytes) else bytes(length)
            require(len(plain) == length, f"chunk {first}: wrong length")
            yield plain

    def restore_tree(self, backup: dict[str, Any], out: Path) -> None:
        """Write directories, files and symbolic links of a subvolume, without their attributes."""
        found = {record["number"]: record for record in self.inodes(backup)}
        waiting, seen = [(256, out)], set[int]()
        while waiting:
            number, path = waiting.pop()
            path.mkdir()
            require(number not in seen, f"directory {number} is in two places")
            seen.add(number)
            for _, inode, entry_kind, name in self.listing(found[number]):
                require(b"/" not in name and name not in (b"", b".", b".."), f"{name!r} is no name")
                below, record = path / os.fsdecode(name), found.get(inode)
                kind = record["mode"] >> 12 if record is not None and entry_kind != SUBVOLUME else None
                if record is None or kind is None:
                    require(entry_kind == SUBVOLUME, f"{name!r} leads nowhere")
                    below.mkdir()
                elif kind == DIRECTORY:
                    waiting.append((inode, below))
                elif kind == REGULAR:
                    with below.open("xb") as file:
                        file.writelines(self.contents(backup, record))
                elif kind == LINK:
                    below.symlink_to(os.fsdecode(record["detail"]))

    def verify(self) -> int:
        """Prove every pack, frame and writer record (3.5); return the number of frames."""
        for name in self.names("writers"):
            record = document(self.keys.open(self.read(name), WRITER, name), name)
            require(f"writers/{record['writer']}.{record['sequence']}" == name, f"{name}: another run's")
        frames = {row for name in self.names("packs") for row in self._pack(name)}
        require(set(self.rows.items()) <= frames, "the index lists a frame that its pack does not have")
        return len(frames)

    def _pack(self, name: str) -> Iterator[tuple[bytes, Row]]:
        data, (writer, _, hash_) = self.read(name), name.rpartition("/")[2].partition("-")
        require(blake3(data).hexdigest() == hash_ and name.split("/")[1] == hash_[:2], f"{name}: wrong hash")
        magic, version, zero, repository, author, _ = struct.unpack_from("<8sII16s16s16s", data)
        require((magic, zero, author.hex()) == (b"BSPACK1\0", 0, writer), f"{name}: no pack")
        if version != 1:
            raise NewerError(f"{name}: version {version}")
        require(repository == self.keys.repository_id, f"{name}: of another repository")
        footer, length, end = struct.unpack("<QI4s", data[-16:])
        require(end == b"BSPT" and footer + length + 16 == len(data), f"{name}: wrong trailer")
        table, at = self.keys.open(data[footer:-16], FOOTER, f"footer of {name}"), 64
        for id_, offset, size, plain, type_, zeros in struct.iter_unpack("<32sIIIB3s", table):
            require((offset, zeros) == (at, bytes(3)), f"{name}: its frames do not follow one another")
            at += size
            found = self.keys.open(data[offset:at], type_, f"{name} at {offset}", id_)
            require(len(found) == plain, f"{name} at {offset}: wrong content size")
            yield id_, Row(name, offset, size, type_)
        require(at == footer, f"{name}: its frames do not follow one another")


def main(place: str, *words: str) -> None:
    repository = Repository(place, os.environb.get(b"BLOCKSNAP_PASSPHRASE"))
    if words == ("verify",):
        print(f"{repository.verify()} frames are sound")
        return
    for backup in repository.backups():
        if not words:
            print(backup["id"], backup["time"], backup["size"], backup["volume"]["name"])
        elif backup["id"].startswith(words[0]):
            if words[2:] == ("mapped",):
                Path(words[1]).write_bytes(repository.mapped(backup) or b"")
            elif "inodes" in backup:
                repository.restore_tree(backup, Path(words[1]))
            else:
                repository.restore(backup, words[1])
            return
    require(not words, f"there is no backup {words[:1]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
