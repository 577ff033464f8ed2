package coapgateway

import (
	"bytes"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
)

// element is one resource in a batch representation of /oic/res (OCF Core, interface oic.if.b).
type element struct {
	Href  string          `cbor:"href"`
	Rep   cbor.RawMessage `cbor:"rep"`
	ETag  []byte          `cbor:"etag"`
	Types []string        `cbor:"rt"`
}

// parseBatch returns the changes of a batch representation in the order they are to be stored. Elements without a usable
// href or without rep are left out and counted. An error means that the whole body is no batch.
func parseBatch(format int32, body, etag []byte) (changes []hub.Change, skipped int, err error) {
	if format != hub.FormatCBOR && format != hub.FormatOCFCBOR {
		return nil, 0, hub.NewError(hub.Unsupported, "batch-invalid", "a batch must be CBOR")
	}
	var raw []cbor.RawMessage
	if err := decoding.Unmarshal(body, &raw); err != nil {
		return nil, 0, hub.NewError(hub.Invalid, "batch-invalid", "the batch is no CBOR array").With("decode batch", err)
	}
	last := -1
	changes = make([]hub.Change, 0, len(raw))
	for _, one := range raw {
		// One by one, so that a single element of a wrong shape does not cost the device all others.
		var e element
		if decoding.Unmarshal(one, &e) != nil {
			skipped++
			continue
		}
		href, ok := batchHref(e.Href)
		if !ok || len(e.Rep) == 0 {
			skipped++
			continue
		}
		if isEmptyMap(e.Rep) {
			// The device says "nothing here": it could not read the resource. Security resources and the introspection are
			// answered so although they exist (compat), so that says nothing about them.
			if hidden(href) {
				skipped++
				continue
			}
			changes = append(changes, hub.Change{Href: href, Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}})
			continue
		}
		c := change(href, hub.StatusOK, hub.Content{Type: hub.MediaType(format), Format: format, Data: e.Rep}, e.ETag)
		if len(e.Types) > 0 {
			c.Types = e.Types
		}
		if len(etag) > 0 && bytes.Equal(etag, e.ETag) {
			last = len(changes)
		}
		changes = append(changes, c)
	}
	if last >= 0 {
		// The message's ETag is the newest; its element goes last, so that the directory's newest ETag is the device's, and
		// the next synchronisation can ask for what changed since.
		c := changes[last]
		changes = append(append(changes[:last:last], changes[last+1:]...), c)
	}
	return changes, skipped, nil
}

// change is a representation as it goes to the directory. Content over the limit becomes an error status: the application
// sees that there is something it cannot have, and the session lives.
func change(href hub.Href, status hub.Status, content hub.Content, etag []byte) hub.Change {
	if len(content.Data) > hub.MaxContent {
		return hub.Change{Href: href, Status: hub.StatusError, Content: hub.Content{Format: hub.FormatNone}}
	}
	c := hub.Change{Href: href, Status: status, Content: content, ETag: etag}
	if status == hub.StatusOK {
		c.Types = typesOf(content.Format, content.Data)
	}
	return c
}

// batchHref cleans an element's href: "/light" or "ocf://<di>/light". The device's ID comes from the session, never from here.
func batchHref(s string) (hub.Href, bool) {
	if rest, ok := strings.CutPrefix(s, "ocf://"); ok {
		slash := strings.IndexByte(rest, '/')
		if slash < 0 {
			return "", false
		}
		s = rest[slash:]
	}
	h, err := hub.ParseHref(s)
	return h, err == nil
}

// isEmptyMap recognises both forms of an empty map (RFC 8949, Sections 3.1 and 3.2.2).
func isEmptyMap(rep []byte) bool {
	return bytes.Equal(rep, []byte{0xa0}) || bytes.Equal(rep, []byte{0xbf, 0xff})
}

func hidden(h hub.Href) bool {
	return strings.HasPrefix(string(h), "/oic/sec/") || strings.HasPrefix(string(h), "/oc/wk/introspection")
}
