"""The conformance suite on LVM: thin volumes without and with a base, and classic ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.conformance import Conformance, Kind
from support.kinds import ClassicKind, ThinKind, fill
from support.lvm_lab import ThinPool


class TestThin(Conformance):
    @pytest.fixture
    def kind(self, pool: ThinPool) -> Iterator[Kind]:
        made = ThinKind(pool, base=False)
        fill(made)
        yield made
        made.close()


class TestThinWithBase(Conformance):
    @pytest.fixture
    def kind(self, pool: ThinPool) -> Iterator[Kind]:
        made = ThinKind(pool, base=True)
        fill(made)
        yield made
        made.close()


class TestClassic(Conformance):
    @pytest.fixture
    def kind(self, pool: ThinPool) -> Iterator[Kind]:
        made = ClassicKind(pool.group)
        fill(made)
        yield made
        made.close()
