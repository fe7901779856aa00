"""Up to where a target holds everything, while what comes is in another order."""

from __future__ import annotations


class Outstanding:
    """Which ranges of a window, told by the first chunk of each, are not written yet.

    Ranges come in the order of packs; what may be relied upon is told in the order of the volume.
    """

    def __init__(self, firsts: list[int], end: int) -> None:
        self._end = end
        self._order = sorted(range(len(firsts)), key=firsts.__getitem__)
        self._firsts = firsts
        self._is_written = bytearray(len(firsts))
        self._done = 0

    def written(self, number: int) -> None:
        """Note that a range is."""
        self._is_written[number] = True
        while self._done < len(self._order) and self._is_written[self._order[self._done]]:
            self._done += 1

    @property
    def is_whole(self) -> bool:
        """Whether all of it is written."""
        return self._done == len(self._order)

    @property
    def reached(self) -> int:
        """The chunk below which everything is: holes and zeros are before any range is fetched."""
        return self._end if self.is_whole else self._firsts[self._order[self._done]]
