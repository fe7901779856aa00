# SPDX-License-Identifier: Apache-2.0
"""Processes that begin as copies of the test's: nothing has to be imported, and they may die anywhere."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def exit_code_of(work: Callable[[], int]) -> int:
    """Do something in a child, which ends right after it, and return its exit code (-N: of signal N).

    Nothing of the test's own is closed, finished or written a second time there.
    """
    # What waits in a buffer would be written by both.
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = work()
    except BaseException:  # noqa: BLE001 - the child has nobody else to tell it to
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
