package grpcgateway

import (
	"context"
	"encoding/json"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coaphub/coaphub/hub"
)

// Web of Things: a device is a thing, its published resources are properties, and the forms lead to this API (W3C Web of
// Things Thing Description 1.1).

const (
	thingContext = "https://www.w3.org/2022/wot/td/v1.1"
	// thingType is the resource type of a description that a device brings itself.
	thingType = "wot.thing"
	// securityName is the name of the one way in: an access token in the header (TD 1.1, Section 5.3.3.7).
	securityName = "bearer_sc"
	// maxThings bounds a list of things, which is one document; "next" leads to the rest.
	maxThings = 10_000
)

type thingLink struct {
	Href string `json:"href"`
	Rel  string `json:"rel"`
	Type string `json:"type,omitempty"`
}

type thingSecurity struct {
	Scheme        string `json:"scheme"`
	In            string `json:"in"`
	Format        string `json:"format"`
	Authorization string `json:"authorization,omitempty"` // whom to ask for a token
}

// thing is a Thing Description; also the list of things is one.
type thing struct {
	Context             string                    `json:"@context"`
	ID                  string                    `json:"id"`
	Title               string                    `json:"title"`
	Description         string                    `json:"description,omitempty"`
	Modified            string                    `json:"modified,omitempty"`
	Base                string                    `json:"base"`
	Security            []string                  `json:"security"`
	SecurityDefinitions map[string]thingSecurity  `json:"securityDefinitions"`
	Properties          map[string]map[string]any `json:"properties,omitempty"`
	Links               []thingLink               `json:"links"`
}

// newThing fills in what all descriptions share. Base ends with a slash and hrefs begin without one, so that they join as RFC
// 3986, Section 5.2 says.
func (g *Gateway) newThing(id, title string) thing {
	info := g.deps.HubInfo()
	return thing{
		Context: thingContext, ID: "urn:uuid:" + id, Title: title,
		Base:     strings.TrimSuffix(info.HTTPGatewayAddress, "/") + "/api/v1/",
		Security: []string{securityName},
		SecurityDefinitions: map[string]thingSecurity{
			securityName: {Scheme: "bearer", In: "header", Format: "jwt", Authorization: info.Authority},
		},
		Links: []thingLink{},
	}
}

// thingElement is a device that is a thing: one that published something.
type thingElement struct{ id hub.DeviceID }

func (thingElement) message(string) proto.Message           { return nil } // there is no such call over gRPC
func (e thingElement) appendJSON(b []byte, _ string) []byte { return append(b, e.id...) }

func (g *Gateway) things(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		if d.ID == f.from.device || d.Links.Len() == 0 {
			return true
		}
		return yield(found{thingElement{d.ID}, place{device: d.ID}})
	})
}

func (g *Gateway) getThings(w http.ResponseWriter, r *request) error {
	f := filter{}
	var err error
	if f.limit, err = r.query.limit(); err != nil {
		return err
	}
	if f.limit == 0 || f.limit > maxThings {
		f.limit = maxThings
	}
	owner := r.claims.Owner
	if f.from, err = g.place(listThings, owner, &f, r.query.get("cursor")); err != nil {
		return err
	}
	t := g.newThing(g.deps.HubID, "coaphub")
	err = g.page(listThings, owner, &f, g.things(r.Context(), owner, &f), func(e element, cursor string) error {
		t.Links = append(t.Links, thingLink{"things/" + string(e.appendJSON(nil, "")), "item", "application/td+json"})
		if cursor != "" {
			next := url.Values{"limit": {strconv.FormatUint(uint64(f.limit), 10)}, "cursor": {cursor}}
			t.Links = append(t.Links, thingLink{"things?" + next.Encode(), "next", ""})
		}
		return r.Context().Err()
	})
	if err != nil {
		return err
	}
	return writeThing(w, r, t)
}

func (g *Gateway) getThing(w http.ResponseWriter, r *request) error {
	f := deviceOf(r.vars.device)
	for d, err := range g.pictures(r.Context(), r.claims.Owner, &f) {
		if err != nil {
			return err
		}
		if d.Links.Len() == 0 {
			break
		}
		return writeThing(w, r, g.describe(d))
	}
	return errNotFound
}

// describe makes the description of a device from its links. What the device says of itself in a description of its own is
// taken over for what it published; where things are and how to get in is the hub's to say.
func (g *Gateway) describe(d *hub.Device) thing {
	t := g.newThing(string(d.ID), string(d.ID))
	if e, ok := g.newDevice(d); ok && e.says.name != "" {
		t.Title = e.says.name
	}
	if d.LinksCause.Known {
		t.Modified = time.Unix(0, d.LinksCause.Time).UTC().Format(time.RFC3339)
	}
	own := ownDescription(d)
	if own.Description != "" {
		t.Description = own.Description
	}
	t.Links = append(t.Links, thingLink{"things", "collection", "application/td+json"})
	t.Properties = map[string]map[string]any{}
	for l := range d.Links.All() {
		if slices.Contains(l.Types, thingType) { // it is this document
			continue
		}
		p := own.Properties[string(l.Href)]
		if p == nil {
			p = own.Properties[strings.TrimPrefix(string(l.Href), "/")]
		}
		if p == nil {
			p = map[string]any{}
		}
		if p["title"] == nil {
			p["title"] = titleOf(l)
		}
		if p["description"] == nil && len(l.Types) > 0 {
			p["description"] = "resource type " + strings.Join(l.Types, ", ")
		}
		ops := []string{"readproperty"}
		if writable(l) {
			ops = append(ops, "writeproperty")
		}
		p["readOnly"] = len(ops) == 1
		p["observable"], p["writeOnly"] = false, false // there is no form for it
		p["forms"] = []map[string]any{{
			"href": propertyHref(d.ID, l.Href), "op": ops, "contentType": "application/json",
		}}
		t.Properties[string(l.Href)] = p
	}
	return t
}

func titleOf(l hub.Link) string {
	if l.Title != "" {
		return l.Title
	}
	return string(l.Href)
}

// writable reports whether the resource has an interface for it (OCF Core, Section 7.6.3).
func writable(l hub.Link) bool {
	return slices.Contains(l.Interfaces, "oic.if.rw") || slices.Contains(l.Interfaces, "oic.if.a")
}

// propertyHref leads to the content of a resource. Slashes stay unless a segment is one of the words that our own paths end
// with.
func propertyHref(id hub.DeviceID, h hub.Href) string {
	segments := strings.Split(strings.TrimPrefix(string(h), "/"), "/")
	between := "/"
	for i, s := range segments {
		if s == "events" || s == "pending-commands" {
			between = "%2F"
		}
		segments[i] = url.PathEscape(s)
	}
	return "devices/" + string(id) + "/resources/" + strings.Join(segments, between) + "?onlyContent=true"
}

type ownThing struct {
	Description string
	Properties  map[string]map[string]any
}

// ownDescription reads what the device says of itself. A description that cannot be read is none: the links tell enough.
func ownDescription(d *hub.Device) ownThing {
	var own ownThing
	for l := range d.Links.All() {
		if !slices.Contains(l.Types, thingType) {
			continue
		}
		res, ok := d.Resources.Get(l.Href)
		if !ok {
			continue
		}
		doc, ok := appendDecoded(nil, res.Content)
		var members map[string]json.RawMessage
		if !ok || json.Unmarshal(doc, &members) != nil {
			continue
		}
		// One member of a wrong type must not cost the others.
		_ = json.Unmarshal(members["description"], &own.Description)
		var properties map[string]json.RawMessage
		_ = json.Unmarshal(members["properties"], &properties)
		own.Properties = map[string]map[string]any{}
		for name, raw := range properties {
			var p map[string]any
			if json.Unmarshal(raw, &p) == nil && p != nil {
				maps.DeleteFunc(p, func(member string, value any) bool { return !ownMember(member, value) })
				own.Properties[name] = p
			}
		}
		break
	}
	return own
}

// ownMember reports whether a member of a property may be taken over: what says what the property is (TD 1.1, Sections 5.3.1.2
// and 5.3.2), in the form that it must have. Forms and security are the hub's to say, and a description with a member of a
// wrong type would be none.
func ownMember(name string, value any) bool {
	switch name {
	case "title", "description", "unit", "format", "contentEncoding", "contentMediaType":
		_, ok := value.(string)
		return ok
	case "titles", "descriptions":
		texts, ok := value.(map[string]any)
		for _, t := range texts {
			_, is := t.(string)
			ok = ok && is
		}
		return ok
	case "type":
		t, _ := value.(string)
		return slices.Contains([]string{"boolean", "integer", "number", "string", "object", "array", "null"}, t)
	case "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "minLength", "maxLength":
		_, ok := value.(float64)
		return ok
	case "properties", "items":
		_, ok := value.(map[string]any)
		return ok
	case "required", "oneOf":
		_, ok := value.([]any)
		return ok
	case "enum":
		list, ok := value.([]any)
		return ok && len(list) > 0
	case "const", "default":
		return true
	}
	return false
}

// writeThing answers with a description, under its own media type for those who ask for that (TD 1.1, Section 10.1).
func writeThing(w http.ResponseWriter, r *request, t thing) error {
	if strings.Contains(r.Header.Get("Accept"), "application/td+json") {
		return writeJSONAs(w, r, "application/td+json", t)
	}
	return writeJSON(w, r, t)
}
