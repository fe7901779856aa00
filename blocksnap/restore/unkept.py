"""What a restored tree could not be given: told at the end, never dropped in silence."""

from __future__ import annotations

from dataclasses import dataclass, field

from blocksnap.restore.naming import printable

_EXAMPLES = 3


@dataclass(slots=True)
class Unkept:
    """Counts what was not kept by what it is, with the first few paths."""

    _counts: dict[str, int] = field(default_factory=dict)
    _paths: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, path: bytes) -> None:
        """Note that something of a path was not kept."""
        self._counts[what] = self._counts.get(what, 0) + 1
        examples = self._paths.setdefault(what, [])
        if len(examples) < _EXAMPLES:
            examples.append(printable(path))

    def __bool__(self) -> bool:
        return bool(self._counts)

    def lines(self) -> list[str]:
        """Return a line for each sort of thing."""
        return [
            f"{what}, of {count}: {', '.join(self._paths[what])}"
            + (", ..." if count > len(self._paths[what]) else "")
            for what, count in sorted(self._counts.items())
        ]

    def document(self) -> list[dict[str, object]]:
        """Return the same for a document."""
        return [
            {"what": what, "count": count, "examples": self._paths[what]}
            for what, count in sorted(self._counts.items())
        ]
