"""Which extended attributes a copy does not have: cp(1) with ``--archive`` passes over what cannot be set."""

from __future__ import annotations

import errno
import os

from blocksnap.restore.unkept import Unkept

_NONE = frozenset({errno.EOPNOTSUPP, errno.EPERM})
_OF_A_HOST = frozenset({"security.selinux", "security.evm"})
"""The label is given by the policy of the host on which a file is, the seal made with a key of its own."""
_SECOND_NAMES = frozenset({"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"})
"""What XFS calls ACLs besides (kernel: fs/xfs/xfs_xattr.c)."""


def note_lost(source: str, made: str, shown: str, unkept: Unkept) -> None:
    """Note the extended attributes of a tree, ACLs among them, that are not in the copy; raises OSError.

    ``shown`` is what to call the top of both.
    """
    waiting = [(source, made, shown)]
    while waiting:
        original, copy, name = waiting.pop()
        try:
            for lost in sorted(_names(original) - _names(copy) - _OF_A_HOST - _SECOND_NAMES):
                unkept.note(f"extended attribute {lost}", os.fsencode(name))
            waiting += _below(original, copy, name)
        except OSError as err:
            # Programs that walk by descriptors can make what no path reaches.
            if err.errno != errno.ENAMETOOLONG:
                raise
            unkept.note(
                "extended attributes were not looked at below a path that is too long", os.fsencode(name)
            )


def _below(original: str, copy: str, name: str) -> list[tuple[str, str, str]]:
    if os.path.islink(original) or not os.path.isdir(original):
        return []
    return [
        (f"{original}/{each}", f"{copy}/{each}", f"{name}/{each}")
        for each in sorted(os.listdir(original), reverse=True)
    ]


def _names(path: str) -> set[str]:
    try:
        return set(os.listxattr(path, follow_symlinks=False))
    except OSError as err:
        if err.errno not in _NONE:
            raise
        return set()
