package grpcgateway

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// minCompressed is the smallest answer worth compressing: what fits into a few packets anyway is not.
const minCompressed = 4096

var (
	gzips = sync.Pool{New: func() any { w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed); return w }}
	zstds = sync.Pool{New: func() any {
		w, _ := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(128<<10))
		return w
	}}
)

// compress returns where to write an answer of at least size bytes, and what to call at its end. It sets the headers, so
// none must have been sent.
func compress(w http.ResponseWriter, r *http.Request, size int) (io.Writer, func()) {
	w.Header().Add("Vary", "Accept-Encoding")
	if size < minCompressed {
		return w, func() {}
	}
	switch coding := acceptedCoding(r.Header.Values("Accept-Encoding")); coding {
	case "zstd":
		w.Header().Set("Content-Encoding", coding)
		z := zstds.Get().(*zstd.Encoder)
		z.Reset(w)
		return z, func() { _ = z.Close(); z.Reset(nil); zstds.Put(z) }
	case "gzip":
		w.Header().Set("Content-Encoding", coding)
		z := gzips.Get().(*gzip.Writer)
		z.Reset(w)
		return z, func() { _ = z.Close(); z.Reset(io.Discard); gzips.Put(z) }
	}
	return w, func() {}
}

// acceptedCoding chooses among zstd and gzip (RFC 9110, Section 12.5.3); "" means as it is. What has a weight of 0 is not
// wanted; of several we take the one that is cheaper for both sides.
func acceptedCoding(header []string) string {
	var zs, gz bool
	for _, h := range header {
		for part := range strings.SplitSeq(h, ",") {
			name, params, _ := strings.Cut(part, ";")
			if q, ok := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q="); ok {
				if f, err := strconv.ParseFloat(q, 32); err != nil || f <= 0 {
					continue
				}
			}
			switch strings.ToLower(strings.TrimSpace(name)) {
			case "zstd":
				zs = true
			case "gzip", "x-gzip":
				gz = true
			}
		}
	}
	switch {
	case zs:
		return "zstd"
	case gz:
		return "gzip"
	}
	return ""
}
