"""Installing as the README says: a wheel built from the checkout, in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pip_install_into_a_new_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [tmp_path / "venv" / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Unlike an option, these reach the pip that fills the environment of the build, too.
    patience = {"PIP_RETRIES": "10", "PIP_DEFAULT_TIMEOUT": "60"}
    subprocess.run(
        [*pip, f"--config-settings=build-dir={tmp_path / 'build'}", ROOT],
        check=True,
        cwd=tmp_path,
        env={**os.environ, **patience},
    )
    blocksnap = tmp_path / "venv" / "bin" / "blocksnap"
    shown = subprocess.run([blocksnap, "--version"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert shown.stdout.startswith("blocksnap ")
    native = "import blocksnap._native as n; print(n.__file__)"
    found = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", native],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.stdout.strip().endswith(".abi3.so")
    assert str(tmp_path) in found.stdout
    # The watchdog is a program of its own, and installed as one.
    watchdog = "from blocksnap.system.watchdog import Watchdog; print(Watchdog([], 10.0).close(10.0))"
    kept = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", watchdog],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert kept.stdout == "True\n"
