"""What a job says about limits and pace: models for the configuration file, embedded in those of the jobs.

[jobs.shop.limits]
drop_data_percent = 97
snapshot_seconds = 14400

[jobs.shop.pace]
policy = "gentle"
write_rate = "50M"
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from blocksnap.errors import UsageError
from blocksnap.quantities import parse_size
from blocksnap.volumes.base import VolumeLimits

PacePolicy = Literal["off", "gentle", "fixed"]
"""How much a run holds back: not at all, while others wait for the disks, or to rates."""


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as err:
        raise ValueError(f"is no size; {err.resolution}") from err


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
"""Bytes: a number, or text like ``"64M"``."""
Percent = Annotated[float, Field(gt=0, le=100)]
NotAll = Annotated[float, Field(gt=0, lt=100)]
"""Of something that must never be full."""
_DAY_SECONDS = 86400


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LimitSettings(_Model):
    """From where on no snapshot is taken, one that is there is given up, and a restore ends."""

    pool_data_percent: Percent = 95.0
    """No snapshot is taken in a thin pool whose data is fuller than this."""
    pool_metadata_percent: Percent = 90.0
    drop_data_percent: Percent = 98.0
    """The snapshot is given up, and the backup fails, when the pool becomes fuller than this."""
    drop_metadata_percent: Percent = 95.0
    store_percent: Percent = 15.0
    """Of a classic volume, for the exception store of its snapshot; more where more is written."""
    cow_percent: Percent = 90.0
    """The snapshot is given up when its exception store is fuller than this: full, it would be invalid."""
    repository_free: Size = 0
    """The run fails when there is less room than this where the repository lies."""
    snapshot_seconds: Annotated[float, Field(gt=0)] | None = None
    """How long a snapshot may live; None for as long as the run takes."""
    restore_data_percent: NotAll = 98.0
    """A restore ends before it makes the pool of its target fuller than this."""
    restore_metadata_percent: NotAll = 95.0
    restore_wait_seconds: Annotated[float, Field(ge=0, le=_DAY_SECONDS)] = 20.0
    """First it waits so long: LVM may extend the pool."""

    def for_volumes(self) -> VolumeLimits:
        """Return those that concern taking a snapshot."""
        return VolumeLimits(self.pool_data_percent, self.pool_metadata_percent, self.store_percent)

    @model_validator(mode="after")
    def _room_to_live(self) -> Self:
        if self.drop_data_percent < self.pool_data_percent:
            raise ValueError("drop_data_percent is below pool_data_percent: no snapshot could live")
        if self.drop_metadata_percent < self.pool_metadata_percent:
            raise ValueError("drop_metadata_percent is below pool_metadata_percent: no snapshot could live")
        return self


class PaceSettings(_Model):
    """How a run shares the disks with the applications of the host."""

    policy: PacePolicy = "off"
    read_rate: Annotated[Size, Field(gt=0)] | None = None
    """Bytes a second that are read of the volumes."""
    write_rate: Annotated[Size, Field(gt=0)] | None = None
    """Bytes a second that are stored in the repository."""
    pressure_percent: Percent = 10.0
    """With ``gentle``: the run holds back while others wait for the disks for more of the time than this."""

    @model_validator(mode="after")
    def _that_makes_sense(self) -> Self:
        rates = self.read_rate is not None or self.write_rate is not None
        if self.policy == "fixed" and not rates:
            raise ValueError("policy fixed needs a read_rate or a write_rate")
        if self.policy == "off" and rates:
            raise ValueError('rates need policy = "fixed" or "gentle"')
        return self
