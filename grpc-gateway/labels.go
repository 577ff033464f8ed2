package grpcgateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"

	"github.com/coaphub/coaphub/hub"
)

// labelsBody is what a caller sends, and what is answered. A null removes a label (PATCH; as in RFC 7396).
type labelsBody struct {
	Labels map[string]*string `json:"labels"`
}

func appendLabels(b []byte, l hub.Labels) []byte {
	if len(l) == 0 {
		return b
	}
	b = append(appendName(b, "labels"), '{')
	for _, name := range slices.Sorted(maps.Keys(l)) {
		b = appendString(appendName(b, name), l[name])
	}
	return append(b, '}')
}

func writeLabels(w http.ResponseWriter, r *request, l hub.Labels) error {
	if l == nil {
		l = hub.Labels{} // the member is what was asked for
	}
	return writeJSON(w, r, struct {
		Labels hub.Labels `json:"labels"`
	}{l})
}

func (g *Gateway) getLabels(w http.ResponseWriter, r *request) error {
	f := deviceOf(r.vars.device)
	var err error
	if f.at, err = r.query.at(); err != nil {
		return err
	}
	for d, err := range g.pictures(r.Context(), r.claims.Owner, &f) {
		if err != nil {
			return err
		}
		return writeLabels(w, r, d.Labels)
	}
	return errNotFound
}

// putLabels replaces all labels, patchLabels those that are named.
func (g *Gateway) putLabels(w http.ResponseWriter, r *request) error { return g.setLabels(w, r, true) }

func (g *Gateway) patchLabels(w http.ResponseWriter, r *request) error {
	return g.setLabels(w, r, false)
}

func (g *Gateway) setLabels(w http.ResponseWriter, r *request, replace bool) error {
	var body labelsBody
	if err := readJSON(r, &body); err != nil {
		return err
	}
	if body.Labels == nil {
		return invalid("body-incomplete", "the body lacks the member labels")
	}
	change := hub.LabelChange{Replace: replace, Set: hub.Labels{}}
	for name, value := range body.Labels {
		switch {
		case value != nil:
			change.Set[name] = *value
		case replace:
			return invalid("label-invalid", "the value of a label is a text; to remove one, leave it out, or use PATCH")
		default:
			change.Remove = append(change.Remove, name)
		}
	}
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil {
		return errNotFound
	}
	labels, err := g.deps.Directory.SetLabels(r.Context(), r.claims.Owner, id, change, r.claims.Subject)
	if hub.IsKind(err, hub.NotFound) {
		return errNotFound
	}
	if err != nil {
		return err
	}
	return writeLabels(w, r, labels)
}

var errBodyForm = hub.NewError(hub.Invalid, "body-invalid", "the body is not the JSON or CBOR object that this call takes")

// readJSON reads a body that is one document of ours, in JSON or, where Content-Type says so, in CBOR. What it does not know
// is Invalid: a member that was misspelt would be passed over otherwise.
func readJSON(r *request, v any) error {
	b, err := r.document()
	if err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err = d.Decode(v)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one document")
		}
	}
	if err != nil {
		return errBodyForm.With("http.body", err)
	}
	return nil
}

// document reads a body in JSON or CBOR as JSON.
func (r *request) document() ([]byte, error) {
	b, err := r.body()
	if err != nil {
		return nil, err
	}
	if c := (hub.Content{Type: r.Header.Get("Content-Type"), Data: b}); len(b) > 0 && isCBOR(mediaType(c)) {
		decoded, ok := appendDecoded(nil, c)
		if !ok {
			return nil, errBodyForm
		}
		b = decoded
	}
	return b, nil
}

// body reads the request's body.
func (r *request) body() ([]byte, error) {
	b, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, errBody
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, &hub.Error{Kind: hub.Deadline, Op: "http.body", Err: err}
	case err != nil:
		return nil, &hub.Error{Kind: hub.Unavailable, Op: "http.body", Err: err} // the caller is gone
	}
	return b, nil
}

// writeJSON answers with a document of ours, which has one form only.
func writeJSON(w http.ResponseWriter, r *request, v any) error {
	return writeJSONAs(w, r, "application/json", v)
}

func writeJSONAs(w http.ResponseWriter, r *request, contentType string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return &hub.Error{Kind: hub.Internal, Op: "http.json", Err: err}
	}
	return writeTagged(w, r, contentType, append(b, '\n'))
}
