// Command image builds the container image: the hub's static binary on an empty base, for each platform, as an OCI image layout
// (a folder) and as one tar file of it. It needs no container engine, and the same commit gives the same digest with the same Go. With
// -push it puts the image into a registry, too.
//
// It is a module of its own, so that what it needs is neither in the product nor in the way of the other tools.
//
// It must not know what the hub does: only how it is built, and what it wants of the place where it runs.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func main() {
	root := flag.String("root", ".", "the repository")
	out := flag.String("out", "bin", "folder that gets image/ and image.tar")
	platforms := flag.String("platforms", "linux/amd64,linux/arm64,linux/arm/v7", "what to build for, separated by commas")
	push := flag.String("push", "", "reference of a registry to push to: host/name:tag")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := build(ctx, *root, *out, *platforms, *push); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, root, out, platforms, push string) error {
	src, err := sourceOf(ctx, root)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "coaphub-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	var programs []program
	for s := range strings.SplitSeq(platforms, ",") {
		p, err := v1.ParsePlatform(s)
		if err != nil {
			return fmt.Errorf("platform %q: %w", s, err)
		}
		fmt.Println("building", p)
		file, err := compile(ctx, root, tmp, src.version, *p)
		if err != nil {
			return err
		}
		programs = append(programs, program{*p, file})
	}
	img, err := assemble(programs, src)
	if err != nil {
		return err
	}
	digest, err := write(img, src.version, out)
	if err != nil {
		return err
	}
	fmt.Printf("%s in %s and %s\n", digest, filepath.Join(out, "image"), filepath.Join(out, "image.tar"))
	if push == "" {
		return nil
	}
	return pushTo(ctx, push, img)
}

// source is what the image says of where it comes from.
type source struct {
	version, revision string
	created           time.Time // of the commit: the time of the build would be another one in each image
}

// sourceOf asks git. What is not in a repository has a version of its own making: SOURCE_DATE_EPOCH is its time, as for other builds
// that can be repeated (reproducible-builds.org).
func sourceOf(ctx context.Context, root string) (source, error) {
	src := source{version: "unknown", created: time.Unix(0, 0).UTC()}
	git := func(args ...string) string {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-C", root}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	if v := git("describe", "--tags", "--always", "--dirty"); v != "" {
		src.version, src.revision = v, git("rev-parse", "HEAD")
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		epoch = git("log", "-1", "--format=%ct")
	}
	if epoch != "" {
		sec, err := strconv.ParseInt(epoch, 10, 64)
		if err != nil {
			return src, fmt.Errorf("SOURCE_DATE_EPOCH is %q: it must be seconds since 1970", epoch)
		}
		src.created = time.Unix(sec, 0).UTC()
	}
	return src, nil
}

// compile builds the hub for a platform: without cgo, so that it needs no library of where it runs, and without the paths of where it
// was built.
func compile(ctx context.Context, root, dir, version string, p v1.Platform) (string, error) {
	file := filepath.Join(dir, "coaphub-"+strings.ReplaceAll(p.String(), "/", "-"))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+version, "-o", file, "./cmd/coaphub")
	cmd.Dir, cmd.Stderr = root, os.Stderr
	// The lowest of each architecture: an image of linux/amd64 must run on any.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOOS="+p.OS, "GOARCH="+p.Architecture,
		"GOAMD64=v1", "GOARM64=v8.0", "GOARM="+strings.TrimPrefix(p.Variant, "v"))
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build for %s: %w", p, err)
	}
	return file, nil
}
