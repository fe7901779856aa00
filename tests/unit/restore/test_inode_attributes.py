"""What a restored inode gets: nothing that gives rights which it did not have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blocksnap.repository.blockmap import HOLE, MapRoot
from blocksnap.repository.inodes import InodeRecord, Value
from blocksnap.restore.inode_attributes import finish_by_name, finish_open
from blocksnap.restore.unkept import Unkept

NOBODY = 65534
NOTHING = Value.short(b"")


def record(mode: int, uid: int) -> InodeRecord:
    return InodeRecord(
        number=257, generation=1, mode=mode, uid=uid, gid=uid, nlink=1, flags=0, size=0, device=(0, 0),
        mtime=0, atime=0, ctime=0, otime=0, xattrs=NOTHING, detail=NOTHING, content=MapRoot(0, HOLE),
    )  # fmt: skip


def test_a_program_of_another_owner_does_not_run_as_ours(tmp_path: Path) -> None:
    """Whoever is not root cannot give a file to root, and must not lend it its own rights instead."""
    (tmp_path / "program").touch()
    os.mkfifo(tmp_path / "pipe")
    is_root = os.geteuid() == 0
    if is_root:
        for path in (tmp_path, *tmp_path.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    folder = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fd = os.open(tmp_path / "program", os.O_RDWR)
    pid = os.fork()
    if not pid:
        # In a process of its own, which goes whatever happens.
        told = 99
        try:
            if is_root:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            unkept = Unkept()
            finish_open(fd, record(stat.S_IFREG | 0o6755, 0), (), b"program", unkept)
            finish_by_name(folder, b"pipe", record(stat.S_IFIFO | 0o4711, 0), (), b"pipe", unkept)
            told = len([line for line in unkept.lines() if "set-user-ID" in line])
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "pipe").stat().st_mode) == 0o711
    own = os.fstat(fd).st_uid
    finish_open(fd, record(stat.S_IFREG | 0o4755, own), (), b"program", Unkept())
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o4755
    os.close(fd)
    os.close(folder)
