package e2e_test

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/crypto/ocsp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/test/device"
)

const apiService = "grpcgateway.pb.GrpcGateway"

// remote is a script's connection to the gRPC door, which it knows by reflection alone.
type remote struct {
	conn  *grpc.ClientConn
	files *protoregistry.Files
}

func (w *world) remote(ctx context.Context) (*remote, error) {
	if w.grpc != nil {
		return w.grpc, nil
	}
	conn, err := grpc.NewClient(w.start().GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	w.grpc = &remote{conn, reflected(ctx, w.t, conn)}
	return w.grpc, nil
}

// callLine calls an rpc of the API and tells its answers, or the error's code and sentence. Of a stream that has no end it tells
// the first answer.
func (w *world) callLine(ctx context.Context, who, rest string) (string, error) {
	name, body, _ := strings.Cut(strings.TrimSpace(rest), " ")
	r, err := w.remote(ctx)
	if err != nil {
		return "", err
	}
	found, err := r.files.FindDescriptorByName(protoreflect.FullName(apiService + "." + name))
	if err != nil {
		return "", err
	}
	method := found.(protoreflect.MethodDescriptor)
	token, err := w.token(ctx, who)
	if err != nil {
		return "", err
	}
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	v, err := w.value(strings.TrimSpace(body))
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	in := dynamicpb.NewMessage(method.Input())
	types := dynamicpb.NewTypes(r.files)
	if err := (protojson.UnmarshalOptions{Resolver: types}).Unmarshal(b, in); err != nil {
		return "", err
	}
	endless := method.IsStreamingClient()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	desc := &grpc.StreamDesc{ServerStreams: method.IsStreamingServer(), ClientStreams: endless}
	stream, err := r.conn.NewStream(ctx, desc, path.Join("/", apiService, name))
	if err != nil {
		return "", err
	}
	if err := stream.SendMsg(in); err != nil && !errors.Is(err, io.EOF) { // the error is what RecvMsg brings
		return "", err
	}
	if !endless {
		if err := stream.CloseSend(); err != nil {
			return "", err
		}
	}
	var parts []string
	for {
		out := dynamicpb.NewMessage(method.Output())
		err := stream.RecvMsg(out)
		if s, ok := grpcstatus.FromError(err); err != nil && !errors.Is(err, io.EOF) {
			if !ok {
				return "", err
			}
			return strings.Join(append(parts, fmt.Sprintf("%s (%s)", s.Code(), w.names(s.Message()))), " "), nil
		}
		if err != nil {
			break
		}
		b, err := (protojson.MarshalOptions{Resolver: types}).Marshal(out)
		if err != nil {
			return "", err
		}
		parts = append(parts, contentWord.ReplaceAllStringFunc(w.answered(b), decoded))
		if endless || !method.IsStreamingServer() {
			break
		}
	}
	reached.Store("rpc "+name, true)
	return strings.Join(append([]string{"OK"}, parts...), " "), nil
}

// streamLine hears the first n messages of GET /api/v1/events/stream.
func (w *world) streamLine(ctx context.Context, who, rest string) (string, error) {
	count, query, _ := strings.Cut(rest, " ")
	n, err := strconv.Atoi(count)
	if err != nil {
		return "", err
	}
	req, err := w.request(ctx, who, http.MethodGet, eventStream+query)
	if err != nil {
		return "", err
	}
	res, err := checked(w.t).Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	parts := []string{strconv.Itoa(res.StatusCode)}
	lines := bufio.NewScanner(res.Body)
	for len(parts) <= n && lines.Scan() {
		if data, ok := strings.CutPrefix(lines.Text(), "data:"); ok {
			parts = append(parts, w.answered([]byte(data)))
		}
	}
	reached.Store("GET "+eventStream, true)
	return strings.Join(parts, " "), lines.Err()
}

const eventStream = "/api/v1/events/stream"

// answered renders an answer of the API, and keeps what later lines name.
func (w *world) answered(b []byte) string {
	for _, m := range correlationWord.FindAllSubmatch(b, -1) {
		w.correlation = string(m[1])
	}
	for _, m := range issuerWord.FindAllSubmatch(b, -1) {
		w.issuer = string(m[1])
	}
	for _, m := range thingWord.FindAllSubmatch(b, -1) {
		w.thing = string(m[1])
	}
	for _, m := range signedWord.FindAllSubmatch(b, -1) {
		w.question = questionAbout(w.t, m[1])
	}
	return w.renderJSON(b)
}

var thingWord = regexp.MustCompile(`"id":\s*"([-0-9a-f]{32,36})"`)

// factory is the manufacturer of the script's devices.
func (w *world) factory() *maker {
	if w.maker == nil {
		w.maker = newMaker(w.t, "maker")
	}
	return w.maker
}

// provision asks one thing at the door for enrolment, with a factory certificate that names the device.
func (w *world) provision(ctx context.Context, d *actor, rest string) (string, error) {
	method, rest, _ := strings.Cut(rest, " ")
	path, body, _ := strings.Cut(rest, " ")
	if d.chain == nil {
		d.chain, d.factoryKey = w.factory().device("uuid:" + d.id)
	}
	n, err := comes(w.t, w.start(), transportOf("tls"), d.chain, d.factoryKey)
	if err != nil {
		return "", err
	}
	defer n.Close()
	q := device.Request{Code: map[string]codes.Code{"GET": codes.GET, "POST": codes.POST}[method], Path: path}
	if body != "" {
		if q.Body, err = w.value(body); err != nil {
			return "", err
		}
	}
	a, err := n.Do(ctx, q)
	if err != nil {
		return "", err
	}
	if a.Body == nil {
		return strings.TrimSpace(codeText(a.Code) + " (" + string(a.Raw) + ")"), nil
	}
	return codeText(a.Code) + " " + w.render("", a.Body), nil
}

var issuerWord = regexp.MustCompile(`"issuerId":\s*"([-0-9a-f]{36})"`)

var signedWord = regexp.MustCompile(`"certificate":\s*"([A-Za-z0-9+/=]+)"`)

// questionAbout is an OCSP request about the first certificate of a chain, which the second one issued.
func questionAbout(t *testing.T, chain []byte) []byte {
	t.Helper()
	rest, err := base64.StdEncoding.AppendDecode(nil, chain)
	if err != nil {
		t.Fatal(err)
	}
	var certs [2]*x509.Certificate
	for i := range certs {
		block, more := pem.Decode(rest)
		if block == nil {
			t.Fatal("the chain has no issuer")
		}
		if certs[i], err = x509.ParseCertificate(block.Bytes); err != nil {
			t.Fatal(err)
		}
		rest = more
	}
	der, err := ocsp.CreateRequest(certs[0], certs[1], nil)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

var correlationWord = regexp.MustCompile(`"correlationId":\s*"([-0-9a-f]{36})"`)

// reached are the operations of the API that scripts have called, and that were carried out: "METHOD template" and "rpc Name".
var reached sync.Map

// wantAllReached reports what no script has called.
func wantAllReached(t *testing.T) {
	t.Helper()
	d, err := description()
	if err != nil {
		t.Fatal(err)
	}
	all := d.Operations()
	for _, m := range pb.GrpcGateway_ServiceDesc.Methods {
		all = append(all, "rpc "+m.MethodName)
	}
	for _, m := range pb.GrpcGateway_ServiceDesc.Streams {
		all = append(all, "rpc "+m.StreamName)
	}
	// Whose answers differ from run to run in more than a script has words for: with the test that calls each.
	elsewhere := map[string]string{
		"GET /api/v1/devices/{deviceId}/connection": "TestOwnersOnboardTheirDevices",
		"POST /api/v1/onboarding":                   "TestOwnersOnboardTheirDevices",
		"GET /api/v1/system":                        "TestSystemOverTheAPI",
		"GET /api/v1/system/parts":                  "TestSystemOverTheAPI",
		"GET /api/v1/system/metrics":                "TestSystemOverTheAPI",
		"GET /api/v1/system/configuration":          "TestSystemOverTheAPI",
	}
	missing := slices.DeleteFunc(all, func(op string) bool { _, ok := reached.Load(op); return ok || elsewhere[op] != "" })
	if len(missing) > 0 {
		t.Errorf("no script calls\n%s", strings.Join(missing, "\n"))
	}
}

// contentWord is the content of a resource as gRPC has it.
var contentWord = regexp.MustCompile(`\{(?:coapContentFormat: \d+, )?contentType: "?application/(?:vnd.ocf\+)?cbor"?, data: [^ ,}]+\}`)

// decoded shows what CBOR says: the order of its members, and so its bytes, differ from run to run.
func decoded(content string) string {
	_, data, _ := strings.Cut(strings.TrimSuffix(content, "}"), "data: ")
	b, err := base64.StdEncoding.DecodeString(strings.Trim(data, `"`))
	if err != nil {
		return content
	}
	var v any
	if err := decodeCBOR(b, &v); err != nil {
		return content
	}
	return "CBOR " + (&world{}).render("", v)
}
