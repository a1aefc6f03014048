# shellcheck shell=bash
# Files go into the host in plain TCP: ssh's encryption on a software processor takes ten times as long. QEMU answers
# connections to one address of its user-mode network, which only the host can make, with the file $run/parcel.

readonly parcel_address=10.0.2.100:1

# send COMMANDLINE: standard input becomes that of the shell command line in the host.
send() {
    local lock
    if ! grep -qs "$parcel_address" "/proc/$(<"$run/pid")/cmdline"; then # started before this address existed
        in_host "$1"
        return
    fi
    exec {lock}>"$run/parcel.lock"
    flock "$lock"
    cat >"$run/parcel"
    in_host "set -o pipefail; socat -u TCP:$parcel_address - | { $1; }"
    rm -f "$run/parcel"
    exec {lock}>&-
}

# send_files FOLDER TAR_ARGUMENT...: unpacks what `tar -c TAR_ARGUMENT...` packs into FOLDER in the host. tar replaces
# files, it does not write to them, so a program that runs does not mind.
send_files() {
    local folder
    folder=$(printf %q "$1")
    shift
    tar -c --owner=0 --group=0 "$@" | send "mkdir -p $folder && tar -C $folder --no-overwrite-dir -x"
}
