"""A volume made for a restore is whole or gone, whenever the restore ends."""

from __future__ import annotations

import pytest

from blocksnap.restore import new_volume
from blocksnap.restore.new_volume import TAG, NewVolume
from blocksnap.restore.record import RestoreRecord
from blocksnap.system.command import CommandError
from blocksnap.system.lvm_report import LvReport

RECORD = RestoreRecord(repository="00" * 16, backup="12" * 16, mode="whole")


class Lvm:
    """An LVM of volumes with tags, whose lvcreate is interrupted when it has done its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ending: BaseException) -> None:
        self.volumes: dict[str, set[str]] = {}
        self.ending = ending
        for name in ("report", "create_thick", "remove_volume"):
            monkeypatch.setattr(new_volume.lvm, name, getattr(self, name))

    def report(self, _: str) -> LvReport:
        return LvReport(())

    def create_thick(self, group: str, name: str, size_bytes: int, tags: tuple[str, ...]) -> str:
        if name in self.volumes:
            raise CommandError("lvcreate", 5, "already exists")
        self.volumes[name] = set(tags)
        raise self.ending

    def remove_volume(self, group: str, name: str, *, tag: str) -> bool:
        if tag in self.volumes.get(name, ()):
            del self.volumes[name]
            return True
        return False


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(143), CommandError("lvcreate", 5, "no")])
def test_an_interrupt_while_it_is_made_leaves_none(
    monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    lvm = Lvm(monkeypatch, ending)
    with pytest.raises(type(ending)), NewVolume("vg", "new", 512, RECORD, pool=None):
        pytest.fail("it was not made")
    assert lvm.volumes == {}


def test_the_volume_of_another_restore_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lvm = Lvm(monkeypatch, KeyboardInterrupt())
    lvm.volumes["new"] = {TAG, f"{TAG}.0123456789abcdef"}
    with pytest.raises(CommandError, match="already exists"), NewVolume("vg", "new", 512, RECORD, pool=None):
        pytest.fail("it was not made")
    assert list(lvm.volumes) == ["new"]
