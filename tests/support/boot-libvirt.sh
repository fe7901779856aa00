#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Starts a libvirtd of its own in namespaces of its own, apart from one that the machine may have, and waits.
# support/guests.py starts it, as the first process of these namespaces:
#
#     unshare --mount --net --pid --mount-proc --fork --kill-child boot-libvirt.sh SHARED
#
# SHARED/run becomes its /run, so that its sockets can be reached from outside.
set -euo pipefail

SHARED=$1

mount --make-rprivate /
ip link set lo up
mount -t sysfs sysfs /sys
for directory in etc run lib cache log; do
    mkdir "$SHARED/$directory"
done
mount --bind "$SHARED/run" /run
mkdir -p /etc/libvirt
mount --bind "$SHARED/etc" /etc/libvirt
for directory in lib cache log; do
    mkdir -p "/var/$directory/libvirt"
    mount --bind "$SHARED/$directory" "/var/$directory/libvirt"
done
# Nothing here is worth protecting from the one guest, and a container's root may lack the rights.
cat > /etc/libvirt/qemu.conf << 'CONF'
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
CONF
cat > /etc/libvirt/libvirtd.conf << 'CONF'
auth_unix_rw = "none"
auth_unix_ro = "none"
CONF
virtlogd -d
# Not as process 1: somebody has to wait for what is orphaned, or libvirt thinks it still runs. When it is
# killed it is started again, after a while, as systemd does.
while :; do
    libvirtd || true
    sleep 3
done
