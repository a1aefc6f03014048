# shellcheck shell=bash
# Makes the test host's disk image, once, into the cache. Needs root (debootstrap), mounts nothing.

# Sets $image to the folder of the image that this checkout's recipe describes.
locate_image() {
    local digest
    digest=$(cd "$host_d" && find recipe.sh image.sh initrd-init rootfs -type f -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum | sha256sum | cut -c1-16)
    image=$cache/host-$digest
}

# Makes $image unless it is there: disk.img, vmlinuz, initrd, the ssh keys and known_hosts. A lock lets two
# builders take turns; the second finds it made.
ensure_image() {
    locate_image
    [[ -e $image/disk.img ]] && return
    need debootstrap debootstrap
    need mke2fs e2fsprogs
    need ssh-keygen openssh-client
    need unxz xz-utils
    ((EUID == 0)) ||
        fail "the test host's disk has to be made once, and debootstrap does that only as root; run this once as root"
    mkdir -p "$cache"
    note "Making the test host's disk, Debian $suite (once; kept in $image)"
    local lock
    exec {lock}>"$cache/host.lock"
    flock --nonblock "$lock" || step "waiting for another build of it to end" flock "$lock"
    if [[ ! -e $image/disk.img ]]; then
        need_space "$cache" 4000
        step_log=$cache/host-build.log
        : >"$step_log"
        rm -rf "$cache"/host-build.??????
        build=$(mktemp -d "$cache/host-build.XXXXXX")
        trap 'rm -rf "$build"' EXIT
        build_image
        rm -rf "$image"
        mv "$build/image" "$image"
        rm -rf "$build"
        trap - EXIT
    fi
    exec {lock}>&-
}

build_image() {
    local root=$build/root keys=$build/image
    mkdir -p "$keys"
    chmod 755 "$build"
    ssh-keygen -q -t ed25519 -N '' -C forkvm-client -f "$keys/client"
    ssh-keygen -q -t ed25519 -N '' -C forkvm-host -f "$keys/server"
    printf 'forkvm-host %s\n' "$(<"$keys/server.pub")" >"$keys/known_hosts"

    step "installing Debian packages" bootstrap "$root" "${packages[@]}"
    step "configuring" configure_root "$root"
    step "making the initrd" make_initrd "$root" "$keys/initrd"
    cp "$root"/boot/vmlinuz-* "$keys/vmlinuz"
    step "writing the disk" mke2fs -q -t ext4 -d "$root" -L forkvm-host -m 0 \
        -E lazy_itable_init=0,lazy_journal_init=0 "$keys/disk.img" "$disk_size"
}
