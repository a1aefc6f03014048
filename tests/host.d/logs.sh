# shellcheck shell=bash
# Fetches what a failed test leaves behind.

# The files that the host writes into a tar stream, made by this script inside it.
collect='
set -u
d=$(mktemp -d)
journalctl --no-pager -o short-precise >$d/journal.log 2>&1
journalctl --no-pager -o short-precise -u containerd >$d/containerd.log 2>&1
journalctl --no-pager -o short-precise -u docker >$d/docker.log 2>&1
dmesg >$d/dmesg.log 2>&1
ps -eo pid,ppid,stat,etimes,rss,args --forest >$d/processes.txt 2>&1
cat /proc/mounts >$d/mounts.txt
[ -d /var/log/forkvm ] && cp -r /var/log/forkvm $d/forkvm
[ -d /run/forkvm ] && mkdir $d/run-forkvm && (cd /run/forkvm && find . -type f -size -16M -exec cp --parents {} $d/run-forkvm/ \; ; find . -ls >$d/run-forkvm.txt)
tar -C $d -cf - . ; rm -rf $d'

# fetch_logs FOLDER: whatever can be had; the serial console and QEMU's own messages also when the host has died.
fetch_logs() {
    local to=$1
    mkdir -p "$to" || fail "cannot make $to"
    for log in console.log qemu.log up.log; do
        [[ ! -e $run/$log ]] || cp "$run/$log" "$to/"
    done
    if is_up; then
        connect
        in_host "$collect" | tar -C "$to" -xf - || fail "the host is up but gave no logs; its console is in $to/console.log"
    else
        note "the test host '$name' is not up: only its console and QEMU's messages are left"
    fi
    note "logs are in $to"
}
