# SPDX-License-Identifier: Apache-2.0
"""Skip a test whose prerequisite is missing, unless that was forbidden.

BLOCKSNAP_REQUIRE holds words joined by commas (lvm, btrfs, xfs, postgres, vagrant, root, ...). A
test that needs one of them fails where it would have been skipped, so that a machine which is
meant to run everything cannot quietly run less.
"""

from __future__ import annotations

import os

import pytest

VARIABLE = "BLOCKSNAP_REQUIRE"


def required_words() -> frozenset[str]:
    """The prerequisites that may not be missing on this machine."""
    return frozenset(word.strip() for word in os.environ.get(VARIABLE, "").split(",") if word.strip())


def require(word: str, available: bool, reason: str) -> None:
    """Return if `available`; otherwise skip the test, or fail it if `word` is required."""
    if available:
        return
    if word in required_words():
        pytest.fail(f"{VARIABLE} demands {word!r}: {reason}", pytrace=False)
    pytest.skip(f"needs {word}: {reason}")
