// Serves container images to the tests of others: `registry ADDRESS LAYOUT` is a registry on ADDRESS, in memory, with
// the images that those tests ask for, made from the one image of the OCI layout in the folder LAYOUT:
//
//	test/image:1    the image, with users in a layer more
//	test/layers:1   the same with one layer more again
//
// It writes `ready` when they are there, and serves until its standard input ends, so also when who started it has died.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: registry ADDRESS LAYOUT")
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		log.Fatalf("registry: %v", err)
	}
}

func serve(address, folder string) error {
	image, err := onlyImage(folder)
	if err != nil {
		return fmt.Errorf("the layout %s: %w", folder, err)
	}
	image, err = with(image, map[string]string{
		"etc/passwd": "root:x:0:0:root:/:/bin/sh\nwww-data:x:33:33:www-data:/:/bin/sh\n",
		"etc/group":  "root:x:0:\nwww-data:x:33:\n",
	})
	if err != nil {
		return err
	}
	layers, err := with(image, map[string]string{"second": "of the second layer\n"})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		ended <- err
	}()
	go func() {
		ended <- http.Serve(listener, registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	}()
	for path, image := range map[string]v1.Image{"test/image:1": image, "test/layers:1": layers} {
		reference, err := name.ParseReference(address+"/"+path, name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.Write(reference, image); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	return <-ended
}

func onlyImage(folder string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(folder)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(manifest.Manifests) != 1 {
		return nil, errors.New("it has not just one image")
	}
	return index.Image(manifest.Manifests[0].Digest)
}

// with gives the image one layer more, of these files.
func with(image v1.Image, files map[string]string) (v1.Image, error) {
	var archive bytes.Buffer
	writer := tar.NewWriter(&archive)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		text := files[path]
		if err := writer.WriteHeader(&tar.Header{Name: path, Mode: 0o644, Size: int64(len(text))}); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(writer, text); err != nil {
			return nil, err
		}
	}
	if err := writer.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(archive.Bytes())), nil
	})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, layer)
}
