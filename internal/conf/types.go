package conf

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Hidden is what a secret prints as, everywhere.
const Hidden = "***"

// Secret is a text that never prints: formatting, logging and marshalling show three asterisks. In YAML it is the text
// itself or {file: PATH}, in the environment the variable or the same name with _FILE.
type Secret string

// String hides the secret; an empty one is empty.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return Hidden
}

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// MarshalText hides the secret from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Reveal returns the text, for the one place that needs it.
func (s Secret) Reveal() string { return string(s) }

// Size is a number of bytes, written with a binary unit: 64KiB, 8MiB, 2GiB, or a plain number.
type Size int64

var units = []struct {
	name string
	size Size
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// ParseSize reads a size. Negative sizes and those beyond 2^62 are refused.
func ParseSize(s string) (Size, error) {
	digits, unit := strings.TrimSpace(s), Size(1)
	for _, u := range units {
		if d, ok := strings.CutSuffix(digits, u.name); ok {
			digits, unit = strings.TrimSpace(d), u.size
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > (1<<62)/int64(unit) {
		return 0, fmt.Errorf("%q is not a size; write for example 64KiB, 8MiB or 2GiB", s)
	}
	return Size(n) * unit, nil
}

// String writes the size with the largest unit that divides it.
func (s Size) String() string {
	for _, u := range units {
		if s != 0 && s%u.size == 0 && u.size > 1 {
			return strconv.FormatInt(int64(s/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// UnmarshalText makes Size usable with other decoders and flags.
func (s *Size) UnmarshalText(b []byte) (err error) { *s, err = ParseSize(string(b)); return err }

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// ParseDuration reads a duration as Go writes it, with days besides: 90s, 1h30m, 7d.
func ParseDuration(s string) (time.Duration, error) {
	t := strings.TrimSpace(s)
	if days, rest, ok := strings.Cut(t, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err == nil && rest == "" {
			return time.Duration(n) * 24 * time.Hour, nil
		}
		if err == nil {
			if d, err := time.ParseDuration(rest); err == nil && d >= 0 {
				return time.Duration(n)*24*time.Hour + d, nil
			}
		}
		return 0, fmt.Errorf("%q is not a duration; write for example 10s, 5m, 36h or 7d", s)
	}
	d, err := time.ParseDuration(t)
	if err != nil {
		return 0, fmt.Errorf("%q is not a duration; write for example 10s, 5m, 36h or 7d", s)
	}
	return d, nil
}

// FormatDuration writes what ParseDuration reads, without zero units.
func FormatDuration(d time.Duration) string {
	if d != 0 && d%(24*time.Hour) == 0 && d > 0 {
		return strconv.FormatInt(int64(d/(24*time.Hour)), 10) + "d"
	}
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
