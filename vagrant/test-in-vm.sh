#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs the LVM and btrfs tests on this machine's own kernel, LVM on loop devices that it makes and
# removes. It is meant for a VM that can be thrown away: the tests load modules and create volumes.
set -euo pipefail

DISK_SIZE=4G

release() {
    local device
    for device in "${DEVICES[@]}"; do
        losetup -d "$device" || true
    done
    rm -rf "$DIRECTORY"
}

cd "$(dirname "$(readlink -f "$0")")/.."
[ "$(systemd-detect-virt)" != none ] || { echo "test-in-vm: this is no VM" >&2; exit 1; }
modprobe -a loop dm-thin-pool dm-snapshot btrfs xfs
DEVICES=()
DIRECTORY=$(mktemp -d /var/tmp/blocksnap-disks.XXXXXX)
trap release EXIT
for number in 1 2; do
    truncate -s $DISK_SIZE "$DIRECTORY/disk$number"
    DEVICES+=("$(losetup --find --show "$DIRECTORY/disk$number")")
done
LAB=vm
LAB_DISKS=$(IFS=:; echo "${DEVICES[*]}")
BLOCKSNAP_REQUIRE=lvm,btrfs,root
export LAB LAB_DISKS BLOCKSNAP_REQUIRE
# An emulated processor is ten to twenty times slower.
.venv/bin/python -m pytest -p no:cacheprovider --timeout 3000 tests/lvm tests/btrfs
