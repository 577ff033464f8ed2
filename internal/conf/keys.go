package conf

import (
	"reflect"
	"strings"
	"time"
)

// Key describes one key of a configuration, for the reference.
type Key struct {
	Path    string
	Default string // the value it has in the struct that was given, as YAML; secrets hidden
	Type    string // what a reader of the reference calls it: duration, size, text, …
	// Where its comment is: the struct's package path, name and field.
	Package, Struct, Field string
}

// Keys lists the keys of cfg, a pointer to a struct, in order. Lists of structs are one key each, followed by the keys of
// their elements with "[]" in the path and no default.
func Keys(cfg any) []Key { return keys(reflect.Indirect(reflect.ValueOf(cfg)), "", false) }

func keys(v reflect.Value, path string, element bool) []Key {
	var out []Key
	for _, f := range fields(v.Type()) {
		fv, at := v.FieldByIndex(f.index), join(path, f.key)
		owner := v.Type()
		for _, i := range f.index[:len(f.index)-1] {
			owner = owner.Field(i).Type
		}
		k := Key{Path: at, Type: typeName(fv.Type()), Package: owner.PkgPath(), Struct: owner.Name(), Field: owner.Field(f.index[len(f.index)-1]).Name}
		switch {
		case leaf(fv.Type()):
			if !element {
				var b strings.Builder
				if err := emit(&b, node(fv)); err == nil {
					k.Default = strings.TrimSpace(b.String())
				}
			}
			out = append(out, k)
			if e := fv.Type(); e.Kind() == reflect.Slice && !leaf(e.Elem()) {
				out = append(out, keys(reflect.Indirect(reflect.New(e.Elem())), at+"[]", true)...)
			}
		default:
			if fv.Kind() == reflect.Pointer {
				if fv.IsNil() {
					fv = reflect.New(fv.Type().Elem())
				}
				fv = fv.Elem()
			}
			out = append(out, keys(fv, at, element)...)
		}
	}
	return out
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "duration"
	case t == reflect.TypeFor[Size]():
		return "size"
	case t == secretType:
		return "secret"
	}
	switch t.Kind() {
	case reflect.Pointer:
		return typeName(t.Elem())
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "list of " + typeName(t.Elem())
	case reflect.Map:
		return "map of " + typeName(t.Elem())
	case reflect.Struct:
		return "keys"
	case reflect.Float32, reflect.Float64:
		return "number"
	}
	return "whole number"
}
