"""What can go wrong with the devices of an instant restore, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from blocksnap.errors import TargetError
from blocksnap.system.command import CommandError


class WritesFailedError(TargetError):
    """The store for what is written meanwhile has failed; ``users`` are in the way of taking it up again."""

    def __init__(self, volume: str, users: Sequence[str] = ()) -> None:
        self.volume, self.users = volume, tuple(users)
        super().__init__(
            f"the store for what is written to {volume} meanwhile has failed: reads and writes fail, and "
            f"what was written before is kept{''.join(f'; it is {user}' for user in users)}",
            resolution="see dmesg for why (a full pool, a failing disk) and mend that, stop what uses the "
            f"volume, unmount it, end this command, and go on: blocksnap restore --instant --resume {volume}",
        )


class MergeFailedError(TargetError):
    """What was written meanwhile could not be brought to the volume."""

    def __init__(self, volume: str, users: Sequence[str] = ()) -> None:
        self.volume, self.users = volume, tuple(users)
        super().__init__(
            f"what was written to {volume} meanwhile cannot be merged into it; nothing of it is lost"
            f"{''.join(f'; it is {user}' for user in users)}",
            resolution="see dmesg for why (a full pool, a failing disk) and mend that, stop what uses the "
            f"volume, unmount it, then: blocksnap restore --instant --resume {volume}",
        )


class PartGoneError(TargetError):
    """Somebody has removed a volume that the restore is made of."""

    def __init__(self, volume: str, part: str, making: str | None) -> None:
        """``making`` are the words that make another one in its place, where that helps."""
        self.volume, self.part = volume, part
        again = (
            f"make it again: {making}; then: blocksnap restore --instant --resume {volume}; or "
            if making
            else ""
        )
        super().__init__(
            f"{volume} cannot be restored any further: {part} is gone",
            resolution=f"{again}{giving_up(volume)}",
        )


class PartInactiveError(TargetError):
    """A volume that the restore is made of cannot be activated, as when a disk is missing."""

    def __init__(self, volume: str, part: str, err: CommandError) -> None:
        self.volume, self.part = volume, part
        super().__init__(
            f"{part}, of which {volume} is made, cannot be activated: {err.brief}",
            details=err.details,
            resolution="bring its disks back (pvs, dmesg), then: blocksnap restore --instant --resume "
            f"{volume}; or {giving_up(volume)}",
        )


class PartStaysError(TargetError):
    """What is given up cannot be removed."""

    def __init__(self, volume: str, part: str, err: CommandError) -> None:
        self.volume, self.part = volume, part
        group = part.partition("/")[0]
        super().__init__(
            f"{part} cannot be removed: {err.brief}",
            details=err.details,
            resolution="where disks are gone for good take them, and all that was on them, out of the group: "
            f"vgreduce --removemissing --force {group}; then: blocksnap restore --instant --abandon {volume}",
        )


class VolumeShrunkError(TargetError):
    """Somebody has made the volume smaller that the backup goes to."""

    def __init__(self, part: str, size: int, needed: int) -> None:
        self.part, self.size, self.needed = part, size, needed
        super().__init__(
            f"{part} was made smaller: it has {size} bytes and needs {needed}",
            resolution=f"run: {self.remedy}",
        )

    @property
    def remedy(self) -> str:
        """The command that makes it as large again."""
        return f"lvextend --size {self.needed}b {self.part}"


class StoreFullError(TargetError):
    """There is no more room for what is written meanwhile; ``users`` are in the way of making some."""

    def __init__(self, volume: str, users: Sequence[str] = ()) -> None:
        self.volume, self.users = volume, tuple(users)
        super().__init__(
            f"the room for what is written to {volume} meanwhile is full: writes fail, and what was written "
            f"before is kept{''.join(f'; it is {user}' for user in users)}",
            resolution="stop what uses it, unmount it, end this command, and make room with: "
            f"blocksnap restore --instant --resume {volume}",
        )


class StoreStaysSmallError(TargetError):
    """A store that was full cannot be made larger."""

    def __init__(self, volume: str, part: str, err: CommandError) -> None:
        self.volume, self.part = volume, part
        super().__init__(
            f"{part}, which has what is written to {volume} meanwhile, is full and cannot be made larger, so "
            f"writes may fail: {err.brief}",
            details=err.details,
            resolution="make room in the volume group (vgs), stop what uses the volume, unmount it, end this "
            f"command, and go on: blocksnap restore --instant --resume {volume}",
        )


class VolumeAppearedError(TargetError):
    """Somebody has made a volume of the name that is restored to, while that was interrupted."""

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name
        super().__init__(
            f"{group}/{name} is being restored, and a volume of that name was made meanwhile",
            resolution=f"give that one another name (lvrename {group} {name} OTHER) or remove it, then: "
            f"blocksnap restore --instant --resume {group}/{name}",
        )


def giving_up(volume: str) -> str:
    """Return what is left to do where a restore can never be finished."""
    return f"give up what was written to it: blocksnap restore --instant --abandon {volume}"
