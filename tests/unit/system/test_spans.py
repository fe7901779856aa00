"""What lies on several devices, and of what only a part is inside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocksnap.system import blockdev, devmapper, mounts, spans
from blocksnap.system.spans import Span, find_outside, spans_of

ONE, TWO, THREE, FOUR = (os.makedev(7, number) for number in range(4))
ARRAY = os.makedev(9, 0)
VOLUME = os.makedev(253, 4)


@pytest.mark.parametrize(
    ("devices", "inside", "outside"),
    [
        ({ONE, TWO}, {ONE}, {TWO}),
        ({ONE, TWO}, {TWO, THREE}, {ONE}),
        ({ONE, TWO, THREE}, {TWO}, {ONE, THREE}),
        ({ONE, TWO}, {ONE, TWO}, None),
        ({ONE, TWO}, {ONE, TWO, THREE}, None),
        ({ONE, TWO}, {THREE}, None),
        ({ONE, TWO}, set(), None),
        ({ONE}, {ONE}, None),
    ],
)
def test_only_what_is_inside_and_outside_is_torn(
    devices: set[int], inside: set[int], outside: set[int] | None
) -> None:
    span = Span("it", frozenset(devices))
    assert find_outside([span], inside) == ([(span, frozenset(outside))] if outside else [])


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sysfs in which an array and a logical volume lie on two devices each."""
    monkeypatch.setattr(blockdev, "_SYSFS", tmp_path)
    monkeypatch.setattr(mounts, "read_mounts", list)
    for number, name in ((ARRAY, "md0"), (VOLUME, "dm-4")):
        folder = tmp_path / blockdev.number_text(number)
        for below in (ONE, TWO):
            slave = folder / "slaves" / f"loop{os.minor(below)}"
            slave.mkdir(parents=True)
            (slave / "dev").write_text(blockdev.number_text(below) + "\n")
        (folder / "uevent").write_text(f"DEVNAME={name}\n")
    (tmp_path / "9:0" / "md").mkdir()
    (tmp_path / "253:4" / "dm").mkdir()
    (tmp_path / "253:4" / "dm/name").write_text("vg--1-data\n")
    (tmp_path / "253:4" / "dm/uuid").write_text("LVM-" + "v" * 32 + "l" * 32 + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("level", "needs_all"),
    [("raid0", True), ("linear", True), ("raid5", True), ("raid10", True), ("raid1", False)],
)
def test_an_array_needs_all_but_a_mirror_does_not(sysfs: Path, level: str, needs_all: bool) -> None:
    (sysfs / "9:0" / "md/level").write_text(f"{level}\n")
    wanted = [Span("/dev/md0", frozenset({ONE, TWO}))] if needs_all else []
    assert spans_of({ARRAY, ONE}) == wanted
    assert spans_of({ARRAY, ONE}, {ARRAY}) == []
    assert spans_of({ONE, TWO}) == []


@pytest.mark.parametrize(
    ("table", "needs_all"),
    [
        ("0 10 linear 7:0 2048\n10 10 linear 7:1 2048\n", True),
        ("0 10 striped 2 128 7:0 0 7:1 0\n", True),
        ("0 10 raid raid5_ls 3 64 region_size 1024 2 7:0 7:0 7:1 7:1\n", True),
        ("0 10 thin-pool 7:0 7:1 128 0 0\n", True),
        ("0 10 writecache s 7:0 7:1 4096 0\n", True),
        ("0 10 raid raid1 3 0 region_size 1024 2 7:0 7:0 7:1 7:1\n", False),
        ("0 10 mirror clustered-disk 2 7:0 1024 2 7:0 0 7:1 0\n", False),
        ("0 10 snapshot 7:0 7:1 P 8\n", False),
        ("0 10 thin 7:0 1 7:1\n", False),
        ("0 10 linear 7:0 0\n10 10 snapshot 7:0 7:1 P 8\n", False),
        ("", False),
    ],
)
def test_a_volume_needs_all_that_it_has_data_on(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch, table: str, needs_all: bool
) -> None:
    assert sysfs.is_dir()
    asked: list[tuple[str, ...]] = []

    def run(*argv: str) -> str:
        asked.append(argv)
        return table

    monkeypatch.setattr(devmapper, "run", run)
    wanted = [Span("vg-1/data", frozenset({ONE, TWO}))] if needs_all else []
    assert spans_of({VOLUME}) == wanted
    assert asked == [("dmsetup", "table", "--major", "253", "--minor", "4")]


@pytest.mark.parametrize(
    ("own", "thread", "journal"),
    [
        ("loop0", "jbd2/loop0-8", None),
        ("loop0", "jbd2/loop1", TWO),
        ("loop0", "jbd2/dm-3", THREE),
        ("loop0", "jbd2/gone", None),
        ("loop0", "", None),
        # As Linux before 5.17 says ``jbd2/nvme10n1p12-8``.
        ("nvme10n1p12", "jbd2/nvme10n1p1", None),
        ("nvme10n1p2", "jbd2/nvme10n1p1", FOUR),
    ],
)
def test_the_journal_of_an_ext4_is_told_by_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, thread: str, journal: int | None
) -> None:
    for folder in (f"block/{own}", "class/loop1", "class/dm-3", "class/nvme10n1p1", f"ext4/{own}", "proc/77"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "7:0").symlink_to(f"block/{own}")
    for name, number in (("loop1", TWO), ("dm-3", THREE), ("nvme10n1p1", FOUR)):
        (tmp_path / "class" / name / "dev").write_text(blockdev.number_text(number) + "\n")
    (tmp_path / f"ext4/{own}/journal_task").write_text("77\n")
    (tmp_path / "proc/77/comm").write_text(thread + "\n")
    monkeypatch.setattr(blockdev, "_SYSFS", tmp_path)
    monkeypatch.setattr(spans, "_CLASS", tmp_path / "class")
    monkeypatch.setattr(spans, "_EXT4", tmp_path / "ext4")
    monkeypatch.setattr(spans, "_PROC", tmp_path / "proc")
    mount = mounts.Mount(ONE, "/", "/srv", "ext4", "/dev/loop0", read_only=False)
    monkeypatch.setattr(mounts, "read_mounts", lambda: [mount, mount])
    wanted = [Span("the ext4 on /srv", frozenset({ONE, journal}), "/srv")] if journal else []
    assert spans_of(()) == wanted


def test_devices_of_an_xfs_are_in_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    line = (
        "36 29 7:0 / /srv rw,noatime shared:1 - xfs /dev/loop0 rw,logdev=/dev/a\\040b,rtdev=/dev/c,logbufs=8"
    )
    (mount,) = mounts.parse_mountinfo(line)
    assert mount.options == ("rw", "logdev=/dev/a b", "rtdev=/dev/c", "logbufs=8")
    monkeypatch.setattr(mounts, "node_number", {"/dev/a b": TWO, "/dev/c": THREE}.get)
    monkeypatch.setattr(mounts, "read_mounts", lambda: [mount])
    assert spans_of(()) == [Span("the xfs on /srv", frozenset({ONE, TWO, THREE}), "/srv")]
