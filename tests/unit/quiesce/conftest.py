from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blocksnap.quiesce.assemble import assemble
from blocksnap.quiesce.settings import QuiesceSettings
from blocksnap.quiesce.standstill import Standstill
from support.require import require
from support.standing import hook_folder, safe_base

MakeStandstill = Callable[..., Standstill]


@pytest.fixture
def hooks() -> Iterator[Path]:
    require("hooks", safe_base() is not None, "no directory here is only ours, with all above it")
    with hook_folder() as folder:
        yield folder


@pytest.fixture
def attended(tmp_path: Path) -> Iterator[MakeStandstill]:
    """Make standstills that are attended and, at the end, closed."""
    made: list[Standstill] = []
    journal = os.open(tmp_path / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def make(**settings: Any) -> Standstill:
        standstill = assemble(QuiesceSettings.model_validate(settings), [], [])
        made.append(standstill)
        standstill.attend(journal, {"BLOCKSNAP_RUN": "run1", "BLOCKSNAP_VOLUMES": "vg/a\nvg/b"})
        return standstill

    yield make
    for standstill in made:
        standstill.end()
        standstill.close()
    os.close(journal)
