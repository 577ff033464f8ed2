package hub

import (
	"fmt"
	"maps"
	"unicode"
	"unicode/utf8"
)

// Limits of labels: with all of them a device's labels take less than 12 KB.
const (
	MaxLabels     = 32
	MaxLabelName  = 63  // bytes
	MaxLabelValue = 256 // bytes
)

// Labels are what an owner writes on a device to find it again: names with values, such as room: kitchen. They say nothing
// to the device and decide nothing. nil is none.
type Labels map[string]string

// Equal reports whether both say the same.
func (l Labels) Equal(o Labels) bool { return maps.Equal(l, o) }

// LabelChange is a change of labels: those of Remove go, then those of Set come. Replace forgets all others first.
type LabelChange struct {
	Replace bool
	Set     Labels
	Remove  []string
}

// Apply returns the labels after the change; old is left as it is. Labels over their limits are Invalid ("label-invalid"),
// too many of them TooLarge ("too-many-labels").
func (c LabelChange) Apply(old Labels) (Labels, error) {
	out := Labels{}
	if !c.Replace {
		maps.Copy(out, old)
	}
	for _, name := range c.Remove {
		delete(out, name)
	}
	for name, value := range c.Set {
		if err := checkLabel(name, value); err != nil {
			return nil, err
		}
		out[name] = value
	}
	if len(out) > MaxLabels {
		return nil, &Error{Kind: TooLarge, Code: "too-many-labels", Text: fmt.Sprintf("a device has at most %d labels", MaxLabels)}
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

// checkLabel keeps names fit for paths and query strings, and values fit for a line of text.
func checkLabel(name, value string) error {
	bad := func(format string, args ...any) error {
		return &Error{Kind: Invalid, Code: "label-invalid", Text: fmt.Sprintf(format, args...)}
	}
	if name == "" || len(name) > MaxLabelName {
		return bad("a label's name has 1 to %d bytes", MaxLabelName)
	}
	for _, c := range []byte(name) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_') {
			return bad("a label's name is made of letters, digits, dots, dashes and underscores")
		}
	}
	if len(value) > MaxLabelValue {
		return bad("the label %s is longer than %d bytes", name, MaxLabelValue)
	}
	if !utf8.ValidString(value) {
		return bad("the label %s is not UTF-8", name)
	}
	for _, r := range value {
		if unicode.IsControl(r) {
			return bad("the label %s has control characters", name)
		}
	}
	return nil
}
