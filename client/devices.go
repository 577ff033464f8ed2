package client

import (
	"context"
	"encoding/json"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// DeviceQuery says which devices, and how. The zero value is all of them, by ID.
type DeviceQuery struct {
	IDs    []string
	Types  []string // resource types of /oic/d; one match is enough
	Status []string // ONLINE, OFFLINE
	Search string   // words that must all occur in the ID, the name, a type or a label
	Sort   string   // id, name, modelNumber, connectedAt or status; with a minus from the largest down
	At     time.Time
	Limit  int // at most so many; 0: no limit
}

// ListDevices lists devices that have published /oic/d.
func (c *Client) ListDevices(ctx context.Context, q DeviceQuery) iter.Seq2[Device, error] {
	v := url.Values{}
	v["deviceIdFilter"] = q.IDs
	v["typeFilter"] = q.Types
	v["statusFilter"] = q.Status
	set(v, "search", q.Search)
	set(v, "sort", q.Sort)
	at(v, q.At)
	return list[Device](ctx, c, "/api/v1/devices", v, q.Limit)
}

// set sets a parameter of a query, unless it is empty.
func set(v url.Values, name, text string) {
	if text != "" {
		v.Set(name, text)
	}
}

func at(v url.Values, t time.Time) {
	if !t.IsZero() {
		v.Set("at", nanoseconds(t))
	}
}

// GetDevice reads one device. One that is not the caller's is NotFound.
func (c *Client) GetDevice(ctx context.Context, deviceID string) (Device, error) {
	if err := named(deviceID); err != nil {
		return Device{}, err
	}
	v, _, err := value[Device](ctx, c, Request{Path: DevicePath(deviceID)})
	return v, err
}

// named refuses a missing device ID: the path without it is that of all devices.
func named(deviceID string) error {
	if deviceID == "" {
		return &Error{Kind: Invalid, Code: "device-id-invalid", Message: "the device ID is empty"}
	}
	return nil
}

// DeleteDevices deletes devices with everything that belongs to them, and returns the IDs of those that were the caller's.
// None is Invalid.
func (c *Client) DeleteDevices(ctx context.Context, deviceIDs ...string) ([]string, error) {
	type deleted struct {
		JSON
		DeviceIDs []string `json:"deviceIds"`
	}
	q := url.Values{"deviceIdFilter": deviceIDs}
	v, _, err := value[deleted](ctx, c, Request{Method: http.MethodDelete, Path: "/api/v1/devices", Query: q})
	return v.DeviceIDs, err
}

// labels is the body of calls about labels; nil removes one.
type labels struct {
	JSON
	Labels map[string]*string `json:"labels"`
}

// UpdateLabels sets labels of a device and removes those whose value is nil. It returns all that there are afterwards.
func (c *Client) UpdateLabels(ctx context.Context, deviceID string, change map[string]*string) (map[string]string, error) {
	if err := named(deviceID); err != nil {
		return nil, err
	}
	body, err := json.Marshal(labels{Labels: change})
	if err != nil {
		return nil, err
	}
	v, _, err := value[labels](ctx, c, Request{Method: http.MethodPatch, Path: DevicePath(deviceID, "labels"), Body: body})
	if err != nil {
		return nil, err
	}
	all := make(map[string]string, len(v.Labels))
	for name, text := range v.Labels {
		if text != nil {
			all[name] = *text
		}
	}
	return all, nil
}

// ResourceQuery says which links or twins. The zero value is all of the caller's.
type ResourceQuery struct {
	DeviceIDs []string
	Resources []ResourceID // together with DeviceIDs a union; not for links
	Types     []string     // resource types; one match is enough
	At        time.Time
	Limit     int // at most so many; 0: no limit
}

func (q ResourceQuery) values() (url.Values, error) {
	v := url.Values{}
	v["deviceIdFilter"] = q.DeviceIDs
	for _, r := range q.Resources {
		if strings.Contains(r.Href, "?") { // what is behind it would be taken for ETags
			return nil, &Error{Kind: Invalid, Code: "href-invalid", Message: "an href with a question mark cannot be one of several"}
		}
		v.Add("resourceIdFilter", r.DeviceID+r.Href)
	}
	v["typeFilter"] = q.Types
	at(v, q.At)
	return v, nil
}

// only is the path of the one resource that a query is about, empty if it is about more.
func (q ResourceQuery) only() (string, error) {
	if len(q.DeviceIDs) > 0 || len(q.Resources) != 1 {
		return "", nil
	}
	return ResourcePath(q.Resources[0].DeviceID, "resources", q.Resources[0].Href)
}

// listOf reads a list of a query: at path, or at below that of the one resource that it is about.
func listOf[T any, P document[T]](ctx context.Context, c *Client, q ResourceQuery, path, below string, more url.Values) iter.Seq2[T, error] {
	only, err := q.only()
	if below != "" && only != "" {
		path, q.Resources = only+below, nil
	}
	v := url.Values{}
	if err == nil {
		v, err = q.values()
	}
	if err != nil {
		return func(yield func(T, error) bool) {
			var none T
			yield(none, err)
		}
	}
	maps.Copy(v, more)
	return list[T, P](ctx, c, path, v, q.Limit)
}

// ListLinks lists what devices publish, one element a device.
func (c *Client) ListLinks(ctx context.Context, q ResourceQuery) iter.Seq2[Links, error] {
	q.Resources = nil
	return listOf[Links](ctx, c, q, "/api/v1/resource-links", "", nil)
}

// ListResources lists twins: what published resources reported last. The devices may be asleep or away.
func (c *Client) ListResources(ctx context.Context, q ResourceQuery) iter.Seq2[Resource, error] {
	return listOf[Resource](ctx, c, q, "/api/v1/resources", "", nil)
}

// ListMetadata lists how devices are connected.
func (c *Client) ListMetadata(ctx context.Context, q ResourceQuery) iter.Seq2[Metadata, error] {
	q.Resources = nil
	return listOf[Metadata](ctx, c, q, "/api/v1/devices-metadata", "", nil)
}

// GetResource reads the twin of one resource, with its Tag. A resource that the hub does not know is NotFound.
func (c *Client) GetResource(ctx context.Context, deviceID, href string) (Resource, error) {
	path, err := ResourcePath(deviceID, "resources", href)
	if err != nil {
		return Resource{}, err
	}
	v, header, err := value[Resource](ctx, c, Request{Path: path})
	v.Tag = header.Get("ETag")
	return v, err
}

// EventQuery says which events of the past. The zero value is everything of all devices that the hub still keeps.
type EventQuery struct {
	DeviceIDs []string
	Resources []ResourceID // together with DeviceIDs a union
	After     time.Time    // only newer ones
	Limit     int          // at most so many; 0: no limit
}

// ListEvents lists what happened, device by device, each in its order.
func (c *Client) ListEvents(ctx context.Context, q EventQuery) iter.Seq2[Event, error] {
	more := url.Values{}
	if !q.After.IsZero() {
		more.Set("timestampFilter", nanoseconds(q.After))
	}
	about := ResourceQuery{DeviceIDs: q.DeviceIDs, Resources: q.Resources, Limit: q.Limit}
	return listOf[Event](ctx, c, about, "/api/v1/events", "/events", more)
}

// GetConfiguration reads what everybody may know of the hub; it needs no token.
func (c *Client) GetConfiguration(ctx context.Context) (Configuration, error) {
	v, _, err := value[Configuration](ctx, c, Request{Path: "/.well-known/configuration", open: true})
	return v, err
}

// ListAudit lists calls that changed something, or were meant to, newest first: at most limit of them, 0 for all that the
// hub keeps. The token needs the scope admin.
func (c *Client) ListAudit(ctx context.Context, limit int) iter.Seq2[AuditEntry, error] {
	return list[AuditEntry](ctx, c, "/api/v1/audit", nil, limit)
}

// things is a page of a list of things.
type things struct {
	JSON
	Links []struct {
		Href string `json:"href"`
		Rel  string `json:"rel"`
	} `json:"links"`
}

// GetThing reads a device as a W3C Thing Description 1.1.
func (c *Client) GetThing(ctx context.Context, deviceID string) (json.RawMessage, error) {
	if err := named(deviceID); err != nil {
		return nil, err
	}
	v, _, err := value[things](ctx, c, Request{Path: "/api/v1/things/" + url.PathEscape(deviceID)})
	return v.Raw, err
}

// ListThings lists the IDs of the devices that have a Thing Description.
func (c *Client) ListThings(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		ask := Request{Path: "/api/v1/things", Query: url.Values{"limit": {strconv.Itoa(pageSize)}}}
		for {
			v, _, err := value[things](ctx, c, ask)
			if err != nil {
				yield("", err)
				return
			}
			next := ""
			for _, l := range v.Links {
				u, err := url.Parse(l.Href)
				if err != nil {
					yield("", strange(err))
					return
				}
				switch l.Rel {
				case "item":
					id := u.Path[len(u.Path)-min(len(u.Path), 36):] // a UUID is the last segment
					if !yield(id, nil) {
						return
					}
				case "next":
					next = u.Query().Get("cursor")
				}
			}
			if next == "" {
				return
			}
			ask.Query.Set("cursor", next)
		}
	}
}
