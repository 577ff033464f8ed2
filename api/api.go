// Package api holds the description of the HTTP API. The protobuf contract is in proto, the Go code made from it in gen.
//
// It must not know who serves the API.
package api

//go:generate go run -C ../tools ./protogen
//go:generate go test -run ^TestReference$ -count=1 . -update

import (
	_ "embed" // of the description
	"encoding/json"
	"fmt"
	"sync"

	"go.yaml.in/yaml/v3"
)

//go:embed openapi.yaml
var openapi []byte

// JSON returns the OpenAPI 3.1 description of the HTTP API. The bytes are shared by all callers: do not change them.
var JSON = sync.OnceValues(func() ([]byte, error) {
	var doc any
	if err := yaml.Unmarshal(openapi, &doc); err != nil {
		return nil, fmt.Errorf("openapi.yaml: %w", err)
	}
	return json.Marshal(doc)
})
