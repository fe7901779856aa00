"""Read map nodes by where they lie: runs store them in order, so one read brings many."""

from __future__ import annotations

from collections import OrderedDict

from blocksnap.errors import DamageError
from blocksnap.repository.errors import DamagedObjectError
from blocksnap.repository.frame import FrameType
from blocksnap.repository.repository import Repository

BLOCK = 64 << 10
"""What is read at once: some thirty nodes."""
BLOCKS = 512
"""How many are remembered, 32 MiB in all: one for each of the backups that are walked together, and more."""


class NodeLoader:
    """Loads nodes of a repository; for one thread."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def load(
        self,
        id_: bytes,
        pack: str,
        pack_size: int,
        offset: int,
        length: int,
        kind: FrameType = FrameType.NODE,
    ) -> bytes:
        """Return the plaintext of the node that a row of the index points to, or of another copy of it.

        Or of a page of inode records, if that is the ``kind``.

        Raises DamageError.
        """
        try:
            frame = self._read(pack, pack_size, offset, length)
            where = f"frame at {offset} of {pack}"
            return bytes(self._repository.opener().open(memoryview(frame), where=where, kind=kind, id_=id_))
        except DamageError:
            return self.load_anywhere(id_, kind)

    def load_anywhere(self, id_: bytes, kind: FrameType = FrameType.NODE) -> bytes:
        """Return a node by its id alone; raises DamageError."""
        return self._repository.load(kind, id_)

    def forget(self) -> None:
        """Give the memory back."""
        self._blocks.clear()

    def _read(self, pack: str, size: int, offset: int, length: int) -> bytes:
        if offset + length > size:
            raise DamagedObjectError(pack, "the index points behind its end")
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if first == last:
            at = offset - first * BLOCK
            return self._block(pack, size, first)[at : at + length]
        data = b"".join(self._block(pack, size, number) for number in range(first, last + 1))
        return data[offset - first * BLOCK :][:length]

    def _block(self, pack: str, size: int, number: int) -> bytes:
        key = pack, number
        found = self._blocks.get(key)
        if found is None:
            buffer = bytearray(min(BLOCK, size - number * BLOCK))
            self._repository.read_range(pack, number * BLOCK, memoryview(buffer))
            found = self._blocks[key] = bytes(buffer)
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(key)
        return found
