package revocation

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coaphub/coaphub/internal/conf"
)

// CASetConfig is a Set as a configuration has it, an entry of a door's tls.caSets.
type CASetConfig struct {
	// Name of the set, for logs and metrics; unique.
	Name string `yaml:"name"`
	// CAs is files or PEM texts: the roots, and all CAs below them that issue devices' certificates or revocation lists.
	CAs []string `yaml:"cas"`
	// Lists is where revocation lists of the CAs are: http or https URLs, file URLs, or files. What certificates name is not
	// fetched.
	Lists []string `yaml:"lists"`
	// Responder is the URL that is asked for a device's certificate (OCSP) where the lists say nothing of it. Empty: none.
	Responder string `yaml:"responder"`
	// Policy is what becomes of a device of whose certificate nobody knows whether it was revoked, because a list is late or a
	// responder away: closed (default), what it asks for is answered by 5.03 (503), or open, it comes in.
	Policy string `yaml:"policy"`
	// Refresh is how long after the last time a list is fetched again at the latest; also sooner, before it ends. 0: an hour.
	Refresh time.Duration `yaml:"refresh"`
}

// Values of CASetConfig.Policy.
const (
	PolicyClosed = "closed"
	PolicyOpen   = "open"
)

const defaultRefresh = time.Hour

// MaxSets and maxLists bound what is fetched.
const MaxSets, maxLists = 16, 64

// set reads the CAs of a set. Each error begins with the key below it.
func (c CASetConfig) set() (s Set, errs []error) {
	s = Set{Name: c.Name, Lists: c.Lists, Responder: c.Responder, Open: c.Policy == PolicyOpen, Refresh: c.Refresh}
	if s.Refresh == 0 {
		s.Refresh = defaultRefresh
	}
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Name == "" {
		bad("name: must be set")
	}
	switch {
	case c.Policy != "" && c.Policy != PolicyClosed && c.Policy != PolicyOpen:
		bad("policy: %q is neither %s nor %s", c.Policy, PolicyClosed, PolicyOpen)
	case c.Policy != "" && len(c.Lists) == 0 && c.Responder == "":
		bad("policy: nobody reads it without lists or responder")
	}
	if s.Refresh < time.Minute {
		bad("refresh: %v is less than 1m", c.Refresh)
	}
	if len(c.Lists) > maxLists {
		bad("lists: there are more than %d", maxLists)
	} else if err := s.Check(); err != nil {
		errs = append(errs, err)
	}
	var err error
	if s.CAs, err = conf.Certificates(c.CAs); err != nil {
		bad("cas: %w", err)
	} else if len(s.CAs) == 0 {
		bad("cas: at least one must be named")
	}
	return s, errs
}

// CheckSets tells bad what is wrong with the sets: the path below and with caSets, and a text.
func CheckSets(sets []CASetConfig, bad func(path, text string)) {
	if len(sets) > MaxSets {
		bad("caSets", fmt.Sprintf("there are more than %d", MaxSets))
		return
	}
	names := map[string]bool{}
	for i, c := range sets {
		path := fmt.Sprintf("caSets[%d].", i)
		_, errs := c.set()
		for _, err := range errs {
			key, text, _ := strings.Cut(err.Error(), ": ")
			bad(path+key, text)
		}
		if names[c.Name] && c.Name != "" {
			bad(path+"name", fmt.Sprintf("%q is used twice", c.Name))
		}
		names[c.Name] = true
	}
}

// ReadSets reads the sets of a configuration that was checked. Errors begin with caSets.
func ReadSets(sets []CASetConfig) (out []Set, err error) {
	for i, c := range sets {
		s, errs := c.set()
		if len(errs) > 0 { // files, which may have changed since
			return nil, fmt.Errorf("caSets[%d].%w", i, errors.Join(errs...))
		}
		out = append(out, s)
	}
	return out, nil
}
