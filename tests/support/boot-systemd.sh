#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Becomes a systemd that is process 1 of namespaces of its own, above the machine's files and without a
# way to change them. support/systemd_host.py starts it, in a control group of its own:
#
#     unshare --mount --pid --cgroup --net --ipc --uts --fork boot-systemd.sh SHARED UNITS
#
# SHARED is the one folder that both sides can write to; UNITS, in it, has the units to begin with.
set -euo pipefail

SHARED=$1 UNITS=$2
WORK=/mnt
ROOT=$WORK/root

overlay() {
    mkdir -p "$WORK/changed$1" "$WORK/work$1"
    mount -t overlay -o "lowerdir=$1,upperdir=$WORK/changed$1,workdir=$WORK/work$1" overlay "$ROOT$1"
}

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs $WORK
mkdir $ROOT $WORK/top $WORK/top.work
mount -t overlay -o lowerdir=/,upperdir=$WORK/top,workdir=$WORK/top.work overlay $ROOT
overlay /dev
mount -t proc proc "$ROOT/proc"
mount --bind "$ROOT/proc/sys" "$ROOT/proc/sys"
mount -o remount,bind,ro "$ROOT/proc/sys"
mount -t sysfs -o ro sysfs "$ROOT/sys"
mount -t cgroup2 cgroup2 "$ROOT/sys/fs/cgroup"
mount -t tmpfs tmpfs "$ROOT/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$ROOT/dev/pts"
# What it says there is for us, not for the machine's own console or the kernel's messages.
for name in console kmsg; do
    touch "$SHARED/$name"
    mount --bind "$SHARED/$name" "$ROOT/dev/$name"
done
mount -t tmpfs -o mode=755 tmpfs "$ROOT/run"
mount -t tmpfs -o mode=755 tmpfs "$ROOT/etc/systemd/system"
mkdir -p "$ROOT/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\n' > "$ROOT/etc/systemd/journald.conf.d/test.conf"
mount --rbind "$SHARED" "$ROOT$SHARED"
mkdir "$ROOT/old"
cd "$ROOT"
pivot_root . old
umount -l old
# Credentials are mounted in a namespace beside it.
mount --make-rshared /
# What only a machine has (devices, swap, clocks, the kernel's settings) is left alone in a container.
exec env -i container=blocksnap-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    SYSTEMD_UNIT_PATH="/etc/systemd/system:/run/systemd/system:$UNITS" \
    /lib/systemd/systemd --system --unit=basic.target --log-target=journal-or-kmsg < /dev/null
