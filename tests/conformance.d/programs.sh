# shellcheck shell=bash
# Builds the programs of the suites. $top, $cache, $conformance_d and functions come from the script that sources this.

# containerd's tests of its client are a module of their own in 1.7, which no proxy has: they come with Debian's source of
# containerd (trixie), which is checked by this SHA-256.
readonly source_17=containerd_1.7.24~ds1.orig.tar.xz
readonly source_17_sha256=e35d88a79245e807aebf5d45eb17083c10cf54ad8b226c60c193a0fe0bbf5965

# Where the images of containerd's tests are served from in place of the internet: REGISTRY in tests/src/conformance/client.rs.
readonly registry=127.0.0.1:5000

# version_of_suite NAME: the version of a suite's source.
version_of_suite() {
    case $1 in
    client-1.7) sed 's/.*_\([0-9.]*\).*/\1/' <<<"$source_17" ;;
    client-2.4) module_version containerds/2.4 github.com/containerd/containerd/v2 ;;
    runtimetest) module_version conformance.d github.com/opencontainers/runtime-tools ;;
    esac
}

# module_version FOLDER MODULE: the version in the module in tests/FOLDER.
module_version() {
    sed -n "s|^\(require\)\?[[:space:]]*$2 v\([0-9.]*\).*|\2|p" "$top/tests/$1/go.mod"
}

# Prints the folder with the programs client-1.7, client-2.4, registry and runtimetest; makes it unless it is in the cache.
conformance_programs() {
    local folder
    folder=$cache/conformance-$({
        cat "$conformance_d"/{programs.sh,go.*,registry/main.go} "$top/tests/containerds"/{go.sh,2.4/go.*}
    } | sha256sum | cut -c1-16)
    if [[ ! -d $folder ]]; then
        mkdir -p "$cache"
        need_space "$cache" 4000
        work=$(mktemp -d "$cache/conformance-build.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        mkdir "$work/out"
        step "building registry and runtimetest" go_build "$conformance_d" "$work/out" forkvm.local/conformance/registry github.com/opencontainers/runtime-tools/cmd/runtimetest
        step "copying containerd's source of 2.4" copy_source_24
        step "building containerd's tests of 2.4" client_tests 2.4 .
        step "getting containerd's source of 1.7" get_source_17
        # There they are a module of their own.
        step "building containerd's tests of 1.7" client_tests 1.7 integration/client
        mv "$work/out" "$folder"
        rm -rf "$work"
        trap - EXIT
    fi
    echo "$folder"
}

# The source is the very one that the containerd beside is built from (tests/containerds/2.4).
copy_source_24() {
    local folder
    folder=$(cd "$top/tests/containerds/2.4" && go mod download github.com/containerd/containerd/v2 && go list -m -f '{{.Dir}}' github.com/containerd/containerd/v2)
    cp -r --no-preserve=mode "$folder" "$work/2.4"
}

get_source_17() {
    local mirror
    mirror=$(debian_mirror)
    [[ $mirror ]] || fail "no mirror of Debian is known here: set FORKVM_MIRROR"
    wget --no-verbose -O "$work/1.7.tar.xz" "${mirror%/}/pool/main/c/containerd/$source_17"
    sha256sum --check <<<"$source_17_sha256  $work/1.7.tar.xz"
    mkdir "$work/1.7"
    tar -C "$work/1.7" --strip-components=1 -xf "$work/1.7.tar.xz"
    # What Debian keeps in vendor would be taken for all there is.
    rm -rf "$work/1.7/vendor"
}

# client_tests VERSION MODULE: builds containerd's tests from the source in $work/VERSION, in which they belong to the module in
# the folder MODULE, with other names of images: those that our registry has. They give a containerd two or four seconds to start, which
# says nothing of a runtime; it has a minute, as a slow processor may need it.
client_tests() {
    local wait='^(\s*waitCtx, \w+ := context\.WithTimeout\(.*, )[24]\*time\.Second\)' tests=$work/$1/integration/client
    grep -qE "$wait" "$tests"/client_test.go && grep -qE "$wait" "$tests"/restart_monitor_test.go ||
        fail "containerd's tests of $1 do not say how long they wait for containerd where they did"
    sed -i -E "s|$wait|\1time.Minute)|" "$tests"/*_test.go
    sed -i -e "s|\(\sBusyBox:\s*\).*|\1\"$registry/test/image:1\",|" \
        -e "s|\(\sVolumeCopyUp:\s*\).*|\1\"$registry/test/layers:1\",|" \
        -e "s|\(\sVolumeOwnership:\s*\).*|\1\"$registry/test/image:1\",|" "$work/$1/integration/images/image_list.go"
    (cd "$work/$1/$2" && CGO_ENABLED=0 go test -c -mod=readonly -trimpath -ldflags='-s -w' -o "$work/out/client-$1" "$work/$1/integration/client")
}
