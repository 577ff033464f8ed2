package client

import (
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"
)

// EventKind is a kind of events: its name in the API.
type EventKind string

// The kinds of events.
const (
	Registered      EventKind = "deviceRegistered"      // the device became the caller's
	Unregistered    EventKind = "deviceUnregistered"    // it no longer is
	MetadataUpdated EventKind = "deviceMetadataUpdated" // it came or went, or its twin is further
	Published       EventKind = "resourcePublished"
	Unpublished     EventKind = "resourceUnpublished"
	Changed         EventKind = "resourceChanged" // a resource reported

	// A command was given …
	CreatePending         EventKind = "resourceCreatePending"
	RetrievePending       EventKind = "resourceRetrievePending"
	UpdatePending         EventKind = "resourceUpdatePending"
	DeletePending         EventKind = "resourceDeletePending"
	MetadataUpdatePending EventKind = "deviceMetadataUpdatePending"
	// … and ended; one of the twin ends with MetadataUpdated.
	Created   EventKind = "resourceCreated"
	Retrieved EventKind = "resourceRetrieved"
	Updated   EventKind = "resourceUpdated"
	Deleted   EventKind = "resourceDeleted"

	// Live is told by Watch, once: everything that happens from then on is told.
	Live EventKind = "live"
	// Lagged is told by Watch when events are missing: the hub no longer keeps all that happened since the last one, or the
	// connection broke before the current state had been told whole, and things happened since. The current state follows, as
	// events.
	Lagged EventKind = "lagged"
)

// filter is the kind's name in filters: RESOURCE_CHANGED.
func (k EventKind) filter() string {
	var b strings.Builder
	for _, r := range string(k) {
		if r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteRune(r)
	}
	s := strings.ToUpper(b.String())
	if k == Registered || k == Unregistered {
		s = strings.TrimPrefix(s, "DEVICE_")
	}
	return s
}

// Event is something that happened. Besides its kind, place and time it has one of the pointers.
type Event struct {
	JSON
	Kind      EventKind
	DeviceIDs []string // whose it is: one, but for Registered and Unregistered
	Time      time.Time
	// ResumeToken is where to go on behind this event (EventFilter.Resume). Only Watch has it.
	ResumeToken string

	Change      *Change   // of Changed, Created, Retrieved, Updated, Deleted
	Links       *Links    // of Published
	Unpublished []string  // hrefs; of Unpublished
	Metadata    *Metadata // of MetadataUpdated
	Command     *Command  // of those that end in Pending
}

// Href is of which resource it tells; empty if it is about the device.
func (e *Event) Href() string {
	switch {
	case e.Change != nil:
		return e.Change.Resource.Href
	case e.Command != nil:
		return e.Command.Resource.Href
	}
	return ""
}

// UnmarshalJSON reads an event: an object with one member, its kind.
func (e *Event) UnmarshalJSON(b []byte) error {
	kind, raw, err := member(b)
	if err != nil {
		return err
	}
	return e.read(kind, raw)
}

// history names two kinds differently from subscriptions.
var history = map[string]EventKind{"resourceLinksPublished": Published, "resourceLinksUnpublished": Unpublished}

// member finds the one member that is an object.
func member(b []byte) (EventKind, json.RawMessage, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(b, &members); err != nil {
		return "", nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		if raw := members[name]; len(raw) > 0 && raw[0] == '{' {
			kind := EventKind(name)
			if k, ok := history[name]; ok {
				kind = k
			}
			return kind, raw, nil
		}
	}
	return "", nil, errors.New("an event has no kind")
}

func (e *Event) read(kind EventKind, raw json.RawMessage) error {
	e.Kind = kind
	into := func(v any, device *string, at *Time) error {
		if err := json.Unmarshal(raw, v); err != nil {
			return err
		}
		e.DeviceIDs, e.Time = []string{*device}, at.Time
		return nil
	}
	switch kind {
	case Changed, Created, Retrieved, Updated, Deleted:
		e.Change = &Change{}
		e.Change.keep(raw)
		return into(e.Change, &e.Change.Resource.DeviceID, &e.Change.Event.Time)
	case Published:
		e.Links = &Links{}
		e.Links.keep(raw)
		return into(e.Links, &e.Links.DeviceID, &e.Links.Event.Time)
	case MetadataUpdated:
		e.Metadata = &Metadata{}
		e.Metadata.keep(raw)
		return into(e.Metadata, &e.Metadata.DeviceID, &e.Metadata.Event.Time)
	case CreatePending, RetrievePending, UpdatePending, DeletePending, MetadataUpdatePending:
		e.Command = &Command{}
		e.Command.keep(raw)
		if err := e.Command.read(kind, raw); err != nil {
			return err
		}
		e.DeviceIDs, e.Time = []string{e.Command.Resource.DeviceID}, e.Command.Event.Time.Time
		return nil
	}
	// Registered, Unregistered, Unpublished, and kinds that this version does not know.
	var other struct {
		DeviceID  string        `json:"deviceId"`
		DeviceIDs []string      `json:"deviceIds"`
		Hrefs     []string      `json:"hrefs"`
		Resource  ResourceID    `json:"resourceId"`
		Event     EventMetadata `json:"eventMetadata"`
	}
	if err := into(&other, &other.DeviceID, &other.Event.Time); err != nil {
		return err
	}
	e.Unpublished = other.Hrefs
	switch {
	case len(other.DeviceIDs) > 0:
		e.DeviceIDs = other.DeviceIDs
	case other.Resource.DeviceID != "":
		e.DeviceIDs = []string{other.Resource.DeviceID}
	}
	return nil
}
