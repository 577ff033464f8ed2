// Package grpcgateway is the applications' door: gRPC and HTTP/JSON over the same calls, with OpenAPI.
//
// It must not know CoAP or stores; protobuf ends here. What it needs of other services it says in directory.go, in hub's
// words.
package grpcgateway
