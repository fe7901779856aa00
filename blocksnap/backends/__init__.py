"""Named objects somewhere: a local directory, later object stores and SFTP."""

from __future__ import annotations

import re

from blocksnap.backends.base import Backend
from blocksnap.errors import UsageError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


class UnsupportedBackendError(UsageError):
    """A repository URL of a kind that this version cannot open."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        super().__init__(
            f"repositories at {scheme}:// are not supported by this version",
            resolution="name a directory: a plain path or file:///path",
        )


def open_backend(url: str) -> Backend:
    """Return the backend that a repository URL names; a plain path is a local directory."""
    match = _SCHEME.match(url)
    if match and match[1] != "file":
        raise UnsupportedBackendError(match[1])
    path = match[2] if match else url
    if not path:
        raise UsageError("the repository's name is empty", resolution="name a directory")
    if match and not path.startswith("/"):
        # What stands there is a host by RFC 8089, and would be taken for a directory below this one.
        raise UsageError(
            f"{url} names no absolute path",
            resolution="write it with three slashes, as in file:///srv/repo, or as a plain path",
        )
    from blocksnap.backends.local import LocalBackend

    return LocalBackend(path)
