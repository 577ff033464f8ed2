package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// imageFile is what clients were made from: a FileDescriptorSet, below api. It is also what grpcurl and the like take.
const imageFile = "image.binpb"

var (
	pascal     = regexp.MustCompile(`^[A-Z][A-Za-z0-9]*$`)
	lowerSnake = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	upperSnake = regexp.MustCompile(`^[A-Z][A-Z0-9]*(_[A-Z0-9]+)*$`)
)

// check lints the files and compares them with the image, which then takes in what is new. Whoever breaks clients on purpose
// removes the image first.
func check(root string, set *descriptorpb.FileDescriptorSet) error {
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return err
	}
	problems := lint(files)
	path := filepath.Join(root, "api", imageFile)
	old, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		var was descriptorpb.FileDescriptorSet
		if err := proto.Unmarshal(old, &was); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		before, err := protodesc.NewFiles(&was)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		problems = append(problems, breaks(before, files)...)
	}
	if len(problems) > 0 {
		return errors.Join(problems...)
	}
	now, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err != nil {
		return err
	}
	return os.WriteFile(path, now, 0o644)
}

// lint holds the files to the rules of buf's category BASIC about names and enums. The others of its STANDARD would rename what
// clients of plgd's hub depend on: prefixes of enum values, suffixes of packages and services, types of requests.
func lint(files *protoregistry.Files) (problems []error) {
	named := func(d protoreflect.Descriptor, what string, want *regexp.Regexp) {
		if !want.MatchString(string(d.Name())) {
			problems = append(problems, fmt.Errorf("lint: %s: the name of the %s does not match %s", d.FullName(), what, want))
		}
	}
	enums := func(es protoreflect.EnumDescriptors) {
		for i := range es.Len() {
			e := es.Get(i)
			named(e, "enum", pascal)
			if e.Values().Get(0).Number() != 0 {
				problems = append(problems, fmt.Errorf("lint: %s: the first value is not 0", e.FullName()))
			}
			seen := map[protoreflect.EnumNumber]bool{}
			for j := range e.Values().Len() {
				v := e.Values().Get(j)
				named(v, "enum value", upperSnake)
				if seen[v.Number()] {
					problems = append(problems, fmt.Errorf("lint: %s: %d has two names", e.FullName(), v.Number()))
				}
				seen[v.Number()] = true
			}
		}
	}
	var messages func(protoreflect.MessageDescriptors)
	messages = func(ms protoreflect.MessageDescriptors) {
		for i := range ms.Len() {
			m := ms.Get(i)
			if m.IsMapEntry() {
				continue
			}
			named(m, "message", pascal)
			for j := range m.Fields().Len() {
				named(m.Fields().Get(j), "field", lowerSnake)
			}
			for j := range m.Oneofs().Len() {
				if o := m.Oneofs().Get(j); !o.IsSynthetic() {
					named(o, "oneof", lowerSnake)
				}
			}
			enums(m.Enums())
			messages(m.Messages())
		}
	}
	files.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() == "google.protobuf" {
			return true
		}
		if f.Package() == "" {
			problems = append(problems, fmt.Errorf("lint: %s has no package", f.Path()))
		}
		enums(f.Enums())
		messages(f.Messages())
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			named(s, "service", pascal)
			for j := range s.Methods().Len() {
				named(s.Methods().Get(j), "call", pascal)
			}
		}
		return true
	})
	return problems
}

// breaks lists what clients made from before would not find, or would read differently, in now: over the wire or in JSON. It is
// buf's category WIRE_JSON, with the calls of services.
func breaks(before, now *protoregistry.Files) (problems []error) {
	broken := func(name protoreflect.FullName, format string, args ...any) {
		problems = append(problems, fmt.Errorf("breaking: %s: %s", name, fmt.Sprintf(format, args...)))
	}
	find := func(name protoreflect.FullName) protoreflect.Descriptor {
		d, err := now.FindDescriptorByName(name)
		if err != nil {
			return nil
		}
		return d
	}
	enum := func(was protoreflect.EnumDescriptor) {
		is, ok := find(was.FullName()).(protoreflect.EnumDescriptor)
		if !ok {
			broken(was.FullName(), "the enum is gone")
			return
		}
		for i := range was.Values().Len() {
			v := was.Values().Get(i)
			switch n := is.Values().ByNumber(v.Number()); {
			case n != nil && n.Name() != v.Name():
				broken(v.FullName(), "the value %d is called %s now", v.Number(), n.Name())
			case n == nil && !(is.ReservedRanges().Has(v.Number()) && is.ReservedNames().Has(v.Name())):
				broken(v.FullName(), "the value is gone, and its number and name are not reserved")
			}
		}
	}
	field := func(was, is protoreflect.FieldDescriptor) {
		if was.Name() != is.Name() || was.JSONName() != is.JSONName() {
			broken(was.FullName(), "the field %d is called %s now", was.Number(), is.Name())
		}
		if was.Kind() != is.Kind() {
			broken(was.FullName(), "it is a %s now and was a %s", is.Kind(), was.Kind())
		}
		if was.Cardinality() != is.Cardinality() || was.IsMap() != is.IsMap() || was.HasPresence() != is.HasPresence() {
			broken(was.FullName(), "how often it occurs has changed")
		}
		if oneof(was) != oneof(is) {
			broken(was.FullName(), "it is in the oneof %q now and was in %q", oneof(is), oneof(was))
		}
		switch {
		case was.Message() != nil && is.Message() != nil && was.Message().FullName() != is.Message().FullName():
			broken(was.FullName(), "it is a %s now and was a %s", is.Message().FullName(), was.Message().FullName())
		case was.Enum() != nil && is.Enum() != nil && was.Enum().FullName() != is.Enum().FullName():
			broken(was.FullName(), "it is a %s now and was a %s", is.Enum().FullName(), was.Enum().FullName())
		}
	}
	var message func(protoreflect.MessageDescriptor)
	message = func(was protoreflect.MessageDescriptor) {
		is, ok := find(was.FullName()).(protoreflect.MessageDescriptor)
		if !ok {
			broken(was.FullName(), "the message is gone")
			return
		}
		for i := range was.Fields().Len() {
			f := was.Fields().Get(i)
			switch g := is.Fields().ByNumber(f.Number()); {
			case g != nil:
				field(f, g)
			case !is.ReservedRanges().Has(f.Number()) || !is.ReservedNames().Has(f.Name()):
				broken(f.FullName(), "the field is gone, and its number and name are not reserved")
			}
		}
		for i := range was.Enums().Len() {
			enum(was.Enums().Get(i))
		}
		for i := range was.Messages().Len() {
			message(was.Messages().Get(i))
		}
	}
	before.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() == "google.protobuf" {
			return true
		}
		for i := range f.Enums().Len() {
			enum(f.Enums().Get(i))
		}
		for i := range f.Messages().Len() {
			message(f.Messages().Get(i))
		}
		for i := range f.Services().Len() {
			was := f.Services().Get(i)
			is, ok := find(was.FullName()).(protoreflect.ServiceDescriptor)
			if !ok {
				broken(was.FullName(), "the service is gone")
				continue
			}
			for j := range was.Methods().Len() {
				m := was.Methods().Get(j)
				switch n := is.Methods().ByName(m.Name()); {
				case n == nil:
					broken(m.FullName(), "the call is gone")
				case n.Input().FullName() != m.Input().FullName() || n.Output().FullName() != m.Output().FullName() ||
					n.IsStreamingClient() != m.IsStreamingClient() || n.IsStreamingServer() != m.IsStreamingServer():
					broken(m.FullName(), "the call has other types, or streams otherwise")
				}
			}
		}
		return true
	})
	return problems
}

// oneof is the name of the oneof that a field is in; empty if in none.
func oneof(f protoreflect.FieldDescriptor) protoreflect.Name {
	if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() {
		return o.Name()
	}
	return ""
}
