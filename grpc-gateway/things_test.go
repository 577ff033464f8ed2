package grpcgateway

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// things decodes a description.
func (a answer) thing() (t thing) {
	a.t.Helper()
	if a.Code != 200 {
		a.t.Fatalf("status %d: %s", a.Code, a.Body)
	}
	if err := json.Unmarshal(a.Body.Bytes(), &t); err != nil {
		a.t.Fatal(err)
	}
	return t
}

func TestThings(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	all := w.get(t, "/api/v1/things").thing()
	want(t, "id", all.ID, "urn:uuid:"+hubID)
	var items []string
	for _, l := range all.Links {
		items = append(items, l.Rel+" "+l.Href)
	}
	// Who only signed up offers nothing, and is no thing.
	wantList(t, "things", items, "item things/"+string(lampA), "item things/"+string(lampB), "item things/"+string(nameless))
	for _, l := range all.Links {
		if !strings.HasPrefix(l.Href, "things/") {
			t.Errorf("link %q", l.Href)
			continue
		}
		want(t, "description", w.get(t, resolve(t, all.Base, l.Href)).Code, 200)
	}
	for _, id := range []string{string(fresh), string(bobs), string(unknown), "abc"} {
		want(t, id, w.get(t, "/api/v1/things/"+id).reason(), "not-found")
	}
	want(t, "own media type", w.get(t, "/api/v1/things", "Accept: application/td+json").Header().Get("Content-Type"), "application/td+json")
}

// resolve makes a request's target of an href as RFC 3986 says.
func resolve(t testing.TB, base, href string) string {
	t.Helper()
	b, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	u, err := b.Parse(href)
	if err != nil {
		t.Fatal(err)
	}
	return u.RequestURI()
}

func TestThingsComeInPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	target := "/api/v1/things?limit=1"
	var items []string
	for range 5 {
		page := w.get(t, target).thing()
		target = ""
		for _, l := range page.Links {
			switch l.Rel {
			case "item":
				items = append(items, l.Href)
			case "next":
				target = resolve(t, page.Base, l.Href)
			}
		}
		if target == "" {
			break
		}
	}
	wantList(t, "things", items, "things/"+string(lampA), "things/"+string(lampB), "things/"+string(nameless))
	want(t, "cursor of another call", w.get(t, "/api/v1/devices?limit=1&cursor="+w.cursor(listThings, alice, &filter{}, place{device: lampA})).reason(), "cursor-invalid")
}

// Each form of a description leads to the content it promises, whatever the href is.
func TestFormsOfAThingWork(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := w.pictures[lampA]
	odd := []hub.Href{"/a b", "/events", "/a/pending-commands/b", "/pending-commands", "/ü?x#y", "/a%2Fb"}
	for _, h := range odd {
		if _, ok := d.Links.Get(h); ok {
			continue
		}
		d.Links = insertLink(d.Links.(linkSet), hub.Link{Href: h, Types: []string{"x.odd"}, Interfaces: []string{"oic.if.s"}})
		d.Resources = insertTwin(d.Resources.(resourceSet), twin(h, ocf(map[string]any{"href": string(h)}), ""))
	}
	d.Links = insertLink(d.Links.(linkSet), hub.Link{Href: "/rw", Types: []string{"x.odd"}, Interfaces: []string{"oic.if.baseline", "oic.if.rw"}})
	thing := w.get(t, "/api/v1/things/"+string(lampA)).thing()
	want(t, "title", thing.Title, "lamp A")
	want(t, "what can be written", fmt.Sprint(thing.Properties["/rw"]["forms"].([]any)[0].(map[string]any)["op"]), "[readproperty writeproperty]")
	want(t, "properties", len(thing.Properties), d.Links.Len())
	for name, p := range thing.Properties {
		form := p["forms"].([]any)[0].(map[string]any)
		a := w.get(t, resolve(t, thing.Base, form["href"].(string)))
		want(t, name, a.Code, 200)
		want(t, name, a.Header().Get("Content-Type"), form["contentType"].(string))
		for _, h := range odd {
			if name == string(h) {
				want(t, name, a.json()["href"], any(name))
			}
		}
		ops := len(form["op"].([]any))
		want(t, name+" says so if it can only be read", p["readOnly"], any(ops == 1))
		if ops == 2 {
			w.orders = nil
			a := w.send(t, "alice", "PUT", resolve(t, thing.Base, form["href"].(string)), `{"power":1}`)
			want(t, name, a.Code, 200)
			want(t, name, string(w.orders[0].Href), name)
		}
	}
}

// What the device says of itself is taken over for what it published, but not where things are.
func TestOwnDescriptionOfAThing(t *testing.T) {
	w := newWorld(t)
	d := w.pictures[lampA]
	d.Links = insertLink(d.Links.(linkSet), hub.Link{Href: "/.well-known/wot", Types: []string{"wot.thing"}})
	d.Resources = insertTwin(d.Resources.(resourceSet), twin("/.well-known/wot", hub.Content{Type: "application/json", Format: 50, Data: []byte(`{
		"title": 7, "description": "a lamp", "security": ["none"], "base": "http://evil.example/",
		"properties": {
			"/light/1": {"title": "Light", "type": "object", "properties": {"power": {"type": "integer"}}, "security": ["none"], "forms": [{"href": "http://evil.example/"}]},
			"json": {"type": "object"}, "/gone": {"title": "not published"}, "/types": 5,
			"/text": {"title": 7, "description": [], "type": "text", "titles": {"en": 5}, "enum": [], "minimum": "1", "@type": "x", "default": null}}}`)}, ""))
	a := w.get(t, "/api/v1/things/"+string(lampA))
	thing := a.thing()
	want(t, "description", thing.Description, "a lamp")
	want(t, "title", thing.Title, "lamp A")
	want(t, "its own title", thing.Properties["/light/1"]["title"], any("Light"))
	want(t, "its own type", thing.Properties["/json"]["type"], any("object"))
	want(t, "without the slash", thing.Properties["/light/1"]["properties"] != nil, true)
	text := thing.Properties["/text"]
	want(t, "what is of a wrong type is left out", len(text), 7) // title, description, readOnly, writeOnly, observable, forms, default
	want(t, "title in its place", text["title"], any("/text"))
	want(t, "its security", thing.Properties["/light/1"]["security"] == nil, true)
	want(t, "not published", thing.Properties["/gone"] == nil, true)
	want(t, "the description itself is no property", thing.Properties["/.well-known/wot"] == nil, true)
	if strings.Contains(a.Body.String(), "evil") {
		t.Errorf("the device leads elsewhere: %s", a.Body)
	}
	d.Resources = insertTwin(d.Resources.(resourceSet), twin("/.well-known/wot", hub.Content{Type: "application/json", Data: []byte(`[`)}, ""))
	want(t, "one that cannot be read", len(w.get(t, "/api/v1/things/"+string(lampA)).thing().Properties), d.Links.Len()-1)
}
