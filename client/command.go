package client

import (
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"
)

// CommandOptions says how a command is given. The zero value waits for the device, for as long as the hub does by default.
type CommandOptions struct {
	// TTL is how long the device may take, which may be away until then: from 100 ms to a year, 0 = the hub's default. A call
	// waits for five minutes at most; one for a device that may be away longer is better Async.
	TTL time.Duration
	// Async does not wait for the device: the outcome comes as an event.
	Async bool
	// Force takes resources that the hub does not know. Not for RetrieveResource.
	Force bool
	// Supersede cancels commands of the same kind and resource that were not sent yet. Not for RetrieveResource.
	Supersede bool
	// Key is the idempotency key: a repeat with the same one within 24 hours does nothing and has the first outcome. With a key
	// a command whose answer was lost can be given again.
	Key string
	// IfMatch is a Resource.Tag: if the twin is another by now, it fails with Precondition and the device is not asked. Not for
	// RetrieveResource.
	IfMatch string
	// ForwardIfMatch has the device check IfMatch, too. If it does not fulfil it, that is a Precondition with the code
	// "device-condition"; if it knows no conditions, as many do not, Unsupported with "condition-unsupported". Either way it has
	// done nothing.
	ForwardIfMatch bool
	// Interface is an OCF interface of the resource, such as oic.if.rw. Not for CreateResource.
	Interface string
}

func (o CommandOptions) request(method, path string) Request {
	r := Request{Method: method, Path: path, Query: url.Values{}, Header: http.Header{}}
	if o.TTL != 0 {
		r.Query.Set("timeToLive", strconv.FormatInt(int64(o.TTL), 10))
	}
	for name, on := range map[string]bool{"async": o.Async, "force": o.Force, "supersede": o.Supersede, "forwardIfMatch": o.ForwardIfMatch} {
		if on {
			r.Query.Set(name, "true")
		}
	}
	set(r.Query, "resourceInterface", o.Interface)
	for name, text := range map[string]string{"Idempotency-Key": o.Key, "If-Match": o.IfMatch} {
		if text != "" {
			r.Header.Set(name, text)
		}
	}
	return r
}

// CBOR is a content of a command that is CBOR already.
type CBOR []byte

// content puts the content of a command into a request.
func (r *Request) content(v any) error {
	if b, ok := v.(CBOR); ok {
		r.Body = b
		r.Header.Set("Content-Type", "application/cbor")
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return &Error{Kind: Invalid, Code: "content-invalid", Message: "the content does not become JSON: " + err.Error(), Err: err}
	}
	r.Body = b
	return nil
}

// outcome is what a command brings; no Data if it was only accepted.
type outcome struct {
	JSON
	Data *Change `json:"data"`
}

// give gives a command about a resource.
func (c *Client) give(ctx context.Context, r Request, about ResourceID) (*Change, error) {
	v, _, err := value[outcome](ctx, c, r)
	if err == nil && v.Raw == nil { // 304: the device answered that nothing has changed
		return &Change{Resource: about, Status: "NOT_MODIFIED"}, nil
	}
	if v.Data != nil {
		var members map[string]json.RawMessage
		if json.Unmarshal(v.Raw, &members) == nil {
			v.Data.keep(members["data"])
		}
	}
	return v.Data, err
}

// UpdateResource changes a resource of a device. content is anything that encoding/json takes, or CBOR; the hub makes of it
// what the resource reports. What comes back is the device's answer, nil with Async. An answer that is no success is an error
// with the code "device-error" and the answer as its Outcome; a device that did not answer in time is a Deadline; when no
// answer can come any more it is Unavailable, "command-unavailable", and may have been carried out.
func (c *Client) UpdateResource(ctx context.Context, deviceID, href string, content any, o CommandOptions) (*Change, error) {
	path, err := ResourcePath(deviceID, "resources", href)
	if err != nil {
		return nil, err
	}
	r := o.request(http.MethodPut, path)
	if err := r.content(content); err != nil {
		return nil, err
	}
	return c.give(ctx, r, ResourceID{deviceID, href})
}

// CreateResource creates a resource in a collection of a device, as UpdateResource.
func (c *Client) CreateResource(ctx context.Context, deviceID, href string, content any, o CommandOptions) (*Change, error) {
	path, err := ResourcePath(deviceID, "resource-links", href)
	if err != nil {
		return nil, err
	}
	r := o.request(http.MethodPost, path)
	if err := r.content(content); err != nil {
		return nil, err
	}
	return c.give(ctx, r, ResourceID{deviceID, href})
}

// DeleteResource asks a device to delete one of its resources, as UpdateResource. The device stays in the hub.
func (c *Client) DeleteResource(ctx context.Context, deviceID, href string, o CommandOptions) (*Change, error) {
	path, err := ResourcePath(deviceID, "resource-links", href)
	if err != nil {
		return nil, err
	}
	return c.give(ctx, o.request(http.MethodDelete, path), ResourceID{deviceID, href})
}

// RetrieveResource asks the device itself for a resource, where GetResource reads what the hub knows; as UpdateResource.
func (c *Client) RetrieveResource(ctx context.Context, deviceID, href string, o CommandOptions) (*Change, error) {
	path, err := ResourcePath(deviceID, "resources", href)
	if err != nil {
		return nil, err
	}
	r := o.request(http.MethodGet, path)
	r.Query.Set("twin", "false")
	return c.give(ctx, r, ResourceID{deviceID, href})
}

// TwinUpdate is a command about a device's twin.
type TwinUpdate struct {
	Enabled     *bool         `json:"twinEnabled,omitempty"`              // on or off; nil: as it is
	Synchronize bool          `json:"twinForceSynchronization,omitempty"` // anew
	TTL         time.Duration `json:"timeToLive,omitempty"`               // as in CommandOptions
	Key         string        `json:"idempotencyKey,omitempty"`           // as in CommandOptions
}

// UpdateTwin switches the twin of a device on or off, or synchronises it anew. It returns the metadata afterwards.
func (c *Client) UpdateTwin(ctx context.Context, deviceID string, u TwinUpdate) (Metadata, error) {
	if err := named(deviceID); err != nil {
		return Metadata{}, err
	}
	body, err := json.Marshal(u)
	if err != nil {
		return Metadata{}, err
	}
	type data struct {
		JSON
		Data Metadata `json:"data"`
	}
	v, _, err := value[data](ctx, c, Request{Method: http.MethodPut, Path: DevicePath(deviceID, "metadata"), Body: body})
	return v.Data, err
}

// CommandQuery says which commands. The zero value is all of the caller's.
type CommandQuery struct {
	DeviceIDs []string
	Resources []ResourceID // together with DeviceIDs a union; leaves those of the twin out
	Limit     int          // at most so many; 0: no limit
}

// ListCommands lists commands that have not ended, device by device, each in the order of sending.
func (c *Client) ListCommands(ctx context.Context, q CommandQuery) iter.Seq2[Command, error] {
	about := ResourceQuery{DeviceIDs: q.DeviceIDs, Resources: q.Resources, Limit: q.Limit}
	return listOf[Command](ctx, c, about, "/api/v1/pending-commands", "/pending-commands", url.Values{"includeHiddenResources": {"true"}})
}

// CancelCommands cancels commands of a resource, those with these IDs (Command.By.CorrelationID) or all; with an empty href
// those of the device's twin. It returns the IDs of what it cancelled; nothing to cancel is NotFound. A command that was sent
// may be carried out all the same.
func (c *Client) CancelCommands(ctx context.Context, deviceID, href string, ids ...string) ([]string, error) {
	path := DevicePath(deviceID, "pending-metadata-updates")
	if href != "" {
		resource, err := ResourcePath(deviceID, "resources", href)
		if err != nil {
			return nil, err
		}
		path = resource + "/pending-commands"
	}
	if slices.Contains(ids, "") { // a slip; taken for none it would cancel all
		return nil, &Error{Kind: Invalid, Code: "command-id-invalid", Message: "the ID of a command is empty"}
	}
	q := url.Values{"correlationIdFilter": ids}
	type cancelled struct {
		JSON
		IDs []string `json:"correlationIds"`
	}
	v, _, err := value[cancelled](ctx, c, Request{Method: http.MethodDelete, Path: path, Query: q})
	return v.IDs, err
}
