"""Random histories of a thin pool: the difference of any two snapshots, by the core, the tool and a model.

A pool of device-mapper's own, on a disk of no volume group; BLOCKSNAP_SOAK_ROUNDS multiplies the rounds.
"""

from __future__ import annotations

import os

import pytest

from blocksnap import _native
from blocksnap.extents.model import ExtentList
from support.dm_pool import DmPool, delta_by_model, delta_by_tool, diff, dm_pool, holding, read_metadata

KIB = 1 << 10
SOAK = int(os.environ.get("BLOCKSNAP_SOAK_ROUNDS", "1"))


@pytest.mark.parametrize("chunk_size", [64 * KIB, 192 * KIB])
@pytest.mark.timeout(max(900, 300 * SOAK))
@pytest.mark.usefixtures("_lab")
def test_random_histories_against_the_tool_and_the_model(chunk_size: int) -> None:
    """Any two snapshots, of any ages, after anything; and what the times say is never less than that."""
    with dm_pool(seed=chunk_size, chunk_size=chunk_size) as pool:
        pool.write(40)
        pool.snapshot()
        for _ in range(6 * SOAK):
            pool.disturb()
            pool.snapshot()
            first, second = sorted(pool.dice.sample(pool.snapshots, 2))
            _check(pool, first, second)
            if len(pool.snapshots) > 6:
                pool.drop()


def _check(pool: DmPool, first: int, second: int) -> None:
    fd = os.open(pool.metadata, os.O_RDONLY | os.O_DIRECT)
    try:
        older, newer = (_native.thin_device(fd, each, 0) for each in (first, second))
        found = diff(fd, first, second)
        since, bitmap, _, _ = _native.thin_scan(fd, second, older[11], 0, pool.nr_chunks, False, 0)
    finally:
        os.close(fd)
    with holding(pool.name):
        assert delta_by_tool(pool.metadata, first, second, pool.chunk_size) == found
    model = read_metadata(pool.metadata)
    assert delta_by_model(model, first, second) == found
    assert (newer[8], newer[9]) == (model.devices()[second].root, len(model.mappings(second)))
    mapped = model.mappings(second)
    assert bitmap == sum(1 << chunk for chunk in mapped).to_bytes(len(bitmap), "little")
    size = pool.chunk_size
    by_time = ExtentList.of((c * size, size) for c, (_, time) in sorted(mapped.items()) if time >= older[11])
    assert ExtentList(since) == by_time
    assert found[0].intersect(by_time).total == found[0].total
