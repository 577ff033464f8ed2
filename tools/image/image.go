package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// user is who the hub runs as: a number that is nobody's on usual systems. Kubernetes can tell from a number, not from a name, that it
// is not root.
const user = 65532

// program is the hub's binary for one platform.
type program struct {
	platform v1.Platform
	file     string
}

// assemble makes the image of all platforms. Nothing in it depends on when or where that is done.
func assemble(programs []program, src source) (v1.ImageIndex, error) {
	roots, err := rootCertificates()
	if err != nil {
		return nil, err
	}
	base, err := layerOf(src.created, []entry{
		{path: "backup/", mode: 0o700, own: true}, // a new volume of Docker's takes over whose these two are
		{path: "data/", mode: 0o700, own: true},
		{path: "etc/group", mode: 0o644, text: fmt.Appendf(nil, "root:x:0:\ncoaphub:x:%d:\n", user)},
		{path: "etc/passwd", mode: 0o644, text: fmt.Appendf(nil, "root:x:0:0:root:/:/sbin/nologin\ncoaphub:x:%d:%d:coaphub:/data:/sbin/nologin\n", user, user)},
		{path: "etc/ssl/certs/ca-certificates.crt", mode: 0o644, text: roots},
		{path: "tmp/", mode: 0o1777},
	})
	if err != nil {
		return nil, err
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range programs {
		b, err := os.ReadFile(p.file)
		if err != nil {
			return nil, err
		}
		hub, err := layerOf(src.created, []entry{{path: "usr/bin/coaphub", mode: 0o755, text: b}})
		if err != nil {
			return nil, err
		}
		img, err := imageOf(p.platform, src, base, hub)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &p.platform}})
	}
	return mutate.Annotations(index, labels(src)).(v1.ImageIndex), nil
}

func labels(src source) map[string]string {
	l := map[string]string{
		"org.opencontainers.image.title":         "coaphub",
		"org.opencontainers.image.description":   "A hub for constrained devices that speak CoAP",
		"org.opencontainers.image.url":           "https://github.com/coaphub/coaphub",
		"org.opencontainers.image.source":        "https://github.com/coaphub/coaphub",
		"org.opencontainers.image.documentation": "https://github.com/coaphub/coaphub/blob/main/docs/operations.md",
		"org.opencontainers.image.licenses":      "Apache-2.0",
		"org.opencontainers.image.version":       src.version,
		"org.opencontainers.image.created":       src.created.Format(time.RFC3339),
	}
	if src.revision != "" {
		l["org.opencontainers.image.revision"] = src.revision
	}
	return l
}

func imageOf(p v1.Platform, src source, base, hub v1.Layer) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: p.Architecture, OS: p.OS, Variant: p.Variant, Created: v1.Time{Time: src.created},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{}},
		Config: v1.Config{
			User:       fmt.Sprintf("%d:%d", user, user),
			Entrypoint: []string{"/usr/bin/coaphub"},
			Cmd:        []string{"serve", "--data", "/data"},
			// COAPHUB_DATA is for the commands that somebody runs beside the hub. There are no keys of the configuration here: they would
			// come before those of a file (docs/config.md).
			Env:          []string{"PATH=/usr/bin", "COAPHUB_DATA=/data"},
			WorkingDir:   "/data",
			Volumes:      map[string]struct{}{"/data": {}},
			ExposedPorts: map[string]struct{}{"5684/tcp": {}, "5684/udp": {}, "8080/tcp": {}, "8081/tcp": {}, "8082/tcp": {}, "8443/tcp": {}, "15684/tcp": {}, "15684/udp": {}},
			Labels:       labels(src),
			StopSignal:   "SIGTERM",
		},
	})
	if err != nil {
		return nil, err
	}
	for _, l := range []struct {
		layer v1.Layer
		what  string
	}{{base, "folders, the user, certificates of public CAs"}, {hub, "coaphub " + src.version}} {
		img, err = mutate.Append(img, mutate.Addendum{Layer: l.layer, History: v1.History{Created: v1.Time{Time: src.created}, CreatedBy: l.what}})
		if err != nil {
			return nil, err
		}
	}
	return img, nil
}

// rootCertificates are the public CAs that Mozilla trusts, for providers of tokens and revocation lists that are elsewhere. They come
// from a module, so that go.sum says which they are. CAs that are trusted only for certificates from before some day are not among
// them: a file of certificates cannot say the day.
func rootCertificates() ([]byte, error) {
	var out bytes.Buffer
	for r := range bundle.Roots() {
		if r.Constraint != nil {
			continue
		}
		cert, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			return nil, fmt.Errorf("a root certificate: %w", err)
		}
		fmt.Fprintf(&out, "# %s\n", cert.Subject)
		if err := pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: r.Certificate}); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), nil
}

// entry is a file, or a folder when its path ends with a slash. It is root's unless it is the hub's own.
type entry struct {
	path string
	mode int64
	text []byte
	own  bool
}

// layerOf makes a layer of the entries and the folders they are in.
func layerOf(at time.Time, entries []entry) (v1.Layer, error) {
	all := map[string]entry{}
	for _, e := range entries {
		all[e.path] = e
		for dir := path.Dir(strings.TrimSuffix(e.path, "/")); dir != "."; dir = path.Dir(dir) {
			if _, ok := all[dir+"/"]; !ok {
				all[dir+"/"] = entry{path: dir + "/", mode: 0o755}
			}
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, p := range slices.Sorted(maps.Keys(all)) {
		e := all[p]
		h := tar.Header{Name: e.path, Mode: e.mode, Size: int64(len(e.text)), ModTime: at, Typeflag: tar.TypeReg, Format: tar.FormatPAX}
		if strings.HasSuffix(e.path, "/") {
			h.Typeflag = tar.TypeDir
		}
		if e.own {
			h.Uid, h.Gid = user, user
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.text); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer))
}

// write makes out/image, an OCI image layout, and out/image.tar of it, and returns the digest of the image.
func write(img v1.ImageIndex, version, out string) (v1.Hash, error) {
	digest, err := img.Digest()
	if err != nil {
		return digest, err
	}
	folder := filepath.Join(out, "image")
	if err := os.RemoveAll(folder); err != nil {
		return digest, err
	}
	to, err := layout.Write(folder, empty.Index)
	if err != nil {
		return digest, err
	}
	ref := map[string]string{"org.opencontainers.image.ref.name": version, "io.containerd.image.name": "docker.io/library/coaphub:" + version}
	if err := to.AppendIndex(img, layout.WithAnnotations(ref)); err != nil {
		return digest, err
	}
	docker, err := dockerManifest(img, version)
	if err != nil {
		return digest, err
	}
	return digest, writeTar(folder, filepath.Join(out, "image.tar"), docker)
}

// dockerManifest is the file by which Docker's older store finds an image in the tar. It knows one platform only: the first.
func dockerManifest(img v1.ImageIndex, version string) ([]byte, error) {
	m, err := img.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(m.Manifests) == 0 {
		return nil, errors.New("no platform")
	}
	first, err := img.Image(m.Manifests[0].Digest)
	if err != nil {
		return nil, err
	}
	fm, err := first.Manifest()
	if err != nil {
		return nil, err
	}
	blob := func(h v1.Hash) string { return path.Join("blobs", h.Algorithm, h.Hex) }
	d := tarball.Descriptor{Config: blob(fm.Config.Digest), RepoTags: []string{"coaphub:" + version}}
	for _, l := range fm.Layers {
		d.Layers = append(d.Layers, blob(l.Digest))
	}
	return json.Marshal(tarball.Manifest{d})
}

func writeTar(folder, file string, docker []byte) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	put := func(name string, b []byte) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := w.Write(b)
		return err
	}
	err = filepath.WalkDir(folder, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(folder, p)
		if err != nil {
			return err
		}
		return put(filepath.ToSlash(rel), b)
	})
	return errors.Join(err, put("manifest.json", docker), w.Close())
}

// pushTo puts the image into a registry, with the login of docker login or podman login if there is one.
func pushTo(ctx context.Context, reference string, img v1.ImageIndex) error {
	ref, err := name.ParseReference(reference, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("PUSH must be host/name:tag: %w", err)
	}
	if err := remote.WriteIndex(ref, img, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)); err != nil {
		return fmt.Errorf("push to %s: %w", ref, err)
	}
	fmt.Println("pushed", ref)
	return nil
}
