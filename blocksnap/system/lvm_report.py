"""What LVM reports about volume groups and logical volumes, as records that are checked on the way in.

Every field is asked for by name, in bytes, with ``--binary`` for yes and no, so nothing of the
report depends on the version, the locale or the administrator's report settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from blocksnap.errors import VolumeError


def _optional_number(value: object) -> object:
    return None if value in ("", "-1", -1) else value


def _flag(value: object) -> object:
    """LVM writes -1 for what it cannot tell."""
    return {"1": True, "0": False, "-1": None, "": None}.get(str(value), value)


def _tags(value: object) -> object:
    return tuple(value.split(",")) if isinstance(value, str) and value else () if value == "" else value


_WITH_CLASSIC_SNAPSHOTS = frozenset({"linear", "striped", "cache", "writecache"})
Number = Annotated[int | None, BeforeValidator(_optional_number)]
Percent = Annotated[float | None, BeforeValidator(_optional_number)]
Flag = Annotated[bool | None, BeforeValidator(_flag)]
Tags = Annotated[tuple[str, ...], BeforeValidator(_tags)]


class LvRecord(BaseModel):
    """One logical volume as ``lvs`` reports it; the attributes are called as the fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vg_name: str
    vg_uuid: str
    vg_exported: Flag
    vg_partial: Flag
    vg_shared: Flag
    vg_free: int
    vg_extent_size: int
    lv_name: str
    lv_uuid: str
    lv_size: int
    lv_attr: str
    lv_time: str
    lv_host: str
    """Name of the host that made it."""
    lv_tags: Tags
    lv_active: str
    lv_suspended: Flag
    lv_merging: Flag
    lv_permissions: str
    lv_skip_activation: Flag
    lv_device_open: Flag
    lv_kernel_major: Number
    lv_kernel_minor: Number
    lv_health_status: str
    lv_check_needed: Flag
    lv_when_full: str
    lv_role: str
    segtype: str
    devices: str
    origin: str
    origin_uuid: str
    origin_size: Number
    """Of a classic snapshot: the size that it shows, in bytes; ``lv_size`` is that of its exception store."""
    pool_lv: str
    pool_lv_uuid: str
    metadata_lv: str
    metadata_lv_uuid: str
    thin_id: Number
    transaction_id: Number
    chunk_size: Number
    data_percent: Percent
    metadata_percent: Percent
    zero: Flag

    @property
    def name(self) -> str:
        """Name within the volume group, without the brackets that ``lvs`` puts around inner volumes."""
        return self.lv_name.strip("[]")

    @property
    def full_name(self) -> str:
        """``VG/LV``."""
        return f"{self.vg_name}/{self.name}"

    @property
    def is_internal(self) -> bool:
        """Whether LVM made it as a part of another volume."""
        return self.lv_name.startswith("[")

    @property
    def number(self) -> int | None:
        """Device number, None when it is not active; of pools see ``devmapper.pool_above``."""
        if self.lv_kernel_major is None or self.lv_kernel_minor is None:
            return None
        return os.makedev(self.lv_kernel_major, self.lv_kernel_minor)

    @property
    def is_thin(self) -> bool:
        """Whether it is a thin volume."""
        return self.segtype == "thin"

    @property
    def is_classic(self) -> bool:
        """Whether its snapshots are classic ones, with an exception store."""
        stored = self.segtype in _WITH_CLASSIC_SNAPSHOTS or self.segtype.startswith("raid")
        return stored and not self.is_classic_snapshot

    @property
    def is_classic_snapshot(self) -> bool:
        """Whether it is a classic snapshot itself."""
        return "thicksnapshot" in self.lv_role


@dataclass(frozen=True, slots=True)
class ThinRecord:
    """A thin volume with the parts of its pool."""

    lv: LvRecord
    pool: LvRecord
    metadata: LvRecord
    external_origin: str | None


class LvReport:
    """The logical volumes of one or all volume groups, inner ones included."""

    def __init__(self, records: list[LvRecord]) -> None:
        # A volume of several segments comes once for each; the first has all that is asked here.
        self._by_uuid = {record.lv_uuid: record for record in reversed(records)}
        self._by_name = {(record.vg_name, record.name): record for record in reversed(records)}

    def __iter__(self) -> Iterator[LvRecord]:
        return iter(sorted(self._by_uuid.values(), key=lambda record: (record.vg_name, record.name)))

    def find(self, vg: str, name: str) -> LvRecord | None:
        """Return a volume by name."""
        return self._by_name.get((vg, name))

    def find_uuid(self, uuid: str) -> LvRecord | None:
        """Return a volume by UUID, hyphens or not."""
        if "-" in uuid:
            return self._by_uuid.get(uuid)
        return next(
            (record for record in self._by_uuid.values() if record.lv_uuid.replace("-", "") == uuid), None
        )

    def thin(self, lv: LvRecord) -> ThinRecord:
        """Return a thin volume with its pool; raises VolumeError when the report does not have all of it."""
        pool = self.find_uuid(lv.pool_lv_uuid)
        metadata = self.find_uuid(pool.metadata_lv_uuid) if pool else None
        if pool is None or metadata is None:
            raise VolumeError(
                f"LVM reports no pool with metadata for {lv.full_name}",
                resolution=f"see: lvs -a {lv.vg_name}",
            )
        return ThinRecord(lv, pool, metadata, self._external_origin(lv))

    def parts(self, lv: LvRecord) -> Iterator[LvRecord]:
        """Yield the inner volumes that a volume lies on, at any depth."""
        for part in lv.devices.split(","):
            below = self.find(lv.vg_name, part.rpartition("(")[0].strip("[]"))
            if below is not None and below.lv_uuid != lv.lv_uuid:
                yield below
                yield from self.parts(below)

    def place(self, lv: LvRecord, disks: Mapping[str, str]) -> str:
        """Return where a volume begins, in terms that outlive device names; ``disks``: PV names to UUIDs."""
        parts = []
        for part in lv.devices.split(","):
            name, _, extent = part.rpartition("(")
            below = self.find(lv.vg_name, name.strip("[]"))
            parts.append(f"{below.lv_uuid if below else disks.get(name, name)}({extent}")
        return ",".join(parts)

    def _external_origin(self, lv: LvRecord) -> str | None:
        """Return what shows through the unmapped parts of a thin volume: the first origin outside its pool.

        A snapshot of a volume with an external origin has it too, though LVM names the volume as its origin.
        """
        origin, seen = lv, {lv.lv_uuid}
        while origin.origin_uuid and origin.origin_uuid not in seen:
            seen.add(origin.origin_uuid)
            found = self.find_uuid(origin.origin_uuid)
            if found is None or found.pool_lv_uuid != lv.pool_lv_uuid:
                return found.full_name if found else origin.origin
            origin = found
        return None


FIELDS = ",".join(LvRecord.model_fields)


def parse_disks(text: str) -> dict[str, str]:
    """Parse ``pvs --reportformat json -o pv_name,pv_uuid``: names of physical volumes to their UUIDs."""
    return {str(row["pv_name"]): str(row["pv_uuid"]) for row in _rows(text, "pv")}


def parse_report(text: str) -> LvReport:
    """Parse the output of ``lvs --reportformat json --binary``; raises VolumeError."""
    try:
        return LvReport([LvRecord.model_validate(row) for row in _rows(text, "lv")])
    except ValidationError as err:
        raise _nonsense(err) from err


def _rows(text: str, kind: str) -> list[dict[str, Any]]:
    try:
        document = json.loads(text)
        return [row for report in document["report"] for row in report.get(kind, ())]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise _nonsense(err) from err


def _nonsense(err: Exception) -> VolumeError:
    return VolumeError(
        "the report of LVM makes no sense", details=str(err), resolution="blocksnap needs lvm2 2.03 or later"
    )
