package hub

import "strings"

// MaxContent is the largest content of a resource in bytes; one byte more is TooLarge.
const MaxContent = 256 << 10

// CoAP Content-Formats that the hub itself reads or writes (IANA CoRE parameters; 10000 is OCF's).
const (
	FormatNone    int32 = -1
	FormatText    int32 = 0
	FormatLink    int32 = 40
	FormatOctets  int32 = 42
	FormatJSON    int32 = 50
	FormatCBOR    int32 = 60
	FormatProblem int32 = 257 // RFC 9290
	FormatOCFCBOR int32 = 10000

	// Of EST over CoAP (RFC 9148, Section 5.3).
	FormatCertsOnly     int32 = 281
	FormatCSRAttributes int32 = 285
	FormatCSR           int32 = 286
	FormatCert          int32 = 287
)

// Content is a representation as the device sent it. Bytes that fail to decode are kept as they are.
type Content struct {
	Type   string // media type, "" when there is no format
	Format int32  // CoAP Content-Format, FormatNone when there is none
	Data   []byte // nobody changes these bytes
}

var mediaTypes = map[int32]string{
	FormatText: "text/plain; charset=utf-8", FormatLink: "application/link-format", 41: "application/xml",
	FormatOctets: "application/octet-stream", 47: "application/exi", FormatJSON: "application/json",
	FormatCBOR: "application/cbor", 110: "application/senml+json", 112: "application/senml+cbor",
	FormatProblem:   "application/concise-problem-details+cbor",
	FormatCertsOnly: "application/pkcs7-mime; smime-type=certs-only", FormatCSRAttributes: "application/csrattrs",
	FormatCSR: "application/pkcs10", FormatCert: "application/pkix-cert",
	11542: "application/vnd.oma.lwm2m+tlv", 11543: "application/vnd.oma.lwm2m+json", FormatOCFCBOR: "application/vnd.ocf+cbor",
}

// MediaType returns the media type of a CoAP Content-Format, or "" if it is unknown or FormatNone.
func MediaType(format int32) string { return mediaTypes[format] }

// Status is how a device answered, with the numbers of the client API (compat: resourceaggregate.pb.Status).
type Status uint8

// The states of an answer.
const (
	StatusUnknown          Status = 0
	StatusOK               Status = 1
	StatusBadRequest       Status = 2
	StatusUnauthorized     Status = 3
	StatusForbidden        Status = 4
	StatusNotFound         Status = 5
	StatusUnavailable      Status = 6
	StatusNotImplemented   Status = 7
	StatusAccepted         Status = 8
	StatusError            Status = 9
	StatusMethodNotAllowed Status = 10
	StatusCreated          Status = 11
	StatusCanceled         Status = 12
	StatusNotModified      Status = 13
)

// FormatOf returns the CoAP Content-Format of a media type, which is in lower case and without parameters; false if there is
// none.
func FormatOf(mediaType string) (int32, bool) {
	for f, t := range mediaTypes {
		if t, _, _ = strings.Cut(t, ";"); t == mediaType {
			return f, true
		}
	}
	return FormatNone, false
}
