"""Backups as plain documents, for ``list``, ``show`` and ``backup``; field names are a contract."""

from __future__ import annotations

from collections.abc import Iterable

from blocksnap.repository.documents import Backup
from blocksnap.repository.stored import StoredBackup


def name_hosts(origins: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return what to call hosts, each by id and name: those of one name by the beginning of the id too."""
    found = set(origins)
    ids: dict[str, list[str]] = {}
    for id_, name in found:
        ids.setdefault(name, []).append(id_)
    return {(id_, name): f"{name} ({id_[:8]})" if len(ids[name]) > 1 else name for id_, name in found}


def describe_brief(stored: StoredBackup) -> dict[str, object]:
    """Return one entry of ``list --json``."""
    backup = stored.backup
    return {
        "id": backup.id,
        "volume": backup.volume.name,
        "host": stored.manifest.hostname,
        "time": backup.time.isoformat(),
        "arrived": stored.received.isoformat() if stored.received else None,
        "dated": stored.moment.isoformat(),
        "kind": backup.kind,
        "parent": backup.parent,
        "volume_bytes": backup.size,
        "stored_bytes": stored_bytes(stored),
        "tags": dict(stored.manifest.tags),
    }


def describe(stored: StoredBackup) -> dict[str, object]:
    """Return what ``show --json`` and the last event of ``backup --json`` say of a backup."""
    backup, figures = stored.backup, stored.backup.statistics
    return {
        **describe_brief(stored),
        "method": backup.method,
        "reason": backup.reason,
        "consistency": backup.consistency,
        "volume_kind": backup.volume.kind,
        "chunk_size": backup.chunk_size,
        "changed_bytes": figures.changed_bytes,
        "read_bytes": figures.read_bytes,
        "new_bytes": figures.new_bytes,
        "new_chunks": figures.new_chunks,
        "metadata_bytes": figures.metadata_bytes + _manifest_share(stored),
        "quiesced": backup.quiesced.model_dump() if backup.quiesced else {"state": "none"},
        "freeze_ms": figures.freeze_ms,
        "skew_ms": figures.skew_ms,
        "seconds": figures.seconds,
        "program": stored.manifest.program,
        "source": dict(backup.source),
    }


def describe_quiesced(backup: Backup) -> str:
    """Return one line about what stood still for a backup."""
    quiesced = backup.quiesced
    if quiesced is None:
        return "nothing was asked to"
    if quiesced.state == "failed":
        return f"no: {quiesced.reason}"
    return f"{', '.join(quiesced.by)}, for {quiesced.ms:.0f} ms"


def describe_records(backup: Backup) -> list[tuple[str, str]]:
    """Return what applications said of themselves, as facts to print: one line each, without the labels."""
    shown = []
    for record in backup.quiesced.records if backup.quiesced else ():
        facts = {name: value for name, value in record.facts.items() if value and "\n" not in value}
        shown.append((record.kind, ", ".join(f"{name} {value}" for name, value in facts.items())))
    return shown


def stored_bytes(stored: StoredBackup) -> int:
    """Return what a backup added to the repository, its share of the manifest included."""
    return stored.backup.statistics.stored_bytes + _manifest_share(stored)


def _manifest_share(stored: StoredBackup) -> int:
    # A manifest cannot state its own size; the first backup in it is charged for it.
    return stored.manifest_bytes if stored.manifest.backups[0].id == stored.backup.id else 0
