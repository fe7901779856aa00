from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from blocksnap.config import Configuration
from blocksnap.operations.timers import MARK, ForeignUnitError, install_units, plan_units

CONFIGURATION = Configuration.model_validate(
    {
        "repository": "main",
        "repositories": {
            "main": {"url": "/r", "prune_schedule": "Sun 06:00"},
            "other": {"url": "/s"},
        },
        "jobs": {
            "one": {"volumes": ["v/a"], "schedule": "daily", "retention": {"daily": 3}},
            "two": {"volumes": ["v/b"], "retention": {"daily": 3}, "repository": "other", "drill": {}},
            "three": {
                "volumes": ["v/c"],
                "retention": {"last": 3},
                "repository": "file:///r/",
                "drill": {"schedule": "weekly"},
            },
        },
    }
)


def units(configuration: Configuration = CONFIGURATION, path: str = "/etc/b s/50%.toml") -> dict[str, str]:
    return {unit.name: unit.text for unit in plan_units(configuration, "/usr/bin/blocksnap", path)}


def test_what_has_a_schedule_gets_a_timer() -> None:
    planned = units()
    assert list(planned) == [
        "blocksnap-backup-one.service",
        "blocksnap-backup-one.timer",
        "blocksnap-drill-three.service",
        "blocksnap-drill-three.timer",
        "blocksnap-prune-main.service",
        "blocksnap-prune-main.timer",
    ]
    commands = [
        line
        for name in planned
        for line in planned[name].splitlines()
        if line.startswith(("ExecStart=", "OnCalendar="))
    ]
    tail = '--config "/etc/b s/50%%.toml"'
    assert commands == [
        f"ExecStart=/usr/bin/blocksnap backup --job one {tail}",
        "OnCalendar=daily",
        f"ExecStart=/usr/bin/blocksnap drill --job three {tail}",
        "OnCalendar=weekly",
        f"ExecStart=/usr/bin/blocksnap forget --job one {tail}",
        f"ExecStart=/usr/bin/blocksnap forget --job three {tail}",
        f"ExecStart=/usr/bin/blocksnap prune --repo main --wait 3600 {tail}",
        "OnCalendar=Sun 06:00",
    ]


def test_systemd_takes_them(tmp_path: Path) -> None:
    from support.require import require

    found = subprocess.run(["which", "systemd-analyze"], check=False, capture_output=True).returncode == 0
    require("systemd", found, "systemd-analyze is not installed")
    for unit in plan_units(CONFIGURATION, "/bin/true", "/etc/b s/50%.toml"):
        (tmp_path / unit.name).write_text(unit.text)
    done = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            "--recursive-errors=no",
            *map(str, sorted(tmp_path.iterdir())),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    complaints = [line for line in done.stderr.splitlines() if "blocksnap" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_installing_replaces_and_removes_only_ours(tmp_path: Path) -> None:
    planned = plan_units(CONFIGURATION, "/usr/bin/blocksnap", "/etc/b.toml")
    (tmp_path / "blocksnap-mine.service").write_text("[Unit]\n")
    (tmp_path / "blocksnap-backup-old.timer").write_text(MARK)
    drop_ins = tmp_path / "blocksnap-backup-one.service.d"
    drop_ins.mkdir()
    (drop_ins / "override.conf").write_text(f"{MARK}[Service]\n")
    (tmp_path / "blocksnap-masked.timer").symlink_to("nowhere")
    done = install_units(planned, str(tmp_path), activate=False)
    assert (len(done.written), done.removed, done.unchanged) == (6, ("blocksnap-backup-old.timer",), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["blocksnap-mine.service", "blocksnap-masked.timer", drop_ins.name, *(unit.name for unit in planned)]
    )
    again = install_units(planned, str(tmp_path), activate=False)
    assert (again.written, again.removed, len(again.unchanged)) == ((), (), 6)
    (tmp_path / planned[1].name).write_text("[Timer]\n")
    with pytest.raises(ForeignUnitError):
        install_units(planned, str(tmp_path), activate=False)
    assert (tmp_path / planned[1].name).read_text() == "[Timer]\n"
    assert (drop_ins / "override.conf").exists()
