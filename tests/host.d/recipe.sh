# shellcheck shell=bash
# What the test host is made of. Everything in this file, image.sh, initrd-init and rootfs/ is an
# input of the cached image: a change makes a new one.

readonly suite=trixie
readonly disk_size=8G

packages=(
    systemd-sysv udev dbus kmod linux-image-cloud-amd64
    containerd runc crun docker.io docker-cli containernetworking-plugins
    iproute2 iptables nftables ca-certificates
    apparmor # apparmor_parser, so that Docker applies its docker-default profile
    openssh-server busybox-static
    e2fsprogs procps psmisc strace jq socat xz-utils
)

# Units that a test host never needs; each costs boot time on a software processor.
masked_units=(
    apparmor.service # Docker loads docker-default itself; Debian's other profiles are not used
    apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
    fstrim.timer systemd-pstore.service systemd-tmpfiles-clean.timer
    systemd-hwdb-update.service systemd-update-utmp.service systemd-update-utmp-runlevel.service
    systemd-journal-catalog-update.service systemd-journal-flush.service ldconfig.service
    systemd-logind.service getty@tty1.service serial-getty@ttyS0.service sshd-keygen.service
    systemd-udev-trigger.service # what the host needs is in modules-load.d
    systemd-random-seed.service systemd-network-generator.service systemd-machine-id-commit.service
    modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service
    sys-kernel-debug.mount sys-kernel-tracing.mount
    dev-mqueue.mount dev-hugepages.mount
)

# configure_root ROOT: turns the bare Debian in ROOT into the test host. $keys has the ssh keys.
configure_root() {
    local root=$1 version unit module here
    here=$(dirname "${BASH_SOURCE[0]}")
    version=$(ls "$root/usr/lib/modules")

    cp -r --no-preserve=ownership "$here/rootfs/." "$root/"
    install -d -m 700 "$root/root/.ssh"
    install -m 600 "$keys/client.pub" "$root/root/.ssh/authorized_keys"
    rm -f "$root"/etc/ssh/ssh_host_*
    install -m 600 "$keys/server" "$root/etc/ssh/ssh_host_ed25519_key"
    install -m 644 "$keys/server.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"
    # A fixed machine-id, so that no boot counts as the first one.
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"

    for unit in "${masked_units[@]}"; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    chroot "$root" systemctl enable forkvm-net.service forkvm-ready.service
    chroot "$root" systemctl set-default multi-user.target

    # Unpacking modules is slow on a software processor: do it once, here.
    find "$root/usr/lib/modules" -name '*.ko.xz' -print0 | xargs -0 -r unxz
    chroot "$root" depmod "$version"
    rm -rf "$root"/boot/initrd.img* "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
        "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale
}

# make_initrd ROOT OUTPUT: busybox, the disk driver's modules in loading order, and initrd-init.
make_initrd() {
    local root=$1 output=$2 tree=$1/initrd version path number=10
    version=$(ls "$root/usr/lib/modules")
    mkdir -p "$tree"/{bin,dev,root,sys,modules}
    cp "$root/bin/busybox" "$tree/bin/busybox"
    install -m 755 "$(dirname "${BASH_SOURCE[0]}")/initrd-init" "$tree/init"
    while read -r path; do
        cp "$root/$path" "$tree/modules/$((number++))-${path##*/}"
    done < <(chroot "$root" modprobe --set-version "$version" --show-depends --all nfit nd_pmem | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++')
    chroot "$root" sh -c 'cd /initrd && find . | busybox cpio -o -H newc' >"$output"
    rm -rf "$tree"
}
