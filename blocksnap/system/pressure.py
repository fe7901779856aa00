"""For how long others wait for the disks: the kernel's pressure stall information.

``some ... total=N`` of an ``io.pressure`` counts the microseconds in which at least one task of a control
group waited for I/O (kernel: Documentation/accounting/psi.rst). The groups beside the one of this process, on
every level up to the root, are everybody else; where there are none, the whole host is asked, and who asks
has to subtract what it waited itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blocksnap.system import sysfs

_HOST = Path("/proc/pressure/io")
_CGROUPS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_TOTAL = re.compile(r"^some .*total=(\d+)$", re.MULTILINE)
_PRESSURE = "io.pressure"


@dataclass(frozen=True, slots=True)
class PressureFiles:
    """What to read; ``ours_too`` when what this process waits is counted in them."""

    paths: tuple[Path, ...]
    ours_too: bool


def find_pressure_files(
    roots: Sequence[Path] = _CGROUPS, own: Path = Path("/proc/self/cgroup"), host: Path = _HOST
) -> PressureFiles | None:
    """Return whose waiting can be read; None where the kernel does not count it."""
    for root in roots:
        if (root / "cgroup.controllers").exists():
            others = _beside(root, _own_group(own))
            if others:
                return PressureFiles(tuple(others), ours_too=False)
    try:
        sysfs.exact_text(host)
    except OSError:
        return None
    return PressureFiles((host,), ours_too=True)


def longest_wait(paths: Sequence[Path], before: dict[Path, int]) -> int:
    """Return the microseconds that the most hindered of several groups waited since the last call.

    ``before`` remembers what was read then.
    """
    longest = 0
    for path in paths:
        try:
            found = _TOTAL.search(sysfs.exact_text(path))
        except OSError:
            # The group is gone.
            continue
        if found:
            total = int(found[1])
            longest = max(longest, total - before.get(path, total))
            before[path] = total
    return longest


def _own_group(path: Path) -> str:
    try:
        lines = sysfs.exact_text(path).split("\n")
    except OSError:
        return "/"
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def _beside(root: Path, group: str) -> list[Path]:
    """Return the pressure files of all groups that hang beside the way from the root to a group."""
    found = []
    folder = root
    for part in [part for part in group.split("/") if part]:
        found += [
            path / _PRESSURE
            for path in sysfs.find(folder, "*")
            if path.name != part and (path / _PRESSURE).exists()
        ]
        folder = folder / part
        if not folder.is_dir():
            return []
    return found
