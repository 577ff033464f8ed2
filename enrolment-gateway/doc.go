// Package enrolmentgateway is the door for devices that have no identity of this hub yet, or want another certificate: EST over
// HTTPS (RFC 7030) and over CoAP (RFC 9148), SCEP over HTTPS (RFC 8894), one-time tokens, and plgd's device provisioning. It
// carries; whether a device gets what it asks for, and under which name, is the certificate authority's to decide.
//
// It must not know protobuf, stores or tokens of applications.
package enrolmentgateway
