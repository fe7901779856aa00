"""Guests whose disk is backed up, told by the real virsh about the guests of libvirt's own test driver.

The driver keeps a guest's state for one connection only, so that one is frozen and thawed is told by what
virsh was asked; a script in front of it writes that down, and fails or hangs where the test says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blocksnap.controller.journal import read_entries
from blocksnap.controller.quiescing import QuiesceRequest
from blocksnap.controller.session import SnapshotSession
from blocksnap.errors import QuiesceError
from blocksnap.quiesce.hook import run_after
from blocksnap.quiesce.libvirt import guests_on, parse_disks
from blocksnap.quiesce.places import Placement, Target
from blocksnap.quiesce.settings import QuiesceSettings
from support.copied_volume import CopiedVolume
from support.loops import call, loop_device
from support.require import require
from support.standing import holding, read_log, write_hook

VIRSH = shutil.which("virsh")
NAMES = ("on it", "in it", "off", "away")
UUIDS = {name: f"{number}695eb01-f6a4-8304-79aa-97f2502e193f" for number, name in enumerate(NAMES)}
SHUT_OFF = 5


def domain(name: str, disks: list[tuple[str, str]], state: int = 1) -> str:
    """A guest, as the driver's file has it."""
    listed = "".join(
        f"<disk type='{kind}'><source {'dev' if kind == 'block' else 'file'}='{source}'/>"
        f"<target dev='vd{letter}'/></disk>"
        for letter, (kind, source) in zip("abc", disks, strict=False)
    )
    return (
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>"
        f"<name>{name}</name><uuid>{UUIDS[name]}</uuid><memory>8192</memory><vcpu>1</vcpu>"
        f"<os><type>hvm</type></os><devices>{listed}</devices>"
        f"<test:runstate>{state}</test:runstate></domain>"
    )


class World:
    """Two volumes, a file on one, four guests."""

    def __init__(self, folder: Path, hooks: Path, stack: ExitStack) -> None:
        self.folder, self.hooks = folder, hooks
        self.raw, self.files = (CopiedVolume(folder, name, 32 << 20, stack) for name in ("raw", "files"))
        image = self.files.folder / "disk with words.img"
        image.touch()
        elsewhere = folder / "elsewhere.img"
        elsewhere.touch()
        guests = [
            domain("on it", [("file", str(elsewhere)), ("block", self.raw.device)]),
            domain("in it", [("file", str(image))]),
            domain("off", [("block", self.raw.device)], SHUT_OFF),
            domain("away", [("file", str(elsewhere)), ("file", str(folder / "gone.img"))]),
        ]
        (folder / "node.xml").write_text(f"<node>{''.join(guests)}</node>")
        self.behave("")

    def behave(self, words: str) -> None:
        (self.hooks / "log").unlink(missing_ok=True)
        write_hook(
            self.hooks, "virsh", f'case "$3" in domfs*) log "$3 $4";; esac\n{words}\nexec {VIRSH} "$@"'
        )

    def back_up(self, *volumes: CopiedVolume, **policy: object) -> tuple[SnapshotSession, str]:
        asked = {"guests": "auto", "libvirt_uri": f"test://{self.folder}/node.xml", "deadline_seconds": 30}
        request = QuiesceRequest(QuiesceSettings.model_validate({**asked, **policy}))
        with SnapshotSession(volumes, "run", self.folder / "state", request) as session:  # type: ignore[arg-type]
            pass
        return session, session.quiesced.state if session.quiesced else "none"


@pytest.fixture
def world(tmp_path: Path, hooks: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    require("libvirt", VIRSH is not None, "libvirt-clients is not installed")
    monkeypatch.setenv("PATH", f"{hooks}:{os.environ['PATH']}")
    with ExitStack() as stack:
        yield World(tmp_path, hooks, stack)


def asked(*names: str, word: str) -> list[str]:
    return [f"domfs{word} {UUIDS[name]}" for name in names]


def test_guests_that_run_and_have_a_disk_here_are_frozen_and_thawed(world: World) -> None:
    session, state = world.back_up(world.raw, world.files)
    assert (state, session.warnings) == ("application", [])
    assert session.quiesced is not None
    assert session.quiesced.by == ("guest on it (vdb)", "guest in it (vda)")
    assert read_log(world.hooks) == [
        *asked("on it", "in it", word="freeze"),
        *asked("in it", "on it", word="thaw"),
    ]

    world.behave("")
    session, state = world.back_up(world.files)
    assert session.quiesced is not None
    assert session.quiesced.by == ("guest in it (vda)",)


def test_an_image_is_not_all_of_its_filesystem(world: World) -> None:
    image, other = world.files.folder / "disk with words.img", world.files.folder / "other.img"
    other.touch()
    device, uri = os.stat(image).st_dev, f"test://{world.folder}/node.xml"
    for path, found in ((image, ["guest in it (vda)"]), (other, [])):
        placement = Placement([Target("key", device, str(path))])
        guests = list(guests_on(placement, uri))
        assert [guest.name for guest in guests] == found
        for guest in guests:
            guest.close()
        # A server with its files beside the image has none of them in it.
        assert placement.of_directory(os.getpid(), str(world.files.folder)) == frozenset()
    call("truncate", "--size=16M", other)
    with loop_device(other) as node:
        call("mkfs.ext4", "-q", node)
        with holding(node, world.folder / "in other") as folder:
            placement = Placement([Target("key", device, str(other)), Target("another", device, str(image))])
            assert placement.of_directory(os.getpid(), str(folder)) == {"key"}


def test_a_guest_that_does_not_freeze_is_thawed_nevertheless(world: World) -> None:
    silent = "error: Guest agent is not responding: QEMU guest agent is not connected"
    world.behave(f'[ "$3" != domfsfreeze ] || {{ echo "{silent}" >&2; exit 1; }}')
    with pytest.raises(QuiesceError, match="guest on it does not freeze its filesystems") as refused:
        world.back_up(world.raw)
    assert silent in str(refused.value.details)
    assert read_log(world.hooks) == [*asked("on it", word="freeze"), *asked("on it", word="thaw")]

    world.behave('[ "$3" != domfsfreeze ] || sleep 100')
    session, state = world.back_up(world.raw, deadline_seconds=5, on_failure="crash-consistent")
    assert state == "failed"
    assert "only crash-consistent" in session.warnings[0]
    assert read_log(world.hooks) == [*asked("on it", word="freeze"), *asked("on it", word="thaw")]


def test_a_guest_whose_agent_does_not_answer_is_not_asked(world: World) -> None:
    silent = "error: Guest agent is not responding: QEMU guest agent is not connected"
    world.behave(f'[ "$3" != domtime ] || {{ echo "{silent}" >&2; exit 1; }}')
    with pytest.raises(QuiesceError, match=r"guest on it does not freeze.*: its agent does not") as refused:
        world.back_up(world.raw)
    assert refused.value.details == silent
    assert read_log(world.hooks) == []


def test_a_thaw_that_libvirt_has_no_time_for_is_tried_again(world: World) -> None:
    busy = "error: Timed out during operation: cannot acquire state change lock (held by agent=x)"
    tried = world.hooks / "tried"
    world.behave(
        f'[ "$3" != domfsthaw ] || [ -e {tried} ] || {{ touch {tried}; echo "{busy}" >&2; exit 1; }}'
    )
    session, state = world.back_up(world.raw)
    assert (state, session.warnings) == ("application", [])
    assert read_log(world.hooks)[1:] == asked("on it", "on it", word="thaw")


def test_a_guest_that_is_not_thawed_is_told_with_what_to_do(world: World) -> None:
    world.behave('[ "$3" != domfsthaw ] || { echo "error: no domain" >&2; exit 1; }')
    session, state = world.back_up(world.raw)
    assert state == "application"
    # It is left to the next run.
    (entry,) = read_entries(world.folder / "state")
    (trace,) = (entry.standstill() or {})["standing"]  # type: ignore[misc]
    assert trace["name"] == "guest on it"
    world.behave("")
    run_after(tuple(trace["argv"]), {})
    assert read_log(world.hooks) == asked("on it", word="thaw")
    by_hand = f"virsh --connect test://{world.folder}/node.xml domfsthaw 'on it'"
    (warning,) = session.warnings
    assert warning.startswith(
        "guest on it may still be frozen: its thaw failed, with exit status 1: error: no"
    )
    assert warning.endswith(f" (run: {by_hand})")
    assert trace["by_hand"] == by_hand


@pytest.mark.parametrize("uuid", [UUIDS["off"], "9695eb01-f6a4-8304-79aa-97f2502e193f"], ids=["off", "gone"])
def test_a_guest_that_was_stopped_meanwhile_is_left_to_nobody(world: World, uuid: str) -> None:
    """What virsh says of one is what it is known by."""
    world.behave(f'[ "$3" != domfsthaw ] || set -- "$1" "$2" "$3" {uuid}')
    session, state = world.back_up(world.raw)
    assert state == "application"
    (warning,) = session.warnings
    assert "guest on it may still be frozen: its thaw failed, with exit status 1: error: " in warning
    assert read_entries(world.folder / "state") == []


def test_libvirt_that_does_not_answer(world: World) -> None:
    with pytest.raises(QuiesceError, match="does not say which guests run"):
        world.back_up(world.raw, libvirt_uri="test:///nowhere.xml")


def test_disks_are_read_as_virsh_writes_them() -> None:
    listed = """\
 Type      Device   Target   Source
-----------------------------------------------------
 block     disk     vda      /dev/vg0/vm1
 file      disk     vdb      /srv/with  two spaces.img
 file      cdrom    sda      /srv/installer.iso
 file      disk     vdc      -
 network   disk     vdd      rbd/pool
 block     lun      sdb      /dev/vg0/vm1-data

"""
    assert parse_disks(listed) == [
        ("vda", "/dev/vg0/vm1"),
        ("vdb", "/srv/with  two spaces.img"),
        ("sdb", "/dev/vg0/vm1-data"),
    ]
