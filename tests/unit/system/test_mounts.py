from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.system import mounts

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
