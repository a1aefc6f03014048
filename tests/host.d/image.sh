# shellcheck shell=bash
# Makes the test host's disk image, once, into the cache. Needs root (debootstrap), no mounts.

# Sets $image to the folder of the image that this checkout's recipe describes.
locate_image() {
    local digest
    digest=$(cd "$host_d" && find recipe.sh image.sh initrd-init rootfs -type f -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum | sha256sum | cut -c1-16)
    image=$cache/host-$digest
}

# Makes $image unless it is there. A lock lets two builders take turns; the second finds it made.
ensure_image() {
    locate_image
    [[ -e $image/disk.img ]] && return
    need debootstrap debootstrap
    need mke2fs e2fsprogs
    need ssh-keygen openssh-client
    need unxz xz-utils
    ((EUID == 0)) || fail "the test host's image has to be made once, which debootstrap does only as root; run this as root"
    mkdir -p "$cache"
    note "Making the test host (Debian $suite, once; kept in $image)"
    exec {build_lock}>"$cache/host.lock"
    flock --nonblock "$build_lock" || step "waiting for another build of it to finish" flock "$build_lock"
    if [[ ! -e $image/disk.img ]]; then
        need_space "$cache" 4000
        build=$(mktemp -d "$cache/build-host.XXXXXX")
        trap 'rm -rf "$build"' EXIT
        step_log=$cache/build-host.log
        : >"$step_log"
        build_image
        rm -rf "$image"
        mv "$build/image" "$image"
        rm -rf "$build"
        trap - EXIT
    fi
    exec {build_lock}>&-
}

build_image() {
    local root=$build/root debs=$cache/debs
    local keys=$build/image
    mkdir -p "$keys" "$debs"
    chmod 755 "$build"
    ssh-keygen -q -t ed25519 -N '' -C forkvm-client -f "$keys/client"
    ssh-keygen -q -t ed25519 -N '' -C forkvm-host -f "$keys/server"
    printf 'forkvm-host %s\n' "$(<"$keys/server.pub")" >"$keys/known_hosts"

    local list
    list=$(IFS=,; echo "${packages[*]}")
    step "installing Debian packages" debootstrap --variant=minbase --cache-dir="$debs" \
        --include="$list" "$suite" "$root" $(debian_mirror)
    step "configuring" configure_root "$root"
    step "making the initrd" make_initrd "$root" "$build/image/initrd"
    cp "$root"/boot/vmlinuz-* "$build/image/vmlinuz"
    step "writing the disk image" mke2fs -q -t ext4 -d "$root" -L forkvm-host -m 0 \
        -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 -O ^metadata_csum "$build/image/disk.img" "$disk_size"
}

# The Debian archive to install from: $FORKVM_MIRROR, or what this machine's apt uses, or nothing
# (debootstrap's default).
debian_mirror() {
    if [[ -n ${FORKVM_MIRROR:-} ]]; then
        echo "$FORKVM_MIRROR"
    else
        apt-get indextargets 'Origin: Debian' 'Label: Debian' --format '$(REPO_URI)' 2>/dev/null |
            grep -m 1 '^https\?://' || true
    fi
}
