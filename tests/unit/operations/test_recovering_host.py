from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocksnap.errors import TargetError
from blocksnap.operations.recording import physical_volumes
from blocksnap.operations.recovering_host import SenselessRecordError, export_host, newest_of_host, script
from blocksnap.repository.documents import RecordedDisk, RecordedHeader, RecordedMount, Recovery

GROUP = """
my-vg {
  extent_size = 8192
  physical_volumes {
    pv0 { id = "a" device = "/dev/sda2" }
    pv1 { id = "b" device = "/dev/sdb" }
  }
  logical_volumes {
    root { status = ["READ", "WRITE", "VISIBLE"]
      segment1 { extent_count = 10 type = "striped" }
      segment2 { extent_count = 3 type = "striped" } }
    pool { status = ["READ", "WRITE", "VISIBLE"]
      segment1 { extent_count = 100 type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata"
        chunk_size = 256 } }
    data { status = ["READ", "WRITE", "VISIBLE"]
      segment1 { extent_count = 50 type = "thin" thin_pool = "pool" } }
    blocksnap-x { status = ["READ", "VISIBLE"] tags = ["blocksnap", "blocksnap.r"]
      segment1 { extent_count = 50 type = "thin" thin_pool = "pool" } }
    pool_tmeta { status = ["READ", "WRITE"] segment1 { extent_count = 2 type = "striped" } }
    pool_tdata { status = ["READ", "WRITE"] segment1 { extent_count = 100 type = "striped" } }
  }
}
"""
ID = "ab" * 16
POOL = (
    "lvcreate --yes --type thin-pool --size 419430400b --chunksize 131072b --poolmetadatasize 8388608b "
    "--name pool my-vg"
)
RECOVERY = Recovery(
    groups={"my-vg": GROUP},
    disks=(
        RecordedDisk(path="/dev/sda", size=1 << 40, table="label: gpt\n"),
        RecordedDisk(path="/dev/sdb", size=1 << 30),
    ),
    mounts=(RecordedMount(source="/dev/mapper/my--vg-root", point="/", filesystem="ext4"),),
    fstab="/dev/my-vg/root / ext4\n",
)


def test_the_script_makes_pools_before_volumes_and_tells_what_there_is_no_backup_of() -> None:
    lines = [line for line in script(RECOVERY, {"my-vg/data": ID}) if not line.startswith("# W")]
    assert lines[-6:] == [
        'cd "$(dirname "$0")"',
        "sfdisk /dev/sda < sda.sfdisk",
        "vgcreate --yes --physicalextentsize 4194304b my-vg /dev/sda2 /dev/sdb",
        POOL,
        "# my-vg/root (striped, 54525952 bytes) is in no backup of this repository",
        f"blocksnap restore {ID} my-vg/data --create --pool pool",
    ]
    assert script(RECOVERY, {"my-vg/root": ID}) is not None
    assert "my-vg/root --create --classic" in "\n".join(script(RECOVERY, {"my-vg/root": ID}))
    assert physical_volumes("my-vg", GROUP) == ["/dev/sda2", "/dev/sdb"]


def test_names_that_are_no_names_of_lvm_never_reach_a_shell() -> None:
    hostile = GROUP.replace("my-vg {", "$(reboot) {", 1)
    with pytest.raises(SenselessRecordError, match="is no name of a volume"):
        list(script(Recovery(groups={"$(reboot)": hostile}), {}))
    hostile = GROUP.replace('"/dev/sdb"', '"/dev/$(reboot)"')
    assert "'/dev/$(reboot)'" in "\n".join(script(Recovery(groups={"my-vg": hostile}), {}))
    for old, new in (
        ('thin_pool = "pool"', 'thin_pool = "pool;reboot"'),
        ('type = "striped"', 'type = "x\nreboot\n"'),
        ('"/dev/sdb"', '"--config=x"'),
    ):
        with pytest.raises(SenselessRecordError):
            list(script(Recovery(groups={"my-vg": GROUP.replace(old, new)}), {"my-vg/data": ID}))
    disk = RecordedDisk(path="/dev/sda\nreboot\n", size=1)
    lines = "\n".join(script(Recovery(disks=(disk,)), {})).splitlines()
    assert not any(line.startswith("reboot") for line in lines)


@pytest.mark.parametrize(
    "text",
    ["my-vg {", "my-vg { logical_volumes = 1 }", GROUP.replace('device = "/dev/sdb"', ""), "a {" * 100_000],
    ids=["cut", "another kind", "no device", "deep"],
)
def test_a_group_that_makes_no_sense_is_damage(text: str) -> None:
    with pytest.raises(SenselessRecordError, match="recorded of the host makes no sense") as raised:
        list(script(Recovery(groups={"my-vg": text}), {}))
    assert raised.value.exit_code == 13


def test_headers_are_restored_and_containers_opened_before_groups_are_made() -> None:
    header = RecordedHeader(volume="luks:1-2", path="/dev/sdb$1", mapping="my vault")
    recovery = RECOVERY.model_copy(update={"headers": (header,)})
    lines = list(script(recovery, {"luks:1-2": ID}))
    at = lines.index("(umask 077 && blocksnap restore -- " + ID + " sdb-1.luks)")
    assert lines[at + 1 : at + 4] == [
        "cryptsetup luksHeaderRestore --batch-mode --header-backup-file sdb-1.luks '/dev/sdb$1'",
        "rm sdb-1.luks",
        "cryptsetup open -- '/dev/sdb$1' 'my vault'",
    ]
    assert lines[at + 4].startswith("vgcreate")
    assert lines[at - 2].startswith("sfdisk")
    assert not any("luksHeaderRestore" in line for line in script(recovery, {}))
    # Where there is none, the document is what it was before there were headers.
    assert "headers" not in RECOVERY.model_dump(mode="json")
    assert Recovery.model_validate_json(recovery.model_dump_json()) == recovery


def test_nothing_recorded_is_taken_for_an_option() -> None:
    header = RecordedHeader(volume="--repo=x", path="/-f/disk", mapping="--test")
    lines = list(script(Recovery(headers=(header,)), {"--repo=x": ID}))
    words = [shlex.split(line.strip("()").removeprefix("umask 077 && ")) for line in lines]
    found = {line[0]: line[1:] for line in words if line and line[0] in ("blocksnap", "cryptsetup", "rm")}
    assert found == {
        "blocksnap": ["restore", "--", ID, "f-disk.luks"],
        "cryptsetup": ["open", "--", "/-f/disk", "--test"],
        "rm": ["f-disk.luks"],
    }


def test_arrays_are_to_be_made_by_hand() -> None:
    on_array = GROUP.replace('"/dev/sdb"', '"/dev/md0"')
    header = RecordedHeader(volume="luks:1-2", path="/dev/md/two\nreboot")
    recovery = Recovery(groups={"my-vg": on_array}, headers=(header,))
    found = [line for line in script(recovery, {}) if "was an array" in line]
    assert [line.partition(" was")[0] for line in found] == ["# '/dev/md/two\\nreboot'", "# '/dev/md0'"]
    assert not any("was an array" in line for line in script(RECOVERY, {}))


def test_of_volumes_of_several_hosts_those_of_the_one_are_meant() -> None:
    def stored(host: str, id_: str, name: str = "my-vg/data") -> Any:
        backup = SimpleNamespace(id=id_, volume=SimpleNamespace(name=name))
        return SimpleNamespace(backup=backup, manifest=SimpleNamespace(host=host))

    backups = [stored("a", "1"), stored("a", "2"), stored("b", "3"), stored("b", "4", "my-vg/root")]
    repository: Any = SimpleNamespace(backups=lambda: backups)
    assert newest_of_host(repository, "a") == {"my-vg/data": "2"}
    assert newest_of_host(repository, "b") == {"my-vg/data": "3", "my-vg/root": "4"}
    lines = list(script(RECOVERY, newest_of_host(repository, "a")))
    assert "blocksnap restore 2 my-vg/data --create --pool pool" in lines
    assert any(line.startswith("# my-vg/root") for line in lines)


def test_everything_is_exported(tmp_path: Path) -> None:
    written = export_host(RECOVERY, {}, tmp_path / "host")
    assert {path.name for path in written} == {"my-vg.vgcfg", "sda.sfdisk", "fstab", "mounts", "recover.sh"}
    assert (tmp_path / "host/mounts").read_text() == "/dev/mapper/my--vg-root / ext4\n"
    assert (tmp_path / "host/my-vg.vgcfg").read_text() == GROUP
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="cannot write"):
        export_host(RECOVERY, {}, tmp_path / "file")
