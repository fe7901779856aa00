"""Whether the snapshot of a thin volume stays on the pool as the base of the next backup (``lvm_base``).

It is skipped by activation, so nothing activates it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocksnap.extents.changes import BASE_KEPT, BaseDecision, BasePolicy, Parent
from blocksnap.extents.thin_identity import LostBase
from blocksnap.volumes import lvm_base
from blocksnap.volumes.errors import PoolFullError, PoolHealthError
from blocksnap.volumes.thin_pool import PoolLimits, check_pool

if TYPE_CHECKING:
    from blocksnap.system.lvm_report import LvRecord, LvReport, ThinRecord

AUTO_BASE_MAPPINGS = 1 << 25
"""Mappings of a volume from which on ``auto`` keeps a base: walking them all would take a second or more."""
BASE_LIMITS = PoolLimits(data_percent=90.0, metadata_percent=80.0)
"""How full a pool may be for a base to stay: what is overwritten until the next backup is allocated twice."""


def decide_base(policy: BasePolicy, mapped_chunks: int, thin: ThinRecord) -> BaseDecision:
    """Decide whether the snapshot ``thin``, which maps so many chunks, stays."""
    if policy == "none":
        return BaseDecision(stays=False, reason="nothing is to stay on the pool")
    if thin.external_origin is not None:
        return BaseDecision(stays=False, reason="a volume with an external origin is read as a whole anyway")
    if policy == "auto" and mapped_chunks < AUTO_BASE_MAPPINGS:
        return BaseDecision(
            stays=False, reason=f"the volume maps {mapped_chunks} chunks, which are walked in no time"
        )
    try:
        check_pool(thin, BASE_LIMITS)
    except PoolFullError as err:
        used = f"{err.part} of thin pool {err.pool} is {err.used_percent:.1f} % full"
        return BaseDecision(stays=False, reason=f"{used}, and a base needs it below {err.limit_percent:g} %")
    except PoolHealthError as err:
        return BaseDecision(stays=False, reason=err.brief)
    chosen = "as asked for" if policy == "keep" else f"the volume maps {mapped_chunks} chunks"
    return BaseDecision(stays=True, reason=chosen)


def find_base(report: LvReport, lv_uuid: str, parent: Parent) -> LvRecord | LostBase | None:
    """Return the base that the parent's run left of a volume; None when it left none."""
    found = lvm_base.find_base(report, lv_uuid, parent)
    if found is None and parent.binding.get(BASE_KEPT) is True:
        return LostBase("the base snapshot of the parent backup is gone")
    return found
