"""What talking with any database server on this host begins with: the account, the password."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager

from blocksnap.quiesce.errors import AgentError
from blocksnap.quiesce.settings import LoginSettings
from blocksnap.system import peers


def account_of(settings: LoginSettings) -> str | None:
    """Return the user of this host to connect as; None to stay who we are.

    A server that asks the kernel takes a user of its own for one of the host with the same name: PostgreSQL's
    ``peer``, MariaDB's ``unix_socket``. With a password nobody else is needed.
    """
    if settings.account is not None or settings.password_file is not None:
        return settings.account
    try:
        pwd.getpwnam(settings.user)
    except KeyError:
        return None
    return settings.user


def process_behind(server: str, fd: int) -> int:
    """Return the process of the server at the other end of a socket; raises AgentError."""
    try:
        pid = peers.process_behind(fd)
    except OSError as err:
        raise AgentError(server, f"does not tell who it is: {err.strerror}") from err
    if not pid:
        raise AgentError(server, "is no process that can be seen from here")
    return pid


@contextmanager
def looking_up_files(server: str) -> Iterator[None]:
    """Tell what is not where the server says that it is; raises AgentError."""
    try:
        yield
    except OSError as err:
        raise AgentError(
            server, f"tells of {err.filename or 'a file'}, which is not to be found: {err.strerror}"
        ) from err


def password_of(server: str, settings: LoginSettings) -> str | None:
    """Return the password, which is never logged nor given to another program; raises AgentError."""
    path = settings.password_file
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o007:
                raise AgentError(
                    server,
                    f"is not asked: everybody can read {path}",
                    advice=f"chmod 600 {path}, and change the password",
                )
            return file.readline().rstrip("\r\n")
    except OSError as err:
        raise AgentError(server, f"is not asked: {path}: {os.strerror(err.errno or 0)}") from err
    except UnicodeDecodeError as err:
        raise AgentError(server, f"is not asked: {path} is not UTF-8") from err
