package conf

import (
	"encoding"
	"fmt"
	"io"
	"reflect"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"
)

// Write writes cfg, a struct or a pointer to one, as the YAML that Read reads. Secrets are written as three asterisks.
func Write(w io.Writer, cfg any) error { return emit(w, tree(reflect.ValueOf(cfg), nil)) }

// WriteDiff writes only the values in which cfg differs from def, of the same type. Nothing different is "{}".
func WriteDiff(w io.Writer, cfg, def any) error {
	d := reflect.ValueOf(def)
	return emit(w, tree(reflect.ValueOf(cfg), &d))
}

func emit(w io.Writer, n *yaml.Node) error {
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(n); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return enc.Close()
}

// tree makes a mapping of a struct. With def, what equals it is left out.
func tree(v reflect.Value, def *reflect.Value) *yaml.Node {
	v = reflect.Indirect(v)
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, f := range fields(v.Type()) {
		fv := v.FieldByIndex(f.index)
		var child *yaml.Node
		var fd *reflect.Value
		if def != nil {
			d := reflect.Indirect(*def).FieldByIndex(f.index)
			fd = &d
			if reflect.DeepEqual(fv.Interface(), d.Interface()) {
				continue
			}
		}
		switch {
		case leaf(fv.Type()):
			child = node(fv)
		case fv.Kind() == reflect.Pointer && fv.IsNil():
			child = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"}
		default:
			if fd != nil && fd.Kind() == reflect.Pointer && fd.IsNil() {
				fd = nil
			}
			child = tree(fv, fd)
		}
		n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: f.key}, child)
	}
	return n
}

// node makes YAML of one value.
func node(v reflect.Value) *yaml.Node {
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null"}
		}
		v = v.Elem()
	}
	text := func(s string) *yaml.Node {
		n := &yaml.Node{}
		n.SetString(s)
		return n
	}
	if v.Type() == durationType {
		return &yaml.Node{Kind: yaml.ScalarNode, Value: FormatDuration(time.Duration(v.Int()))}
	}
	if v.Type().Implements(marshalerType) {
		b, err := v.Interface().(encoding.TextMarshaler).MarshalText()
		if err != nil {
			return text(err.Error())
		}
		if v.Type() == reflect.TypeFor[Size]() {
			return &yaml.Node{Kind: yaml.ScalarNode, Value: string(b)}
		}
		return text(string(b))
	}
	switch v.Kind() {
	case reflect.String:
		return text(v.String())
	case reflect.Slice:
		n := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			e := v.Index(i)
			if leaf(e.Type()) {
				n.Content = append(n.Content, node(e))
			} else {
				n.Content = append(n.Content, tree(e, nil))
			}
		}
		if len(n.Content) == 0 {
			n.Style = yaml.FlowStyle
		}
		return n
	case reflect.Map:
		n := &yaml.Node{Kind: yaml.MappingNode}
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int {
			if a.String() < b.String() {
				return -1
			}
			return 1
		})
		for _, k := range keys {
			e := v.MapIndex(k)
			child := (*yaml.Node)(nil)
			if leaf(e.Type()) {
				child = node(e)
			} else {
				child = tree(e, nil)
			}
			n.Content = append(n.Content, text(k.String()), child)
		}
		if len(n.Content) == 0 {
			n.Style = yaml.FlowStyle
		}
		return n
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Value: fmt.Sprint(v.Interface())}
}
