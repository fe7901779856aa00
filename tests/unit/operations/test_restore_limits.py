"""Which limits a restore goes by, and what they say of a pool."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocksnap.config_files import load
from blocksnap.controller.settings import LimitSettings
from blocksnap.operations.drill import drill_settings
from blocksnap.operations.restore_limits import restore_limits
from blocksnap.restore.pool_watch import RestoreLimits, room_left

MIB = 1 << 20


def stored_backup(volume: str, tags: dict[str, str]) -> Any:
    return SimpleNamespace(
        backup=SimpleNamespace(volume=SimpleNamespace(name=volume)), manifest=SimpleNamespace(tags=tags)
    )


TEXT = """
[defaults.limits]
restore_data_percent = 90
restore_wait_seconds = 1
[volumes.wal]
path = "vg0/wal"
limits = { restore_data_percent = 80 }
[volumes.logs]
path = "/dev/vg0/log-*"
limits = { restore_data_percent = 60 }
[jobs.shop]
volumes = ["vg0/shop", "wal", "logs"]
limits = { restore_metadata_percent = 70 }
"""


@pytest.mark.parametrize(
    ("volume", "job", "wanted"),
    [
        ("vg0/shop", "shop", RestoreLimits(90, 70, 1)),
        # Those of a volume stand in the place of all of the job's.
        ("vg0/wal", "shop", RestoreLimits(80, 95, 20)),
        ("vg0/log-2", "shop", RestoreLimits(60, 95, 20)),
        # It belonged to the job once.
        ("vg0/old", "shop", RestoreLimits(90, 70, 1)),
        ("vg0/shop", "of another host", RestoreLimits(90, 95, 1)),
        ("vg0/shop", None, RestoreLimits(90, 95, 1)),
    ],
)
def test_the_limits_are_those_of_the_job(
    tmp_path: Path, volume: str, job: str | None, wanted: RestoreLimits
) -> None:
    path = tmp_path / "b.toml"
    path.write_text(TEXT)
    configuration = load(str(path), required=True).configuration
    stored = stored_backup(volume, {"job": job} if job else {})
    assert restore_limits(configuration, stored) == wanted


def test_drills_of_backups_without_a_job_go_by_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    drill = "drill.command"
    path.write_text(
        f'[defaults]\n{drill} = ["/bin/false"]\n[jobs.a]\nvolumes = ["vg0/a"]\n{drill} = ["/bin/true"]\n'
    )
    configuration = load(str(path), required=True).configuration
    for tags, command in (({}, "/bin/false"), ({"job": "gone"}, "/bin/false"), ({"job": "a"}, "/bin/true")):
        assert drill_settings(stored_backup("vg0/a", tags), configuration).command == (command,)
    assert drill_settings(stored_backup("vg0/a", {}), None).command is None


def test_without_a_configuration_they_are_the_defaults() -> None:
    limits = LimitSettings().model_dump()
    said = RestoreLimits(**{each.name: limits[f"restore_{each.name}"] for each in fields(RestoreLimits)})
    assert restore_limits(None, stored_backup("vg0/shop", {})) == RestoreLimits() == said


@pytest.mark.parametrize(
    ("size_mib", "percent", "limit", "left_mib"),
    [
        (1000, 50, 98, 480),
        (1000, 98, 98, 0),
        (1000, 99, 98, -10),
        (1000, 50, 40, -100),
        # 8 MiB stay free, of a pool below 32 MiB a quarter.
        (100, 50, 98, 42),
        (24, 50, 98, 6),
        (24, 50, 50, 0),
    ],
)
def test_room_that_is_left(size_mib: int, percent: float, limit: float, left_mib: float) -> None:
    assert room_left(size_mib * MIB, percent, limit) == pytest.approx(left_mib * MIB)
