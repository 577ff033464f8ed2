package grpcgateway

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// vars are what a path names.
type vars struct {
	device string // as it stands, perhaps no UUID: such a device is not found, as on other hubs
	href   hub.Href
	// correlation is the ID of one command.
	correlation string
	name        string // of an account, or ID of a group
	issuer      string // of certificates
	question    string // about certificates, base64
}

// named finds the template of a path that names something other than a device's resource, "" if there is none.
func named(path string) (template string, v vars) {
	for _, n := range []struct {
		prefix, variable string
		value            *string
	}{
		{"/api/v1/things/", "{deviceId}", &v.device},
		{"/api/v1/accounts/", "{name}", &v.name},
		{"/certificate-authority/api/v1/signing/crl/", "{issuerId}", &v.issuer},
		{"/device-provisioning-service/api/v1/enrollment-groups/", "{id}", &v.name},
		{"/api/v1/enrollment-groups/", "{id}", &v.name},
	} {
		rest, ok := strings.CutPrefix(path, n.prefix)
		if !ok {
			continue
		}
		name, below, more := strings.Cut(rest, "/")
		template = n.prefix + n.variable
		if more {
			template += "/" + below
		}
		var err error
		if *n.value, err = url.PathUnescape(name); err == nil && name != "" && routes[template] != nil && !strings.Contains(below, "{") {
			return template, v
		}
	}
	return "", vars{}
}

// split finds the template of an escaped path, "" if there is none. It is our own, since hrefs stand in the middle of paths
// and may hold slashes, dots and whatever else: net/http's mux neither matches nor leaves them alone.
//
// Everything behind resources/ or resource-links/ is the href, except for a last segment "events" or "pending-commands"
// (also the last but one): a resource of such a name is reached by escaping the slash before it (%2F), which makes it one
// segment here.
func split(path string) (template string, v vars, err error) {
	if question, ok := questionIn(path); ok { // first: its last character may be a slash
		return ocspPath + "/{request}", vars{question: question}, nil
	}
	path = strings.TrimRight(path, "/")
	const devices = "/api/v1/devices"
	rest, ok := strings.CutPrefix(path, devices+"/")
	if !ok {
		if path == "" {
			path = "/"
		}
		if routes[path] == nil || strings.Contains(path, "{") {
			template, v = named(path)
			return template, v, nil
		}
		return path, v, nil
	}
	device, rest, more := strings.Cut(rest, "/")
	if v.device, err = url.PathUnescape(device); err != nil || device == "" {
		return "", v, nil
	}
	template = devices + "/{deviceId}"
	if !more {
		return template, v, nil
	}
	kind, rest, more := strings.Cut(rest, "/")
	template += "/" + kind
	switch kind {
	case "access", "connection", "labels", "metadata", "pre-shared-key", "quarantine", "pending-commands", "pending-metadata-updates", "events":
		if more && kind == "pending-metadata-updates" && !strings.Contains(rest, "/") {
			v.correlation, err = url.PathUnescape(rest)
			if err != nil || rest == "" {
				return "", v, nil
			}
			return template + "/{correlationId}", v, nil
		}
		if more {
			return "", v, nil
		}
		return template, v, nil
	case "resources", "resource-links":
	default:
		return "", v, nil
	}
	if !more {
		return template, v, nil
	}
	template += "/{href}"
	if kind == "resources" {
		if href, last, ok := cutLast(rest); ok {
			switch before, middle, _ := cutLast(href); {
			case last == "events", last == "pending-commands":
				template, rest = template+"/"+last, href
			case middle == "pending-commands" && before != "":
				if v.correlation, err = url.PathUnescape(last); err != nil {
					return "", v, nil
				}
				template, rest = template+"/pending-commands/{correlationId}", before
			}
		}
	}
	// The path was cut in its escaped form; from here on an encoded slash is a slash. Runs of slashes, encoded or not, are
	// one: other hubs redirect to that path, we answer at once.
	raw, err := url.PathUnescape(rest)
	if err == nil {
		v.href, err = hub.ParseHref(raw)
	}
	if err != nil {
		return template, v, hub.NewError(hub.Invalid, "href-invalid", "the path names no resource").With("http.split", err)
	}
	return template, v, nil
}

// ofAPI reports whether a path is the API's, also one that is not there: nothing below it goes to Deps.Pages.
func ofAPI(path string) bool {
	return strings.HasPrefix(path, "/api/") || strings.HasPrefix(path, "/certificate-authority/api/") ||
		strings.HasPrefix(path, "/device-provisioning-service/api/")
}

func cutLast(s string) (before, last string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i <= 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

// operation is what a route does for one method.
type operation struct {
	id    string // operationId of the OpenAPI description and label of metrics
	scope string // "" = public
	serve func(*Gateway, http.ResponseWriter, *request) error
	// stream: it goes on for as long as the caller listens, so no time limit of a request applies.
	stream bool
}

// routes are all paths of the API.
var routes map[string]map[string]operation

func init() { // not a literal: split reads what it leads to
	read := func(id string, serve func(*Gateway, http.ResponseWriter, *request) error) operation {
		return operation{id: id, scope: hub.ScopeRead, serve: serve}
	}
	admin := func(id string, serve func(*Gateway, http.ResponseWriter, *request) error) operation {
		return operation{id: id, scope: hub.ScopeAdmin, serve: serve}
	}
	write := func(id string, serve func(*Gateway, http.ResponseWriter, *request) error) operation {
		return operation{id: id, scope: hub.ScopeWrite, serve: serve}
	}
	stream := func(id string, serve func(*Gateway, http.ResponseWriter, *request) error) operation {
		return operation{id: id, scope: hub.ScopeRead, serve: serve, stream: true}
	}
	open := func(id string, serve func(*Gateway, http.ResponseWriter, *request) error) operation {
		return operation{id: id, serve: serve}
	}
	const device = "/api/v1/devices/{deviceId}"
	type methods = map[string]operation
	routes = map[string]methods{
		"/":                              {"GET": open("root", (*Gateway).getRoot)},
		"/.well-known/configuration":     {"GET": open("getConfiguration", (*Gateway).getConfiguration)},
		"/.well-known/hub-configuration": {"GET": open("getHubConfiguration", (*Gateway).getConfiguration)},
		"/web_configuration.json":        {"GET": open("getWebConfiguration", (*Gateway).getWebConfiguration)},
		"/api/v1/openapi.json":           {"GET": open("getOpenAPI", (*Gateway).getOpenAPI)},
		"/api/v1/docs":                   {"GET": open("getDocs", docsFile("index.html"))},
		"/api/v1/docs/docs.js":           {"GET": open("getDocsScript", docsFile("docs.js"))},
		"/api/v1/docs/docs.css":          {"GET": open("getDocsStyle", docsFile("docs.css"))},

		"/api/v1/audit":                    {"GET": admin("getAudit", (*Gateway).getAudit)},
		"/api/v1/refusals":                 {"GET": read("getRefusals", (*Gateway).getRefusals)},
		"/api/v1/accounts":                 {"GET": admin("getAccounts", (*Gateway).getAccounts), "POST": admin("addAccount", (*Gateway).addAccount)},
		"/api/v1/accounts/{name}/password": {"PUT": admin("putPassword", (*Gateway).putPassword)},
		"/api/v1/accounts/{name}/roles":    {"PUT": admin("putRoles", (*Gateway).putRoles)},

		"/api/v1/system":               {"GET": admin("getSystem", (*Gateway).getSystem)},
		"/api/v1/system/parts":         {"GET": admin("getSystemParts", (*Gateway).getSystemParts)},
		"/api/v1/system/metrics":       {"GET": admin("getSystemMetrics", (*Gateway).getSystemMetrics)},
		"/api/v1/system/configuration": {"GET": admin("getSystemConfiguration", (*Gateway).getSystemConfiguration)},

		"/api/v1/onboarding":     {"POST": write("onboard", (*Gateway).onboard)},
		"/api/v1/devices-counts": {"GET": read("getDevicesCounts", (*Gateway).getDevicesCounts)},

		"/api/v1/things":            {"GET": read("getThings", (*Gateway).getThings)},
		"/api/v1/things/{deviceId}": {"GET": read("getThing", (*Gateway).getThing)},

		"/api/v1/devices": {"GET": read("getDevices", (*Gateway).getDevices), "DELETE": write("deleteDevices", (*Gateway).deleteAll)},
		device:            {"GET": read("getDevice", (*Gateway).getDevice), "DELETE": write("deleteDevice", (*Gateway).deleteOne)},
		device + "/pre-shared-key": {
			"GET": read("getPreSharedKey", (*Gateway).getPreSharedKey), "POST": write("newPreSharedKey", (*Gateway).newPreSharedKey),
			"DELETE": write("deletePreSharedKey", (*Gateway).deletePreSharedKey),
		},
		device + "/connection": {"GET": read("getDeviceConnection", (*Gateway).getConnection)},
		device + "/access":     {"GET": read("getDeviceAccess", (*Gateway).getAccess), "PUT": write("putDeviceAccess", (*Gateway).putAccess)},
		device + "/quarantine": {"GET": read("getQuarantine", (*Gateway).getQuarantine)},
		device + "/labels": {
			"GET": read("getLabels", (*Gateway).getLabels), "PUT": write("putLabels", (*Gateway).putLabels),
			"PATCH": write("patchLabels", (*Gateway).patchLabels),
		},
		"/api/v1/resource-links":            {"GET": read("getResourceLinks", (*Gateway).getLinks)},
		device + "/resource-links":          {"GET": read("getResourceLinksOfDevice", (*Gateway).getLinksOfDevice)},
		"/api/v1/resources":                 {"GET": read("getResources", (*Gateway).getResources)},
		device + "/resources":               {"GET": read("getResourcesOfDevice", (*Gateway).getResourcesOfDevice)},
		"/api/v1/devices-metadata":          {"GET": read("getDevicesMetadata", (*Gateway).getMetadata)},
		"/api/v1/events":                    {"GET": read("getEvents", (*Gateway).getEvents)},
		device + "/events":                  {"GET": read("getEventsOfDevice", (*Gateway).getEventsOfDevice)},
		device + "/resources/{href}/events": {"GET": read("getEventsOfResource", (*Gateway).getEventsOfResource)},
		device + "/resources/{href}": {
			"GET": read("getResource", (*Gateway).getResource), "PUT": write("updateResource", (*Gateway).updateResource),
		},

		device + "/resource-links/{href}": {
			"POST": write("createResource", (*Gateway).createResource), "DELETE": write("deleteResource", (*Gateway).deleteResource),
		},
		device + "/metadata": {"PUT": write("updateDeviceMetadata", (*Gateway).updateMetadata)},
		"/api/v1/pending-commands": {
			"GET": read("getPendingCommands", (*Gateway).getPending), "DELETE": write("cancelPendingCommands", (*Gateway).cancelPending),
		},
		device + "/pending-commands": {"GET": read("getPendingCommandsOfDevice", (*Gateway).getPendingOfDevice)},
		device + "/pending-metadata-updates": {
			"GET":    read("getPendingMetadataUpdates", (*Gateway).getPendingMetadata),
			"DELETE": write("cancelPendingMetadataUpdates", (*Gateway).cancelPendingMetadata),
		},
		device + "/pending-metadata-updates/{correlationId}": {
			"DELETE": write("cancelPendingMetadataUpdate", (*Gateway).cancelPendingMetadata),
		},
		device + "/resources/{href}/pending-commands": {
			"GET":    read("getPendingCommandsOfResource", (*Gateway).getPendingOfResource),
			"DELETE": write("cancelPendingCommandsOfResource", (*Gateway).cancelPendingOfResource),
		},
		device + "/resources/{href}/pending-commands/{correlationId}": {
			"GET":    read("getPendingCommand", (*Gateway).getPendingOfResource),
			"DELETE": write("cancelPendingCommand", (*Gateway).cancelPendingOfResource),
		},

		// Other hubs have the authority's calls at two paths, the second for clients from before it was a service of its own.
		"/certificate-authority/api/v1/sign/identity-csr": {"POST": write("signIdentityCertificate", (*Gateway).signIdentity)},
		"/api/v1/sign/identity-csr":                       {"POST": write("signIdentityCertificateOld", (*Gateway).signIdentity)},
		"/certificate-authority/api/v1/sign/csr":          {"POST": write("signCertificate", (*Gateway).signCertificate)},
		"/api/v1/sign/csr":                                {"POST": write("signCertificateOld", (*Gateway).signCertificate)},
		"/certificate-authority/api/v1/signing/records": {
			"GET": read("getSigningRecords", (*Gateway).getCertificates), "DELETE": write("deleteSigningRecords", (*Gateway).revokeCertificates),
		},
		"/api/v1/signing/records": {
			"GET": read("getSigningRecordsOld", (*Gateway).getCertificates), "DELETE": write("deleteSigningRecordsOld", (*Gateway).revokeCertificates),
		},
		"/certificate-authority/api/v1/signing/report":         {"GET": read("getCertificateReport", (*Gateway).getCertificateReport)},
		"/certificate-authority/api/v1/signing/crl/{issuerId}": {"GET": open("getRevocationList", (*Gateway).getRevocationList)},
		ocspPath:                {"POST": open("askCertificateStatus", (*Gateway).postStatus)},
		ocspPath + "/{request}": {"GET": open("getCertificateStatus", (*Gateway).getStatus)},

		// Of other hubs' device provisioning there are two paths each, the second without the service's name.
		"/device-provisioning-service/api/v1/provisioning-records": {
			"GET":    read("getProvisioningRecords", (*Gateway).getProvisioningRecords),
			"DELETE": write("deleteProvisioningRecords", (*Gateway).deleteProvisioningRecords),
		},
		"/api/v1/provisioning-records": {
			"GET":    read("getProvisioningRecordsShort", (*Gateway).getProvisioningRecords),
			"DELETE": write("deleteProvisioningRecordsShort", (*Gateway).deleteProvisioningRecords),
		},
		"/device-provisioning-service/api/v1/enrollment-groups": {
			"GET":    read("getEnrollmentGroups", (*Gateway).getEnrollmentGroups),
			"POST":   admin("createEnrollmentGroup", (*Gateway).createEnrollmentGroup),
			"DELETE": write("deleteEnrollmentGroups", (*Gateway).deleteEnrollmentGroups),
		},
		"/api/v1/enrollment-groups": {
			"GET":    read("getEnrollmentGroupsShort", (*Gateway).getEnrollmentGroups),
			"POST":   admin("createEnrollmentGroupShort", (*Gateway).createEnrollmentGroup),
			"DELETE": write("deleteEnrollmentGroupsShort", (*Gateway).deleteEnrollmentGroups),
		},
		"/device-provisioning-service/api/v1/enrollment-groups/{id}": {"PUT": admin("updateEnrollmentGroup", (*Gateway).updateEnrollmentGroup)},
		"/api/v1/enrollment-groups/{id}":                             {"PUT": admin("updateEnrollmentGroupShort", (*Gateway).updateEnrollmentGroup)},
		"/device-provisioning-service/api/v1/hubs":                   {"GET": read("getHubs", (*Gateway).getHubs)},
		"/api/v1/hubs":                 {"GET": read("getHubsShort", (*Gateway).getHubs)},
		"/api/v1/enrolments":           {"GET": read("getEnrolments", (*Gateway).getEnrolments)},
		"/api/v1/enrolments/decisions": {"POST": write("decideEnrolments", (*Gateway).decideEnrolments)},
		"/api/v1/enrolments/terms":     {"POST": write("acceptTerms", (*Gateway).acceptTerms)},
		"/api/v1/enrolment-tokens": {
			"GET":    read("getEnrolmentTokens", (*Gateway).getEnrolmentTokens),
			"POST":   write("createEnrolmentToken", (*Gateway).createEnrolmentToken),
			"DELETE": write("deleteEnrolmentTokens", (*Gateway).deleteEnrolmentTokens),
		},

		"/api/v1/ws/events":     {"GET": stream("subscribeWebSocket", (*Gateway).subscribeWebSocket)},
		"/api/v1/events/stream": {"GET": stream("subscribeEvents", (*Gateway).subscribeSSE)},
	}
}
