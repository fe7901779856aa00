"""What the pipeline needs of the place that chunks go to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Sealer(Protocol):
    """Turns one chunk into the bytes that are stored; used by one thread only."""

    def seal_into(self, id_: bytes, plain: memoryview, out: memoryview) -> int:
        """Write the frame of a chunk to ``out`` and return its length."""
        ...


class ChunkSink(Protocol):
    """Where chunks go. All methods but ``store`` are called from several threads at once."""

    @property
    def overhead(self) -> int:
        """Bytes that a frame may be longer than its chunk."""
        ...

    def identify(self, plain: memoryview) -> bytes:
        """Return the id of a chunk."""
        ...

    def claim(self, id_: bytes) -> bool:
        """Tell whether this caller has to seal and store the chunk; true once for each new id."""
        ...

    def new_sealer(self) -> Sealer:
        """Return a sealer for one worker."""
        ...

    def store(self, id_: bytes, frame: memoryview, plain_length: int) -> None:
        """Take a sealed chunk; the frame's buffer is reused when this returns."""
        ...


class Pace(Protocol):
    """How fast the pipeline may go. ``wait`` sleeps so many seconds, or less when the run ends."""

    def begin_reading(self) -> None:
        """Called by the thread that reads, before anything else."""
        ...

    def before_read(self, length: int, wait: Callable[[float], object]) -> None:
        """Wait until so many bytes may be read."""
        ...

    def after_read(self, seconds: float) -> None:
        """Note how long reading them took."""
        ...

    def before_write(self, length: int, wait: Callable[[float], object]) -> None:
        """Wait until so many bytes may be stored; called by the thread that stores."""
        ...
