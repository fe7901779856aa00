# SPDX-License-Identifier: Apache-2.0
"""The table at the end of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from journal import Pace
from product import Backup

HEADER = (
    *("backup", "method", "read", "stored", "took", "freeze"),
    *("longest stall", "(quiet)", "commits/s", "(quiet)"),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One backup, how the program got on during it, and in the quiet stretch before it."""

    backup: Backup
    during: Pace
    quiet: Pace

    def cells(self) -> tuple[str, ...]:
        """Return one text for each column of HEADER."""
        return (
            self.backup.kind,
            self.backup.method,
            mebibytes(self.backup.read_bytes),
            mebibytes(self.backup.stored_bytes),
            f"{self.backup.seconds:.1f} s",
            f"{self.backup.freeze_ms:.0f} ms",
            f"{self.during.longest_stall_ms:.0f} ms",
            f"{self.quiet.longest_stall_ms:.0f} ms",
            f"{self.during.per_second:.0f}",
            f"{self.quiet.per_second:.0f}",
        )


def mebibytes(count: int) -> str:
    """Return a size in MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns, the first two to the left and the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
