"""What ``volumes`` tells of this host: files that jobs name, devices, what is in the way and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support.file_ioctls import set_immutable
from support.in_process import InProcess
from support.loops import call, loop_device, mounted

MIB = 1 << 20


def listed(blocksnap: InProcess) -> dict[str, dict[str, Any]]:
    found = json.loads(blocksnap.done("volumes", "--json"))["volumes"]
    return {each["name"]: each for each in found}


def test_files_of_jobs_with_how_they_are_tracked_and_when_they_were_backed_up(
    on_xfs: Path, on_ext4: Path, blocksnap: InProcess
) -> None:
    folder = on_xfs / "listed"
    folder.mkdir()
    images = [folder / name for name in ("a.img", "b.img")]
    for path in images:
        path.write_bytes(b"x" * MIB)
    plain = on_ext4 / "plain.img"
    plain.write_bytes(b"x" * MIB)
    (blocksnap.folder / "blocksnap.toml").write_text(
        f'[jobs.images]\nvolumes = ["{folder}/*.img"]\nbase = "auto"\n'
        f'[jobs.all]\nvolumes = ["{images[0]}", "{plain}", "{on_ext4}/none"]\n'
    )
    before = listed(blocksnap)
    assert before[str(images[0])]["jobs"] == ["images", "all"]
    assert before[str(images[0])]["age_seconds"] is None
    assert (before[str(images[1])]["kind"], before[str(images[1])]["tracking"]) == ("image", "compare")
    assert "tracks changes" in before[str(images[1])]["advice"]
    assert before[f"{on_ext4}/none"]["supported"] is False
    assert "there is no volume" in before[f"{on_ext4}/none"]["obstacle"]
    assert (before[str(plain)]["kind"], before[str(plain)]["supported"]) == ("file", True)
    blocksnap.done("backup", "--job", "images")
    with plain.open("r+b"):
        after = listed(blocksnap)
    image = after[str(images[1])]
    assert (image["tracking"], len(image["bases"]), image["jobs"]) == ("fiemap", 1, ["images"])
    assert 0 <= image["age_seconds"] < 600
    assert image["advice"] is None
    assert "open for writing" in after[str(plain)]["obstacle"]
    assert "quiet_files" in after[str(plain)]["advice"]
    text = blocksnap.done("volumes").decode()
    assert "JOBS" in text.splitlines()[0]
    assert f"{plain}: " not in text
    for clone in folder.glob(".blocksnap/clone-*"):
        set_immutable(clone, immutable=False)
    shutil.rmtree(folder)
    plain.unlink()


def test_a_device_in_use_says_what_can_be_done(blocksnap: InProcess, tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk.img", size=320 * MIB) as device:
        found = listed(blocksnap)[device]
        assert (found["kind"], found["supported"], found["tracking"]) == ("loop", True, "compare")
        assert (found["size"], found["obstacle"], found["advice"]) == (320 * MIB, None, None)
        call("mkfs.ext4", "-q", device)
        (blocksnap.folder / "blocksnap.toml").write_text(f'[jobs.disk]\nvolumes = ["{tmp_path}/mnt"]\n')
        with mounted(device, tmp_path / "mnt"):
            found = listed(blocksnap)[device]
            assert (found["supported"], found["jobs"]) == (False, ["disk"])
            assert found["mountpoints"] == [str(tmp_path / "mnt")]
            assert f"mounted on {tmp_path}/mnt" in found["obstacle"]
            assert "unmount it or stop what uses it" in found["advice"]
            assert f"{device}: unmount it" in blocksnap.done("volumes").decode()
