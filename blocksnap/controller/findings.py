"""What an examination of the host finds: where, how bad, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["warning", "error"]
"""An error hurts production now, or keeps backups from being taken; a warning will, or only takes space."""
Area = Literal[
    "leftover", "base", "pool", "snapshot", "group", "device", "journal", "archive", "tool", "repository"
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be.

    ``ours`` when a dead run of blocksnap left it, told by tag and journal, so that ``doctor --fix`` may clean
    it up.
    """

    severity: Severity
    area: Area
    subject: str
    message: str
    advice: str | None = None
    ours: bool = False

    def document(self) -> dict[str, str | bool | None]:
        """Return its JSON form."""
        return asdict(self)


def exit_code_for(findings: Iterable[Finding]) -> int:
    """Return 0 for none, 3 for warnings, 1 where there is an error among them."""
    severities = {finding.severity for finding in findings}
    return 1 if "error" in severities else 3 if severities else 0
