package grpcgateway

import (
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// entityTag is the ETag of answers that show a twin: the device's, or if it gave none the commit that brought it, marked
// with an @, which no base64 has. It is weak, since there are several forms of the same state (RFC 9110, Section 8.8.1).
func entityTag(res *hub.Resource) string {
	if len(res.ETag) > 0 {
		return `W/"` + base64.StdEncoding.EncodeToString(res.ETag) + `"`
	}
	return `W/"@` + strconv.FormatUint(res.Seq, 10) + `"`
}

// matches compares weakly (RFC 9110, Section 13.1.2).
func matches(ifNoneMatch []string, tag string) bool {
	tag = strings.TrimPrefix(tag, "W/")
	return slices.ContainsFunc(ifNoneMatch, func(h string) bool {
		for part := range strings.SplitSeq(h, ",") { // our tags have no comma in them
			part = strings.TrimSpace(part)
			if part == "*" || strings.TrimPrefix(part, "W/") == tag {
				return true
			}
		}
		return false
	})
}

// bodyTag is the ETag of an answer that is no single twin: of its bytes before compression, so that it is the same after a
// restart and on every instance. It is weak, since the same body goes out in several codings. A hash of the body begins with
// a #, which neither base64 nor a commit's number does.
func bodyTag(b []byte) string {
	sum := sha256.Sum256(b)
	return `W/"#` + base64.RawStdEncoding.EncodeToString(sum[:12]) + `"`
}

// unchanged sets the ETag of a whole answer that is about to go out, and answers 304 if the caller has it already (RFC 9110,
// Section 15.4.5: with the headers that 200 would have had). Only reads have one.
func unchanged(w http.ResponseWriter, r *request, body []byte) bool {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return false
	}
	tag := bodyTag(body)
	w.Header().Set("ETag", tag)
	if !matches(r.Header.Values("If-None-Match"), tag) {
		return false
	}
	w.WriteHeader(http.StatusNotModified)
	return true
}

// writeTagged is writeBody with an ETag of the body.
func writeTagged(w http.ResponseWriter, r *request, contentType string, b []byte) error {
	contentType, b, err := r.inForm(contentType, b)
	if err != nil {
		return err
	}
	if unchanged(w, r, b) {
		return nil
	}
	return writeBody(w, r, contentType, b)
}
