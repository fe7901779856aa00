"""Where directories of trees were found: one that is found in a second place is damage.

An honest tree names each directory once, so this bounds every walk by the names that are stored. Named twice,
the paths would double with each level: sixty directories are enough for a walk that nobody sees the end of.
"""

from __future__ import annotations

import threading
import weakref
from itertools import islice
from typing import TYPE_CHECKING

from blocksnap.errors import BlocksnapError

if TYPE_CHECKING:
    import sqlite3

_RECENT = 1 << 16
"""How many are held in memory at most, those that were looked at last."""
_TABLE = """
CREATE TABLE places (tree INTEGER, number INTEGER, place INTEGER, PRIMARY KEY (tree, number)) WITHOUT ROWID
"""
_SIGN = 1 << 63
"""SQLite's integers are signed, of 64 bits."""


class PlacesFailedError(BlocksnapError):
    """It cannot be remembered where directories were found."""

    def __init__(self, err: sqlite3.Error) -> None:
        super().__init__(
            f"cannot remember which directories were looked at: {err}",
            resolution="make room for temporary files (TMPDIR, else /var/tmp)",
        )


class Places:
    """Remembers all, in memory what is recent and the rest in a file without a name; for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: dict[tuple[int, int], int] = {}
        self._rest: sqlite3.Connection | None = None

    def is_its_own(self, tree: int, number: int, path: bytes) -> bool:
        """Tell whether a directory of a tree was found nowhere else before; raises PlacesFailedError."""
        key, place = (tree, number), hash(path)
        with self._lock:
            known = self._recent.pop(key, None)
            if known is None:
                known = self._find(key)
                if len(self._recent) >= _RECENT:
                    self._put_away()
            # The last that was looked at is the last to be put away.
            self._recent[key] = place if known is None else known
            return known in (None, place)

    def _find(self, key: tuple[int, int]) -> int | None:
        if self._rest is None:
            return None
        import sqlite3

        try:
            found = self._rest.execute("SELECT place FROM places WHERE tree = ? AND number = ?", _row(key))
            row = found.fetchone()
        except sqlite3.Error as err:
            raise PlacesFailedError(err) from err
        return None if row is None else int(row[0])

    def _put_away(self) -> None:
        """Put the half of them into the file that was not looked at for the longest time."""
        import sqlite3

        old = dict(islice(self._recent.items(), -(-_RECENT // 2)))
        try:
            if self._rest is None:
                # A database without a name is a temporary file, removed as soon as it is open.
                made = sqlite3.connect("", check_same_thread=False)
                weakref.finalize(self, made.close)
                made.execute(_TABLE)
                self._rest = made
            with self._rest as rest:
                rows = ((*_row(key), place) for key, place in old.items())
                rest.executemany("INSERT OR REPLACE INTO places VALUES (?, ?, ?)", rows)
        except sqlite3.Error as err:
            raise PlacesFailedError(err) from err
        for key in old:
            del self._recent[key]


def _row(key: tuple[int, int]) -> tuple[int, int]:
    return key[0], key[1] - _SIGN
