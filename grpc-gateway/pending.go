package grpcgateway

import (
	"cmp"
	"context"
	"iter"
	"net/http"
	"slices"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// pendingElement is a command that waits: an element of a list, or an event.
type pendingElement struct {
	hub.Command
	hubID string
}

// pendingOf makes a command of its event.
func pendingOf(c *hub.Commit, i int) hub.Command {
	ev := &c.Events[i]
	return hub.Command{
		CommandEvent: *ev.Command, Device: c.Device, ID: ev.Correlation, Href: ev.Href, Content: ev.Content, Types: ev.Types, Seq: c.Seq,
		Index: i, Cause: hub.CauseOf(c, i),
	}
}

// event is the message of the pending event.
func (p pendingElement) event() proto.Message {
	audit, meta := causeMessages(p.Cause, p.hubID)
	id := &rapb.ResourceId{DeviceId: string(p.Device), Href: string(p.Href)}
	switch p.Kind {
	case hub.CommandCreate:
		return &rapb.ResourceCreatePending{
			ResourceId: id, Content: contentMessage(p.Content), AuditContext: audit, EventMetadata: meta, ValidUntil: p.ValidUntil,
			ResourceTypes: p.Types,
		}
	case hub.CommandRetrieve:
		return &rapb.ResourceRetrievePending{
			ResourceId: id, ResourceInterface: p.Interface, AuditContext: audit, EventMetadata: meta, ValidUntil: p.ValidUntil, Etag: p.ETags,
			ResourceTypes: p.Types,
		}
	case hub.CommandUpdate:
		return &rapb.ResourceUpdatePending{
			ResourceId: id, ResourceInterface: p.Interface, Content: contentMessage(p.Content), AuditContext: audit, EventMetadata: meta,
			ValidUntil: p.ValidUntil, ResourceTypes: p.Types,
		}
	case hub.CommandDelete:
		return &rapb.ResourceDeletePending{
			ResourceId: id, AuditContext: audit, EventMetadata: meta, ValidUntil: p.ValidUntil, ResourceInterface: p.Interface,
			ResourceTypes: p.Types,
		}
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	m := &rapb.DeviceMetadataUpdatePending{DeviceId: string(p.Device), AuditContext: audit, EventMetadata: meta, ValidUntil: p.ValidUntil}
	if p.Kind == hub.CommandTwinSync {
		m.UpdatePending = &rapb.DeviceMetadataUpdatePending_TwinForceSynchronization{TwinForceSynchronization: true}
	} else {
		m.UpdatePending = &rapb.DeviceMetadataUpdatePending_TwinEnabled{TwinEnabled: p.Kind == hub.CommandTwinOn}
	}
	return m
}

// name is the member that holds the event, in lists and in the history.
func (p pendingElement) name() string {
	switch p.Kind {
	case hub.CommandCreate:
		return "resourceCreatePending"
	case hub.CommandRetrieve:
		return "resourceRetrievePending"
	case hub.CommandUpdate:
		return "resourceUpdatePending"
	case hub.CommandDelete:
		return "resourceDeletePending"
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	return "deviceMetadataUpdatePending"
}

func (p pendingElement) appendEvent(b []byte) []byte {
	b = append(b, '{')
	if p.Kind.OfTwin() {
		b = appendText(b, "deviceId", string(p.Device))
		if p.Kind == hub.CommandTwinSync {
			b = appendBool(b, "twinForceSynchronization", true)
		} else {
			b = appendBool(b, "twinEnabled", p.Kind == hub.CommandTwinOn)
		}
	} else {
		b = appendText(append(appendName(b, "resourceId"), '{'), "deviceId", string(p.Device))
		b = append(appendText(b, "href", string(p.Href)), '}')
		if p.Kind != hub.CommandCreate {
			b = appendText(b, "resourceInterface", p.Interface)
		}
		if p.Kind == hub.CommandCreate || p.Kind == hub.CommandUpdate {
			b = appendContent(appendName(b, "content"), p.Content)
		}
		if len(p.ETags) > 0 {
			b = append(appendName(b, "etag"), '[')
			for i, e := range p.ETags {
				if i > 0 {
					b = append(b, ',')
				}
				b = appendBase64(b, e)
			}
			b = append(b, ']')
		}
	}
	b = appendCause(b, p.Cause, p.hubID)
	b = appendInt(b, "validUntil", p.ValidUntil)
	return append(appendTexts(b, "resourceTypes", p.Types), '}')
}

func (p pendingElement) message(cursor string) proto.Message {
	m := &pb.PendingCommand{Cursor: optional(cursor)}
	switch e := p.event().(type) {
	case *rapb.ResourceCreatePending:
		m.Command = &pb.PendingCommand_ResourceCreatePending{ResourceCreatePending: e}
	case *rapb.ResourceRetrievePending:
		m.Command = &pb.PendingCommand_ResourceRetrievePending{ResourceRetrievePending: e}
	case *rapb.ResourceUpdatePending:
		m.Command = &pb.PendingCommand_ResourceUpdatePending{ResourceUpdatePending: e}
	case *rapb.ResourceDeletePending:
		m.Command = &pb.PendingCommand_ResourceDeletePending{ResourceDeletePending: e}
	case *rapb.DeviceMetadataUpdatePending:
		m.Command = &pb.PendingCommand_DeviceMetadataUpdatePending{DeviceMetadataUpdatePending: e}
	}
	return m
}

func (p pendingElement) appendJSON(b []byte, cursor string) []byte {
	b = p.appendEvent(appendName(append(b, '{'), p.name()))
	return append(appendText(b, "cursor", cursor), '}')
}

// kindOf is a command's kind in the API.
func kindOf(k hub.CommandKind) pb.GetPendingCommandsRequest_Command {
	switch k {
	case hub.CommandCreate:
		return pb.GetPendingCommandsRequest_RESOURCE_CREATE
	case hub.CommandRetrieve:
		return pb.GetPendingCommandsRequest_RESOURCE_RETRIEVE
	case hub.CommandUpdate:
		return pb.GetPendingCommandsRequest_RESOURCE_UPDATE
	case hub.CommandDelete:
		return pb.GetPendingCommandsRequest_RESOURCE_DELETE
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	return pb.GetPendingCommandsRequest_DEVICE_METADATA_UPDATE
}

// pendingFilter is what of the commands that wait is asked for.
type pendingFilter struct {
	kinds  []pb.GetPendingCommandsRequest_Command // empty: all
	hidden bool                                   // also those of resources that are not published
	id     string                                 // "": all
}

// wantsCommand reports whether a command is wanted. Those of the twin belong to no resource, so a filter for resources or types
// leaves them out.
func (f *filter) wantsCommand(d *hub.Device, c *hub.Command, now int64) bool {
	p := &f.pending
	switch {
	case c.ValidUntil <= now, p.id != "" && p.id != c.ID, len(p.kinds) > 0 && !slices.Contains(p.kinds, kindOf(c.Kind)):
		return false
	case c.Kind.OfTwin():
		return len(f.types) == 0 && len(f.resources) == 0
	case !f.wantsTypes(c.Types):
		return false
	}
	if _, ok := f.wants(d.ID, c.Href); !ok {
		return false
	}
	if p.hidden {
		return true
	}
	_, published := d.Links.Get(c.Href)
	return published
}

// pendings lists the commands that wait, device by device, each in its order.
func (g *Gateway) pendings(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	now := time.Now().UnixNano()
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		for i := range d.Commands {
			c := &d.Commands[i]
			at := place{device: d.ID, seq: c.Seq, index: uint32(c.Index)}
			if d.ID == f.from.device && cmp.Or(cmp.Compare(at.seq, f.from.seq), cmp.Compare(at.index, f.from.index)) <= 0 || !f.wantsCommand(d, c, now) {
				continue
			}
			if !yield(found{pendingElement{*c, g.deps.HubID}, at}) {
				return false
			}
		}
		return true
	})
}

// cancel ends commands and returns their IDs.
func (g *Gateway) cancel(ctx context.Context, c hub.Claims, device string, pick hub.CommandPick, from string) (cancelled, error) {
	id, err := hub.ParseDeviceID(device)
	switch {
	case device == "":
		return cancelled{}, invalid("device-id-missing", "the request names no device")
	case err != nil:
		return cancelled{}, errNotYours
	case len(pick.IDs) > maxFilter:
		return cancelled{}, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	case slices.Contains(pick.IDs, ""): // a client that lost its variable must not cancel everything
		return cancelled{}, invalid("filter-empty", "a correlation ID is empty")
	}
	ids, err := g.deps.Directory.CancelCommands(ctx, c.Owner, id, pick, c.Subject, from)
	return cancelled{ids}, err
}

// cancelled are the correlation IDs of what was cancelled.
type cancelled struct{ ids []string }

func (c cancelled) response() *pb.CancelPendingCommandsResponse {
	return &pb.CancelPendingCommandsResponse{CorrelationIds: c.ids}
}

func (c cancelled) message(string) proto.Message { return c.response() }

func (c cancelled) appendJSON(b []byte, _ string) []byte {
	return append(appendTexts(append(b, '{'), "correlationIds", c.ids), '}')
}

func (s *server) GetPendingCommands(r *pb.GetPendingCommandsRequest, out grpc.ServerStreamingServer[pb.PendingCommand]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), r.GetResourceIdFilter(), r.GetHttpResourceIdFilter()) //nolint:staticcheck // old clients use it
	if err != nil {
		return err
	}
	f.types = r.GetTypeFilter()
	f.pending = pendingFilter{kinds: r.GetCommandFilter(), hidden: r.GetIncludeHiddenResources()}
	return sendList(s.g, listPending, out, f, r, s.g.pendings)
}

func (s *server) CancelPendingCommands(ctx context.Context, r *pb.CancelPendingCommandsRequest) (*pb.CancelPendingCommandsResponse, error) {
	href, err := hub.ParseHref(r.GetResourceId().GetHref())
	if err != nil {
		return nil, err
	}
	pick := hub.CommandPick{Href: href, IDs: r.GetCorrelationIdFilter()}
	c, err := s.g.cancel(ctx, claimsOf(ctx), r.GetResourceId().GetDeviceId(), pick, caller(ctx))
	if err != nil {
		return nil, err
	}
	return c.response(), nil
}

func (s *server) CancelPendingMetadataUpdates(ctx context.Context, r *pb.CancelPendingMetadataUpdatesRequest) (*pb.CancelPendingCommandsResponse, error) {
	pick := hub.CommandPick{Twin: true, IDs: r.GetCorrelationIdFilter()}
	c, err := s.g.cancel(ctx, claimsOf(ctx), r.GetDeviceId(), pick, caller(ctx))
	if err != nil {
		return nil, err
	}
	return c.response(), nil
}

// commandKinds reads commandFilter, by name or number.
func (q query) commandKinds() ([]pb.GetPendingCommandsRequest_Command, error) {
	var out []pb.GetPendingCommandsRequest_Command
	for _, s := range q["commandFilter"] {
		n, known := pb.GetPendingCommandsRequest_Command_value[s]
		if !known {
			i, err := strconv.ParseInt(s, 10, 32)
			if err != nil {
				return nil, invalid("query-invalid", "commandFilter is no kind of command")
			}
			n = int32(i)
		}
		out = append(out, pb.GetPendingCommandsRequest_Command(n))
	}
	return out, nil
}

func (g *Gateway) writePending(w http.ResponseWriter, r *request, f filter, err error) error {
	if err != nil {
		return err
	}
	f.pending.hidden = f.pending.hidden || r.query.flag("includeHiddenResources", false)
	return g.writeList(w, r, listPending, &f, g.pendings)
}

func (g *Gateway) getPending(w http.ResponseWriter, r *request) error {
	f, err := newFilter(r.query["deviceIdFilter"], nil, r.query["resourceIdFilter"])
	if err != nil {
		return err
	}
	f.types = r.query["typeFilter"]
	f.pending.kinds, err = r.query.commandKinds()
	return g.writePending(w, r, f, err)
}

// resourceKinds are the kinds that the routes below one device know; that of the twin has a route of its own, and is passed over
// here as on other hubs.
func (r *request) resourceKinds() ([]pb.GetPendingCommandsRequest_Command, error) {
	kinds, err := r.query.commandKinds()
	kinds = slices.DeleteFunc(kinds, func(k pb.GetPendingCommandsRequest_Command) bool {
		return k == pb.GetPendingCommandsRequest_DEVICE_METADATA_UPDATE
	})
	if len(kinds) == 0 {
		kinds = []pb.GetPendingCommandsRequest_Command{
			pb.GetPendingCommandsRequest_RESOURCE_CREATE, pb.GetPendingCommandsRequest_RESOURCE_RETRIEVE,
			pb.GetPendingCommandsRequest_RESOURCE_UPDATE, pb.GetPendingCommandsRequest_RESOURCE_DELETE,
		}
	}
	return kinds, err
}

func (g *Gateway) getPendingOfDevice(w http.ResponseWriter, r *request) error {
	f := deviceOf(r.vars.device)
	f.types = r.query["typeFilter"]
	var err error
	f.pending.kinds, err = r.resourceKinds()
	return g.writePending(w, r, f, err)
}

func (g *Gateway) getPendingOfResource(w http.ResponseWriter, r *request) error {
	f := filter{any: true}
	if f.addResource(r.vars.device, string(r.vars.href), nil) != nil {
		f = filter{any: true} // such a device has no commands
	}
	f.pending.id, f.pending.hidden = r.vars.correlation, true // whoever names the resource means it
	var err error
	f.pending.kinds, err = r.resourceKinds()
	return g.writePending(w, r, f, err)
}

func (g *Gateway) getPendingMetadata(w http.ResponseWriter, r *request) error {
	f := deviceOf(r.vars.device)
	f.pending.kinds = []pb.GetPendingCommandsRequest_Command{pb.GetPendingCommandsRequest_DEVICE_METADATA_UPDATE}
	return g.writePending(w, r, f, nil)
}

// correlations are the IDs that a cancellation names: that of the path, else those of the query.
func (r *request) correlations() []string {
	if r.vars.correlation != "" {
		return []string{r.vars.correlation}
	}
	return r.query["correlationIdFilter"]
}

func (g *Gateway) writeCancelled(w http.ResponseWriter, r *request, device string, pick hub.CommandPick) error {
	c, err := g.cancel(r.Context(), r.claims, device, pick, r.RemoteAddr)
	if err != nil {
		return err
	}
	return writeOne(w, r, c)
}

func (g *Gateway) cancelPending(w http.ResponseWriter, r *request) error {
	href, err := hub.ParseHref(r.query.get("resourceId.href"))
	if err != nil {
		return err
	}
	return g.writeCancelled(w, r, r.query.get("resourceId.deviceId"), hub.CommandPick{Href: href, IDs: r.correlations()})
}

func (g *Gateway) cancelPendingOfResource(w http.ResponseWriter, r *request) error {
	return g.writeCancelled(w, r, r.vars.device, hub.CommandPick{Href: r.vars.href, IDs: r.correlations()})
}

func (g *Gateway) cancelPendingMetadata(w http.ResponseWriter, r *request) error {
	return g.writeCancelled(w, r, r.vars.device, hub.CommandPick{Twin: true, IDs: r.correlations()})
}
