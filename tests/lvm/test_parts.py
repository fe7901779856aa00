"""A volume group on logical volumes: what is striped over some is a part where not all are backed up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from support.in_process import InProcess
from support.lvm_lab import ThinPool, tool

INNER = "blocksnap-inner"
_ALLOWED = ("--config", "devices { scan_lvs = 1 }")


@contextmanager
def striped(pool: ThinPool, *volumes: str) -> Iterator[str]:
    """A volume group in volumes, and a volume striped over them; yield its name."""
    nodes = [pool.node(name) for name in volumes]
    tool("vgcreate", "--yes", *_ALLOWED, INNER, *nodes)
    try:
        how = ("-i", str(len(nodes)), "-L", "16M", "--wipesignatures=n")
        tool("lvcreate", *_ALLOWED, *how, "-n", "data", INNER)
        yield f"{INNER}/data"
    finally:
        tool("udevadm", "settle")
        tool("vgremove", "--force", *_ALLOWED, INNER)
        tool("pvremove", "--yes", *_ALLOWED, *nodes)


def test_a_volume_that_another_is_striped_over_is_a_part(pool: ThinPool, blocksnap: InProcess) -> None:
    for name in ("one", "two"):
        pool.create(name)
    one, two = (f"{pool.group}/{name}" for name in ("one", "two"))
    with striped(pool, "one", "two") as inner:
        code, _, err = blocksnap("backup", one)
        assert (code, err.count(f"only a part of {inner} is on {one}: the rest is on {two}, and")) == (3, 1)
        code, _, err = blocksnap("backup", one, two)
        assert (code, "only a part" in err) == (0, False), err
    for name in ("one", "two"):
        code, _, err = blocksnap("backup", f"{pool.group}/{name}")
        assert (code, "only a part" in err) == (0, False), err
    pool.remove("one", "two")
