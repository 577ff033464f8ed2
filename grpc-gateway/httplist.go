package grpcgateway

import (
	"context"
	"io"
	"iter"
	"net/http"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coaphub/coaphub/hub"
)

// chunk is how much of a list is collected before it is sent. Up to then an error still gets a status of its own.
const chunk = 32 << 10

var protoJSON = protojson.MarshalOptions{EmitUnpopulated: true}

func appendElement(b []byte, r *request, e element, cursor string) ([]byte, error) {
	if r.proto {
		return appendMessage(b, e.message(cursor))
	}
	return e.appendJSON(b, cursor), nil
}

// appendResult appends an element of a list with its wrapper: a line of JSON, or an item of a CBOR sequence.
func appendResult(b []byte, r *request, e element, cursor string) ([]byte, error) {
	from := len(b)
	b, err := appendElement(append(b, `{"result":`...), r, e, cursor)
	if err != nil {
		return b, err
	}
	b = append(b, '}', '\n')
	if !r.cbor {
		return b, nil
	}
	item, err := cborFrom(b[from:])
	return append(b[:from], item...), err
}

// listType is the content type of lists.
func (r *request) listType() string {
	if r.cbor {
		return cborSequence
	}
	return r.contentType()
}

func appendMessage(b []byte, m proto.Message) ([]byte, error) {
	b, err := protoJSON.MarshalAppend(b, m)
	if err != nil {
		return b, &hub.Error{Kind: hub.Internal, Op: "http.protojson", Err: err}
	}
	return b, nil
}

// reader reads one of the lists.
type reader = func(context.Context, hub.Owner, *filter) iter.Seq2[found, error]

// writeList answers with a list: one line {"result":…} for each element, ended by one line feed in both forms. An error
// before the first chunk gets its status and no wrapper; afterwards it is the last line, {"error":…}. A list that fits into
// one chunk has an ETag; of a longer one pages with a limit have.
func (g *Gateway) writeList(w http.ResponseWriter, r *request, l list, f *filter, read reader) error {
	var err error
	if f.limit, err = r.query.limit(); err != nil {
		return err
	}
	if f.from, err = g.place(l, r.claims.Owner, f, r.query.get("cursor")); err != nil {
		return err
	}
	var (
		out  io.Writer
		done func()
		buf  = make([]byte, 0, 4096)
	)
	begin := func(size int) {
		w.Header().Set("Content-Type", r.listType())
		w.Header().Set("X-Content-Type-Options", "nosniff")
		out, done = compress(w, r.Request, size)
	}
	ctx := r.Context()
	err = g.page(l, r.claims.Owner, f, read(ctx, r.claims.Owner, f), func(e element, cursor string) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		if buf, err = appendResult(buf, r, e, cursor); err != nil {
			return err
		}
		if len(buf) < chunk {
			return nil
		}
		if out == nil {
			begin(len(buf))
		}
		_, err = out.Write(buf)
		buf = buf[:0]
		if err != nil { // the reader is gone or does not read
			return &hub.Error{Kind: hub.Unavailable, Op: "http.list", Err: err}
		}
		return nil
	})
	if err != nil {
		if out == nil {
			return err
		}
		w.(*writer).cut = true
		buf = append(appendError(append(buf[:0], `{"error":`...), err, r.proto), '}', '\n')
		if r.cbor {
			if c, bad := cborFrom(buf); bad == nil {
				buf = c
			}
		}
	}
	if out == nil {
		if unchanged(w, r, buf) { // it is whole; a longer one is on its way before its end is known
			return nil
		}
		begin(len(buf))
	}
	_, _ = out.Write(buf)
	done()
	return err
}
