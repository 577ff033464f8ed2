package resourcedirectory

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/dose"
)

func TestPublishEmitsNewAndChangedLinksOnly(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	a, b := link("/a", "x.a"), link("/b", "x.b")
	got, err := x.publish(b, a)
	h.must(err)
	if len(got) != 2 || got[0].Href != "/b" || got[1].Href != "/a" {
		t.Errorf("answer %v: the given order was lost", got)
	}
	got, err = x.publish(a, b) // unchanged: no event, but both are in the answer
	h.must(err)
	if len(got) != 2 {
		t.Errorf("answer %v", got)
	}
	b.Title = "lamp"
	_, err = x.publish(a, b, link("/c", "x.c"))
	h.must(err)
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "published 0 [/b /a]", "published 1 [/b /c]")
	d := h.device(alice, lamp)
	var hrefs []string
	for l := range d.Links.All() {
		hrefs = append(hrefs, string(l.Href)+l.Title)
	}
	if strings.Join(hrefs, " ") != "/a /blamp /c" || d.Links.Len() != 3 {
		t.Errorf("links %v", hrefs)
	}
	if d.LinksCause.Version != 1 || !d.LinksCause.Known || d.LinksCause.Connection != "conn-1" {
		t.Errorf("cause %+v", d.LinksCause)
	}
}

func TestEveryFieldOfALinkIsKeptAndCompared(t *testing.T) {
	t.Parallel()
	full := hub.Link{
		Href: "/a", Types: []string{"t1", "t2"}, Interfaces: []string{"i"}, Anchor: "ocf://x", Title: "title",
		ContentTypes: []string{"application/cbor"}, Policy: 7, Endpoints: []hub.Endpoint{{URI: "coaps://[::1]:1", Priority: 2}},
		ValidUntil: 12345,
	}
	for i := range reflect.TypeFor[hub.Link]().NumField() {
		name := reflect.TypeFor[hub.Link]().Field(i).Name
		if name == "Href" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			h := open(t)
			x := h.registered(lamp)
			before := full
			reflect.ValueOf(&before).Elem().Field(i).SetZero()
			_, err := x.publish(before)
			h.must(err)
			got, err := x.publish(full)
			h.must(err)
			h.restart()
			stored, ok := h.device(alice, lamp).Links.Get("/a")
			if !ok || !reflect.DeepEqual(stored, full) || !reflect.DeepEqual(got, []hub.Link{full}) {
				t.Errorf("stored %+v, answered %+v", stored, got)
			}
			if v := h.device(alice, lamp).LinksCause.Version; v != 1 {
				t.Errorf("version %d: the change of %s made no event", v, name)
			}
		})
	}
}

func TestPublishTakesTheLastOfEqualHrefs(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	got, err := x.publish(link("/a", "old"), link("/b"), link("/a", "new"))
	h.must(err)
	if len(got) != 3 || got[0].Types[0] != "new" || got[2].Types[0] != "new" {
		t.Errorf("answer %v", got)
	}
	if l, _ := h.device(alice, lamp).Links.Get("/a"); l.Types[0] != "new" {
		t.Errorf("stored %v", l)
	}
}

func TestPublishRepeatedAnswersWhatIsStored(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/a", "x"))
	h.must(err)
	got, err := h.d.Publish(t.Context(), x.same(), []hub.Link{link("/a", "x")})
	h.must(err)
	if len(got) != 1 || got[0].Types[0] != "x" {
		t.Errorf("answer %v", got)
	}
}

func TestPublishRefusesBadLinks(t *testing.T) {
	t.Parallel()
	h := open(t, func(h *house) { h.cfg.Limits.Links, h.cfg.Limits.LinkBytes = 3, 20<<10 })
	x := h.registered(lamp)
	long := func(n int) hub.Link { return hub.Link{Href: "/long", Title: strings.Repeat("x", n)} }
	other := long(10 << 10)
	other.Href = "/other"
	for name, c := range map[string]struct {
		links []hub.Link
		kind  hub.Kind
		code  string
	}{
		"no links":             {nil, hub.Invalid, "links-empty"},
		"no href":              {[]hub.Link{link("/a"), link("")}, hub.Invalid, "href-invalid"},
		"the root":             {[]hub.Link{link("/")}, hub.Invalid, "href-invalid"},
		"two slashes":          {[]hub.Link{link("//a")}, hub.Invalid, "href-invalid"},
		"a dot segment":        {[]hub.Link{link("/a/../b")}, hub.Invalid, "href-invalid"},
		"an href of 4 KB":      {[]hub.Link{link(hub.Href("/" + strings.Repeat("a", 4096)))}, hub.Invalid, "href-invalid"},
		"bad UTF-8":            {[]hub.Link{link("/\xff")}, hub.Invalid, "href-invalid"},
		"a link of 20 KiB":     {[]hub.Link{long(20 << 10)}, hub.TooLarge, "link-too-large"},
		"too many links":       {[]hub.Link{link("/a"), link("/b"), link("/c"), link("/d")}, hub.TooLarge, "links-limit"},
		"too many bytes":       {[]hub.Link{long(12 << 10), other}, hub.TooLarge, "links-limit"},
		"bad one among others": {[]hub.Link{link("/good"), link("/./bad")}, hub.Invalid, "href-invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := x.publish(c.links...)
			wantKind(t, err, c.kind, c.code)
		})
	}
	h.expect(lamp, "registered", "meta 0 online out-of-sync") // nothing half done
}

func TestThousandsOfLinks(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	links := make([]hub.Link, dose.Of(2_000, 10_000, 10_000))
	for i := range links {
		links[i] = link(hub.Href(fmt.Sprintf("/r/%05d", i)), "oic.r.temperature")
	}
	got, err := x.publish(links...)
	h.must(err)
	if len(got) != len(links) || h.device(alice, lamp).Links.Len() != len(links) {
		t.Fatalf("%d answered, %d stored", len(got), h.device(alice, lamp).Links.Len())
	}
	before := len(h.commits(lamp))
	_, err = x.publish(links...)
	h.must(err)
	if n := len(h.commits(lamp)); n != before {
		t.Errorf("an unchanged publish made %d commits", n-before)
	}
	h.restart()
	if n := h.device(alice, lamp).Links.Len(); n != len(links) {
		t.Fatalf("%d links after the restart", n)
	}
	x = h.signIn(lamp, alice, 1, "conn-2")
	removed, err := h.d.Unpublish(t.Context(), x.stamp(), nil)
	h.must(err)
	if len(removed) != len(links) || removed[0] != links[0].Href || removed[len(links)-1] != links[len(links)-1].Href {
		t.Errorf("%d links were removed", len(removed))
	}
	d := h.device(alice, lamp)
	if d.Links.Len() != 0 || d.Resources.Len() != len(links) {
		t.Errorf("%d links and %d twins are left", d.Links.Len(), d.Resources.Len())
	}
	h.must(x.notify(value("/r/00001", 1))) // after a request of several commits the session goes on
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), ""))
}

func TestUnpublishSetsTheTwinNotFound(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/a", "x.a"), link("/b", "x.b"), link("/c", "x.c"))
	h.must(err)
	h.must(x.notify(value("/a", 1)))
	removed, err := h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/b", "/a", "/never", "/a"})
	h.must(err)
	if fmt.Sprint(removed) != "[/a /b]" {
		t.Errorf("removed %v", removed)
	}
	again, err := h.d.Unpublish(t.Context(), x.same(), []hub.Href{"/a", "/b"}) // its answer was lost
	h.must(err)
	if fmt.Sprint(again) != "[/a /b]" {
		t.Errorf("removed %v the second time", again)
	}
	none, err := h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/a"})
	if err != nil || len(none) != 0 {
		t.Errorf("removed %v, %v", none, err)
	}
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "published 0 [/a /b /c]", "changed 0 /a 1 1",
		"unpublished 1 [/a /b]", "changed 1 /a 5 ", "changed 0 /b 5 ")
	d := h.device(alice, lamp)
	r, _ := d.Resources.Get("/a")
	if r == nil || r.Status != hub.StatusNotFound || len(r.Content.Data) != 0 || r.Content.Format != hub.FormatNone ||
		len(r.Types) != 1 || r.Types[0] != "x.a" {
		t.Errorf("twin %+v", r)
	}
	if d.Links.Len() != 1 {
		t.Errorf("%d links are left", d.Links.Len())
	}
	// Published again and unpublished again, with a twin that is NOT_FOUND already: no second change.
	_, err = x.publish(link("/a", "x.a"))
	h.must(err)
	removed, err = h.d.Unpublish(t.Context(), x.stamp(), nil)
	h.must(err)
	if fmt.Sprint(removed) != "[/a /c]" {
		t.Errorf("removed %v", removed)
	}
	ev := h.events(lamp)
	if last := ev[len(ev)-2:]; last[0] != "unpublished 3 [/a /c]" || last[1] != "changed 0 /c 5 " {
		t.Errorf("last events %q", last)
	}
}
