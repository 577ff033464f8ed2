package grpcgateway

import (
	"encoding/base64"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// listFilter reads the filters of the lists over all devices.
func (r *request) listFilter() (filter, error) {
	f, err := newFilter(r.query["deviceIdFilter"], nil, r.query["resourceIdFilter"])
	if err != nil {
		return f, err
	}
	f.types = r.query["typeFilter"]
	f.at, err = r.query.at()
	return f, err
}

// deviceFilter is for the routes below one device; filters in the query other than the type are not theirs.
func (r *request) deviceFilter() (filter, error) {
	f, _ := newFilter([]string{r.vars.device}, nil, nil)
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
	f, err := r.listFilter()
	if err != nil {
		return err
	}
	status, err := r.query.status()
	if err != nil {
		return err
	}
	f.setStatus(status)
	f.resources = nil // this call has no such filter
	f.any = len(r.query["deviceIdFilter"]) > 0
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
	f, err := newFilter(r.query["deviceIdFilter"], nil, nil)
	if err != nil {
		return err
	}
	f.types = r.query["typeFilter"]
	if f.at, err = r.query.at(); err != nil {
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
	f, err := r.listFilter()
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
	f, err := newFilter(r.query["deviceIdFilter"], nil, nil)
	if err != nil {
		return err
	}
	f.types = r.query["typeFilter"]
	if f.at, err = r.query.at(); err != nil {
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
	f, _ := newFilter([]string{r.vars.device}, nil, nil)
	return g.writeEvents(w, r, &f)
}

func (g *Gateway) getEventsOfResource(w http.ResponseWriter, r *request) error {
	f := filter{any: true}
	f.addResource(r.vars.device, string(r.vars.href), nil)
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
		return errNotFound
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
			return errNotFound
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
	return errNotFound
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
	b := []byte("null")
	if len(c.Data) > 0 {
		b = appendContent(nil, c)
	}
	return writeBody(w, r, r.contentType(), append(b, '\n'))
}

// entityTag is the ETag of answers that show a twin: the device's, or if it gave none the commit that brought it, marked
// with an @, which no base64 has. It is weak, since there are several forms of the same state (RFC 9110, Section 8.8.1).
func entityTag(res *hub.Resource) string {
	if len(res.ETag) > 0 {
		return `W/"` + base64.StdEncoding.EncodeToString(res.ETag) + `"`
	}
	return `W/"@` + strconv.FormatUint(res.Seq, 10) + `"`
}

// matches compares weakly (RFC 9110, Section 13.1.2).
func matches(ifNoneMatch []string, tag string) bool {
	tag = strings.TrimPrefix(tag, "W/")
	return slices.ContainsFunc(ifNoneMatch, func(h string) bool {
		for part := range strings.SplitSeq(h, ",") { // our tags have no comma in them
			part = strings.TrimSpace(part)
			if part == "*" || strings.TrimPrefix(part, "W/") == tag {
				return true
			}
		}
		return false
	})
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
	return writeBody(w, r, "application/json", g.openapi)
}

// getRoot answers probes, and people who want to know what this is.
func (g *Gateway) getRoot(w http.ResponseWriter, r *request) error {
	return writeBody(w, r, "application/json",
		[]byte(`{"name":"coaphub","configuration":"/.well-known/hub-configuration","openapi":"/api/v1/openapi.json"}`+"\n"))
}
