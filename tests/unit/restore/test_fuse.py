"""Which libfuse serves: the one that takes a connection that is mounted already."""

from __future__ import annotations

import subprocess
import sys

WHAT_IS_ASKED_FOR = """
import ctypes.util
asked, find = [], ctypes.util.find_library
ctypes.util.find_library = lambda name: (asked.append(name), find(name))[1]
import blocksnap.restore.fuse as fuse
fuse.require_libfuse()
print(asked)
"""


def test_libfuse_3_is_used_where_libfuse_2_is_installed_too() -> None:
    done = subprocess.run([sys.executable, "-c", WHAT_IS_ASKED_FOR], check=True, capture_output=True)
    assert done.stdout == b"['fuse3']\n"
