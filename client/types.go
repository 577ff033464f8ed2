package client

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"
)

// JSON is what the hub sent, in the form that docs/api.md calls simple JSON.
type JSON struct {
	Raw json.RawMessage `json:"-"`
}

func (j *JSON) keep(raw json.RawMessage) { j.Raw = raw }

// document is a value that keeps what it was read from.
type document[T any] interface {
	*T
	keep(json.RawMessage)
}

func decode[T any, P document[T]](raw json.RawMessage) (v T, err error) {
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, strange(err)
	}
	P(&v).keep(bytes.TrimSpace(raw))
	return v, nil
}

// Time is a time of the API: nanoseconds since 1970, mostly in a text. A missing one, and 0, is the zero time.
type Time struct{ time.Time }

// UnmarshalJSON reads nanoseconds.
func (t *Time) UnmarshalJSON(b []byte) error {
	s := strings.Trim(string(b), `"`)
	if s == "null" || s == "" {
		return nil
	}
	ns, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return err
	}
	t.Time = time.Time{}
	if ns != 0 {
		t.Time = time.Unix(0, ns)
	}
	return nil
}

// nanoseconds is a time as the API takes it in a query.
func nanoseconds(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) }

// Device is a device of the caller.
type Device struct {
	JSON
	ID              string            `json:"id"`
	Name            string            `json:"name"`
	Types           []string          `json:"types"`
	Interfaces      []string          `json:"interfaces"`
	ModelNumber     string            `json:"modelNumber"`
	Endpoints       []string          `json:"endpoints"`
	OwnershipStatus string            `json:"ownershipStatus"`
	Labels          map[string]string `json:"labels"` // what the owner wrote on it
	Metadata        Metadata          `json:"metadata"`
	Data            *Change           `json:"data"` // its /oic/d; nil if it has none
}

// Metadata is how a device is connected and what the hub keeps of it.
type Metadata struct {
	JSON
	DeviceID    string     `json:"deviceId"` // empty in a Device
	Connection  Connection `json:"connection"`
	Twin        Twin       `json:"twinSynchronization"`
	TwinEnabled bool       `json:"twinEnabled"`
	// NextContact is when a device that sleeps is expected, ContactInterval how long it usually sleeps; zero for others.
	NextContact     Time          `json:"nextContact"`
	ContactInterval time.Duration `json:"contactInterval,string"`
	By              Origin        `json:"auditContext"`
	Event           EventMetadata `json:"eventMetadata"`
	Canceled        bool          `json:"canceled"` // it ends a command that was cancelled
}

// Connection is a device's.
type Connection struct {
	Status      string `json:"status"` // ONLINE or OFFLINE
	ID          string `json:"id"`
	ConnectedAt Time   `json:"connectedAt"`
	Protocol    string `json:"protocol"`
}

// Online reports whether the device is.
func (c Connection) Online() bool { return c.Status == "ONLINE" }

// Twin is how far the hub's picture of a device is.
type Twin struct {
	State     string `json:"state"` // OUT_OF_SYNC, SYNCING, IN_SYNC or DISABLED
	SyncingAt Time   `json:"syncingAt"`
	InSyncAt  Time   `json:"inSyncAt"`
}

// Origin is who caused an event.
type Origin struct {
	User          string `json:"userId"`
	Owner         string `json:"owner"`
	CorrelationID string `json:"correlationId"` // the command's ID, for events of commands
}

// EventMetadata is an event's place.
type EventMetadata struct {
	Version      uint64 `json:"version,string"` // counts the events of one resource, or of one device's metadata
	Time         Time   `json:"timestamp"`
	ConnectionID string `json:"connectionId"`
	HubID        string `json:"hubId"`
}

// ResourceID names a resource.
type ResourceID struct {
	DeviceID string `json:"deviceId"`
	Href     string `json:"href"`
}

// Change is a content of a resource: what it reported, what a device answered to a command.
type Change struct {
	JSON
	Resource ResourceID `json:"resourceId"`
	Status   string     `json:"status"` // OK, or what the device answered instead, such as NOT_FOUND
	// Content is the decoded content: JSON, CBOR and text. What cannot be decoded is an object with contentType,
	// coapContentFormat (-1: there was no content) and data in base64.
	Content json.RawMessage `json:"content"`
	ETag    []byte          `json:"etag"` // as the device sent it
	Types   []string        `json:"resourceTypes"`
	By      Origin          `json:"auditContext"`
	Event   EventMetadata   `json:"eventMetadata"`
}

// Decode reads the content into v.
func (c *Change) Decode(v any) error { return json.Unmarshal(c.Content, v) }

// Resource is a published resource and its twin.
type Resource struct {
	JSON
	Types []string `json:"types"`
	Data  *Change  `json:"data"` // nil: it never reported
	// Tag is the twin's entity tag, for CommandOptions.IfMatch. Only GetResource has it.
	Tag string `json:"-"`
}

// Links are what a device publishes, or one event about that.
type Links struct {
	JSON
	DeviceID  string        `json:"deviceId"`
	Resources []Link        `json:"resources"`
	By        Origin        `json:"auditContext"`
	Event     EventMetadata `json:"eventMetadata"`
}

// Link is one published resource.
type Link struct {
	DeviceID   string   `json:"deviceId"`
	Href       string   `json:"href"`
	Types      []string `json:"resourceTypes"`
	Interfaces []string `json:"interfaces"`
	Anchor     string   `json:"anchor"`
	Title      string   `json:"title"`
	Policy     struct {
		BitFlags int `json:"bitFlags"` // 1 discoverable, 2 observable
	} `json:"policy"`
}

// Command is a command that has not ended, or the event that it was given.
type Command struct {
	JSON
	Kind      EventKind       // one of those that end in Pending
	Resource  ResourceID      `json:"resourceId"` // its Href is empty for a command of the twin
	Interface string          `json:"resourceInterface"`
	Content   json.RawMessage `json:"content"`
	By        Origin          `json:"auditContext"` // CorrelationID is the command's ID
	Event     EventMetadata   `json:"eventMetadata"`
	Until     Time            `json:"validUntil"`
	// Of a command of the twin: on or off, or nil for none of both; and whether it is synchronised anew.
	TwinEnabled     *bool `json:"twinEnabled"`
	TwinSynchronize bool  `json:"twinForceSynchronization"`
}

// UnmarshalJSON reads a pending command: an object with one member, its kind.
func (c *Command) UnmarshalJSON(b []byte) error {
	kind, raw, err := member(b)
	if err != nil {
		return err
	}
	return c.read(kind, raw)
}

// read reads what a member of kind holds.
func (c *Command) read(kind EventKind, raw json.RawMessage) error {
	type plain Command // without UnmarshalJSON
	v := struct {
		*plain
		DeviceID string `json:"deviceId"` // of one of the twin
	}{plain: (*plain)(c)}
	if err := json.Unmarshal(raw, &v); err != nil {
		return err
	}
	c.Kind = kind
	if v.DeviceID != "" {
		c.Resource.DeviceID = v.DeviceID
	}
	return nil
}

// Configuration is what everybody may know of the hub.
type Configuration struct {
	JSON
	HubID       string `json:"id"`
	Now         Time   `json:"currentTime"`
	Authority   string `json:"authority"`          // issuer of access tokens
	HTTP        string `json:"httpGatewayAddress"` // base URL of the API
	CoAPGateway string `json:"coapGateway"`        // where devices sign up
	DeviceRoots string `json:"certificateAuthorities"`
	CommandTTL  int64  `json:"defaultCommandTimeToLive"` // in nanoseconds
	Build       struct {
		Version string `json:"version"`
	} `json:"buildInfo"`
}

// AuditEntry is a call that changed something, or was meant to.
type AuditEntry struct {
	JSON
	Number  uint64    `json:"number,string"`
	Time    time.Time `json:"time"`
	Door    string    `json:"door"` // http, grpc or socket
	Call    string    `json:"call"`
	Target  string    `json:"target"`
	User    string    `json:"user"`
	Owner   string    `json:"owner"`
	Client  string    `json:"client"`
	Remote  string    `json:"remote"`
	Request string    `json:"request"`
	Outcome string    `json:"outcome"` // ok, or an error's stable code
}
