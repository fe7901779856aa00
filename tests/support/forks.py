# SPDX-License-Identifier: Apache-2.0
"""Processes that begin as copies of the test's: nothing has to be imported, and they may die anywhere."""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from typing import NoReturn

import blocksnap
from blocksnap.cli import main
from blocksnap.repository import keys

_IMPORTED_LATE = (
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.asymmetric.x25519",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.kdf.argon2",
    "getpass",
    "sh",
    "zstandard",
)
"""What the package's functions import from elsewhere; what is not named here is imported in each copy."""


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


@cache
def load_everything() -> None:
    """Import whatever commands import when they need it: a copy of this process then has it."""
    for module in pkgutil.walk_packages(blocksnap.__path__, "blocksnap."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in _IMPORTED_LATE:
        importlib.import_module(name)


def become_blocksnap(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be what ``python -m blocksnap`` would be, in a child of which no more is ours than 0, 1 and 2.

    What an interpreter begins with is made so again: signals, streams, hooks and the environment. Keys are
    derived at the lowest cost that is allowed.
    """
    # Were objects of the test's freed here, they would close descriptors that have their numbers by then.
    gc.freeze()
    os.closerange(3, 1 << 20)
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.stdin = open(0, encoding=sys.__stdin__.encoding, errors=sys.__stdin__.errors)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=sys.__stdout__.encoding, errors=sys.__stdout__.errors)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=sys.__stderr__.encoding, errors=sys.__stderr__.errors)  # noqa: SIM115
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    logging.getLogger().handlers.clear()
    sys.argv = [blocksnap.__file__, *arguments]
    _forget()
    keys.DEFAULT_COST = keys.MINIMUM_COST
    code = 1
    try:
        code = main.run(arguments)
        threading._shutdown()
    except BaseException:  # noqa: BLE001 - as an interpreter ends by one that nobody expects
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget() -> None:
    """Empty what functions of blocksnap keep of earlier calls in this process."""
    for name, module in sys.modules.items():
        if name.startswith("blocksnap."):
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
