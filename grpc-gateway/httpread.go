package grpcgateway

import (
	"net/http"

	"github.com/coaphub/coaphub/hub"
)

// listFilter reads the filters of the lists over all devices. resources says whether the list has a filter for them; where
// it has none, entries are passed over like every parameter that a call does not know.
func (r *request) listFilter(resources bool) (filter, error) {
	var named []string
	if resources {
		named = r.query["resourceIdFilter"]
	}
	f, err := newFilter(r.query["deviceIdFilter"], nil, named)
	if err != nil {
		return f, err
	}
	f.types = r.query["typeFilter"]
	f.at, err = r.query.at()
	return f, err
}

// deviceFilter is for the routes below one device; filters in the query other than the type are not theirs.
func (r *request) deviceFilter() (filter, error) {
	f := deviceOf(r.vars.device)
	f.types = r.query["typeFilter"]
	var err error
	f.at, err = r.query.at()
	return f, err
}

// one returns the only element of a list that has at most one, or "not found".
func (g *Gateway) one(r *request, f *filter, read reader) (element, error) {
	for e, err := range read(r.Context(), r.claims.Owner, f) {
		if err != nil {
			return nil, err
		}
		return e.element, nil
	}
	return nil, errNotFound
}

func (g *Gateway) getDevices(w http.ResponseWriter, r *request) error {
	f, err := r.listFilter(false)
	if err != nil {
		return err
	}
	status, err := r.query.status()
	if err != nil {
		return err
	}
	f.setStatus(status)
	if f.search, err = newSearch(r.query.get("search")); err != nil {
		return err
	}
	if f.order, err = newOrder(r.query.get("sort")); err != nil {
		return err
	}
	return g.writeList(w, r, listDevices, &f, g.devices)
}

func (g *Gateway) getDevice(w http.ResponseWriter, r *request) error {
	f, err := r.deviceFilter()
	if err != nil {
		return err
	}
	f.types = nil
	e, err := g.one(r, &f, g.devices)
	if err != nil {
		return err
	}
	return writeOne(w, r, e)
}

func (g *Gateway) getLinks(w http.ResponseWriter, r *request) error {
	f, err := r.listFilter(false)
	if err != nil {
		return err
	}
	return g.writeList(w, r, listLinks, &f, g.links)
}

func (g *Gateway) getLinksOfDevice(w http.ResponseWriter, r *request) error {
	f, err := r.deviceFilter()
	if err != nil {
		return err
	}
	e, err := g.one(r, &f, g.links)
	if err != nil {
		return err
	}
	return writeOne(w, r, e)
}

func (g *Gateway) getResources(w http.ResponseWriter, r *request) error {
	f, err := r.listFilter(true)
	if err != nil {
		return err
	}
	return g.writeList(w, r, listResources, &f, g.resources)
}

func (g *Gateway) getResourcesOfDevice(w http.ResponseWriter, r *request) error {
	f, err := r.deviceFilter()
	if err != nil {
		return err
	}
	return g.writeList(w, r, listResources, &f, g.resources)
}

func (g *Gateway) getMetadata(w http.ResponseWriter, r *request) error {
	f, err := r.listFilter(false)
	if err != nil {
		return err
	}
	return g.writeList(w, r, listMetadata, &f, g.metadata)
}

func (g *Gateway) getEvents(w http.ResponseWriter, r *request) error {
	f, err := newFilter(r.query["deviceIdFilter"], nil, r.query["resourceIdFilter"])
	if err != nil {
		return err
	}
	return g.writeEvents(w, r, &f)
}

func (g *Gateway) getEventsOfDevice(w http.ResponseWriter, r *request) error {
	f := deviceOf(r.vars.device)
	return g.writeEvents(w, r, &f)
}

func (g *Gateway) getEventsOfResource(w http.ResponseWriter, r *request) error {
	f := filter{any: true}
	if f.addResource(r.vars.device, string(r.vars.href), nil) != nil {
		f = filter{any: true} // such a device has no events
	}
	return g.writeEvents(w, r, &f)
}

func (g *Gateway) writeEvents(w http.ResponseWriter, r *request, f *filter) error {
	ns, err := r.query.nanos("timestampFilter")
	if err != nil {
		return err
	}
	f.after = sinceNanos(ns)
	return g.writeList(w, r, listEvents, f, g.events)
}

// getResource reads one twin. A read of the device itself (twin=false, or an interface) is a command.
func (g *Gateway) getResource(w http.ResponseWriter, r *request) error {
	if !r.query.flag("twin", true) || r.query.get("resourceInterface") != "" {
		return g.readDevice(w, r)
	}
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil {
		return noResource(r.vars.href)
	}
	f := filter{any: true, resources: map[hub.DeviceID]map[hub.Href][][]byte{id: {r.vars.href: nil}}}
	if f.at, err = r.query.at(); err != nil {
		return err
	}
	for d, err := range g.pictures(r.Context(), r.claims.Owner, &f) {
		if err != nil {
			return err
		}
		link, ok := d.Links.Get(r.vars.href)
		if !ok {
			return noResource(r.vars.href)
		}
		e := g.twin(d, link, nil)
		if e.known {
			res, _ := d.Resources.Get(r.vars.href)
			tag := entityTag(res)
			w.Header().Set("ETag", tag)
			// The two ways of other hubs, and HTTP's own.
			if hasETag(r.query.etags(r.Header.Get("ETag")), res.ETag) || matches(r.Header.Values("If-None-Match"), tag) {
				w.WriteHeader(http.StatusNotModified)
				return nil
			}
		}
		if r.query.flag("onlyContent", false) {
			return writeContent(w, r, e.data.content)
		}
		return writeOne(w, r, e)
	}
	return noResource(r.vars.href)
}

// writeContent answers with a content alone: the message Content in protobuf's JSON, else the decoded value, null when the
// device never reported or reported nothing.
func writeContent(w http.ResponseWriter, r *request, c hub.Content) error {
	if r.proto {
		b, err := appendMessage(nil, contentMessage(c))
		if err != nil {
			return err
		}
		return writeBody(w, r, r.contentType(), append(b, '\n'))
	}
	if r.cbor && isCBOR(mediaType(c)) { // as the device sent it, byte strings and all
		return writeBody(w, r, cborType, c.Data)
	}
	b := []byte("null")
	if len(c.Data) > 0 {
		b = appendContent(nil, c)
	}
	return writeBody(w, r, r.contentType(), append(b, '\n'))
}

func (g *Gateway) deleteAll(w http.ResponseWriter, r *request) error {
	all, err := r.query.strictFlag("all")
	if err != nil {
		return err
	}
	d, err := g.deleteDevices(r.Context(), r.claims, r.query["deviceIdFilter"], all)
	if err != nil {
		return err
	}
	return writeOne(w, r, d)
}

func (g *Gateway) deleteOne(w http.ResponseWriter, r *request) error {
	if _, err := hub.ParseDeviceID(r.vars.device); err != nil {
		return writeOne(w, r, deleted{}) // no device has such a name
	}
	d, err := g.deleteDevices(r.Context(), r.claims, []string{r.vars.device}, false)
	if err != nil {
		return err
	}
	return writeOne(w, r, d)
}

// getConfiguration has a content type of its own in protobuf's JSON, and takes its form from the query too.
func (g *Gateway) getConfiguration(w http.ResponseWriter, r *request) error {
	w.Header().Set("Cache-Control", "no-cache") // it tells the time
	c := g.configuration()
	if r.proto || r.query.get("accept") == "application/protojson" {
		b, err := appendMessage(nil, c.response())
		if err != nil {
			return err
		}
		return writeBody(w, r, "application/protojson", append(b, '\n'))
	}
	return writeBody(w, r, "application/json", append(c.appendJSON(nil, ""), '\n'))
}

func (g *Gateway) getOpenAPI(w http.ResponseWriter, r *request) error {
	return writeTagged(w, r, "application/json", g.openapi)
}

// getRoot answers probes, and people who want to know what this is.
func (g *Gateway) getRoot(w http.ResponseWriter, r *request) error {
	return writeBody(w, r, "application/json",
		[]byte(`{"name":"coaphub","configuration":"/.well-known/hub-configuration","openapi":"/api/v1/openapi.json"}`+"\n"))
}
