"""After a repair every backup restores as it was, or what of it is lost is told exactly.

Each object of a small repository is flipped, cut, deleted, or changed for another one. The loss that repair
tells has to be what a restore with zeros in the place of the missing lacks.
"""

from __future__ import annotations

import io
import os
import random
from itertools import pairwise

import pytest

from blocksnap.operations.catalogue import find_backup, map_root
from blocksnap.operations.repair import RepairOptions, repair
from blocksnap.operations.reporting import Quiet
from blocksnap.operations.restore import execute_restore, plan_restore
from blocksnap.repository.check import Checker
from blocksnap.repository.repair_plan import RepairPlan
from blocksnap.repository.repository import Repository
from support.tampering import Changing, Objects, Scene, make_scene

STRIDE = 1 if os.environ.get("BLOCKSNAP_SOAK") else 401


@pytest.fixture(scope="module", params=[True, False], ids=["encrypted", "plain"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene") / "made", encrypted=request.param)


def mend(scene: Scene, objects: Objects, *, accept_loss: bool = False) -> tuple[Repository, RepairPlan]:
    """Repair what all packs' hashes and all maps tell; return the repository as the next one opens it."""
    backend = Changing(objects)
    trusted = scene.trusted
    repository = Repository(backend, trusted.config, trusted.keys)
    suspects = frozenset(name for name in objects if name.startswith("packs/"))
    result = repair(repository, suspects, RepairOptions(accept_loss=accept_loss), Quiet())
    return Repository(backend, trusted.config, trusted.keys), result.plan


def require_told_exactly(scene: Scene, repository: Repository, plan: RepairPlan) -> dict[str, int]:
    """Compare every restore with what was told to be lost; return the lost bytes of each backup."""
    listed = {stored.backup.id for stored in repository.backups()}
    lost: dict[str, int] = {}
    for id_, content in scene.contents.items():
        if id_ not in listed:
            assert plan.manifests
            lost[id_] = len(content)
            continue
        out, backup = io.BytesIO(), find_backup(repository, id_).backup
        restore = plan_restore(backup, "-")
        result = execute_restore(repository, restore, out, Quiet(), verify=False, missing="zero")
        told = tuple((loss.offset, loss.length) for loss in plan.losses if loss.backup == id_)
        assert result.missing == told
        expected = bytearray(content)
        for offset, length in told:
            expected[offset : offset + length] = bytes(length)
        assert out.getvalue() == expected
        lost[id_] = sum(length for _, length in told)
    return lost


def require_sound_but_for(repository: Repository, plan: RepairPlan) -> None:
    checker = Checker(repository, map_root, lambda _: None)
    checker.check_structure()
    checker.check_packs()
    checker.name_losses()
    losses = {(loss.backup, loss.offset) for loss in checker.result.losses}
    assert losses == {(loss.backup, loss.offset) for loss in plan.losses}
    told = [finding.object for finding in checker.result.findings if "mapped" in finding.message]
    assert sorted(told) == sorted(f"backup {who}" for who in plan.unmapped)
    damage = [finding for finding in checker.result.findings if finding.severity == "damage"]
    unreadable = {bad.name for bad in plan.manifests}
    assert plan.lost or {finding.object for finding in damage} <= unreadable | {"config"}, damage


def harmed(scene: Scene, name: str) -> list[dict[str, bytes]]:
    """Return what may become of a repository when one object is harmed, a few of each sort."""
    content, luck = scene.objects[name], random.Random(name)
    found = []
    for position in range(luck.randrange(min(STRIDE, len(content))), len(content), STRIDE):
        flipped = bytearray(content)
        flipped[position] ^= 1 << luck.randrange(8)
        found.append({**scene.objects, name: bytes(flipped)})
    lengths = (0, luck.randrange(len(content)), len(content) - 1)
    found += [{**scene.objects, name: content[:length]} for length in lengths]
    found.append({other: stored for other, stored in scene.objects.items() if other != name})
    return found


def names_of(scene: Scene) -> list[str]:
    return [name for name in scene.objects if name.startswith(("packs/", "index/", "manifests/"))]


def test_whatever_is_harmed_is_mended_or_told(scene: Scene) -> None:
    mended = told = 0
    for name in names_of(scene):
        for objects in harmed(scene, name):
            repository, plan = mend(scene, objects)
            gone = name.startswith("manifests/") and name not in objects
            if gone:
                # The run's last record says that it was there.
                assert [(bad.name, bad.reason) for bad in plan.manifests] == [(name, "it is gone")]
                continue
            lost = require_told_exactly(scene, repository, plan)
            require_sound_but_for(repository, plan)
            if name.startswith("index/"):
                assert not any(lost.values()), name
            mended += not any(lost.values())
            told += any(lost.values())
    assert mended
    assert told


def test_objects_changed_for_one_another(scene: Scene) -> None:
    """Packs that have each other's names lose nothing: their frames tell what they are."""
    for folder in ("packs/", "index/"):
        names = scene.names(folder)
        for one, other in pairwise(names):
            swapped = {**scene.objects, one: scene.objects[other], other: scene.objects[one]}
            repository, plan = mend(scene, swapped)
            assert not any(require_told_exactly(scene, repository, plan).values())
            require_sound_but_for(repository, plan)


def test_all_of_the_index_comes_back(scene: Scene) -> None:
    objects = {name: content for name, content in scene.objects.items() if not name.startswith("index/")}
    repository, plan = mend(scene, objects)
    assert plan.listed
    assert plan.is_whole
    require_told_exactly(scene, repository, plan)
    require_sound_but_for(repository, plan)


def test_packs_without_tables_and_an_index_without_segments(scene: Scene) -> None:
    """What is left are frames, and each says what it is."""
    objects = {
        name: content[:-20] if name.startswith("packs/") else content
        for name, content in scene.objects.items()
        if not name.startswith("index/")
    }
    repository, plan = mend(scene, objects)
    assert plan.is_whole
    require_told_exactly(scene, repository, plan)
    require_sound_but_for(repository, plan)


def test_a_second_repair_has_nothing_to_do(scene: Scene) -> None:
    luck = random.Random(5)
    for name in names_of(scene):
        objects = luck.choice(harmed(scene, name))
        repository, first = mend(scene, objects)
        before = dict(repository.backend.objects)  # type: ignore[attr-defined]
        again, second = mend(scene, before)
        if name not in objects and name.startswith("manifests/"):
            continue
        assert not second.acts, name
        assert second.losses == first.losses
        assert again.backend.objects == before  # type: ignore[attr-defined]
