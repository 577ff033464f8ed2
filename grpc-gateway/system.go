package grpcgateway

import (
	"context"
	"net/http"
	"time"

	"github.com/coaphub/coaphub/internal/obs"
)

// SystemStatus is how the hub is. What is of its machine alone is not in it.
type SystemStatus struct {
	HubID     string    `json:"hubId"`
	Version   string    `json:"version"`
	Build     obs.Build `json:"build"`
	Started   time.Time `json:"started"`
	Endpoints Endpoints `json:"endpoints"`
	Issuer    string    `json:"issuer,omitempty"` // of the embedded provider's tokens
	Devices   int       `json:"devices"`
	Online    int       `json:"online"`
	Feed      Feed      `json:"feed"`
	// NotReady says what keeps the hub from serving; empty when it serves.
	NotReady map[string]string `json:"notReady,omitempty"`
	// ReadOnly says why writes are refused while reads go on; empty when they are not.
	ReadOnly string `json:"readOnly,omitempty"`
}

// Feed is the newest place in the feed of all devices.
type Feed struct {
	LogID string `json:"logId"`
	Day   uint32 `json:"day"`
	N     uint64 `json:"n"`
}

// Part is an instance of a part of the hub.
type Part struct {
	Target   string    `json:"target"`
	Name     string    `json:"name"`     // of its process, for people
	Instance string    `json:"instance"` // of this run of it
	Version  string    `json:"version"`
	Started  time.Time `json:"started"`
	Heard    time.Time `json:"heard"` // when it last said that it lives
	State    string    `json:"state"` // serves, leaves, silent
	// What it is at; 0 for what it has none of. Behind is events that are stored and that subscribers or documents do not have yet.
	Partitions int `json:"partitions,omitempty"`
	Sessions   int `json:"sessions,omitempty"`
	Behind     int `json:"behind,omitempty"`
}

// SystemConfiguration is what the process runs with, YAML. Secrets are three asterisks.
type SystemConfiguration struct {
	Configuration string `json:"configuration"`
	Differs       string `json:"differs"` // from the defaults; "{}" if nothing does
}

// System is what administrators see of the hub itself.
type System interface {
	Status(ctx context.Context) (SystemStatus, error)
	// Parts lists the parts of the hub, by target. Precondition in a process that hears of none.
	Parts(ctx context.Context) ([]Part, error)
	// Metrics is what this process counts, in Prometheus' text format.
	Metrics() ([]byte, error)
	Configuration() (SystemConfiguration, error)
}

// metricsType is Prometheus' text format, version 0.0.4.
const metricsType = "text/plain; version=0.0.4"

func (g *Gateway) getSystem(w http.ResponseWriter, r *request) error {
	return ofSystem(g, w, r, func(s System) (SystemStatus, error) { return s.Status(r.Context()) })
}

func (g *Gateway) getSystemParts(w http.ResponseWriter, r *request) error {
	return ofSystem(g, w, r, func(s System) ([]Part, error) { return s.Parts(r.Context()) })
}

func (g *Gateway) getSystemConfiguration(w http.ResponseWriter, r *request) error {
	return ofSystem(g, w, r, func(s System) (SystemConfiguration, error) { return s.Configuration() })
}

func (g *Gateway) getSystemMetrics(w http.ResponseWriter, r *request) error {
	if g.deps.System == nil {
		return errNoRoute
	}
	b, err := g.deps.System.Metrics()
	if err != nil {
		return err
	}
	return writeBody(w, r, metricsType, b)
}

func ofSystem[A any](g *Gateway, w http.ResponseWriter, r *request, ask func(System) (A, error)) error {
	if g.deps.System == nil {
		return errNoRoute
	}
	a, err := ask(g.deps.System)
	if err != nil {
		return err
	}
	return writeJSON(w, r, a)
}
