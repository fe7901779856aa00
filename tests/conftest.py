"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline makes a busy machine look like a broken program.
settings.register_profile("blocksnap", deadline=None)
settings.load_profile("blocksnap")
