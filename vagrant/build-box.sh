#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds a Vagrant box (libvirt) from Debian packages, for machines that cannot download one. The box
# holds everything of packages.txt, so that its guests need no way to a registry, and brings its own
# kernel and provider settings, so that the project's Vagrantfile needs no special case.
#
#     vagrant/build-box.sh FILE.box       as root; BLOCKSNAP_MIRROR overrides the machine's mirror
set -euo pipefail

BOX=$(realpath -m "${1:?usage: build-box.sh FILE.box}")
HERE=$(dirname "$(readlink -f "$0")")
SUITE=bookworm
DISK_GIB=16

# What makes it a machine that Vagrant can use; the rest comes from packages.txt.
GUEST_PACKAGES=(linux-image-cloud-amd64 initramfs-tools systemd-sysv dbus openssh-server sudo
    ifupdown isc-dhcp-client rsync ca-certificates)

die() {
    echo "build-box: $*" >&2
    exit 1
}

machine_mirror() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI)' |
        awk -v suite=$SUITE '$1 == suite && $2 == "main" { print $3; exit }'
}

install_packages() {
    local list
    list=$(sed 's/#.*//' "$HERE/packages.txt" | tr -s '[:space:]' '\n' | sed '/^$/d' |
        cat - <(printf '%s\n' "${GUEST_PACKAGES[@]}") | sort -u | paste -sd,)
    debootstrap --variant=minbase --include="$list" $SUITE "$ROOTFS" "$MIRROR" > "$WORK/debootstrap.log" 2>&1 ||
        { tail -n 20 "$WORK/debootstrap.log" >&2; die "debootstrap failed"; }
}

configure_guest() {
    local key
    key=$(dpkg -L vagrant | grep 'keys/vagrant\.pub$')
    chroot "$ROOTFS" useradd -m -s /bin/bash vagrant
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' > "$ROOTFS/etc/sudoers.d/vagrant"
    install -d -m 700 "$ROOTFS/home/vagrant/.ssh"
    install -m 600 "$key" "$ROOTFS/home/vagrant/.ssh/authorized_keys"
    chroot "$ROOTFS" chown -R vagrant:vagrant /home/vagrant
    echo '/dev/vda / ext4 noatime 0 1' > "$ROOTFS/etc/fstab"
    printf 'auto lo\niface lo inet loopback\nallow-hotplug eth0\niface eth0 inet dhcp\n' \
        > "$ROOTFS/etc/network/interfaces"
    echo blocksnap > "$ROOTFS/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 blocksnap\n' > "$ROOTFS/etc/hosts"
    echo 'UseDNS no' > "$ROOTFS/etc/ssh/sshd_config.d/blocksnap.conf"
    # Nothing may run beside the tests: the emulated processor is slow enough as it is.
    ln -sf /dev/null "$ROOTFS/etc/systemd/system/apt-daily.timer"
    ln -sf /dev/null "$ROOTFS/etc/systemd/system/apt-daily-upgrade.timer"
    ln -sf /dev/null "$ROOTFS/etc/systemd/system/postgresql.service"
    rm -rf "$ROOTFS"/var/cache/apt/archives/*.deb "$ROOTFS"/var/lib/apt/lists/*
}

# Only the disk's drivers are needed to find the root file system.
build_initramfs() {
    sed -i 's/^MODULES=.*/MODULES=list/' "$ROOTFS/etc/initramfs-tools/initramfs.conf"
    printf 'virtio_pci\nvirtio_blk\next4\n' >> "$ROOTFS/etc/initramfs-tools/modules"
    chroot "$ROOTFS" update-initramfs -u > /dev/null
    cp "$ROOTFS"/boot/vmlinuz-* "$WORK/box/vmlinuz"
    cp "$ROOTFS"/boot/initrd.img-* "$WORK/box/initrd"
}

build_image() {
    truncate -s "${DISK_GIB}G" "$WORK/raw.img"
    mke2fs -q -F -t ext4 -d "$ROOTFS" "$WORK/raw.img"
    qemu-img convert -O qcow2 "$WORK/raw.img" "$WORK/box/box.img"
    rm "$WORK/raw.img"
}

write_box() {
    cat > "$WORK/box/metadata.json" << JSON
{"provider": "libvirt", "format": "qcow2", "virtual_size": $DISK_GIB}
JSON
    cat > "$WORK/box/Vagrantfile" << 'RUBY'
# The box's own settings: boot its kernel directly, with hardware help only where that works.
Vagrant.configure("2") do |config|
  config.ssh.insert_key = false
  config.vm.boot_timeout = 900
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = ENV.fetch("BLOCKSNAP_VM_DRIVER", "qemu")
    libvirt.cpu_mode = "host-passthrough" if libvirt.driver == "kvm"
    libvirt.kernel = File.expand_path("vmlinuz", __dir__)
    libvirt.initrd = File.expand_path("initrd", __dir__)
    libvirt.cmd_line = "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off"
  end
end
RUBY
    mkdir -p "$(dirname "$BOX")"
    tar -C "$WORK/box" -cf "$BOX.new" metadata.json Vagrantfile box.img vmlinuz initrd
    mv "$BOX.new" "$BOX"
}

[ "$(id -u)" = 0 ] || die "only root can build a root file system"
MIRROR=${BLOCKSNAP_MIRROR:-$(machine_mirror)}
[ -n "$MIRROR" ] || die "apt knows no mirror of $SUITE here; name one in BLOCKSNAP_MIRROR"
WORK=$(mktemp -d /var/tmp/blocksnap-box.XXXXXX)
trap 'rm -rf --one-file-system "$WORK"' EXIT
ROOTFS=$WORK/rootfs
mkdir "$ROOTFS" "$WORK/box"
install_packages
configure_guest
build_initramfs
build_image
write_box
