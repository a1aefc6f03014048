// Serves container images to the tests of others: `registry ADDRESS LAYOUT` is a registry on ADDRESS, in memory, with
// the images that those tests ask for, made from the one image of the OCI layout in the folder LAYOUT:
//
//	test/image:1    the image
//	test/layers:1   the same with one layer more
//
// It writes `ready` when they are there, and serves until it is killed.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

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
	layers, err := withOneLayerMore(image)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	ended := make(chan error)
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

func withOneLayerMore(image v1.Image) (v1.Image, error) {
	var archive bytes.Buffer
	writer := tar.NewWriter(&archive)
	text := []byte("of the second layer\n")
	if err := writer.WriteHeader(&tar.Header{Name: "second", Mode: 0o644, Size: int64(len(text))}); err != nil {
		return nil, err
	}
	if _, err := writer.Write(text); err != nil {
		return nil, err
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
