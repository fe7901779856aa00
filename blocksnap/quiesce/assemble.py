"""From what a job says and the volumes it names to what has to stand still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from blocksnap.errors import BlocksnapError
from blocksnap.quiesce.base import Quiescer
from blocksnap.quiesce.filesystem import (
    FilesystemFlush,
    FilesystemFreeze,
    decide,
    protected_filesystems,
)
from blocksnap.quiesce.freezer import CgroupFreezer
from blocksnap.quiesce.hook import hook_of
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from blocksnap.system.freeze import Layer, layers_above


def assemble(settings: QuiesceSettings, devices: Iterable[int], protected_paths: Iterable[str]) -> Standstill:
    """Look everything up that is to stand still, in the order in which it will.

    ``devices`` are the numbers of those that snapshots are taken of, ``protected_paths`` what we write to
    ourselves. What cannot be found makes a standstill that has failed already.
    """
    made: list[Quiescer] = []
    try:
        # One by one: what was opened before one that fails is closed again.
        for each in _look_up(settings, devices, protected_paths):
            made.append(each)  # noqa: PERF402 - a list made in one go would be lost with its beginning
    except BlocksnapError as err:
        for each in made:
            each.close()
        return Standstill((), settings, err)
    return Standstill(made, settings)


def _look_up(
    settings: QuiesceSettings, devices: Iterable[int], protected_paths: Iterable[str]
) -> Iterator[Quiescer]:
    yield from (hook_of(hook) for hook in settings.hooks)
    yield from (CgroupFreezer.of_unit(unit) for unit in settings.units)
    yield from (CgroupFreezer.of_folder(folder) for folder in settings.cgroups)
    if settings.filesystems == "auto":
        yield from _of_filesystems(devices, protected_paths)


def _of_filesystems(devices: Iterable[int], protected_paths: Iterable[str]) -> Iterator[Quiescer]:
    layers: dict[int, Layer] = {}
    for device in devices:
        for layer in layers_above(device):
            known = layers.get(layer.mount.device)
            # Where several volumes carry one: what a snapshot freezes itself we may not freeze before.
            if known is None or known.depth > layer.depth:
                layers[layer.mount.device] = layer
    if not layers:
        return
    protected = protected_filesystems(protected_paths)
    for layer in sorted(layers.values(), key=lambda layer: -layer.depth):
        decision = decide(layer, protected)
        if decision.action == "freeze":
            yield FilesystemFreeze(layer)
        elif decision.action == "flush":
            yield FilesystemFlush(layer)
