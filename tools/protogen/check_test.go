package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

const good = `syntax = "proto3";
package a.pb;
enum Color { RED = 0; BLUE = 1; GONE = 2; }
message Lamp {
  string id = 1;
  optional int64 power_now = 2;
  repeated Color colors = 3;
  oneof what { string text = 4; Lamp other = 5; }
  map<string, string> labels = 6;
  message Inner { bool on = 1; enum Deep { ZERO = 0; } }
  string gone = 7;
}
message Other { string id = 1; }
service Lamps { rpc Get(Lamp) returns (stream Lamp); rpc Put(Lamp) returns (Lamp); }
`

func compile(t *testing.T, source string) *descriptorpb.FileDescriptorSet {
	t.Helper()
	c := protocompile.Compiler{Resolver: &protocompile.SourceResolver{Accessor: protocompile.SourceAccessorFromMap(map[string]string{"a.proto": source})}}
	files, err := c.Compile(t.Context(), "a.proto")
	if err != nil {
		t.Fatal(err)
	}
	return &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{protodesc.ToFileDescriptorProto(files[0])}}
}

func parse(t *testing.T, source string) *protoregistry.Files {
	t.Helper()
	files, err := protodesc.NewFiles(compile(t, source))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// Each line of a change is old => new; what is found must have the words, or be nothing.
func TestBreaks(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"BLUE = 1", "BLUE = 1; GREEN = 3", ""},
		{`string gone = 7;`, `reserved 7; reserved "gone"; string more = 8;`, ""},
		{`GONE = 2;`, `reserved 2; reserved "GONE";`, ""},
		{"rpc Put", "rpc Post(Lamp) returns (Other); rpc Put", ""},
		{`string gone = 7;`, ``, "a.pb.Lamp.gone: the field is gone"},
		{`string gone = 7;`, `reserved 7;`, "a.pb.Lamp.gone: the field is gone"},
		{`GONE = 2;`, ``, "a.pb.GONE: the value is gone"},
		{"BLUE = 1", "GREEN = 1", "a.pb.BLUE: the value 1 is called GREEN"},
		{"string id = 1;\n  opt", "string name = 1;\n  opt", "a.pb.Lamp.id: the field 1 is called name"},
		{"optional int64", "optional int32", "power_now: it is a int32 now and was a int64"},
		{"optional int64", "int64", "power_now: how often"},
		{"repeated Color", "Color", "colors: how often"},
		{"string id = 1;\n  opt", "repeated string id = 1;\n  opt", "Lamp.id: how often"},
		{"oneof what { string text = 4; ", "string text = 4; oneof what { ", `text: it is in the oneof ""`},
		{"Lamp other", "Other other", "other: it is a a.pb.Other now"},
		{"repeated Color colors", "repeated Inner.Deep colors", "colors: it is a a.pb.Lamp.Inner.Deep now"},
		{"message Other { string id = 1; }", "", "a.pb.Other: the message is gone"},
		{"enum Deep { ZERO = 0; }", "", "a.pb.Lamp.Inner.Deep: the enum is gone"},
		{"rpc Put(Lamp) returns (Lamp);", "", "a.pb.Lamps.Put: the call is gone"},
		{"returns (stream Lamp)", "returns (Lamp)", "a.pb.Lamps.Get: the call has other types"},
		{"rpc Put(Lamp)", "rpc Put(Other)", "a.pb.Lamps.Put: the call has other types"},
		{"service Lamps {", "service Lights {", "a.pb.Lamps: the service is gone"},
		{"package a.pb", "package b.pb", "a.pb.Lamp: the message is gone"},
	} {
		if !strings.Contains(good, c.old) {
			t.Fatalf("there is no %q", c.old)
		}
		got := fmt.Sprint(breaks(parse(t, good), parse(t, strings.Replace(good, c.old, c.new, 1))))
		if c.want == "" && got != "[]" || !strings.Contains(got, c.want) {
			t.Errorf("%q => %q: %s, want %q", c.old, c.new, got, c.want)
		}
	}
}

func TestLint(t *testing.T) {
	if got := lint(parse(t, good)); got != nil {
		t.Errorf("%v", got)
	}
	for _, c := range []struct{ old, new, want string }{
		{"message Other", "message other_one", "a.pb.other_one: the name of the message"},
		{"string id = 1;\n  opt", "string ID = 1;\n  opt", "a.pb.Lamp.ID: the name of the field"},
		{"oneof what", "oneof What", "a.pb.Lamp.What: the name of the oneof"},
		{"enum Color", "enum color", "a.pb.color: the name of the enum"},
		{"BLUE = 1", "blue = 1", "a.pb.blue: the name of the enum value"},
		{"BLUE = 1;", "option allow_alias = true; BLUE = 1; AZURE = 1;", "a.pb.Color: 1 has two names"},
		{"service Lamps", "service lamps", "a.pb.lamps: the name of the service"},
		{"rpc Put", "rpc put", "a.pb.Lamps.put: the name of the call"},
		{"package a.pb;", "", "a.proto has no package"},
		{`syntax = "proto3"`, `syntax = "proto2"`, ""},
	} {
		source := strings.Replace(good, c.old, c.new, 1)
		if c.old == "enum Color" {
			source = strings.ReplaceAll(source, "repeated Color", "repeated color")
		}
		if c.want == "" {
			source = `syntax = "proto2"; package a; enum E { ONE = 1; }`
			c.want = "a.E: the first value is not 0"
		}
		if got := fmt.Sprint(lint(parse(t, source))); !strings.Contains(got, c.want) {
			t.Errorf("%q: %s", c.new, got)
		}
	}
}

// The image takes in what is new, and is left alone by what would break.
func TestImage(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "api"), 0o755); err != nil {
		t.Fatal(err)
	}
	read := func() string {
		b, err := os.ReadFile(filepath.Join(root, "api", imageFile))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if err := check(root, compile(t, good)); err != nil {
		t.Fatal(err)
	}
	first := read()
	if err := check(root, compile(t, good+"message More {}\n")); err != nil {
		t.Fatal(err)
	}
	second := read()
	if second == first {
		t.Error("the image did not take in what is new")
	}
	if err := check(root, compile(t, good)); err == nil || read() != second || !strings.Contains(err.Error(), "a.pb.More: the message is gone") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(filepath.Join(root, "api", imageFile), []byte("\xff"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := check(root, compile(t, good)); err == nil {
		t.Error("a damaged image was taken")
	}
}
