package identitystore

import (
	"fmt"
	"time"
)

// Config is the section `identityStore` of the configuration.
type Config struct {
	// Retention is how long a former owner may still look for events of a released device. Keep it at least as long as the
	// history of the resource directory. Default 168h; must be positive.
	Retention time.Duration `yaml:"retention"`
	// CachedDevices bounds how many device IDs the lists of owners may hold in memory, over all owners. When it is full other
	// owners' lists are dropped; a list longer than this is read from the store each time. Default 1000000; must be positive.
	CachedDevices int `yaml:"cachedDevices"`
	// RevokeAtRemoval ends what the hub has given a device when its owner or an operator deletes it: its certificates are revoked,
	// its pre-shared key is forgotten, and its tokens are worth nothing. Without it they are good again once the device is onboarded
	// anew. A device that signs off by itself keeps them. Default true.
	RevokeAtRemoval bool `yaml:"revokeAtRemoval"`
}

// Default returns the configuration of a hub without a configuration file.
func Default() Config {
	return Config{Retention: 7 * 24 * time.Hour, CachedDevices: 1_000_000, RevokeAtRemoval: true}
}

// Validate reports all mistakes, each with the full path of its key.
func (c Config) Validate() []error {
	var errs []error
	if c.Retention <= 0 {
		errs = append(errs, fmt.Errorf("identityStore.retention: %s is not positive", c.Retention))
	}
	if c.CachedDevices <= 0 {
		errs = append(errs, fmt.Errorf("identityStore.cachedDevices: %d is not positive", c.CachedDevices))
	}
	return errs
}
