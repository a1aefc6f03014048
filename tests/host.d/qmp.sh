# shellcheck shell=bash
# QEMU's control connection, over two FIFOs: $run/qmp.in and $run/qmp.out. Messages are one line of JSON each, as in
# QEMU's docs/interop/qmp-spec.

# Opens the connection to a QEMU that is starting. Fails if QEMU ends first.
qmp_open() {
    exec {qmp_in}>"$run/qmp.in" {qmp_out}<"$run/qmp.out"
    qmp_until '"QMP"' && qmp '{"execute": "qmp_capabilities"}'
}

qmp_close() { exec {qmp_in}>&- {qmp_out}<&-; }

# qmp COMMAND: sends COMMAND and waits for its answer; fails, with the answer in $qmp_line, if it is an error.
qmp() {
    echo "$1" >&"$qmp_in"
    qmp_until '"return"|"error"' && [[ $qmp_line != *'"error"'* ]]
}

# qmp_until PATTERN: reads until a line matches, which is then in $qmp_line; fails if QEMU ends or says nothing for
# $boot_limit seconds.
qmp_until() {
    qmp_line=
    while IFS= read -r -t "$boot_limit" -u "$qmp_out" qmp_line; do
        echo "$qmp_line"
        [[ ! $qmp_line =~ $1 ]] || return 0
    done
    return 1
}

# qmp_migration COMMAND: starts a migration, in or out, and waits for its end. The disk, a file that is shared memory,
# is not part of the stream.
qmp_migration() {
    qmp '{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [
        {"capability": "events", "state": true}, {"capability": "x-ignore-shared", "state": true}]}}' &&
        qmp "$1" && qmp_until '"status": "(completed|failed)"' && [[ $qmp_line == *completed* ]]
}
