package est

import (
	"bytes"
	"testing"
)

// A SEQUENCE whose base64 begins with 0 begins with 0xD3, which is no SEQUENCE: DER and base64 cannot be taken for each other.
func TestDecode(t *testing.T) {
	der := append([]byte{0x30, 0x82, 1, 2}, bytes.Repeat([]byte{7}, 258)...)
	for name, body := range map[string][]byte{
		"lines":         Encode(der),
		"CRLF":          bytes.ReplaceAll(Encode(der), []byte("\n"), []byte("\r\n")),
		"one line":      bytes.ReplaceAll(Encode(der), []byte("\n"), nil),
		"leading space": append([]byte(" \n"), Encode(der)...),
		"DER":           der,
	} {
		if got, err := Decode(body); err != nil || !bytes.Equal(got, der) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "\n", "MIIB!", "MII"} {
		if got, err := Decode([]byte(bad)); err == nil {
			t.Errorf("%q was decoded as %x", bad, got)
		}
	}
}
