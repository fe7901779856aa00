"""The conformance suite on LVM: thin volumes without and with a base, and classic ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.conformance import Conformance, Kind
from support.in_process import InProcess
from support.kinds import ClassicKind, ThinKind, fill
from support.lvm_lab import ThinPool

SOAK = pytest.mark.skipif("BLOCKSNAP_SOAK" not in os.environ, reason="make soak-kinds runs it")


class TestThin(Conformance):
    @SOAK
    def test_killed_at_every_step(self, kind: Kind, blocksnap: InProcess) -> None:
        """In `make test` tests/lvm/test_doctor.py does this with thin volumes."""
        super().test_killed_at_every_step(kind, blocksnap)

    @pytest.fixture
    def kind(self, pool: ThinPool) -> Iterator[Kind]:
        made = ThinKind(pool, base=False)
        fill(made)
        yield made
        made.close()


class TestThinWithBase(Conformance):
    @SOAK
    def test_killed_at_every_step(self, kind: Kind, blocksnap: InProcess) -> None:
        """As above; tests/lvm/test_thin_bases.py kills runs while they rotate bases."""
        super().test_killed_at_every_step(kind, blocksnap)

    @SOAK
    def test_rounds_of_anything(self, kind: Kind, blocksnap: InProcess) -> None:
        """In `make test` tests/lvm/test_rounds.py does this with thin volumes."""
        super().test_rounds_of_anything(kind, blocksnap)

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


@SOAK
@pytest.mark.parametrize("layers", ["raid1", "cache", "writecache"])
class TestClassicOnLayers(Conformance):
    """In `make test` tests/lvm/test_classic_layers.py has what is particular to them."""

    @pytest.fixture
    def kind(self, pool: ThinPool, layers: str) -> Iterator[Kind]:
        made = ClassicKind(pool.group, layers)
        fill(made)
        yield made
        made.close()
