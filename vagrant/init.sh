#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Init of the lab's kernel: gives the command a machine whose every write is forgotten, runs it,
# and leaves its exit status in the run directory. Started by vagrant/lab, never by hand.
#
# LAB_RUN, from the kernel's command line, is the run directory on the host. It holds
#   command   the command as one shell line
#   keep      directories that must stay visible although /tmp, /var/tmp and /run are fresh
#   share     directories that the command may really write to
#   stdout, stderr, status   what goes back
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

ROOT=/run/root  # where the new root is built, on the writable layer's disk
LAB=/run/lab    # ours, inside the new root

# The host's files below, the first scratch disk above: everything may be written.
mount_overlay() {
    mount -t ext4 -o noatime /dev/ubda /run
    mkdir /run/{upper,work,root,tmp,vartmp}
    chmod 755 /run/upper
    chmod 1777 /run/tmp /run/vartmp
    insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/overlayfs/overlay.ko"
    mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work overlay $ROOT
    mkdir -p $ROOT/{proc,sys,dev,tmp,run,var/tmp}
}

# Directories below the fresh ones are bound aside, and come back once those are in place.
cover_directories() {
    local path number=0 aside=()
    while read -r path; do
        case $path in
        /tmp/* | /var/tmp/* | /run/*)
            aside+=("$path")
            mkdir "/run/aside$number"
            mount --bind "$ROOT$path" "/run/aside$number"
            number=$((number + 1))
            ;;
        esac
    done < "$LAB_RUN/keep"
    mount --bind /run/tmp $ROOT/tmp
    mount --bind /run/vartmp $ROOT/var/tmp
    mount -t tmpfs -o mode=755 tmpfs $ROOT/run
    for number in "${!aside[@]}"; do
        mkdir -p "$ROOT${aside[number]}"
        mount --move "/run/aside$number" "$ROOT${aside[number]}"
    done
}

mount_hostfs() {
    mkdir -p "$2"
    mount -t hostfs -o "$1" none "$2"
}

# Directories that the command really shares with the host, and our own channel to it.
mount_shares() {
    local path
    while read -r path; do
        mount_hostfs "$path" "$ROOT$path"
    done < "$LAB_RUN/share"
    mount_hostfs "$LAB_RUN" "$ROOT$LAB/host"
}

mount_kernel_filesystems() {
    mount -t proc proc $ROOT/proc
    mount -t sysfs sysfs $ROOT/sys
    mount -t cgroup2 cgroup2 $ROOT/sys/fs/cgroup
    mount --move /dev $ROOT/dev
    mkdir $ROOT/dev/{pts,shm,mapper}
    mount -t devpts -o ptmxmode=666,gid=5 devpts $ROOT/dev/pts
    mount -t tmpfs -o mode=1777 tmpfs $ROOT/dev/shm
    ln -s /proc/self/fd $ROOT/dev/fd
    ln -s fd/0 $ROOT/dev/stdin
    ln -s fd/1 $ROOT/dev/stdout
    ln -s fd/2 $ROOT/dev/stderr
}

enter_new_root() {
    cd $ROOT
    mkdir .$LAB/old
    pivot_root . .$LAB/old
    exec chroot . /bin/bash $LAB/host/init.sh inside
}

# Modules that are opened through a node are loaded by the kernel when the node is used.
prepare_devices() {
    local modules version
    version=$(uname -r)
    modules=/lib/modules/$version
    [ -d /lib/modules ] || rm -f /lib/modules
    mkdir -p "$modules"
    mount --bind "/usr/lib/uml/modules/$version" "$modules"
    modprobe -a dm-mod dm-thin-pool dm-snapshot
    mknod /dev/loop-control c 10 237
    mknod -m 666 /dev/fuse c 10 229
    # Only the lab's disks exist here, but the host may have a list of those that LVM may see.
    rm -rf /etc/lvm/devices /etc/lvm/archive /etc/lvm/backup /etc/lvm/cache
    mkdir /run/lock/lvm /run/lvm
    start_udev
}

start_udev() {
    local udevd
    for udevd in /usr/lib/systemd/systemd-udevd /lib/systemd/systemd-udevd; do
        [ -x $udevd ] && break
    done
    $udevd --daemon
    udevadm trigger --subsystem-match=block --subsystem-match=misc --subsystem-match=mem
    udevadm settle
}

prepare_system() {
    umount -l $LAB/old
    hostname lab
    ip link set lo up
    mkdir -m 1777 /run/lock
    if id postgres > /dev/null 2>&1; then
        mkdir /run/postgresql
        chown postgres:postgres /run/postgresql
        chmod 2775 /run/postgresql
    fi
}

# Output goes through pipes, as it would from a service, and from there to files on the host.
run_command() {
    local status=0 pumps=() _
    mkfifo $LAB/out $LAB/err
    cat $LAB/out > $LAB/host/stdout &
    pumps+=($!)
    cat $LAB/err > $LAB/host/stderr &
    pumps+=($!)
    setsid /bin/bash $LAB/host/command < /dev/null > $LAB/out 2> $LAB/err || status=$?
    # A daemon that the command left running may hold the pipes open for ever.
    for _ in {1..20}; do
        kill -0 "${pumps[@]}" 2> /dev/null || break
        sleep 0.1
    done
    while read -r path; do
        sync -f "$path"
    done < $LAB/host/share
    echo $status > $LAB/host/status.new
    mv $LAB/host/status.new $LAB/host/status
}

if [ "${1-}" = inside ]; then
    prepare_system
    prepare_devices
    run_command
    sleep infinity  # the host ends the kernel once it has the status
fi
mount_overlay
cover_directories
mount_shares
mount_kernel_filesystems
enter_new_root
