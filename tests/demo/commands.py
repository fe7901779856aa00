# SPDX-License-Identifier: Apache-2.0
"""Run a program, or say what became of it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping

TIMEOUT_SECONDS = 240


class DemoError(Exception):
    """The demo cannot go on, or has shown what it must not show; the text says which."""


def run(*argv: str, user: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a program and return its standard output; raises DemoError unless it ends with 0.

    As another user it runs in the root directory, because ours need not be open to that user.
    """
    try:
        ended = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_SECONDS,
            cwd="/" if user else None,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DemoError(f"{shlex.join(argv)}: {err}") from err
    if ended.returncode:
        said = "\n".join([*ended.stdout.splitlines()[-10:], *ended.stderr.splitlines()[-20:]])
        raise DemoError(f"{shlex.join(argv)} ended with {ended.returncode}:\n{said}")
    return ended.stdout
