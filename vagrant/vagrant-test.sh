#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Brings a Vagrant VM up, runs the LVM and btrfs tests in it, and destroys it; exits as the tests do.
# Needs root, no box to download, no KVM, no libvirt daemon: the box is built from Debian packages
# (and kept in build/box), and the daemons run in namespaces of their own. With these namespaces the
# domain, the networks, the firewall rules and the daemons are gone, however this ends.
#
#     vagrant/vagrant-test.sh             BLOCKSNAP_VM_DRIVER=qemu|kvm overrides the choice
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
PROJECT=$(dirname "$HERE")
LISTS=("$HERE/packages.txt" "$HERE/packages-vagrant.txt" "$HERE/packages-vm.txt")
WHEELHOUSE=$HERE/.wheelhouse

say() {
    printf 'vagrant-test: %s (%d s)\n' "$*" "$SECONDS" >&2
}

# /dev/kvm is not enough: on some machines it starts no processor like the machine's own, on others it gives up
# at the first instruction that it has to emulate and cannot. So the box's own kernel is started with it,
# without a disk: it has to get as far as missing that.
usable_driver() {
    local messages
    tar -xOf "$BOX" vmlinuz > "$WORK/vmlinuz"
    messages=$(timeout 20 qemu-system-x86_64 -accel kvm -cpu host -m 512 -nodefaults -display none -no-reboot \
        -serial stdio -kernel "$WORK/vmlinuz" -append 'console=ttyS0 panic=-1' < /dev/null 2> /dev/null) || true
    if [[ $messages == *'Unable to mount root fs'* ]]; then echo kvm; else echo qemu; fi
}

ensure_box() {
    local key
    key=$(cat "$HERE/packages.txt" "$HERE/build-box.sh" | sha256sum | cut -c1-12)
    BOX=$PROJECT/build/box/blocksnap-$key.box
    if [ ! -e "$BOX" ]; then
        rm -rf "$PROJECT/build/box"
        say "building the box"
        "$HERE/build-box.sh" "$BOX"
    fi
}

# The guest has no way to a package index, so it gets the wheels along with the project.
build_wheelhouse() {
    rm -rf "$WHEELHOUSE"
    "$PROJECT/.venv/bin/python" -c 'import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
print(*project["build-system"]["requires"], *project["project"]["dependencies"],
      *project["project"]["optional-dependencies"]["dev"], sep="\n")' \
        "$PROJECT/pyproject.toml" > "$WORK/requirements.txt"
    "$PROJECT/.venv/bin/python" -m pip wheel -qq -w "$WHEELHOUSE" -r "$WORK/requirements.txt"
}

start_daemons() {
    local directory
    ip link set lo up
    mount -t sysfs sysfs /sys
    mkdir -p "$WORK/private"
    cp -a /etc/libvirt "$WORK/private/etc"
    mount --bind "$WORK/private/etc" /etc/libvirt
    for directory in lib cache log; do
        mkdir -p "$WORK/private/$directory" "/var/$directory/libvirt"
        mount --bind "$WORK/private/$directory" "/var/$directory/libvirt"
    done
    mount -t tmpfs -o mode=755 tmpfs /run
    rm -f /etc/libvirt/qemu/networks/autostart/*
    # Nothing here is worth protecting from the one guest, and a container's root may lack the rights.
    cat > /etc/libvirt/qemu.conf << 'CONF'
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
CONF
    virtlogd -d
    libvirtd -d
    for _ in {1..100}; do
        virsh -q uri > /dev/null 2>&1 && return
        sleep 0.1
    done
    virsh uri
}

define_pool() {
    mkdir "$WORK/pool"
    virsh -q pool-define-as default dir --target "$WORK/pool" > /dev/null
    virsh -q pool-start default > /dev/null
}

# The namespaces end with their first process, which unshare takes along when it is killed.
clean_up() {
    local status=$?
    [ -z "$NAMESPACES" ] || kill -KILL "$NAMESPACES" 2> /dev/null || true
    wait
    rm -rf --one-file-system "$WHEELHOUSE"
    for _ in {1..50}; do
        rm -rf --one-file-system "$WORK" 2> /dev/null && break
        sleep 0.2
    done
    [ ! -e "$WORK" ] || say "could not remove $WORK"
    say "done, exit status $status"
    exit "$status"
}

run_in_namespaces() {
    export VAGRANT_HOME=$WORK/vagrant-home VAGRANT_DOTFILE_PATH=$WORK/dotfile
    export VAGRANT_DEFAULT_PROVIDER=libvirt VAGRANT_CHECKPOINT_DISABLE=1 LIBVIRT_DEFAULT_URI=qemu:///system
    local box_name status=0
    start_daemons
    define_pool
    cd "$HERE"
    box_name=$(sed -n 's/.*config\.vm\.box = "\(.*\)".*/\1/p' Vagrantfile)
    say "adding the box as $box_name"
    vagrant box add --name "$box_name" "$BOX" > "$WORK/box-add.log" || { cat "$WORK/box-add.log"; return 1; }
    say "vagrant up, driver $BLOCKSNAP_VM_DRIVER"
    # Without a terminal its progress bar would be thousands of lines.
    vagrant up --provider=libvirt | grep --line-buffered -v Progress:
    say "running the tests in the VM"
    vagrant ssh -c 'sudo /blocksnap/vagrant/test-in-vm.sh' || status=$?
    say "vagrant destroy"
    vagrant destroy -f
    return $status
}

if [ "${1-}" = --inside ]; then
    WORK=$2 BOX=$3
    run_in_namespaces
    exit
fi

[ "$(id -u)" = 0 ] || { echo "vagrant-test: only root can make the namespaces" >&2; exit 1; }
"$HERE/bootstrap.sh" "${LISTS[@]}"
NAMESPACES=
WORK=$(mktemp -d /var/tmp/blocksnap-vm.XXXXXX)
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
ensure_box
BLOCKSNAP_VM_DRIVER=${BLOCKSNAP_VM_DRIVER:-$(usable_driver)}
export BLOCKSNAP_VM_DRIVER
build_wheelhouse
setpriv --pdeathsig KILL unshare --mount --net --pid --mount-proc --fork --kill-child=SIGKILL \
    "$HERE/vagrant-test.sh" --inside "$WORK" "$BOX" &
NAMESPACES=$!
wait $NAMESPACES
