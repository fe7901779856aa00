"""Take over what an interrupted run had stored, so that it need not be read, packed and sent again.

The packs of a run carry its id in their names and their tables in themselves, so nothing but a listing is
needed to find them. The dead run is shut out first, though it is dead.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from datetime import datetime

from blocksnap.errors import DamageError
from blocksnap.repository.fencing import IsGone, fence, fenced_runs, read_runs, settled_runs
from blocksnap.repository.pack import PackId, SealedPack, read_footer
from blocksnap.repository.repository import Repository


def find_adoptable(
    repository: Repository,
    host: str,
    sizes: Mapping[str, int],
    passed_over: Container[str],
    is_gone: IsGone,
    now: datetime,
) -> list[SealedPack]:
    """Return the packs of dead runs of this host that no segment lists and that are whole.

    ``sizes`` are those of all packs, and ``passed_over`` the condemned ones.
    """
    listed = repository.index.packs()
    loose: dict[str, list[str]] = {}
    for name in sizes:
        try:
            pack = PackId.parse(name)
        except ValueError:
            continue
        if pack not in listed and name not in passed_over:
            loose.setdefault(pack.writer.hex(), []).append(name)
    if not loose:
        return []
    dead = _dead_runs(repository, host, set(loose), is_gone, now)
    found = []
    for writer in sorted(dead):
        for name in sorted(loose[writer]):
            try:
                rows = read_footer(repository.backend, repository.keys, name, sizes[name])
            except DamageError:
                continue
            found.append(SealedPack(PackId.parse(name), sizes[name], rows))
    return found


def _dead_runs(
    repository: Repository, host: str, writers: set[str], is_gone: IsGone, now: datetime
) -> set[str]:
    mine = {
        writer: run.record
        for writer, run in read_runs(repository, is_newer_passed_over=True).items()
        if run.record is not None and run.record.host == host and writer in writers
    }
    for writer in sorted(mine.keys() - settled_runs(repository)):
        # A fence in the place of a manifest that is gone would hide it.
        if is_gone(mine[writer]) and not mine[writer].tells_of_commit:
            fence(repository, writer, now)
    # Asked again: the run may have committed in the last moment.
    return fenced_runs(repository, mine.keys() & settled_runs(repository))
