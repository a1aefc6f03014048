# shellcheck shell=bash
# What the user sees: steps with their elapsed time, and errors that say what to do.

# step DESCRIPTION COMMAND [ARG...]: runs COMMAND with its output in $step_log. On a terminal one line
# counts the seconds; otherwise one plain line at the end. On failure shows the end of the output.
step() {
    local text=$1 began=$SECONDS status=0
    shift
    : "${step_log:=$(mktemp)}"
    if [[ -t 2 ]]; then
        "$@" >>"$step_log" 2>&1 </dev/null &
        local job=$! frames='|/-\' tick=0
        while kill -0 "$job" 2>/dev/null; do
            printf '\r  %s %s (%d s) ' "${frames:tick++%4:1}" "$text" $((SECONDS - began)) >&2
            sleep 0.2
        done
        wait "$job" || status=$?
        printf '\r\033[K' >&2
    else
        "$@" >>"$step_log" 2>&1 </dev/null || status=$?
    fi
    if ((status)); then
        printf '  FAILED %s (%d s)\n' "$text" $((SECONDS - began)) >&2
        tail -n 20 "$step_log" | sed 's/^/    | /' >&2
        fail "$text failed; its whole output is in $step_log"
    fi
    printf '  %s: %d s\n' "$text" $((SECONDS - began)) >&2
}

# One line about what is going on.
note() { printf '%s\n' "$*" >&2; }

# One clear error, and the end.
fail() {
    printf 'tests/host: error: %s\n' "$*" >&2
    exit 1
}

# need COMMAND PACKAGE: an error naming the Debian package if COMMAND is not there.
need() {
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ||
        fail "'$1' is not installed; install it with: apt-get install $2 (or run: make deps)"
}

# need_space FOLDER MEBIBYTES: an error if the file system of FOLDER has less room.
need_space() {
    local free
    free=$(df --output=avail --block-size=1M "$1" | tail -n 1)
    ((free >= $2)) ||
        fail "$1 has $((free)) MiB free and $2 MiB are needed; make room, or point FORKVM_CACHE at a larger disk"
}
