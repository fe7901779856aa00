"""Tell what on this host is in the way of backups, or was left by them; and clean up what is ours."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blocksnap.controller import doctor
from blocksnap.controller.findings import Finding, exit_code_for
from blocksnap.controller.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class Examination:
    """What is found now, and what was done about what was found before."""

    findings: tuple[Finding, ...]
    fixed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 when nothing is left to do, 3 for warnings, 1 when something is wrong now or cannot be fixed."""
        return 1 if self.failed else exit_code_for(self.findings)


def examine(state_directory: str, limits: LimitSettings, repository: str | None, *, fix: bool) -> Examination:
    """Look at the host; with ``fix`` clean up first, so that what is found is what is left."""
    cleaned = doctor.fix(state_directory) if fix else None
    found = doctor.examine(state_directory, limits)
    if repository is not None:
        found += _repository(repository, limits.repository_free)
    if cleaned is None:
        return Examination(tuple(found))
    return Examination(tuple(found), cleaned.removed, cleaned.warnings)


def _repository(url: str, wanted_bytes: int) -> list[Finding]:
    path = url.removeprefix("file://")
    if "://" in path:
        return []
    try:
        status = os.statvfs(path)
    except OSError as err:
        return [
            Finding(
                "error",
                "repository",
                url,
                f"cannot be reached: {os.strerror(err.errno or 0)}",
                "mount it, or make it with: blocksnap init",
            )
        ]
    free = status.f_bavail * status.f_frsize
    if free >= wanted_bytes and free > 0:
        return []
    return [
        Finding(
            "warning",
            "repository",
            url,
            f"its file system has {free} bytes left, less than repository_free = {wanted_bytes}"
            if wanted_bytes
            else "its file system is full",
            "blocksnap forget and prune, or make room",
        )
    ]
