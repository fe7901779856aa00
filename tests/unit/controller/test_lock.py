from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blocksnap.controller.lock import VolumeBusyError, VolumeLocks
from blocksnap.errors import BusyError


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with VolumeLocks(tmp_path, [("key a", "vg/a"), ("key b", "vg/b")]):
        with (
            pytest.raises(BusyError) as caught,
            VolumeLocks(tmp_path, [("key b", "vg/b"), ("key c", "vg/c")]),
        ):
            pass
        assert caught.value.exit_code == 11
        message = str(caught.value)
        assert message.startswith(
            f"vg/b is held by another run: process {os.getpid()} on {os.uname().nodename} for "
        )
        # What it had taken before it failed is free again.
        with VolumeLocks(tmp_path, [("key c", "vg/c")]):
            pass
    with VolumeLocks(tmp_path, [("key a", "vg/a"), ("key b", "vg/b")]):
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from blocksnap.controller.lock import VolumeLocks\n"
        "VolumeLocks(sys.argv[1], [('k', 'v')]).__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with VolumeLocks(tmp_path, [("k", "v")]):
        pass


def test_holder_that_wrote_nothing_is_still_reported(tmp_path: Path) -> None:
    locks = VolumeLocks(tmp_path, [("k", "v")])
    with locks:
        (path,) = (tmp_path / "locks").iterdir()
        path.write_text("{")
        with (
            pytest.raises(VolumeBusyError, match=r"process \? on \?"),
            VolumeLocks(tmp_path, [("k", "v")]),
        ):
            pass


def test_one_that_waits_gets_it_when_it_is_free(tmp_path: Path) -> None:
    first = VolumeLocks(tmp_path, [("k", "vg/a")])
    first.__enter__()
    threading.Timer(0.3, first.release).start()
    with VolumeLocks(tmp_path, [("k", "vg/a")], wait_seconds=60):
        pass


def test_one_that_waited_in_vain_says_who_has_it(tmp_path: Path) -> None:
    with VolumeLocks(tmp_path, [("k", "vg/a")]):
        began = time.monotonic()
        with pytest.raises(VolumeBusyError, match=f"process {os.getpid()}"):
            VolumeLocks(tmp_path, [("k", "vg/a")], wait_seconds=0.3).__enter__()
        assert time.monotonic() - began >= 0.3
