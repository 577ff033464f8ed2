package grpcgateway

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sort"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	capb "github.com/coaphub/coaphub/api/gen/certificateauthoritypb"
	dppb "github.com/coaphub/coaphub/api/gen/deviceprovisioningservicepb"
	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	idpb "github.com/coaphub/coaphub/api/gen/identitystorepb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
)

// firstOurs is where our own field numbers begin; below are those that clients know.
const firstOurs = 200

// extensions are our own fields: one number for a name, wherever it occurs.
var extensions = map[string]protoreflect.FieldNumber{
	"resume_token": 200, "include_current_state": 201, "limit": 202, "cursor": 203, "idempotency_key": 204, "all": 205,
	"supersede": 206, "at": 207, "lagged": 208, "search": 210, "sort": 211, "labels": 212, "next_contact": 213,
	"contact_interval": 214, "if_match": 215, "forward_if_match": 216, "async": 217,
	"requested_by": 220, "request_method": 221, "revoked_date": 222, "revocation_reason": 223, "reason": 224,
	"allow": 225, "approval": 226, "named": 227, "has_pre_shared_key": 228, "terms": 229, "accepted_terms": 232, "device_types": 233,
	"terms_version": 234, "terms_accepted_by": 235, "terms_acceptance_date": 236,
	"profile": 230, "hosts": 231,
}

func describe(f protoreflect.FieldDescriptor) string {
	name := func(f protoreflect.FieldDescriptor) string {
		switch f.Kind() {
		case protoreflect.MessageKind:
			return string(f.Message().FullName())
		case protoreflect.EnumKind:
			return string(f.Enum().FullName())
		default:
			return f.Kind().String()
		}
	}
	kind := name(f)
	switch {
	case f.IsMap():
		kind = "map " + name(f.MapValue())
	case f.IsList():
		kind = "repeated " + kind
	}
	return fmt.Sprintf("%d %s %s", f.Number(), f.Name(), kind)
}

// Names, numbers and types are those of the hub whose clients must go on working; testdata/contract.json has them.
func TestMessagesHaveTheNumbersThatClientsKnow(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("testdata/contract.json")
	if err != nil {
		t.Fatal(err)
	}
	var contract map[string][]string
	if err := json.Unmarshal(b, &contract); err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	enum := func(e protoreflect.EnumDescriptor) {
		var vs []string
		for i := range e.Values().Len() {
			v := e.Values().Get(i)
			vs = append(vs, fmt.Sprintf("%d %s", v.Number(), v.Name()))
		}
		got[string(e.FullName())] = vs
	}
	var message func(protoreflect.MessageDescriptor)
	message = func(m protoreflect.MessageDescriptor) {
		if m.IsMapEntry() {
			return
		}
		fields := []string{}
		var byNumber []protoreflect.FieldDescriptor
		for i := range m.Fields().Len() {
			byNumber = append(byNumber, m.Fields().Get(i))
		}
		sort.Slice(byNumber, func(i, j int) bool { return byNumber[i].Number() < byNumber[j].Number() })
		for _, f := range byNumber {
			if f.Number() >= firstOurs {
				want(t, "number of "+string(f.FullName()), f.Number(), extensions[string(f.Name())])
				continue
			}
			if f.JSONName() != lowerCamel(string(f.Name())) {
				t.Errorf("%s has the JSON name %s", f.FullName(), f.JSONName())
			}
			fields = append(fields, describe(f))
		}
		got[string(m.FullName())] = fields
		for i := range m.Messages().Len() {
			message(m.Messages().Get(i))
		}
		for i := range m.Enums().Len() {
			enum(m.Enums().Get(i))
		}
	}
	for _, file := range []protoreflect.FileDescriptor{
		pb.File_grpc_gateway_devices_proto, pb.File_grpc_gateway_resources_proto, pb.File_grpc_gateway_commands_proto,
		pb.File_grpc_gateway_events_proto, pb.File_grpc_gateway_configuration_proto, idpb.File_identity_store_events_proto,
		dppb.File_device_provisioning_service_groups_proto, dppb.File_device_provisioning_service_hubs_proto, dppb.File_device_provisioning_service_records_proto,
		capb.File_certificate_authority_signing_proto, rapb.File_resource_aggregate_events_proto, rapb.File_resource_aggregate_metadata_proto, rapb.File_resource_aggregate_resource_proto,
	} {
		for i := range file.Messages().Len() {
			message(file.Messages().Get(i))
		}
		for i := range file.Enums().Len() {
			enum(file.Enums().Get(i))
		}
	}
	for name, fields := range contract {
		if !slices.Equal(got[name], fields) {
			t.Errorf("%s:\ngot  %v\nwant %v", name, got[name], fields)
		}
	}
	for name := range got {
		if contract[name] == nil {
			t.Errorf("%s is not in the contract", name)
		}
	}
}

func lowerCamel(s string) string {
	parts := strings.Split(s, "_")
	for i, p := range parts[1:] {
		parts[i+1] = strings.ToUpper(p[:1]) + p[1:]
	}
	return strings.Join(parts, "")
}

// Members of a oneof share a place; wire formats do not show it, generated clients do.
func TestOneofsAreThoseThatClientsKnow(t *testing.T) {
	t.Parallel()
	for m, oneof := range map[protoreflect.MessageDescriptor]string{
		(&pb.SubscribeToEvents{}).ProtoReflect().Descriptor():             "action",
		(&pb.Event{}).ProtoReflect().Descriptor():                         "type",
		(&pb.GetEventsResponse{}).ProtoReflect().Descriptor():             "type",
		(&pb.PendingCommand{}).ProtoReflect().Descriptor():                "command",
		(&rapb.DeviceMetadataUpdatePending{}).ProtoReflect().Descriptor(): "update_pending",
	} {
		if o := m.Oneofs().ByName(protoreflect.Name(oneof)); o == nil || o.IsSynthetic() {
			t.Errorf("%s has no oneof %s", m.FullName(), oneof)
		}
	}
}

func TestServiceHasTheCallsThatClientsKnow(t *testing.T) {
	t.Parallel()
	s := pb.File_grpc_gateway_service_proto.Services().ByName("GrpcGateway")
	want(t, "name", s.FullName(), "grpcgateway.pb.GrpcGateway")
	var got []string
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		stream := map[bool]string{true: "stream ", false: ""}
		got = append(got, fmt.Sprintf("%s(%s%s) %s%s", m.Name(), stream[m.IsStreamingClient()], m.Input().Name(), stream[m.IsStreamingServer()], m.Output().Name()))
	}
	slices.Sort(got)
	wantList(t, "calls", got,
		"CancelPendingCommands(CancelPendingCommandsRequest) CancelPendingCommandsResponse",
		"CancelPendingMetadataUpdates(CancelPendingMetadataUpdatesRequest) CancelPendingCommandsResponse",
		"CreateResource(CreateResourceRequest) CreateResourceResponse",
		"DeleteDevices(DeleteDevicesRequest) DeleteDevicesResponse",
		"DeleteResource(DeleteResourceRequest) DeleteResourceResponse",
		"GetDevices(GetDevicesRequest) stream Device",
		"GetDevicesMetadata(GetDevicesMetadataRequest) stream DeviceMetadataUpdated",
		"GetEvents(GetEventsRequest) stream GetEventsResponse",
		"GetHubConfiguration(HubConfigurationRequest) HubConfigurationResponse",
		"GetPendingCommands(GetPendingCommandsRequest) stream PendingCommand",
		"GetResourceFromDevice(GetResourceFromDeviceRequest) GetResourceFromDeviceResponse",
		"GetResourceLinks(GetResourceLinksRequest) stream ResourceLinksPublished",
		"GetResources(GetResourcesRequest) stream Resource",
		"SubscribeToEvents(stream SubscribeToEvents) stream Event",
		"UpdateDeviceMetadata(UpdateDeviceMetadataRequest) UpdateDeviceMetadataResponse",
		"UpdateResource(UpdateResourceRequest) UpdateResourceResponse",
	)
	// Every call but the public one asks for a token; what is no read needs the scope to write.
	for i := range s.Methods().Len() {
		name := string(s.Methods().Get(i).Name())
		full := "/grpcgateway.pb.GrpcGateway/" + name
		want(t, name+" is public", public[full], name == "GetHubConfiguration")
		want(t, name+" is a read", reads[full], strings.HasPrefix(name, "Get") && name != "GetHubConfiguration" || name == "SubscribeToEvents")
	}
}
