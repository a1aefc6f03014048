# shellcheck shell=bash
# Where Debian packages come from.

# The Debian archive to install from: $FORKVM_MIRROR, or what this machine's apt uses, or nothing, which
# means debootstrap's default.
debian_mirror() {
    if [[ -n ${FORKVM_MIRROR:-} ]]; then
        echo "$FORKVM_MIRROR"
    elif command -v apt-get >/dev/null; then
        # shellcheck disable=SC2016 # the field's name is apt's
        apt-get indextargets 'Origin: Debian' 'Label: Debian' --format '$(REPO_URI)' 2>/dev/null |
            grep -m 1 -E '^(https?|file):' || true
    fi
}

# bootstrap FOLDER PACKAGE...: a minimal Debian $suite with PACKAGEs in FOLDER. Downloads are kept.
bootstrap() {
    local root=$1 list mirror
    shift
    list=$(IFS=,; echo "$*")
    mirror=$(debian_mirror)
    mkdir -p "$cache/debs"
    debootstrap --variant=minbase --cache-dir="$cache/debs" ${list:+--include="$list"} "$suite" "$root" ${mirror:+"$mirror"}
}
