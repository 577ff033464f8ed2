package hub

import (
	"strings"
	"unicode/utf8"
)

// MaxHref is the longest href in bytes.
const MaxHref = 1024

// Href names a resource of a device: an absolute path such as "/light/1", cleaned by ParseHref.
type Href string

// ParseHref cleans an href as devices and clients send it: runs of slashes become one, a trailing slash goes, a leading one
// comes. Empty hrefs, "/", segments "." and "..", control characters, bad UTF-8 and more than MaxHref bytes are Invalid.
func ParseHref(s string) (Href, error) {
	bad := func(text string) (Href, error) {
		return "", &Error{Kind: Invalid, Code: "href-invalid", Text: text}
	}
	switch {
	case len(s) > MaxHref:
		return bad("the href is longer than 1024 bytes")
	case !utf8.ValidString(s):
		return bad("the href is not UTF-8")
	}
	for _, r := range s {
		if r < 0x20 || r == 0x7f {
			return bad("the href has control characters")
		}
	}
	var b strings.Builder
	b.Grow(len(s) + 1)
	for seg := range strings.SplitSeq(s, "/") {
		switch seg {
		case "":
			continue
		case ".", "..":
			return bad("the href has a dot segment")
		}
		b.WriteByte('/')
		b.WriteString(seg)
	}
	switch {
	case b.Len() == 0:
		return bad("the href is empty")
	case b.Len() > MaxHref: // with the leading slash that came
		return bad("the href is longer than 1024 bytes")
	}
	return Href(b.String()), nil
}
