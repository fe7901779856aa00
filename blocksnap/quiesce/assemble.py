"""From what a job says and the volumes it names to what has to stand still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from blocksnap.errors import BlocksnapError
from blocksnap.quiesce.base import Agent, Quiescer
from blocksnap.quiesce.errors import FilesystemFreezeError, MisplacedError
from blocksnap.quiesce.filesystem import (
    Decision,
    FilesystemFlush,
    FilesystemFreeze,
    decide,
    is_mounted,
    protected_filesystems,
)
from blocksnap.quiesce.freezer import CgroupFreezer
from blocksnap.quiesce.hook import hook_of
from blocksnap.quiesce.places import Placement, Target, VolumeKeys
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Stages, Standstill
from blocksnap.system.freeze import Layer, layers_above


def assemble(
    settings: QuiesceSettings,
    targets: Iterable[Target],
    protected_paths: Iterable[str],
    *,
    reading: bool = False,
) -> Standstill:
    """Look everything up that is to stand still, in the order in which it will.

    ``targets`` are what snapshots are taken of, ``protected_paths`` what we write to ourselves. What cannot
    be found makes a standstill that has failed already. ``reading``: it lasts until everything was read.
    """
    found = _Found(settings, tuple(targets), tuple(protected_paths))
    try:
        found.look()
    except BlocksnapError as err:
        # What was opened before is closed again.
        found.close()
        return Standstill((), settings, err, reading=reading)
    except BaseException:
        found.close()
        raise
    return Standstill(found.quiescers(), settings, stages=found.stages(), reading=reading)


@dataclass(slots=True)
class _Found:
    """What was found so far, one by one, so that nothing is lost that is open."""

    settings: QuiesceSettings
    targets: tuple[Target, ...]
    protected_paths: tuple[str, ...]
    hooks: list[Quiescer] = field(default_factory=list)
    agents: list[Agent] = field(default_factory=list)
    guests: list[Quiescer] = field(default_factory=list)
    freezers: list[CgroupFreezer] = field(default_factory=list)
    filesystems: list[tuple[Quiescer, bool]] = field(default_factory=list)
    late: VolumeKeys = frozenset()

    def look(self) -> None:
        """Find everything; raises BlocksnapError."""
        settings = self.settings
        # A list that is made in one go would be lost with what is open in it.
        for hook in settings.hooks:
            self.hooks.append(hook_of(hook))
        for unit in settings.units:
            self.freezers.append(CgroupFreezer.of_unit(unit))
        for folder in settings.cgroups:
            self.freezers.append(CgroupFreezer.of_folder(folder))
        decisions = _decide(self.targets, self.protected_paths) if settings.filesystems == "auto" else []
        if settings.postgresql or settings.mariadb or settings.guests == "auto":
            frozen = [each.layer.mount.device for each, _ in decisions if each.action == "freeze"]
            self._look_at_applications(Placement(self.targets, frozen))
        self.late = frozenset().union(*(agent.late for agent in self.agents))
        for agent in self.agents:
            if agent.early & self.late:
                raise MisplacedError(
                    agent.name,
                    "has files on a volume with the log of another server",
                    "back the two up in two jobs, or freeze the units of both: units = [...]",
                )
        for decision, under in decisions:
            if under & self.late and not under <= self.late:
                raise MisplacedError(
                    f"the filesystem on {decision.layer.mount.point}",
                    "spans volumes that one snapshot cannot be taken of at the same time",
                    "freeze the unit of the server that writes to it instead: units = [...]",
                )
            self.filesystems += [(each, bool(under & self.late)) for each in _stop(decision)]

    def quiescers(self) -> list[Quiescer]:
        """Return everything in the order in which it is begun."""
        filesystems = [each for each, _ in self.filesystems]
        return [*self.hooks, *self.agents, *self.guests, *self.freezers, *filesystems]

    def stages(self) -> Stages:
        """Return who has a say in the order of the snapshots, and what stands still for a part of it."""
        if not self.late:
            return Stages(tuple(self.agents))
        return Stages(
            tuple(self.agents),
            self.late,
            tuple(each for each, is_late in self.filesystems if not is_late),
            tuple(each for each, is_late in self.filesystems if is_late),
        )

    def close(self) -> None:
        """Close everything."""
        for each in self.quiescers():
            each.close()

    def _look_at_applications(self, placement: Placement) -> None:
        from blocksnap.quiesce.libvirt import guests_on
        from blocksnap.quiesce.mariadb import MariadbAgent
        from blocksnap.quiesce.postgresql import PostgresqlAgent

        frozen = [str(freezer.folder) for freezer in self.freezers]
        for each in self.settings.postgresql:
            self.agents.append(PostgresqlAgent(each, placement, frozen))
        for server in self.settings.mariadb:
            self.agents.append(MariadbAgent(server, placement, frozen))
        if self.settings.guests == "auto":
            self.guests += guests_on(placement, self.settings.libvirt_uri)


def _decide(targets: Iterable[Target], protected_paths: Iterable[str]) -> list[tuple[Decision, VolumeKeys]]:
    """Return what is to be done about each filesystem above volumes, and the volumes under it."""
    layers = _layers(targets)
    protected = protected_filesystems(protected_paths) if layers else set()
    return [(decide(layer, protected), under) for layer, under in layers]


def _stop(decision: Decision) -> Iterator[Quiescer]:
    if decision.action == "freeze":
        try:
            found = FilesystemFreeze(decision.layer)
        except FilesystemFreezeError:
            # Who has unmounted it since it was found has ended all writing to it.
            if is_mounted(decision.layer.mount.device):
                raise
        else:
            yield found
    elif decision.action == "flush":
        yield FilesystemFlush(decision.layer)


def _layers(targets: Iterable[Target]) -> list[tuple[Layer, VolumeKeys]]:
    """Return the filesystems above volumes, the deepest first, each with the volumes under it."""
    layers: dict[int, Layer] = {}
    under: dict[int, set[str]] = {}
    for target in targets:
        for layer in layers_above(target.device):
            number = layer.mount.device
            known = layers.get(number)
            # Where several volumes carry one: what a snapshot freezes itself we may not freeze before.
            if known is None or known.depth > layer.depth:
                layers[number] = layer
            under.setdefault(number, set()).add(target.key)
    ordered = sorted(layers.values(), key=lambda layer: -layer.depth)
    return [(layer, frozenset(under[layer.mount.device])) for layer in ordered]
