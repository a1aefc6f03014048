# shellcheck shell=bash
# Writes images: OCI image layouts (image-spec v1.1, image-layout.md) with a manifest.json beside index.json, which is
# what `docker load` of Docker without the containerd image store reads (moby's image spec v1.2).

# All files carry this time, 2025-01-01, so that an image depends on its packages alone.
epoch=1735689600

# layer ROOT [BASE]: packs ROOT, or what differs in it from BASE with the folders above, and prints the digest of the
# blob, a tar in $build/blobs. Nothing that is in BASE may be missing in ROOT: there are no whiteouts.
layer() {
    local root=$1 base=${2:-} tar
    mkdir -p "$build/blobs"
    tar=$(mktemp "$build/blobs/layer.XXXXXX")
    comm -23 <(entries "$root") <([[ -z $base ]] || entries "$base") | cut -f1 | with_parents |
        tar -C "$root" -cf "$tar" --no-recursion --verbatim-files-from --files-from=- \
            --format=gnu --numeric-owner --mtime="@$epoch"
    blob "$tar"
}

# One line for each file of a root: its path, and what tells a changed one. A folder's time does not.
entries() {
    find "$1" -mindepth 1 \( -type d -printf '%P\t%y|%m|%U|%G\n' \) -o -printf '%P\t%y|%m|%U|%G|%l|%s|%T@\n' | LC_ALL=C sort
}

# Adds the folders above each path: one that is not in a layer would get a default mode from it.
with_parents() {
    awk -F/ '{ path = ""; for (i = 1; i <= NF; i++) { path = path (i > 1 ? "/" : "") $i; print path } }' | LC_ALL=C sort -u
}

# blob FILE: moves FILE to its place among the blobs and prints its digest.
blob() {
    local digest
    digest=$(sha256sum <"$1" | cut -d' ' -f1)
    chmod 644 "$1"
    mv "$1" "$build/blobs/$digest"
    echo "$digest"
}

# json_blob ARGUMENT...: stores what jq makes of ARGUMENTs, compact and with sorted keys; prints the digest.
json_blob() {
    local file
    file=$(mktemp "$build/blobs/json.XXXXXX")
    jq -cnjS "$@" >"$file"
    blob "$file"
}

# image NAME CONFIG LAYER...: stores the image forkvm.local/NAME:1 and appends what the layouts need to know of it to
# $build/images, one line of JSON: {name, manifest, size, config, layers}. CONFIG is the `config` of its configuration.
# shellcheck disable=SC2016 # the variables are jq's
image() {
    local name=forkvm.local/$1:1 execution=$2 layers descriptors config manifest digest
    shift 2
    layers=$(printf '%s\n' "$@" | jq -Rcn '[inputs]')
    config=$(json_blob --argjson layers "$layers" --argjson execution "$execution" \
        --arg created "$(date -u -d "@$epoch" +%Y-%m-%dT%H:%M:%SZ)" '{
        architecture: "amd64", os: "linux", $created,
        config: ($execution + {Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}),
        rootfs: {type: "layers", diff_ids: [$layers[] | "sha256:" + .]},
        history: [$layers[] | {$created, created_by: "tests/images/build"}]}')
    descriptors=$(for digest in "$@"; do
        jq -cn --arg digest "sha256:$digest" --argjson size "$(stat -c %s "$build/blobs/$digest")" \
            '{mediaType: "application/vnd.oci.image.layer.v1.tar", $digest, $size}'
    done | jq -cs .)
    manifest=$(json_blob --argjson layers "$descriptors" --arg config "sha256:$config" \
        --argjson size "$(stat -c %s "$build/blobs/$config")" '{
        schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
        config: {mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, $size}, $layers}')
    jq -cn --arg name "$name" --arg manifest "$manifest" --argjson size "$(stat -c %s "$build/blobs/$manifest")" \
        --arg config "$config" --argjson layers "$layers" '{$name, $manifest, $size, $config, $layers}' >>"$build/images"
}

# layout FILE [NAME]: writes the tar FILE with the image NAME, or with all images.
# shellcheck disable=SC2016
layout() {
    local file=$1 tree chosen digest
    tree=$(mktemp -d "$build/layout.XXXXXX")
    chosen=$(jq -c --arg name "forkvm.local/${2:-}:1" 'select($name == "forkvm.local/:1" or .name == $name)' "$build/images" | jq -cs .)
    mkdir -p "$tree/blobs/sha256"
    for digest in $(jq -r '.[] | .manifest, .config, .layers[]' <<<"$chosen" | sort -u); do
        ln "$build/blobs/$digest" "$tree/blobs/sha256/$digest"
    done
    jq -cnj '{imageLayoutVersion: "1.0.0"}' >"$tree/oci-layout"
    jq -cj '{schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json", manifests: [.[] | {
            mediaType: "application/vnd.oci.image.manifest.v1+json", digest: ("sha256:" + .manifest), size,
            platform: {architecture: "amd64", os: "linux"},
            annotations: {"io.containerd.image.name": .name, "org.opencontainers.image.ref.name": "1"}}]}' \
        <<<"$chosen" >"$tree/index.json"
    jq -cj '[.[] | {Config: ("blobs/sha256/" + .config), RepoTags: [.name], Layers: [.layers[] | "blobs/sha256/" + .]}]' \
        <<<"$chosen" >"$tree/manifest.json"
    tar -C "$tree" -cf "$file" --format=gnu --sort=name --numeric-owner --owner=0 --group=0 --mode=u=rwX,go=rX \
        --mtime="@$epoch" --hard-dereference oci-layout index.json manifest.json blobs
}
