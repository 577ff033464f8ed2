package conf

import (
	"encoding"
	"reflect"
	"strings"
	"time"
)

// field is one key of a struct.
type field struct {
	key   string
	index []int
}

// fields lists the keys of a struct type in order. A field without a yaml tag, or with "-", is no key; ",inline" fields
// give theirs to the struct around them.
func fields(t reflect.Type) []field {
	var out []field
	for i := range t.NumField() {
		f := t.Field(i)
		key, options, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case !f.IsExported() || key == "-":
		case strings.Contains(options, "inline"):
			for _, in := range fields(f.Type) {
				out = append(out, field{in.key, append([]int{i}, in.index...)})
			}
		case key != "":
			out = append(out, field{key, []int{i}})
		}
	}
	return out
}

var (
	durationType    = reflect.TypeFor[time.Duration]()
	secretType      = reflect.TypeFor[Secret]()
	unmarshalerType = reflect.TypeFor[encoding.TextUnmarshaler]()
	marshalerType   = reflect.TypeFor[encoding.TextMarshaler]()
)

// leaf reports whether a type is one value in the file, and not keys of its own.
func leaf(t reflect.Type) bool {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.Kind() != reflect.Struct || reflect.PointerTo(t).Implements(unmarshalerType)
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// Variable returns the environment variable of a path: coapGateway.api.coap.address is
// COAPHUB_COAPGATEWAY_API_COAP_ADDRESS.
func Variable(prefix, path string) string {
	return prefix + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
}
