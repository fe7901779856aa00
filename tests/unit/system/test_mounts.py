from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.system import mounts, own_mount
from blocksnap.system.command import CommandError, CommandTimeoutError

TEXT = r"""27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 27 254:3 / /srv/my\040data rw - xfs /dev/mapper/vg-a\134b ro,noatime
31 27 0:44 /@home /home rw,relatime shared:4 master:2 - btrfs /dev/sdc rw,subvol=/@home
32 27 0:45 / /run/user\0111 rw - tmpfs tmpfs rw
broken line
"""


def test_mountinfo_is_unescaped_and_optional_fields_are_skipped() -> None:
    root, data, home, run = mounts.parse_mountinfo(TEXT)
    assert root == mounts.Mount(
        os.makedev(254, 0), "/", "/", "ext4", "/dev/vda", read_only=False, options=("rw", "discard")
    )
    assert (data.point, data.source, data.read_only) == ("/srv/my data", r"/dev/mapper/vg-a\b", True)
    assert (home.root, home.filesystem, home.source) == ("/@home", "btrfs", "/dev/sdc")
    assert run.point == "/run/user\t1"


def test_mounts_of_a_device_includes_file_systems_that_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mounts.parse_mountinfo(TEXT)
    monkeypatch.setattr(mounts, "node_number", {"/dev/sdc": 77}.get)
    assert [mount.point for mount in mounts.mounts_of(77, found)] == ["/home"]
    assert [mount.point for mount in mounts.mounts_of(os.makedev(254, 3), found)] == ["/srv/my data"]


@pytest.mark.parametrize(
    ("path", "point"),
    [("/", "/"), ("/srv/other", "/"), ("/srv/my data", "/srv/my data"), ("/srv/my data/x", "/srv/my data"),
     ("/srv/my data2", "/"), ("/home/u/x", "/home")],
)  # fmt: skip
def test_longest_mount_point_wins(path: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "read_mounts", lambda: mounts.parse_mountinfo(TEXT))
    found = mounts.mount_under(path)
    assert found is not None
    assert found.point == point


def test_this_host_has_a_root() -> None:
    assert any(mount.point == "/" for mount in mounts.read_mounts())
    assert mounts.mount_under("/proc/self") is not None


def test_swap_is_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "swaps"
    table.write_text("Filename Type Size Used Priority\n/dev/sdx partition 8 0 -2\n")
    monkeypatch.setattr(mounts, "_SWAPS", table)
    monkeypatch.setattr(mounts, "node_number", lambda path: 5 if path == "/dev/sdx" else None)
    assert mounts.swap_users(5) == ["used as swap"]
    assert mounts.swap_users(6) == []


def test_names_have_any_bytes_but_the_line_feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel escapes no CR, which text mode takes for the end of a line."""
    point = b"/mnt/caf\xe9\rb"
    table = tmp_path / "mountinfo"
    table.write_bytes(b"27 1 0:5 / " + point + b" rw,relatime - tmpfs blocksnap-x rw\n")
    monkeypatch.setattr(mounts, "_MOUNTINFO", table)
    monkeypatch.setattr(own_mount, "_THREAD", tmp_path)
    assert [os.fsencode(mount.point) for mount in mounts.read_mounts()] == [point]
    assert own_mount.is_there("blocksnap-x")
    swaps = tmp_path / "swaps"
    swaps.write_bytes(b"Filename Type Size Used Priority\n/swap\\040caf\xe9\r\xc2\x85  file 8 0 -2\n")
    monkeypatch.setattr(mounts, "_SWAPS", swaps)
    assert [os.fsencode(name) for name in mounts.swap_files()] == [b"/swap caf\xe9\r\xc2\x85"]


def test_a_loop_device_is_found_by_a_name_of_any_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\r\n"))
    image.touch()
    for name, path in (("loop1", b"/gone\xe9"), ("loop2", os.fsencode(image))):
        (tmp_path / name / "loop").mkdir(parents=True)
        (tmp_path / name / "loop/backing_file").write_bytes(path + b"\n")
    monkeypatch.setattr(mounts, "_BLOCK", tmp_path)
    assert mounts.loop_devices_of(str(image)) == ["/dev/loop2"]


def test_only_what_may_be_a_device_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of a FUSE mount may be a directory, on a server that does not answer."""
    found = mounts.parse_mountinfo(
        "31 27 0:44 / /a rw - fuse.bindfs /mnt/dead/x rw\n"
        "32 27 0:45 / /b rw - fuse.fuse2fs /dev/sdc rw\n"
        "33 27 0:46 / /c rw - btrfs /srv/node rw\n"
        "34 27 0:47 / /d rw - fuse.portal portal rw\n"
    )
    asked: list[str] = []

    def node_number(path: str) -> int:
        asked.append(path)
        return 77

    monkeypatch.setattr(mounts, "node_number", node_number)
    assert [mount.point for mount in mounts.mounts_of(77, found)] == ["/b", "/c"]
    assert asked == ["/dev/sdc", "/srv/node"]
    monkeypatch.undo()
    assert os.stat("/dev/null").st_rdev
    assert mounts.node_number("/dev/null") is mounts.node_number("/nowhere") is None


def test_a_filesystem_is_flushed_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first mount may be gone by then, with the directory; it only spares time later."""
    found = mounts.parse_mountinfo("31 27 7:5 / /a rw - ext4 /dev/x rw\n32 27 7:5 / /b rw - ext4 /dev/x rw\n")
    monkeypatch.setattr(mounts, "read_mounts", lambda: found)
    flushed: list[str] = []
    failing = {"/a"}
    said = "error opening"

    def flush(point: str) -> None:
        flushed.append(point)
        if point in failing:
            raise CommandError("sync", 1, f"sync: {said} '{point}': No such file or directory")

    monkeypatch.setattr(mounts, "flush", flush)
    mounts.flush_filesystem(os.makedev(7, 5))
    assert flushed == ["/a", "/b"]
    failing.add("/b")
    mounts.flush_filesystem(os.makedev(7, 5))
    # What was written is lost.
    said = "error syncing"
    with pytest.raises(CommandError, match="error syncing"):
        mounts.flush_filesystem(os.makedev(7, 5))
    failing.clear()
    flushed.clear()
    mounts.flush_filesystem(os.makedev(7, 5))
    assert flushed == ["/a"]

    def hang(point: str) -> None:
        raise CommandTimeoutError("sync", 1, 120)

    monkeypatch.setattr(mounts, "flush", hang)
    with pytest.raises(CommandTimeoutError):
        mounts.flush_filesystem(os.makedev(7, 5))
