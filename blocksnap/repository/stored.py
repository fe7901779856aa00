"""Backups together with the runs that stored them, and which clock to believe of when that was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from blocksnap.repository.documents import Backup, Manifest

CLOCK_TOLERANCE = timedelta(hours=1)
"""Where a backup arrives later, or earlier, its host's clock is not believed: storing takes its time, too."""


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
        stored = self.backup.time + timedelta(seconds=self.backup.statistics.seconds)
        return abs(self.received - stored) > CLOCK_TOLERANCE

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
