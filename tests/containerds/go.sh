# shellcheck shell=bash
# Builds programs from Go modules of others, whose versions and checksums are in the tree (go.mod, go.sum).

# Whether there is a Go that can fetch the toolchain which a module asks for.
have_go() {
    local version
    version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) && [[ $(printf '%s\n' go1.21 "$version" | sort -V | head -n 1) == go1.21 ]]
}

# go_build MODULE FOLDER PACKAGE...: builds the programs PACKAGE, of which the go.mod in MODULE says the version, into FOLDER.
# Linked statically: they run on any Linux.
go_build() {
    (cd "$1" && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags='-s -w' -o "$2/" "${@:3}")
}
