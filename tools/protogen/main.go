// Command protogen makes the Go code of api/gen from api/proto. It compiles the files itself, so no protoc has to be
// installed, and runs the plugins at the versions that tools/go.mod pins. Before that it lints the files, and refuses changes
// that would break clients made from an earlier version, which api/image.binpb remembers.
//
// Run it in the repository's root: go run -C tools ./protogen
package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// module is stripped from the plugins' output paths, what remains is relative to the repository's root.
const module = "github.com/coaphub/coaphub"

// plugins are tools of this module; "go tool" runs them at the pinned version.
var plugins = []string{"protoc-gen-go", "protoc-gen-go-grpc"}

func main() {
	root := ".."
	if len(os.Args) > 1 {
		root = os.Args[1]
	}
	if err := generate(context.Background(), root); err != nil {
		fmt.Fprintln(os.Stderr, "protogen:", err)
		os.Exit(1)
	}
}

// generate replaces everything below root/api/gen, so that nothing stale remains.
func generate(ctx context.Context, root string) error {
	src := filepath.Join(root, "api", "proto")
	var names []string
	err := filepath.WalkDir(src, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".proto" {
			return err
		}
		rel, err := filepath.Rel(src, path)
		names = append(names, filepath.ToSlash(rel))
		return err
	})
	if err != nil {
		return fmt.Errorf("list .proto files: %w", err)
	}
	slices.Sort(names)
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{src}}),
		SourceInfoMode: protocompile.SourceInfoStandard, // comments go into the generated code
	}
	files, err := compiler.Compile(ctx, names...)
	if err != nil {
		return fmt.Errorf("compile: %w", err)
	}
	req := &pluginpb.CodeGeneratorRequest{FileToGenerate: names, Parameter: proto.String("module=" + module)}
	seen := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) { // plugins want every file after its imports
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		req.ProtoFile = append(req.ProtoFile, toProto(f))
	}
	for _, f := range files {
		add(f)
	}
	image := &descriptorpb.FileDescriptorSet{}
	for _, f := range req.ProtoFile {
		f := proto.CloneOf(f)
		f.SourceCodeInfo = nil // a change of a comment is none of the API
		image.File = append(image.File, f)
	}
	if err := check(root, image); err != nil {
		return err
	}
	in, err := proto.Marshal(req)
	if err != nil {
		return fmt.Errorf("marshal request: %w", err)
	}
	out := map[string]string{}
	for _, plugin := range plugins {
		if err := run(ctx, root, plugin, in, out); err != nil {
			return fmt.Errorf("%s: %w", plugin, err)
		}
	}
	return write(root, out)
}

// toProto prefers the compiler's own message: it has the source comments.
func toProto(f protoreflect.FileDescriptor) *descriptorpb.FileDescriptorProto {
	if r, ok := f.(interface {
		FileDescriptorProto() *descriptorpb.FileDescriptorProto
	}); ok {
		return r.FileDescriptorProto()
	}
	return protodesc.ToFileDescriptorProto(f)
}

func run(ctx context.Context, root, plugin string, in []byte, out map[string]string) error {
	cmd := exec.CommandContext(ctx, "go", "tool", plugin)
	cmd.Dir = filepath.Join(root, "tools")
	cmd.Stdin = bytes.NewReader(in)
	cmd.Stderr = os.Stderr
	b, err := cmd.Output()
	if err != nil {
		return err
	}
	var resp pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(b, &resp); err != nil {
		return fmt.Errorf("unmarshal response: %w", err)
	}
	if resp.Error != nil {
		return fmt.Errorf("%s", resp.GetError())
	}
	for _, f := range resp.GetFile() {
		if !strings.HasPrefix(f.GetName(), "api/gen/") {
			return fmt.Errorf("%s would be written outside of api/gen", f.GetName())
		}
		out[f.GetName()] = f.GetContent()
	}
	return nil
}

func write(root string, out map[string]string) error {
	if err := os.RemoveAll(filepath.Join(root, "api", "gen")); err != nil {
		return fmt.Errorf("clear api/gen: %w", err)
	}
	for name, content := range out {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
