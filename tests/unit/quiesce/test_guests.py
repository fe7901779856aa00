"""Which guests of libvirt are to freeze, while others stop and disks come and go."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blocksnap.quiesce import libvirt
from blocksnap.quiesce.errors import AgentError
from blocksnap.quiesce.libvirt import guests_on
from blocksnap.quiesce.places import Placement, Target
from blocksnap.system import mounts
from blocksnap.system.mounts import Mount
from support.standing import write_hook

URI = "qemu:///system"
GONE = "error: failed to get domain '{0}'\nerror: Domain not found: no domain with matching uuid '{0}'"
STOPPED = "error: Requested operation is not valid: domain is not running"
LOST = "error: Failed to get domain description xml\nerror: internal error: client socket is closed"
DIES = 'echo "{}" >&2; exit 1'


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "one.img"
    path.touch()
    return path


@pytest.fixture
def virsh(hooks: Path, monkeypatch: pytest.MonkeyPatch, image: Path) -> Callable[..., None]:
    """Pretend guests by their disks; ``then`` are those that run when it is asked once more."""
    monkeypatch.setenv("PATH", f"{hooks}:{os.environ['PATH']}")
    monkeypatch.setattr(libvirt, "_MOMENT_SECONDS", 0.0)

    def pretend(
        then: str = "one other", disks: str = "", agent: str = "exit 0", **sources: str | Path
    ) -> None:
        lists = [f'{name}) echo "file disk vda {source}";;' for name, source in sources.items()]
        once = f'if mkdir {hooks}/asked; then echo "one one"; echo "other other"; else echo "{then}"; fi'
        body = f"""
            case "$3" in
                list) {once};;
                domblklist) case "$4" in {disks} {" ".join(lists)} *) echo "file disk vda {image}";; esac;;
                domtime) {agent};;
            esac
        """
        write_hook(hooks, "virsh", body)

    return pretend


def names(target: Path) -> list[str]:
    placement = Placement([Target("key", os.stat(target).st_dev, str(target))])
    found = list(guests_on(placement, URI))
    for guest in found:
        guest.close()
    return [guest.name for guest in found]


def test_a_guest_that_goes_while_its_disks_are_asked_for_ends_nothing(
    virsh: Callable[..., None], image: Path
) -> None:
    virsh("one", disks=f"other) {DIES.format(GONE.format('other'))};;")
    assert names(image) == ["guest one (vda)"]


def test_a_guest_that_stops_before_its_agent_is_asked_need_not_freeze(
    virsh: Callable[..., None], image: Path
) -> None:
    virsh("one", agent=f'if [ "$4" = other ]; then {DIES.format(STOPPED)}; fi')
    assert names(image) == ["guest one (vda)"]


@pytest.mark.parametrize("said", [GONE.format("other"), LOST], ids=["gone", "lost"])
def test_a_guest_that_runs_and_does_not_tell_its_disks_is_no_guest_without_any(
    virsh: Callable[..., None], image: Path, said: str
) -> None:
    """What virsh says first is the same whether a guest is gone or libvirt."""
    virsh(disks=f"other) {DIES.format(said)};;")
    with pytest.raises(AgentError, match="does not say which guests run"):
        names(image)


def test_a_guest_that_runs_and_whose_agent_does_not_answer_is_told(
    virsh: Callable[..., None], image: Path
) -> None:
    virsh(agent=DIES.format(STOPPED))
    with pytest.raises(AgentError, match="its agent does not answer"):
        names(image)


def test_a_lost_image_hides_no_guest_on_another(
    virsh: Callable[..., None], image: Path, tmp_path: Path
) -> None:
    virsh(other="/gone/elsewhere.img")
    lost = tmp_path / "lost.img"
    device = os.stat(image).st_dev
    placement = Placement([Target("lost", device, str(lost)), Target("key", device, str(image))])
    (guest,) = guests_on(placement, URI)
    guest.close()
    assert guest.name == "guest one (vda)"
    assert placement.of_disk(str(image)) == {"key"}


def failing(monkeypatch: pytest.MonkeyPatch, path: Path, code: int, times: int = 1000) -> list[str]:
    """Have a path fail so many times when it is looked at."""
    real, failed = os.stat, list[str]()

    def stat(place: str | Path, **options: bool) -> os.stat_result:
        if str(place) == str(path) and len(failed) < times:
            failed.append(str(place))
            raise OSError(code, os.strerror(code), str(place))
        return real(place, **options)

    monkeypatch.setattr(os, "stat", stat)
    return failed


@pytest.mark.parametrize(
    ("device", "source"), [(os.makedev(0, 60), "server:/srv"), (os.makedev(254, 7), "/dev/vg/x")]
)
def test_a_disk_that_cannot_be_looked_at_is_on_no_volume_only_where_others_serve_it(
    virsh: Callable[..., None],
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: int,
    source: str,
) -> None:
    other = tmp_path / "other.img"
    virsh(other=other)
    failing(monkeypatch, other, errno.EACCES)
    mount = Mount(device, "/", str(tmp_path), "x", source, read_only=False)
    monkeypatch.setattr(mounts, "mount_under", lambda _path: mount)
    if os.major(device):
        with pytest.raises(AgentError, match=r"other\.img of a guest cannot be looked at: Permission denied"):
            names(image)
    else:
        assert names(image) == ["guest one (vda)"]


def test_a_device_whose_link_is_gone_for_a_moment_is_looked_at_again(
    virsh: Callable[..., None], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    virsh(one="/dev/vg/one", other="/srv/gone.img")
    monkeypatch.setattr(libvirt, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(libvirt, "_MOMENT_SECONDS", 3600.0)
    looks = []

    def of_disk(_placement: Placement, path: str) -> frozenset[str]:
        looks.append(path)
        if path == "/dev/vg/one" and looks.count(path) == 2:
            return frozenset({"key"})
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    monkeypatch.setattr(Placement, "of_disk", of_disk)
    assert names(image) == ["guest one (vda)"]


def test_loop_devices_of_an_image_need_no_nodes(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container /dev has none, and one may be removed meanwhile."""
    for name, number in (("loop77", "7:77"), ("loop78", "7:78")):
        (tmp_path / name / "loop").mkdir(parents=True)
        (tmp_path / name / "loop" / "backing_file").write_text(f"{image}\n")
        (tmp_path / name / "dev").write_text(number)
    (tmp_path / "loop78" / "dev").unlink()
    monkeypatch.setattr(mounts, "_BLOCK", tmp_path)
    target = Target("key", os.stat(image).st_dev, str(image))
    assert target.numbers_above() == {os.makedev(7, 77)}
