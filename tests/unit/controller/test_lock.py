from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocksnap.controller.lock import VolumeBusyError, VolumeLocks
from blocksnap.errors import BusyError


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with VolumeLocks(tmp_path, [("key a", "vg/a"), ("key b", "vg/b")], "run1"):
        with (
            pytest.raises(BusyError) as caught,
            VolumeLocks(tmp_path, [("key b", "vg/b"), ("key c", "vg/c")], "run2"),
        ):
            pass
        assert caught.value.exit_code == 11
        message = str(caught.value)
        assert message.startswith(
            f"vg/b is held by another run: process {os.getpid()} on {os.uname().nodename} for "
        )
        # What it had taken before it failed is free again.
        with VolumeLocks(tmp_path, [("key c", "vg/c")], "run3"):
            pass
    with VolumeLocks(tmp_path, [("key a", "vg/a"), ("key b", "vg/b")], "run2"):
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from blocksnap.controller.lock import VolumeLocks\n"
        "VolumeLocks(sys.argv[1], [('k', 'v')], 'r').__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with VolumeLocks(tmp_path, [("k", "v")], "run2"):
        pass


def test_holder_that_wrote_nothing_is_still_reported(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path, [("k", "v")], "run1")
    with locks:
        (path,) = (tmp_path / "locks").iterdir()
        path.write_text("{")
        with (
            pytest.raises(VolumeBusyError, match=r"process \? on \?"),
            VolumeLocks(tmp_path, [("k", "v")], "run2"),
        ):
            pass
