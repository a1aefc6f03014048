# shellcheck shell=bash
# Puts the current build into the host: only the files that have changed since it was put there before.

install_build() {
    local stage=$run/stage list=$run/installed changed gone
    rm -rf "$stage"
    make -s -C "$top" install PARTIAL=1 DESTDIR="$stage" 2>"$run/not-built"
    if ! compgen -G "$stage/usr/*/forkvm*" >/dev/null; then
        note "  nothing is built yet, so nothing is installed; build with: make build"
        return
    fi
    [[ ! -s $run/not-built ]] || sed 's/^/  /' "$run/not-built" >&2
    (cd "$stage" && find . \( -type f -exec sha256sum {} + \) -o \( -type l -printf 'link %l  %p\n' \)) |
        LC_ALL=C sort >"$list.new"
    touch "$list"
    changed=$(LC_ALL=C comm -13 "$list" "$list.new" | sed 's/.*  //')
    gone=$(LC_ALL=C comm -13 <(sed 's/.*  //' "$list.new" | LC_ALL=C sort) <(sed 's/.*  //' "$list" | LC_ALL=C sort))
    [[ -z $gone ]] || in_host "cd / && rm -f $(tr '\n' ' ' <<<"$gone")"
    [[ -z $changed ]] || send_files / -C "$stage" --no-recursion -T - <<<"$changed"
    mv "$list.new" "$list"
    rm -rf "$stage"
}
