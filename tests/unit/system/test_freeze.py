"""What lies above a device, where files of loop devices have any names."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blocksnap.system import blockdev, freeze, mounts, sysfs

LOOP = os.makedev(7, 5)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\r.img"))
    found.touch()
    (tmp_path / "7:5/loop").mkdir(parents=True)
    (tmp_path / "7:5/loop/backing_file").write_bytes(os.fsencode(found) + b"\n")
    monkeypatch.setattr(blockdev, "_SYSFS", tmp_path)
    return found


def test_the_file_of_a_loop_device_has_a_name_of_any_bytes(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "_device_of_file", lambda _: image.stat().st_dev)
    mount = mounts.mount_under(str(image))
    assert mount is not None
    assert freeze.backing_filesystem(LOOP) == mount.device
    assert freeze.backing_filesystem(os.makedev(7, 6)) is None


@pytest.mark.parametrize("code", [errno.ENXIO, errno.EMFILE])
def test_only_a_loop_device_without_a_file_has_no_filesystem(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def device_of_file(number: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(freeze, "_device_of_file", device_of_file)
    if code == errno.ENXIO:
        assert freeze.backing_filesystem(LOOP) is None
        return
    with pytest.raises(OSError, match="open files"):
        freeze.backing_filesystem(LOOP)


@pytest.mark.parametrize("which", ["uevent", "mountinfo"])
def test_where_files_run_out_no_loop_device_is_passed_over(
    image: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Whatever lies on it would not stand still."""
    real, looks = sysfs.exact_text, {"mountinfo": 1, "uevent": 0}
    if which == "mountinfo":
        monkeypatch.setattr(freeze, "_device_of_file", lambda _: image.stat().st_dev)

    def exact_text(path: Path) -> str:
        if path.name in looks:
            looks[path.name] -= 1
        if path.name == which and looks[which] < 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path)

    monkeypatch.setattr(sysfs, "exact_text", exact_text)
    with pytest.raises(OSError, match="open files"):
        freeze.backing_filesystem(LOOP)
