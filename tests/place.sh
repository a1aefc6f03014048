# shellcheck shell=bash
# Where containers are run: on this machine if its KVM can, else in the test host. $program, $top, $target and the
# functions of host.d/messages.sh come from the script that sources this.

# Where `make binaries` puts what it builds.
# shellcheck disable=SC2154
readonly built=$target/x86_64-unknown-linux-gnu/release
readonly in_place=/usr/local/libexec/forkvm-tests

# choose_place MODE: decides, says so in one line, and brings the place up with the current build in it. MODE is that
# of the test host. Sets $place (machine or host) and $mode (that of the clock: parallel, counted or hardware).
choose_place() {
    local why
    place=host mode=$1
    case ${FORKVM_PLACE:-} in
    host) why="as FORKVM_PLACE says" ;;
    machine) place=machine why="as FORKVM_PLACE says" ;;
    '')
        # Of its checks those of KVM alone: what else it asks for is installed further down.
        why=$({ "$built/forkvm" check --json || true; } |
            jq -er '[.[] | select((.check | startswith("kvm")) and .status == "fail")][0] | "\(.check): \(.found)"') ||
            why="it cannot be asked"
        if ((EUID)); then
            why="because this is not root"
        elif [[ $why == "null: null" ]]; then
            place=machine why="whose KVM passes 'forkvm check'"
        else
            why="because this machine's KVM cannot run them ($why)"
        fi
        ;;
    *) fail "FORKVM_PLACE is '$FORKVM_PLACE'; it may be 'machine' or 'host'" ;;
    esac
    if [[ $place == machine ]]; then
        mode=hardware
        note "Containers run on this machine, $why."
        prepare_machine
    else
        note "Containers run in the test host ($mode mode), $why."
        "$top/tests/host" up --mode "$mode"
    fi
    to_place "$in_place" "$built"/forkvm-{e2e,figures}
}

# to_place FOLDER FILE...: copies files into a folder there.
to_place() {
    if [[ $place == machine ]]; then
        mkdir -p "$1" && cp "${@:2}" "$1/"
    else
        "$top/tests/host" copy "${@:2}" "$1"
    fi
}

# on_place COMMANDLINE: runs a shell command line where containers run.
on_place() {
    if [[ $place == machine ]]; then bash -c "$1"; else "$top/tests/host" run "$1"; fi
}

# from_place FOLDER TO: copies the files of a folder there into TO here.
from_place() {
    mkdir -p "$2"
    # In counted mode its clock is ahead of ours: no warning for that.
    on_place "tar -C $1 -cf - ." | tar -C "$2" -xf - --no-same-owner --warning=no-timestamp
}

# This machine needs what the test host has: containerd, Docker, the build, the images.
prepare_machine() {
    local missing=() images image
    command -v ctr >/dev/null || missing+=(containerd runc)
    command -v docker >/dev/null || missing+=(docker.io)
    if ((${#missing[@]})); then
        step "installing ${missing[*]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
    fi
    step "installing forkvm" make -s -C "$top" install
    images=$("$top/tests/images/build")
    for image in busybox python nginx; do
        ctr image ls -q | grep -q "^forkvm.local/$image:1$" || step "importing $image" ctr image import "$images/$image.tar"
        docker image inspect "forkvm.local/$image:1" >/dev/null 2>&1 || step "loading $image" docker load -i "$images/$image.tar"
    done
}
