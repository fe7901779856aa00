"""Check a repository."""

from __future__ import annotations

from blocksnap.operations.catalogue import map_root
from blocksnap.operations.reporting import Reporter, phase
from blocksnap.repository.check import Checker, CheckResult
from blocksnap.repository.keys import Right
from blocksnap.repository.repository import Repository


def check_repository(repository: Repository, report: Reporter, *, read_data: bool) -> CheckResult:
    """Look at the structure and, with ``read_data``, at every byte; all that is wrong is told."""
    if read_data:
        repository.keys.require(Right.READ)
    checker = Checker(repository, map_root, report.advance)
    checker.check_structure()
    if read_data:
        with phase(report, "reading packs", checker.total_bytes):
            checker.check_data()
        checker.result.read_bytes = checker.total_bytes
    checker.name_losses()
    for finding in checker.result.findings:
        report.event("finding", severity=finding.severity, object=finding.object, message=finding.message)
    return checker.result
