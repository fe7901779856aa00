# SPDX-License-Identifier: Apache-2.0
"""Instant restores near their end: stores that fail, are full or are lost, and what can never be finished."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocksnap.system import lvm_config
from support.in_process import InProcess
from support.instant_restore import MIB, NAME, device_name, nothing_is_left, restoring
from support.lvm_lab import ThinPool, switch, tool
from support.shown import abort
from support.used_volume import (
    BLOCK,
    KILLED_WHEN_WHOLE,
    QUICK,
    SIZE,
    Expected,
    backed_up,
    failing_from,
    part,
    take_devices_away,
    using,
    warned_of,
)

soak = pytest.mark.skipif(not os.environ.get("BLOCKSNAP_SOAK"), reason="make soak-instant")
WHEN_THE_MERGE_IS_LOADED = """
import os
import subprocess
from blocksnap.system import dm_tables
load = dm_tables._with_table
def loaded(table, *words):
    load(table, *words)
    if "snapshot-merge" in table:
        subprocess.run(os.environ["WHEN_LOADED"], shell=True, check=False)
dm_tables._with_table = loaded
"""
KILLED_BEFORE_THE_MERGE = """
import os
import threading
from blocksnap.system import command
from blocksnap.system.devmapper import suspended_devices
own, locate = os.getpid(), command._locate
def located(program):
    if (os.getpid(), threading.current_thread().name) == (own, "MainThread") and suspended_devices():
        os.kill(own, 9)
    return locate(program)
command._locate = located
"""
KILLED_BEFORE_THE_TAG_GOES = """
import os
from blocksnap.system import lvm
lvm.delete_tag = lambda *words: os.kill(os.getpid(), 9)
"""


@pytest.fixture
def content(pool: ThinPool, blocksnap: InProcess, tmp_path: Path) -> Iterator[Expected]:
    with backed_up(pool, blocksnap, tmp_path) as expected:
        yield expected


def test_a_store_that_fails_right_before_the_merge_is_not_merged(
    pool: ThinPool, content: Expected, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A device that merges would answer with what was there before, and write where it is written over."""
    volume, store, broken = f"{pool.group}/{NAME}", part(pool, "meanwhile"), tmp_path / "table"
    with restoring("latest", volume, "--classic", prelude=QUICK + KILLED_BEFORE_THE_MERGE) as first:
        device = first.until("usable")["device"]
        with using(device, content) as application:
            application.write_here_and_there(50)
            assert first.ended() == -signal.SIGKILL
            # It stood still, and goes on.
            columns = ("--columns", "--noheadings", "-o", "suspended")
            assert tool("dmsetup", "info", *columns, device_name(pool)).strip() == "Active"
            assert application.failing() == 0
            application.write_here_and_there(20)
            table = tool("dmsetup", "table", store)
            broken.write_text(failing_from(table, 0))
            write = f"dd if=/dev/zero of={device} bs={BLOCK} count=1 seek=99 oflag=direct"
            breaking = f"dmsetup load {store} {broken} && dmsetup suspend --nolockfs --noflush {store}"
            monkeypatch.setenv("WHEN_LOADED", f"{breaking} && dmsetup resume {store}; {write}")
            content.wrote(99 * BLOCK, bytes(BLOCK), surely=False)
            with restoring("--resume", volume, prelude=QUICK + WHEN_THE_MERGE_IS_LOADED) as second:
                assert second.ended() == 1
                error = second.events[-1]
                assert (error["event"], error["error"]) == ("error", "WritesFailedError"), error
            assert application.failing() > 0
            with pytest.raises(OSError, match="Input/output error"):
                application.write(0)
    switch(store, table)
    with restoring("--resume", volume, prelude=QUICK) as third:
        assert third.done() == 0
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
def test_a_store_that_was_full_is_made_larger_after_a_crash_too(pool: ThinPool, content: Expected) -> None:
    volume, slow = f"{pool.group}/{NAME}", ("--rate", "2M")
    words = ("latest", volume, "--classic", "--write-room", "4M", *slow)
    with restoring(*words, prelude=QUICK) as first:
        device = first.until("usable")["device"]
        with using(device, content) as application, pytest.raises(OSError, match="Input/output error"):
            application.write_everywhere()
        first.end(signal.SIGKILL)
    take_devices_away(pool)
    tool("lvcreate", "-y", "-qq", "-l", "100%FREE", "-n", "other", pool.group)
    try:
        with restoring("--resume", volume, *slow, prelude=QUICK) as second:
            # It cannot be made larger now, and is of use all the same.
            assert "make room" in warned_of(second, "cannot be made larger")
            second.until("usable")
            with using(device, content) as again:
                assert again.failing() == 0
            second.end(signal.SIGKILL)
        take_devices_away(pool)
    finally:
        pool.remove("other")
    with restoring("--resume", volume, *slow, prelude=QUICK) as third:
        third.until("usable")
        with using(device, content) as again:
            again.write_everywhere()
        assert third.done() == 0
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
def test_a_store_that_fails_is_told_while_no_data_arrives(pool: ThinPool, content: Expected) -> None:
    volume, store = f"{pool.group}/{NAME}", part(pool, "meanwhile")
    with restoring("latest", volume, "--classic", "--rate", "3M", prelude=QUICK) as run:
        device = run.until("usable")["device"]
        tool("lvreduce", *lvm_config.settings(), "-f", "-y", "-qq", "-L", "8M", f"{volume}-arriving")
        warned_of(run, "was made smaller")
        with using(device, content) as application:
            switch(store, failing_from(tool("dmsetup", "table", store), 0))
            with pytest.raises(OSError, match="Input/output error"):
                application.write(0)
            warned_of(run, "has failed")


@soak
def test_images_that_are_not_served_any_more_are_told_and_waited_for(
    pool: ThinPool, content: Expected, tmp_path: Path
) -> None:
    volume = f"{pool.group}/{NAME}"
    with restoring("latest", volume, "--rate", "2M", prelude=QUICK) as first:
        device = first.until("usable")["device"]
        with using(device, content) as application:
            abort(first.process.pid, "/sys/fs/fuse/connections/images", tmp_path / "connections")
            assert "--resume" in warned_of(first, "FUSE connection was aborted")
            application.write_here_and_there(20)
            failing: list[int] = []
            reader = threading.Thread(target=lambda: failing.append(application.failing()))
            reader.start()
            reader.join(1)
            assert reader.is_alive()
            first.end(signal.SIGKILL)
            with restoring("--resume", volume, prelude=QUICK) as second:
                assert second.done() == 0
            reader.join(60)
            assert failing == [0]
    nothing_is_left(pool, NAME)
    assert content.differing(0, Path(device).read_bytes()[:SIZE]) == []


@soak
def test_what_can_never_be_finished_is_given_up(
    pool: ThinPool, blocksnap: InProcess, content: Expected, tmp_path: Path
) -> None:
    """All has arrived, and then what was written cannot be read, a disk is gone, or the volume itself."""
    volume = f"{pool.group}/{NAME}"
    words = ("latest", volume, "--classic")

    def given_up() -> None:
        blocksnap.done("restore", "--instant", "--abandon", volume)
        assert [name for name in pool.names() if name.startswith(NAME)] == []
        findings = json.loads(blocksnap("doctor", "--json")[1])["findings"]
        assert [each for each in findings if each["subject"] == volume] == []

    def cannot_go_on(words: str) -> None:
        code, _, err = blocksnap("restore", "--instant", "--resume", volume)
        assert (code, words in err, f"--abandon {volume}" in err) == (1, True, True), err

    with restoring(*words, prelude=QUICK + KILLED_WHEN_WHOLE) as run:
        assert run.ended() == -signal.SIGKILL
    code, _, err = blocksnap("restore", "--instant", "--abandon", volume)
    assert (code, "go on with --resume" in err) == (1, True), err
    take_devices_away(pool)
    tool("lvchange", "-ay", f"{volume}-meanwhile")
    switch(part(pool, "meanwhile"), failing_from(tool("dmsetup", "table", part(pool, "meanwhile")), 0))
    cannot_go_on("Input/output error")
    given_up()

    with restoring(*words, prelude=QUICK + KILLED_WHEN_WHOLE) as run:
        assert run.ended() == -signal.SIGKILL
    (tmp_path / "disk").write_bytes(bytes(20 * MIB))
    loop = tool("losetup", "--find", "--show", str(tmp_path / "disk")).strip()
    try:
        take_devices_away(pool)
        tool("vgextend", "-y", pool.group, loop)
        tool("lvextend", "-qq", "-L", "+8M", f"{volume}-meanwhile", loop)
        tool("losetup", "--detach", loop)
        cannot_go_on("cannot be activated")
        given_up()
    finally:
        tool("vgreduce", "--removemissing", "--force", pool.group)

    with restoring(*words, prelude=QUICK + KILLED_BEFORE_THE_TAG_GOES) as run:
        assert run.ended() == -signal.SIGKILL
    pool.remove(NAME)
    cannot_go_on(f"{volume} is gone")
    given_up()
