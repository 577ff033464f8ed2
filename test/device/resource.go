package device

import (
	"encoding/binary"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

var mapType = reflect.TypeFor[map[string]any]()

// Interfaces of OCF.
const (
	ifBaseline  = "oic.if.baseline"
	ifLinkList  = "oic.if.ll"
	ifBatch     = "oic.if.b"
	ifRead      = "oic.if.r"
	ifActuator  = "oic.if.a"
	ifSensor    = "oic.if.s"
	resHref     = "/oic/res"
	discover    = 1 // p.bm: discoverable
	observeable = 2 // p.bm: observable
)

// resource is one of the device's. Its fields are guarded by the device's mu.
type resource struct {
	href       string
	types      []string
	interfaces []string
	observable bool
	published  bool
	writable   bool
	rep        any        // never changed in place
	fail       codes.Code // not 0: every request gets this
	etag       uint64
}

func (r *resource) policy() int {
	if r.observable {
		return discover | observeable
	}
	return discover
}

// etagBytes is an ETag as iotivity-lite makes it: 8 bytes that grow with each change.
func etagBytes(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func (d *Device) makeResources() {
	d.resources = map[string]*resource{}
	res := &resource{href: resHref, types: []string{"oic.wk.res"}, interfaces: []string{ifLinkList, ifBaseline, ifBatch}, observable: true}
	if d.cfg.PerResource {
		res.interfaces, res.observable = []string{ifLinkList, ifBaseline}, false
	}
	d.add(res)
	d.add(&resource{
		href: "/oic/d", types: []string{"oic.wk.d", "oic.d.light"}, interfaces: []string{ifRead, ifBaseline}, published: true,
		rep: map[string]any{"n": d.cfg.Name, "di": d.cfg.ID, "piid": d.cfg.ID, "icv": "ocf.2.2.5", "dmv": "ocf.res.1.3.0"},
	})
	d.add(&resource{
		href: "/oic/p", types: []string{"oic.wk.p"}, interfaces: []string{ifRead, ifBaseline}, published: true,
		rep: map[string]any{"pi": d.cfg.ID, "mnmn": "coaphub"},
	})
	d.add(&resource{
		href: "/light/1", types: []string{"core.light"}, interfaces: []string{ifActuator, ifBaseline},
		observable: true, published: true, writable: true,
		rep: map[string]any{"name": "Light", "state": false, "power": uint64(0)},
	})
	d.add(&resource{
		href: "/info", types: []string{"x.coaphub.info"}, interfaces: []string{ifRead, ifBaseline}, published: true,
		rep: map[string]any{"firmware": "1.0"},
	})
	for i := range d.cfg.Resources {
		d.add(&resource{
			href: "/sensor/" + strconv.Itoa(i+1), types: []string{"oic.r.sensor"}, interfaces: []string{ifSensor, ifBaseline},
			observable: true, published: true, rep: map[string]any{"value": uint64(0)},
		})
	}
	for _, code := range d.cfg.Errors {
		d.add(&resource{
			href: "/err/" + strconv.Itoa(code), types: []string{"x.coaphub.error"}, interfaces: []string{ifRead, ifBaseline},
			published: true, fail: codeOf(code),
		})
	}
}

// codeOf makes 4.04 of 404.
func codeOf(n int) codes.Code { return codes.Code(n/100<<5 | n%100) }

func (d *Device) add(r *resource) {
	d.etag++
	r.etag = d.etag
	d.resources[r.href] = r
	d.order = append(d.order, r.href)
}

// Hrefs returns the published resources.
func (d *Device) Hrefs() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(d.order), func(h string) bool { return !d.resources[h].published })
}

// Value returns what a resource's GET gives now; nil if there is no such resource.
func (d *Device) Value(href string) any {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.resources[href]; r != nil {
		return r.rep
	}
	return nil
}

// AddResource adds a readable resource with the given types, or replaces one; Publish tells the hub.
func (d *Device) AddResource(href string, observable bool, rep any, types ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.resources[href] != nil {
		d.order = slices.DeleteFunc(d.order, func(h string) bool { return h == href })
	}
	d.add(&resource{
		href: href, types: types, interfaces: []string{ifRead, ifBaseline}, observable: observable, published: true, rep: rep,
	})
}

// links returns the wanted links as /oic/res and publish have them. Callers hold mu.
func (d *Device) links(want func(*resource) bool) []map[string]any {
	out := []map[string]any{}
	for _, h := range d.order {
		r := d.resources[h]
		if !want(r) {
			continue
		}
		l := map[string]any{
			"href": r.href, "rt": r.types, "if": r.interfaces, "anchor": "ocf://" + d.cfg.ID, "p": map[string]any{"bm": r.policy()},
		}
		if cc := d.current(); cc != nil {
			l["eps"] = []any{map[string]any{"ep": fmt.Sprintf("%s://%s", d.over.name, cc.LocalAddr())}}
		}
		out = append(out, l)
	}
	return out
}

// merge puts the fields of a POST over a representation.
func merge(rep any, body any) (any, bool) {
	old, ok1 := rep.(map[string]any)
	with, ok2 := body.(map[string]any)
	if !ok1 || !ok2 {
		return nil, false
	}
	out := maps.Clone(old)
	maps.Copy(out, with)
	return out, true
}
