package grpcgateway

import (
	"encoding/base64"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// query is the parameters of a request under their one name.
type query map[string][]string

// queryNames maps every way to write a parameter, in lower case and without "_", to its name. Others are passed over.
var queryNames = map[string]string{
	"typefilter": "typeFilter", "type": "typeFilter",
	"statusfilter": "statusFilter", "status": "statusFilter",
	"deviceidfilter": "deviceIdFilter", "deviceid": "deviceIdFilter",
	"httpresourceidfilter": "resourceIdFilter", "resourceidfilter": "resourceIdFilter", "resourceid": "resourceIdFilter",
	"timestampfilter": "timestampFilter", "resourceinterface": "resourceInterface", "interface": "resourceInterface",
	"twin": "twin", "onlycontent": "onlyContent", "etag": "etag", "accept": "accept",
	"timetolive": "timeToLive", "force": "force", "async": "async", "supersede": "supersede", "idempotencykey": "idempotencyKey",
	"forwardifmatch": "forwardIfMatch",
	"commandfilter":  "commandFilter", "command": "commandFilter", "includehiddenresources": "includeHiddenResources",
	"correlationidfilter": "correlationIdFilter", "correlationid": "correlationIdFilter",
	"resourceid.deviceid": "resourceId.deviceId", "resourceid.href": "resourceId.href",
	"limit": "limit", "cursor": "cursor", "at": "at", "all": "all", "search": "search", "sort": "sort",
	"eventfilter": "eventFilter", "hreffilter": "hrefFilter", "leadresourcetypefilter": "leadResourceTypeFilter",
	"enrollmentgroupidfilter": "enrollmentGroupIdFilter", "hubidfilter": "hubIdFilter", "statefilter": "stateFilter",
	"attestationmechanismx509certificatenames": "attestationMechanismX509CertificateNames",
	"idfilter": "idFilter", "commonnamefilter": "commonNameFilter", "reason": "reason", "withindays": "withinDays",
	"includecurrentstate": "includeCurrentState", "resumetoken": "resumeToken",
}

// parseQuery reads a query string. One that is malformed is refused as a whole: passing over a filter that cannot be read
// would turn "delete these" into something else.
func parseQuery(raw string) (query, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, hub.NewError(hub.Invalid, "query-invalid", "the query is malformed").With("http.query", err)
	}
	q := query{}
	for _, name := range slices.Sorted(maps.Keys(values)) { // "type=a&typeFilter=b" gives the same list each time
		key := strings.ReplaceAll(strings.ToLower(name), "_", "")
		if known, ok := queryNames[key]; ok {
			q[known] = append(q[known], values[name]...)
		}
	}
	return q, nil
}

func (q query) get(name string) string {
	if v := q[name]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// flag reads a boolean as strconv does; anything else is false, as on other hubs.
func (q query) flag(name string, missing bool) bool {
	v, ok := q[name]
	if !ok {
		return missing
	}
	b, err := strconv.ParseBool(v[0])
	return err == nil && b
}

// strictFlag is for what must not be guessed.
func (q query) strictFlag(name string) (bool, error) {
	v, ok := q[name]
	if !ok {
		return false, nil
	}
	b, err := strconv.ParseBool(v[0])
	if err != nil {
		return false, invalid("query-invalid", name+" is neither true nor false")
	}
	return b, nil
}

// status reads statusFilter, by name or number.
func (q query) status() ([]pb.GetDevicesRequest_Status, error) {
	var out []pb.GetDevicesRequest_Status
	for _, s := range q["statusFilter"] {
		n, known := pb.GetDevicesRequest_Status_value[s]
		if !known {
			i, err := strconv.ParseInt(s, 10, 32)
			if err != nil {
				return nil, invalid("query-invalid", "statusFilter is neither ONLINE nor OFFLINE")
			}
			n = int32(i)
		}
		out = append(out, pb.GetDevicesRequest_Status(n))
	}
	return out, nil
}

// nanos reads a time in Unix nanoseconds, 0 if it is missing.
func (q query) nanos(name string) (int64, error) {
	s := q.get(name)
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0, invalid("query-invalid", name+" is not a number of nanoseconds")
	}
	return n, nil
}

// at reads the time of a time-travel read, as RFC 3339 or Unix nanoseconds.
func (q query) at() (time.Time, error) {
	s := q.get("at")
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 {
		return time.Time{}, invalid("query-invalid", "at is neither an RFC 3339 time nor a number of nanoseconds")
	}
	return time.Unix(0, n), nil
}

func (q query) limit() (uint32, error) {
	s := q.get("limit")
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, invalid("query-invalid", "limit is no number")
	}
	return uint32(n), nil
}

// etags reads the ETags a caller has: the ETag header wins over etag parameters. Bad base64 is passed over.
func (q query) etags(header string) [][]byte {
	values := q["etag"]
	if header != "" {
		values = []string{header}
	}
	var out [][]byte
	for _, v := range values {
		if e, err := base64.StdEncoding.DecodeString(v); err == nil && len(e) > 0 {
			out = append(out, e)
		}
	}
	return out
}
