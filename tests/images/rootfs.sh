# shellcheck shell=bash
# The root file systems of the images, and what makes them the same every time they are made.

# in_root ROOT COMMAND...: runs COMMAND in ROOT with a fixed environment.
in_root() {
    local root=$1
    shift
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 \
        SOURCE_DATE_EPOCH="$epoch" chroot "$root" "$@"
}

debian_rootfs() {
    bootstrap "$1" busybox-static
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" # no package starts its service
    chmod 755 "$1/usr/sbin/policy-rc.d"
    cp /etc/resolv.conf "$1/etc/resolv.conf"
    in_root "$1" apt-get update
}

python_rootfs() {
    with_packages "$1" "$2" python3
    # Compiled files name the times of their sources by default, which the image does not keep.
    find "$2/usr/lib/python3" "$2"/usr/lib/python3.* -name '*.pyc' -delete
    in_root "$2" python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3 /usr/lib/python3.*
    prune "$2"
}

nginx_rootfs() {
    with_packages "$1" "$2" nginx-light
    # As container images of nginx do: in the foreground, logs to the container's output.
    sed -i '1i daemon off;' "$2/etc/nginx/nginx.conf"
    prune "$2"
    mkdir -p "$2/var/log/nginx"
    ln -s /dev/stdout "$2/var/log/nginx/access.log"
    ln -s /dev/stderr "$2/var/log/nginx/error.log"
}

busybox_rootfs() {
    local name
    mkdir -p "$2"/{bin,dev,etc,home,proc,root,run,sys,tmp,usr/bin,usr/sbin,sbin,var/tmp}
    chmod 1777 "$2"/{tmp,var/tmp}
    chmod 700 "$2/root"
    cp "$1/usr/bin/busybox" "$2/bin/busybox"
    for name in $(chroot "$1" busybox --list); do
        [[ $name == busybox ]] || ln -s busybox "$2/bin/$name"
    done
    printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'nobody:x:65534:65534:nobody:/:/bin/false' >"$2/etc/passwd"
    printf '%s\n' 'root:x:0:' 'nogroup:x:65534:' >"$2/etc/group"
}

# with_packages BASE ROOT PACKAGE...: ROOT is a copy of BASE with PACKAGEs installed.
with_packages() {
    local base=$1 root=$2
    shift 2
    cp -a --reflink=auto "$base" "$root"
    in_root "$root" apt-get install -y --no-install-recommends "$@"
}

# prune ROOT: takes out what differs from one run or machine to the next, and what a container does not need.
prune() {
    local folder
    for folder in dev proc sys run tmp boot var/log var/tmp var/cache/apt var/cache/debconf var/cache/ldconfig \
        var/lib/apt/lists usr/share/doc usr/share/man usr/share/locale; do
        [[ ! -d $1/$folder ]] || find "${1:?}/$folder" -mindepth 1 -delete
    done
    rm -f "$1"/etc/{machine-id,resolv.conf,hostname,apt/sources.list} "$1"/etc/*- "$1"/var/lib/dpkg/*-old \
        "$1"/usr/sbin/policy-rc.d
    # The day on which an account was made.
    sed -i 's/^\([^:]*:[^:]*:\)[0-9]*:/\120000:/' "$1/etc/shadow"
}
