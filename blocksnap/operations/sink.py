"""The bridge from the pipeline to the repository: where data chunks go."""

from __future__ import annotations

from blocksnap.repository.frame import OVERHEAD, FrameType
from blocksnap.repository.frame import Sealer as FrameSealer
from blocksnap.repository.writer import RepositoryWriter


class _DataSealer:
    def __init__(self, sealer: FrameSealer) -> None:
        self._sealer = sealer

    def seal_into(self, id_: bytes, plain: memoryview, out: memoryview) -> int:
        """Seal a data chunk."""
        return self._sealer.seal_into(FrameType.DATA, id_, plain, out)


class DataSink:
    """Stores data chunks through a writer (pipeline.protocols.ChunkSink)."""

    overhead = OVERHEAD

    def __init__(self, writer: RepositoryWriter, level: int) -> None:
        self._writer = writer
        self._level = level
        self.claim = writer.claim

    def identify(self, plain: memoryview) -> bytes:
        """Return a chunk's id."""
        return self._writer.identify(FrameType.DATA, plain)

    def new_sealer(self) -> _DataSealer:
        """Return a sealer for one worker."""
        return _DataSealer(self._writer.sealer(self._level))

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        """Append a sealed chunk to the open pack."""
        self._writer.store(FrameType.DATA, id_, frame, plain_length)
