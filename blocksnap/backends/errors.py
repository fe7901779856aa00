"""What can go wrong with named objects, whatever holds them."""

from __future__ import annotations

import errno
import os

from blocksnap.errors import BlocksnapError, NoRepositoryError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}


class ObjectMissingError(BlocksnapError):
    """No object has this name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"object {name} is missing from the repository")


class ObjectExistsError(BlocksnapError):
    """An object has this name already; objects are never replaced."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"object {name} exists in the repository already")


class BackendFailedError(StorageError):
    """The storage refused or failed an operation on an object."""

    def __init__(self, action: str, place: str, err: OSError) -> None:
        self.place = place
        self.errno = err.errno
        reason = os.strerror(err.errno) if err.errno else str(err)
        full = err.errno in _FULL
        super().__init__(
            f"cannot {action} in repository {place}: {reason}",
            resolution="make room for the repository, then run again; finished backups are intact"
            if full
            else None,
        )


class BackendAwayError(BackendFailedError):
    """Nothing can be read any more: the storage is away, which says nothing about the objects in it."""

    def __init__(self, place: str, err: OSError) -> None:
        super().__init__("read anything", place, err)


class NoSuchPlaceError(NoRepositoryError):
    """The directory or bucket itself does not exist."""

    def __init__(self, place: str) -> None:
        self.place = place
        super().__init__(
            f"there is no repository at {place}",
            resolution=f"create one with: blocksnap init --repo {place}",
        )
