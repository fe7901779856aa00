"""The snapshot that stays on a thin pool as the base of the next backup: whether, and what becomes of it.

A base is marked by a tag of its own once its manifest is durable, and not before; those before it go then.
It keeps what it was made with: it is read-only and skipped by activation, so nothing of ours or of the system
activates it. Its content is in the repository, so it may be lost at any time: the next backup says so and
does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocksnap.extents.changes import BASE_KEPT, BaseDecision, BasePolicy, Parent
from blocksnap.extents.thin_identity import LostBase
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
    from blocksnap.system import lvm

    run = parent.binding.get("run")
    for lv in report:
        mark = lvm.base_of(lv.lv_tags)
        if mark is not None and mark.lv_uuid == lv_uuid and lvm.run_of(lv.lv_tags) == run:
            return lv
    if parent.binding.get(BASE_KEPT) is not True:
        return None
    return LostBase("the base snapshot of the parent backup is gone")


def remove_bases(report: LvReport, owner: str, lv_uuid: str, *, but: str | None) -> list[str]:
    """Remove the bases that an owner's runs left of a volume, all ``but`` one; return their names.

    ``report`` may be of any time in this run, which has the volume to itself. Raises BlocksnapError, when it
    has tried them all.
    """
    from blocksnap.errors import BlocksnapError
    from blocksnap.system import lvm

    removed: list[str] = []
    trouble: BlocksnapError | None = None
    for lv in report:
        run = lvm.run_of(lv.lv_tags)
        if run is None or lv.name == but or lvm.base_of(lv.lv_tags) != lvm.BaseMark(owner, lv_uuid):
            continue
        try:
            if lvm.remove_snapshot(lv.vg_name, lv.name, run):
                removed.append(lv.full_name)
        except BlocksnapError as err:
            trouble = err
    if trouble is not None:
        raise trouble
    return removed
