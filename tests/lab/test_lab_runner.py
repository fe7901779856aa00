# SPDX-License-Identifier: Apache-2.0
"""The lab runner on the host: what a command gets from it, and what it leaves behind (nothing)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.require import require
from support.standing import wait_until

PROJECT = Path(__file__).resolve().parents[2]
LAB = PROJECT / "vagrant" / "lab"
LAB_FAILED = 125
RUN_PREFIX = "blocksnap-lab-"
_LONGEST = "600"
"""Seconds, for what hangs: labs that are started beside one another share the processors."""


@pytest.fixture(autouse=True, scope="session")
def _lab_works() -> None:
    check = subprocess.run([LAB, "--check"], capture_output=True, text=True, check=False)
    require("lvm", check.returncode == 0, check.stderr.strip())


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory that the runner uses for its own files, so that they can be counted."""
    directory = Path(tempfile.mkdtemp(prefix="lab-test-"))
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    shutil.rmtree(directory)


def lab(*words: str, script: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    argv = [LAB, "--timeout", _LONGEST, *words, "--", "bash", "-c", script]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)


def kernels(directory: Path) -> list[str]:
    """Command lines of the processes that were started from a run directory below `directory`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{directory}/{RUN_PREFIX}" in text:
            found.append(text)
    return found


def test_passes_on_output_and_exit_status(scratch: Path) -> None:
    result = lab(script="echo out; echo err >&2; pwd; cat; exit 7")
    assert result.returncode == 7, result.stderr
    assert result.stdout == f"out\n{PROJECT}\n"
    assert result.stderr == "err\n"
    assert not list(scratch.iterdir())
    assert not kernels(scratch)


def test_signal_becomes_128_plus_number() -> None:
    assert lab(script="kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_missing_command_is_127() -> None:
    argv = [LAB, "--timeout", _LONGEST, "--", "no-such-command"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 127
    assert "no-such-command" in result.stderr


def test_output_comes_while_the_command_runs() -> None:
    argv = [LAB, "--timeout", _LONGEST, "--", "bash", "-c", "echo first; sleep 1000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "first\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=300) == 128 + signal.SIGTERM


def test_a_lot_of_output_arrives_whole() -> None:
    result = lab(script="seq 300000; seq 1000 >&2")
    assert result.stdout == "".join(f"{n}\n" for n in range(1, 300001))
    assert result.stderr == "".join(f"{n}\n" for n in range(1, 1001))


def test_daemon_left_running_does_not_delay_the_end() -> None:
    result = lab(script="sleep 600 & echo done")
    assert (result.returncode, result.stdout) == (0, "done\n")


def test_timeout_kills_everything(scratch: Path) -> None:
    argv = [LAB, "--timeout", "8", "--", "bash", "-c", "trap '' TERM; echo up; sleep 1000 & wait"]
    started = time.monotonic()
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == 124
    assert "the time is up (8 s)" in result.stderr
    assert time.monotonic() - started < 200
    assert not list(scratch.iterdir())
    assert not kernels(scratch)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_clean_up(scratch: Path, number: signal.Signals) -> None:
    with subprocess.Popen([LAB, "--", "sleep", "600"], stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: processors(scratch), 300)
        process.send_signal(number)
        assert process.wait(timeout=300) == 128 + number
    assert not list(scratch.iterdir())
    assert not kernels(scratch)


def test_kernel_dies_with_a_killed_runner_and_the_next_run_sweeps(scratch: Path) -> None:
    with subprocess.Popen([LAB, "--", "sleep", "600"]) as process:
        assert wait_until(lambda: processors(scratch), 300)
        process.kill()
    assert wait_until(lambda: not kernels(scratch), 300), kernels(scratch)
    assert lab(script="true").returncode == 0
    assert not list(scratch.iterdir())


def test_kernel_that_does_not_boot_is_explained(scratch: Path) -> None:
    argv = [LAB, "--memory", "16M", "--timeout", _LONGEST, "--", "true"]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert result.returncode == LAB_FAILED
    assert "lab: the kernel ended before the command did" in result.stderr
    assert not list(scratch.iterdir())


def test_host_is_not_written_to_except_in_a_share(tmp_path: Path) -> None:
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.mkdir()
    private.mkdir()
    script = f"echo kept > {shared}/file; echo lost > {private}/file; cat {private}/file; echo > /etc/lab"
    result = lab("--share", str(shared), script=script, cwd=private)
    assert (result.returncode, result.stdout) == (0, "lost\n"), result.stderr
    assert (shared / "file").read_text() == "kept\n"
    assert not list(private.iterdir())
    assert not Path("/etc/lab").exists()


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSNAP_MARK", "with space and 'quote'")
    monkeypatch.setenv("SOMETHING_ELSE", "not passed on")
    script = 'printf "%s\\n" "$BLOCKSNAP_MARK" "${SOMETHING_ELSE-unset}" "$EXTRA" "$HOME" "$LAB_DISKS"'
    result = lab("--env", "EXTRA=a=b", "--disk", "64M", "--disk", "1G", "--disk", "2G", script=script)
    assert result.stdout.splitlines() == [
        "with space and 'quote'", "unset", "a=b", "/root", "/dev/ubdb:/dev/ubdc:/dev/ubdd",
    ]  # fmt: skip


def test_lvm_thin_pool_and_snapshots() -> None:
    script = """
        set -ex
        IFS=: read -r disk other <<< "$LAB_DISKS"
        test "$(blockdev --getsize64 "$disk")" = 1073741824
        vgcreate -q vg0 "$disk" "$other"
        lvcreate -q --type thin-pool -L 256M -n pool vg0
        lvcreate -q -T vg0/pool -V 128M -n thin
        lvcreate -q -L 64M -n thick vg0
        mkfs.ext4 -q /dev/vg0/thin
        lvcreate -q -s -kn -n thinsnap vg0/thin
        lvcreate -q -s -L 16M -n thicksnap vg0/thick
        cmp /dev/vg0/thin /dev/vg0/thinsnap
        test "$(head -c 4 /dev/mapper/vg0-thicksnap-cow)" = SnAp
        udevadm info /dev/vg0/thin | grep -q DM_LV_NAME=thin
        pvs --noheadings -o pv_name | wc -l
    """
    result = lab("--disk", "1G", "--disk", "1G", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "2"


def test_filesystems_loop_freezer_and_loopback_network() -> None:
    script = """
        set -ex
        for type in ext4 xfs btrfs; do
            truncate -s 320M /tmp/$type.img
            mkfs.$type -q /tmp/$type.img
            mkdir -p /mnt/$type
            mount -o loop /tmp/$type.img /mnt/$type
            echo data > /mnt/$type/file
        done
        cp --reflink=always /mnt/xfs/file /mnt/xfs/clone
        btrfs -q subvolume snapshot -r /mnt/btrfs /mnt/btrfs/snap
        mkdir /sys/fs/cgroup/frozen
        echo 1 > /sys/fs/cgroup/frozen/cgroup.freeze
        ip -br addr show lo | grep -q 127.0.0.1
    """
    result = lab(script=script)
    assert result.returncode == 0, result.stderr


def test_two_labs_at_once() -> None:
    argv = [LAB, "--timeout", _LONGEST, "--disk", "256M", "--", "bash", "-c"]
    script = 'vgcreate -q same "$LAB_DISKS" >/dev/null && sleep 3 && vgs --noheadings -o pv_count same'
    both = [subprocess.Popen([*argv, script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["1", "1"]
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.parametrize("parent", ["/tmp", "/var/tmp", "/var/lib"])  # noqa: S108 - the point
def test_project_may_lie_anywhere(parent: str) -> None:
    require("root", os.access(parent, os.W_OK), f"cannot write to {parent}")
    with tempfile.TemporaryDirectory(prefix="lab project ", dir=parent) as directory:
        project = Path(directory)
        (project / "vagrant").mkdir()
        for name in ("lab", "init.sh", "uml-registers.c"):
            shutil.copy(PROJECT / "vagrant" / name, project / "vagrant" / name)
        (project / "data").write_text("here\n")
        argv = [project / "vagrant" / "lab", "--timeout", _LONGEST, "--", "cat", str(project / "data")]
        result = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
        assert (result.returncode, result.stdout) == (0, "here\n"), result.stderr


def test_postgres_runs() -> None:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    require("postgres", bool(binaries), "PostgreSQL's server is not installed")
    script = f"""
        set -e
        install -d -o postgres /tmp/cluster
        cd /tmp
        as_postgres() {{ runuser -u postgres -- env PATH={binaries[-1]}:$PATH "$@"; }}
        as_postgres initdb -D /tmp/cluster >&2
        as_postgres pg_ctl -D /tmp/cluster -l /tmp/cluster/log -w start >&2 || ! cat /tmp/cluster/log >&2
        as_postgres psql -Atc 'select 6 * 7'
    """
    result = lab(script=script)
    assert (result.returncode, result.stdout) == (0, "42\n"), result.stderr


def test_wide_registers_of_threads_are_kept_apart() -> None:
    """BLAKE3 uses the widest vectors there are; a register lost at a switch would be a wrong hash."""
    script = """
import threading
from blake3 import blake3

def work(data, wanted):
    answers.extend(blake3(data).digest() == wanted for _ in range(60))

answers = []
data = [bytes([n]) * (1 << 21) for n in range(4)]
threads = [threading.Thread(target=work, args=(each, blake3(each).digest())) for each in data]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(answers), all(answers))
"""
    python = PROJECT / ".venv" / "bin" / "python"
    done = subprocess.run(
        [LAB, "--timeout", _LONGEST, "--", python, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("240 True\n", 0), done.stderr


def processors(directory: Path) -> list[set[int]]:
    """What the kernels that were started from a run directory below `directory` may run on."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"linux.uml") and f"{directory}/{RUN_PREFIX}".encode() in b" ".join(words):
                found.append(os.sched_getaffinity(int(process.name)))
        except OSError:
            continue
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor for all")
def test_each_lab_has_a_processor_of_its_own(scratch: Path) -> None:
    """Two of them in a network namespace, where the claims of other labs are not to be seen."""
    script = f"{LAB} -- sleep 600 & {LAB} -- sleep 600 & wait"
    argv = ["unshare", "--net", "sh", "-c", script]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            assert wait_until(lambda: len({frozenset(each) for each in processors(scratch)}) == 2, 300)
            assert all(len(each) == 1 for each in processors(scratch))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    # The labs are nobody's children here: what they still remove must not be removed beside them.
    assert wait_until(lambda: not kernels(scratch) and not any(scratch.iterdir()), 300)
