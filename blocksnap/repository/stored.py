"""Backups together with the runs that stored them, and which clock to believe of when that was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from blocksnap.repository.documents import Backup, Manifest

CLOCK_TOLERANCE = timedelta(hours=1)
"""Where a backup arrives later, or earlier, its host's clock is not believed: storing takes its time, too."""

_COPIED_AT_LEAST = 3
_COPIED_MADE_OVER = timedelta(days=1)
"""So many backups of a lineage, made over more than that, do not arrive within an hour but by a copy."""


@dataclass(frozen=True, slots=True)
class StoredBackup:
    """A backup together with the run that stored it."""

    backup: Backup
    manifest: Manifest
    manifest_bytes: int
    received: datetime | None = None
    """When the manifest arrived, by the storage's clock."""
    dated: datetime | None = None
    """When it was made as its arrival shows, where that speaks against its host's clock."""

    @property
    def moment(self) -> datetime:
        """When it was made: what comes last is the newest."""
        return self.dated or self.backup.time

    @property
    def oldest(self) -> datetime:
        """The earlier of the two, where the clocks disagree: it is at least that old."""
        return min(self.moment, self.backup.time)

    @property
    def clock_was_wrong(self) -> bool:
        """Whether its arrival speaks against its host's clock, and the time that storing took is not why."""
        if self.dated is None or self.received is None:
            return False
        late = (self.received - self.backup.time).total_seconds()
        # As numbers: whoever may store may say that it took longer than times can tell.
        return abs(late - self.backup.statistics.seconds) > CLOCK_TOLERANCE.total_seconds()

    @property
    def origin(self) -> tuple[str, str]:
        """The host that made it, by id and name: machines made from one template may share either."""
        return self.manifest.host, self.manifest.hostname

    @property
    def lineage(self) -> tuple[str, str, str]:
        """The volume and the host: the same for what one host made of one volume."""
        return self.backup.volume.key, *self.origin


def dated(found: list[StoredBackup]) -> Iterator[StoredBackup]:
    """Date by their arrival the backups whose host's clock was wrong.

    What is older than the first arrival was copied here with its repository, and so was what arrived together
    and is older than that: the order in which it was copied says nothing.
    """
    arrivals = [stored.received for stored in found if stored.received is not None]
    first = min(arrivals) - CLOCK_TOLERANCE if arrivals else None
    together: dict[tuple[str, str, str], datetime] = {}
    for stored in sorted(found, key=lambda stored: stored.received or stored.backup.time):
        time, arrival = stored.backup.time, stored.received
        if first is None or arrival is None or time < first or abs(arrival - time) <= CLOCK_TOLERANCE:
            yield stored
            continue
        if time < arrival:
            since = together.get(stored.lineage)
            if since is None or arrival - since > CLOCK_TOLERANCE:
                since = together[stored.lineage] = arrival
            arrival = since
        yield replace(stored, dated=arrival)


def copied_without_times(found: Iterable[StoredBackup]) -> tuple[StoredBackup, ...]:
    """Return, by their arrival, the backups that came here by a copy which did not keep the times of files.

    A host stores them one after the other as it makes them, so nothing else brings several of one lineage
    within an hour that were made over more than a day, however wrong its clock.
    """
    late: dict[tuple[str, str, str], list[tuple[datetime, StoredBackup]]] = {}
    for stored in found:
        if stored.received is not None and stored.received - stored.backup.time > CLOCK_TOLERANCE:
            late.setdefault(stored.lineage, []).append((stored.received, stored))
    copied: list[tuple[datetime, StoredBackup]] = []
    for arrivals in late.values():
        arrivals.sort(key=lambda arrival: arrival[0])
        begin = 0
        for end in range(1, len(arrivals) + 1):
            if end == len(arrivals) or arrivals[end][0] - arrivals[begin][0] > CLOCK_TOLERANCE:
                together = arrivals[begin:end]
                times = [stored.backup.time for _, stored in together]
                if len(together) >= _COPIED_AT_LEAST and max(times) - min(times) > _COPIED_MADE_OVER:
                    copied += together
                begin = end
    return tuple(stored for _, stored in sorted(copied, key=lambda arrival: arrival[0]))
