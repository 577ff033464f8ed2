// Package coapgateway is the devices' door: sessions over CoAP with sign-up, sign-in, sign-out, sign-off and token refresh,
// publishing, discovery and the observation of devices' resources.
//
// It must not know protobuf, HTTP or stores; what it needs of other services it says in directory.go, in hub's words.
package coapgateway
