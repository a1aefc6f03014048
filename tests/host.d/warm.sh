# shellcheck shell=bash
# A booted host, frozen: booting on a software processor takes half a minute or more, resuming a second or two. One is
# made for each mode, with the container images loaded, and kept in the cache: disk.img and state (QEMU's
# migration stream, which has the memory).

# locate_warm MODE: sets $warm to the folder of the frozen host that this machine would make.
locate_warm() {
    warm=$cache/warm-$({
        echo "$image" "$cpu" "$memory" "$kernel_arguments" "$(mode_arguments "$1")"
        "$top/tests/images/build" --digest
        qemu-system-x86_64 --version
        sha256sum <"$host_d/warm.sh"
    } | sha256sum | cut -c1-16)
}

# ensure_warm MODE: makes $warm unless it is there, under a lock as in ensure_image.
ensure_warm() {
    local lock
    locate_warm "$1"
    [[ -e $warm/state ]] && return
    note "Booting the test host once in $1 mode and freezing it (kept in $warm)"
    exec {lock}>"$warm.lock"
    flock --nonblock "$lock" || step "waiting for another build of it to end" flock "$lock"
    if [[ ! -e $warm/state ]]; then
        need_space "$cache" 4000
        build=$(mktemp -d "$cache/warm-build.XXXXXX")
        trap 'stop; rm -rf "$build"' EXIT
        step "copying the disk" copy_disk "$image/disk.img" "$build/disk.img"
        step "booting" boot "$1" "$build/disk.img" on
        connect
        step "loading the container images" load_images
        step "freezing" freeze "$build/state"
        rm -rf "$warm"
        mv "$build" "$warm"
        trap - EXIT
    fi
    rm -f "$warm.lock"
    exec {lock}>&-
}

# Loads the test images into containerd's default namespace and into Docker, both from one pass over the tar.
load_images() {
    in_host "date -s @$(date +%s) >/dev/null"
    send "mkfifo /run/images && { docker load </run/images & tee /run/images | ctr images import - && wait \$! && rm /run/images; }" \
        <"$images/all.tar"
}

copy_disk() { cp --sparse=always --reflink=auto "$1" "$2"; }

# freeze STATE: writes the running machine to STATE and ends it. There must be no connection into it.
freeze() {
    in_host sync
    disconnect
    qmp_open
    # Stopped first: an idle machine in counted mode runs through its timers without a pause, and dirties memory.
    qmp '{"execute": "stop"}'
    qmp '{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 10000000000}}'
    qmp_migration "{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"exec:cat >'$1'\"}}" || fail "cannot freeze the host: $qmp_line"
    qmp '{"execute": "quit"}'
    qmp_close
    tail --pid="$(<"$run/pid")" -f /dev/null
    stop
}

# thaw MODE: starts QEMU from $warm's state, on $warm's disk, of which it sees a private mapping: what it writes is gone
# at its end.
thaw() {
    rm -f "$run/console.log"
    start "$1" "$warm/disk.img" off -incoming defer >/dev/null
    qmp_open && qmp_migration "{\"execute\": \"migrate-incoming\", \"arguments\": {\"uri\": \"exec:cat '$warm/state'\"}}" && qmp '{"execute": "cont"}' ||
        fail_with_logs "the frozen host cannot be resumed (${qmp_line:-QEMU ended}); have it made again: rm -r $warm"
    qmp_close
}
