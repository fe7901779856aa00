"""A guest of libvirt with a real kernel and a real agent, on a libvirtd of its own.

The guest is a kernel and an initramfs made of Debian packages (``build/guest`` keeps them), which are
unpacked and not installed. Its disk has an ext4, to which a program appends numbered records all the time,
each with an fsync after it. It is emulated: whether a KVM works is not asked.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.loops import call
from support.require import require
from support.standing import PROJECT, wait_until

BOOT = Path(__file__).with_name("boot-libvirt.sh")
CACHE = PROJECT / "build" / "guest"
KERNEL = "linux-image-cloud-amd64"
PACKAGES = ("qemu-guest-agent", "busybox-static")
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)
NAME = "shop vm"
RECORD_BYTES = 32
DISK_BYTES = 64 << 20
NAMESPACES = ("--mount", "--net", "--pid", "--mount-proc")
FORKED = ("--fork", "--kill-child=SIGKILL")

_WRITER = r"""
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return t.tv_sec + t.tv_nsec / 1e9;
}

static volatile sig_atomic_t forget;

static void on_signal(int number)
{
        (void)number;
        forget = 1;
}

int main(int argc, char **argv)
{
        int fd = open(argv[1], O_WRONLY | O_CREAT | O_APPEND, 0600);
        double longest = 0, said = 0, last = now(), at;
        char record[33];

        setvbuf(stdout, NULL, _IOLBF, 0);
        signal(SIGUSR1, on_signal);
        for (unsigned number = 0;; number++) {
                snprintf(record, sizeof(record), "%-31u\n", number);
                if (write(fd, record, 32) != 32 || fsync(fd) < 0)
                        abort();
                at = now();
                if (forget) {
                        longest = forget = 0;
                        last = at;
                        printf("stall 0\n");
                }
                if (at - last > longest)
                        printf("stall %.3f\n", longest = at - last);
                if (at - said > 0.25) {
                        printf("written %u\n", number + 1);
                        said = at;
                }
                last = at;
                usleep(2000);
        }
}
"""

# What comes on the second serial line is done, so that there is a way in without the agent.
_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /sys /dev /run /tmp /data
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules); do insmod /$module.ko || echo "no $module"; done > /dev/ttyS0 2>&1
until [ -b /dev/vda ] && [ -e /dev/vport*p1 ]; do sleep 0.1; done
mount -t ext4 /dev/vda /data || echo "no data" > /dev/ttyS0
/writer /data/records > /dev/ttyS0 &
longest() { killall -USR1 writer; }
agent() { qemu-ga --method=virtio-serial --path="$(echo /dev/vport*p1)" -t /run --fsfreeze-hook=/hook & }
agent
stty -F /dev/ttyS1 -echo
echo ready > /dev/ttyS0
while :; do
    while read -r line; do
        eval "$line"
        echo "did $line" > /dev/ttyS0
    done < /dev/ttyS1
done
"""
_HOOK = """\
#!/bin/sh
[ "$1" != freeze ] || [ ! -e /slow ] || sleep "$(cat /slow)"
"""
_DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>quiet panic=-1</cmdline></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{shared}/console'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{shared}/orders'/><target port='1'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def require_guests() -> None:
    """Skip where such a guest cannot be started."""
    require("guest", os.geteuid() == 0, "its namespaces need root")
    for program in ("libvirtd", "virtlogd", "virsh", "qemu-system-x86_64", "apt-get", "gcc", "mkfs.xfs"):
        require("guest", shutil.which(program) is not None, f"{program} is not installed")


def _tree() -> Path:
    """Download the packages and unpack them, once."""
    tree = CACHE / "tree"
    if tree.exists():
        return tree
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    depends = call("apt-cache", "depends", KERNEL)
    kernels = [line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line]
    fetched = subprocess.run(
        ["apt-get", "download", *PACKAGES, *kernels[:1]],
        cwd=CACHE,
        check=False,
        capture_output=True,
        text=True,
    )
    require("guest", bool(kernels) and fetched.returncode == 0, f"apt has no packages: {fetched.stderr}")
    for package in CACHE.glob("*.deb"):
        call("dpkg-deb", "-x", package, CACHE / "unpacking")
    (CACHE / "unpacking").rename(tree)
    return tree


def _libraries(program: Path) -> list[Path]:
    """What a program is linked with."""
    words = call("ldd", program).split()
    return [Path(word) for word in words if word.startswith("/")]


def _copy(source: Path, root: Path, name: str) -> None:
    target = root / name.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def make_initramfs(folder: Path) -> tuple[Path, Path]:
    """Return the kernel and the initramfs."""
    tree, root = _tree(), folder / "root"
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    _copy(tree / "bin" / "busybox", root, "bin/busybox")
    agent = tree / "usr" / "sbin" / "qemu-ga"
    _copy(agent, root, "bin/qemu-ga")
    for library in _libraries(agent):
        _copy(library, root, str(library))
    for module in MODULES:
        (found,) = (tree / "lib" / "modules").rglob(f"{module}.ko")
        _copy(found, root, found.name)
    (root / "modules").write_text("\n".join(MODULES))
    (folder / "writer.c").write_text(_WRITER)
    call("gcc", "-static", "-O1", "-o", root / "writer", folder / "writer.c")
    for name, text in (("init", _INIT), ("hook", _HOOK)):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    initramfs = folder / "initramfs"
    names = subprocess.run(["find", "."], cwd=root, check=True, capture_output=True).stdout
    with initramfs.open("wb") as file:
        words = [str(tree / "bin" / "busybox"), "cpio", "-o", "-H", "newc"]
        subprocess.run(words, cwd=root, input=names, stdout=file, stderr=subprocess.DEVNULL, check=True)
    return kernel, initramfs


class Guest:
    """It, as long as it runs."""

    def __init__(self, shared: Path, disk: Path) -> None:
        self.shared, self.disk = shared, disk
        self.uri = f"qemu+unix:///system?socket={shared}/run/libvirt/libvirt-sock"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        call("mkfs.ext4", "-q", disk)
        kernel, initramfs = make_initramfs(shared)
        (shared / "guest.xml").write_text(
            _DOMAIN.format(name=NAME, kernel=kernel, initramfs=initramfs, disk=disk, shared=shared)
        )
        self._daemon_output = (shared / "libvirtd").open("wb")
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, *FORKED, BOOT, shared],
            stdin=subprocess.DEVNULL,
            stdout=self._daemon_output,
            stderr=self._daemon_output,
        )

    def start(self) -> None:
        """Boot it."""
        assert wait_until(lambda: self.virsh("uri").returncode == 0, 120), self.console()
        started = self.virsh("create", str(self.shared / "guest.xml"))
        assert started.returncode == 0, started.stderr
        assert wait_until(self.answers, 300), self.console()
        assert wait_until(lambda: self.written() > 0, 60), self.console()

    def virsh(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["virsh", "--connect", self.uri, *words], check=False, capture_output=True, text=True, timeout=120
        )

    def kill_daemon(self) -> None:
        """Kill libvirtd, which is started again three seconds later."""
        init = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0]
        (daemon,) = (
            pid
            for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split()
            if Path(f"/proc/{pid}/comm").read_text() == "libvirtd\n"
        )
        os.kill(int(daemon), signal.SIGKILL)

    def answers(self) -> bool:
        """Whether its agent does."""
        return self.virsh("domfsinfo", NAME).returncode == 0

    def is_frozen(self) -> bool:
        """What its agent says, which must be there."""
        said = self.virsh("qemu-agent-command", NAME, '{"execute": "guest-fsfreeze-status"}')
        assert said.returncode == 0, said.stderr
        return '"frozen"' in said.stdout

    def order(self, line: str) -> None:
        """Have a line of shell done in it, whatever its agent does."""
        before = self.console().count("did ")
        with socket.socket(socket.AF_UNIX) as orders:
            orders.connect(str(self.shared / "orders"))
            orders.sendall(line.encode() + b"\n")
            assert wait_until(lambda: self.console().count("did ") > before, 60), self.console()

    def console(self) -> str:
        try:
            return (self.shared / "console").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _told(self, word: str) -> list[str]:
        lines = (line.split() for line in self.console().splitlines()[:-1])
        return [words[1] for words in lines if len(words) == 2 and words[0] == word]

    def written(self) -> int:
        """How many records are on its disk at least."""
        return int((self._told("written") or ["0"])[-1])

    def stall(self) -> float:
        """The longest time between two records, in seconds."""
        return float((self._told("stall") or ["0"])[-1])

    def goes_on(self, seconds: float = 30.0) -> bool:
        """Whether records are written now."""
        before = self.written()
        return wait_until(lambda: self.written() > before + 1, seconds)

    def is_running(self) -> bool:
        return self.virsh("domstate", NAME).stdout.strip() == "running"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._daemon_output.close()


@contextmanager
def guest_on(shared: Path, disk: Path) -> Iterator[Guest]:
    """Boot one with that file as its disk, and end it and its libvirtd."""
    made = Guest(shared, disk)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def read_records(folder: Path) -> int:
    """How many records there are; every one has to be whole, and in its place."""
    content = (folder / "records").read_bytes()
    count, rest = divmod(len(content), RECORD_BYTES)
    assert rest == 0
    assert content == b"".join(b"%-31d\n" % number for number in range(count))
    return count


def checked(image: Path) -> tuple[Sequence[str], int, str]:
    """What an image says of its filesystem: its features, the exit status of e2fsck and what that says."""
    shown = call("dumpe2fs", "-h", image)
    (features,) = (
        line.partition(":")[2].split()
        for line in shown.splitlines()
        if line.startswith("Filesystem features:")
    )
    done = subprocess.run(["e2fsck", "-fn", image], check=False, capture_output=True, text=True)
    return features, done.returncode, done.stdout + done.stderr


def pause(seconds: float) -> None:
    """Let it write for a while."""
    time.sleep(seconds)
