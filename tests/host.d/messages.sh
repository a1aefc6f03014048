# shellcheck shell=bash
# What the user sees: steps with their elapsed time, and errors that say what to do.

# Errors reach the user also from inside a step, whose own output goes to its log. The number is fixed: scripts that call
# each other then share the one descriptor, and what stays behind them (QEMU, the connection to it) needs to close only
# that one so as not to hold a pipe behind the outermost script open.
to_user=9
exec 9>&2

# step DESCRIPTION COMMAND [ARG...]: runs COMMAND, in a subshell, with its output in $step_log. On a terminal one
# line counts the seconds; otherwise one line tells what is going on and one how long it took. If COMMAND fails
# the end of its output is shown and the program ends.
step() {
    local text=$1 began=$SECONDS status ticker=
    shift
    : "${step_log:=$(mktemp)}"
    if [[ -t 2 ]]; then
        tick "$text" &
        ticker=$!
    else
        printf '  %s ...\n' "$text" >&2
    fi
    # Not `|| status=$?`: in a condition bash would go on after an error inside a function.
    set +e
    (
        set -e
        "$@"
    ) >>"$step_log" 2>&1 </dev/null
    status=$?
    set -e
    [[ -z $ticker ]] || {
        kill "$ticker" 2>/dev/null
        wait "$ticker" 2>/dev/null || true
        printf '\r\033[K' >&2
    }
    case $status in
    0) printf '  %s: %d s\n' "$text" $((SECONDS - began)) >&2 ;;
    99) exit 1 ;; # `fail` has said why
    *)
        tail -n 20 "$step_log" | sed 's/^/    | /' >&2
        fail "$text failed after $((SECONDS - began)) s; its whole output is in $step_log"
        ;;
    esac
}

# Counts the seconds of a step on one line until it is killed, or the program is.
tick() {
    local began=$SECONDS frames='|/-\' frame=0
    while kill -0 $$ 2>/dev/null; do
        printf '\r  %s %s (%d s)\033[K' "${frames:frame++%4:1}" "$1" $((SECONDS - began)) >&2
        sleep 0.2
    done
}

# One line about what is going on.
note() { printf '%s\n' "$*" >&2; }

# One clear error, and the end.
fail() {
    [[ -t $to_user ]] && printf '\r\033[K' >&"$to_user"
    printf '%s: error: %s\n' "${program:-tests/host}" "$*" >&"$to_user"
    ((BASH_SUBSHELL)) && exit 99
    exit 1
}

# need COMMAND PACKAGE: an error naming the Debian package if COMMAND is not there.
need() {
    command -v "$1" >/dev/null || fail "'$1' is not installed; install it with: apt-get install $2 (or: make deps)"
}

# need_space FOLDER MEBIBYTES: an error if the file system of FOLDER has less room.
need_space() {
    local free
    free=$(df --output=avail --block-size=1M "$1" | tail -n 1)
    ((free >= $2)) ||
        fail "$1 has $((free)) MiB free and $2 MiB are needed; make room, or point FORKVM_CACHE at a larger disk"
}
