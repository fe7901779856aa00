# SPDX-License-Identifier: Apache-2.0
"""Commands that die in the middle, as by kill -9, at a step of one's choice."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from blocksnap.cli.main import run
from blocksnap.controller.journal import Journal
from blocksnap.system import clones, lvm
from blocksnap.volumes import image
from support.forks import exit_code_of

_LVM_STEPS = (
    "create_thin_snapshot",
    "create_classic_snapshot",
    "activate",
    "deactivate",
    "mark_base",
    "remove_snapshot",
)


def dead_after(owner: type | ModuleType, name: str, *, when: bool = True) -> None:
    """Have this process die right after the first call of a function."""
    real = getattr(owner, name)

    def wrapped(*arguments: object, **named: object) -> object:
        result = real(*arguments, **named)
        os._exit(9)
        return result

    if when:
        setattr(owner, name, wrapped)


def killed(step: int, *words: str) -> bool:
    """Run a command in a child that dies right after its n-th step, and return whether it died.

    Steps are the lines of the journal, and whatever changes what is on the host: LVM's commands, clones.
    """
    left = step

    def around(owner: type | ModuleType, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: object, **named: object) -> object:
            nonlocal left
            result = real(*arguments, **named)
            if left == 0:
                os._exit(9)
            left -= 1
            return result

        setattr(owner, name, wrapped)

    def work() -> int:
        for name in ("append_all", "finish"):
            around(Journal, name)
        for name in _LVM_STEPS:
            around(lvm, name)
        for name in ("make_clone", "remove_clone"):
            around(clones, name)
        around(image, "_write_mark")
        return run(list(words))

    return exit_code_of(work) != 0


def kill_when(
    happens: Callable[[], bool], start: Callable[[], subprocess.Popen[bytes]], target: Path
) -> None:
    """Kill a command as soon as something is true; one that was faster is begun again, without its target."""
    for _ in range(20):
        process = start()
        while not happens() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        _, said = process.communicate()
        if process.returncode < 0 and not target.exists():
            return
        assert process.returncode <= 0, said
        shutil.rmtree(target)
    raise AssertionError("it was always faster")
