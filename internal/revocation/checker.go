package revocation

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/internal/admission"
)

// skew is how much the clocks of authorities and ours may differ.
const skew = 5 * time.Minute

// Set is some CAs, with where to find what they have revoked. Nothing to find: nobody looks.
type Set struct {
	Name string // for logs and metrics; unique
	// CAs are all that issue certificates or lists of the set. They are trusted as they stand: that nothing says they are not
	// revoked does not matter, that something says they are does.
	CAs []*x509.Certificate
	// Lists are where revocation lists are: http and https URLs, file URLs and paths of files; DER or PEM.
	Lists []string
	// Responder is the URL that is asked for device certificates of which no list says anything; "": none.
	Responder string
	// Open lets certificates in of which nothing is known.
	Open bool
	// Refresh is how old what is known of a list gets at most before somebody looks again; also sooner, when it is about to end.
	Refresh time.Duration
}

// Status is what is known of a certificate.
type Status uint8

// The states.
const (
	Good Status = iota
	Revoked
	Unknown
)

// Checker says of certificates whether they were revoked. Its methods may be called from any goroutine.
type Checker struct {
	dir     string
	log     *slog.Logger
	metrics *metrics
	client  *http.Client
	sets    []*set
	issuers map[string]*issuer // by name and key
	changed atomic.Pointer[func()]
	answers answers
}

// set is a Set at work.
type set struct {
	Set
	issuers []*issuer
	sources []*source
	asking  *admission.Queue
}

// issuer is a CA of a set.
type issuer struct {
	id     string
	set    *set
	cert   *x509.Certificate
	parent *issuer // which issued it; nil for a root, and where it is none of the set's
	mu     sync.Mutex
	lists  atomic.Pointer[[]*list] // of this issuer, from all sources; written with mu
}

// idOf names a CA by name and key: certificates of another serial may stand for it.
func idOf(c *x509.Certificate) string {
	return string(c.RawSubject) + string(c.RawSubjectPublicKeyInfo)
}

// New makes a Checker. Lists that were fetched before are kept in dir, so that a start without a network knows what the last one
// knew; "" keeps none. A CA in two sets, or one that is none, is an error.
func New(sets []Set, dir string, log *slog.Logger, reg prometheus.Registerer) (*Checker, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxResponseHeaderBytes = 64 << 10
	c := &Checker{
		dir: dir, log: log, issuers: map[string]*issuer{}, answers: answers{known: map[string]said{}, asked: map[string]chan struct{}{}},
		client: &http.Client{
			Transport: transport,
			// Lists are where the configuration says, and nowhere else: whoever can forge an answer must not send us about.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	for _, conf := range sets {
		s := &set{Set: conf, asking: admission.NewQueue(maxAsking, maxWaiting, askTimeout)}
		for _, cert := range conf.CAs {
			if !cert.BasicConstraintsValid || !cert.IsCA {
				return nil, fmt.Errorf("CA set %s: %s is not a CA", conf.Name, cert.Subject)
			}
			switch other := c.issuers[idOf(cert)]; {
			case other == nil:
			case other.set != s:
				return nil, fmt.Errorf("CA set %s: %s is in the set %s, too", conf.Name, cert.Subject, other.set.Name)
			default: // another certificate of the same
				continue
			}
			iss := &issuer{id: idOf(cert), set: s, cert: cert}
			iss.lists.Store(&[]*list{})
			c.issuers[iss.id] = iss
			s.issuers = append(s.issuers, iss)
		}
		for _, iss := range s.issuers {
			for _, other := range s.issuers {
				if other != iss && iss.cert.CheckSignatureFrom(other.cert) == nil {
					iss.parent = other
				}
			}
		}
		for _, at := range conf.Lists {
			s.sources = append(s.sources, newSource(s, at))
		}
		c.sets = append(c.sets, s)
	}
	c.metrics = newMetrics(reg, c.sets)
	if dir != "" && len(sets) > 0 {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make the folder of revocation lists: %w", err)
		}
	}
	for _, s := range c.sets {
		for _, src := range s.sources {
			c.begin(src)
		}
	}
	return c, nil
}

// Check reports what is wrong with where a set is told to look, by the names of Set's fields.
func (s Set) Check() error {
	for _, at := range s.Lists {
		u, err := url.Parse(at)
		switch {
		case at == "":
			return fmt.Errorf("lists: an entry is empty")
		case !strings.Contains(at, "://"): // a path
		case err != nil:
			return fmt.Errorf("lists: %q is no URL", at)
		case u.User != nil:
			return fmt.Errorf("lists: a URL with a password would be in logs")
		case u.Scheme == "file" && u.Host == "" && u.Path != "":
		case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
			return fmt.Errorf("lists: %q is neither an http, https or file URL nor a path", at)
		}
	}
	if s.Responder == "" {
		return nil
	}
	if u, err := url.Parse(s.Responder); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return fmt.Errorf("responder: %q is no http or https URL", s.Responder)
	}
	return nil
}

// Changed has f called whenever some certificate may have become revoked. f must not block.
func (c *Checker) Changed(f func()) { c.changed.Store(&f) }

func (c *Checker) tell() {
	if f := c.changed.Load(); f != nil {
		(*f)()
	}
}

// Run keeps the lists fresh until ctx ends. The error is always nil: a list that cannot be had is no reason to end.
func (c *Checker) Run(ctx context.Context, ready func()) error {
	ready()
	var following sync.WaitGroup
	for _, s := range c.sets {
		for _, src := range s.sources {
			following.Go(func() { c.follow(ctx, src) })
		}
	}
	following.Wait()
	<-ctx.Done()
	c.client.CloseIdleConnections()
	return nil
}

// Known is what is known of a verified chain, the certificate in question first. It asks nobody and waits for nobody. Of a chain
// without a CA of the sets nothing is to be known, so it is good.
func (c *Checker) Known(chain []*x509.Certificate) Status {
	st, _, _ := c.known(chain, time.Now())
	return st
}

// known also returns the chain's set, nil if it is of none, and whether an answer about the first certificate would make an
// unknown chain known.
func (c *Checker) known(chain []*x509.Certificate, now time.Time) (_ Status, of *set, ask bool) {
	top, iss := 0, (*issuer)(nil)
	for ; top < len(chain); top++ {
		if iss = c.issuers[idOf(chain[top])]; iss != nil {
			break
		}
	}
	if iss == nil || len(iss.set.Lists) == 0 && iss.set.Responder == "" {
		return Good, nil, false
	}
	of = iss.set
	unknown := 0
	// What is above the configured CA is other people's business; what is below must be known, up to it (RFC 5280, Section 6.3).
	for i, cert := range chain[:top] {
		st := Unknown
		if i == top-1 {
			st = iss.status(cert, now)
		}
		if i == 0 && of.Responder != "" {
			if a, ok := c.answers.get(chain[1], cert, now); ok && (st == Unknown || a == Revoked) {
				st = a
			}
		}
		switch {
		case st == Revoked:
			return Revoked, of, false
		case st == Unknown:
			unknown++
			ask = ask || i == 0 && of.Responder != ""
		}
	}
	for ca, cert := iss, chain[top]; ca.parent != nil; ca, cert = ca.parent, ca.parent.cert {
		if ca.parent.status(cert, now) == Revoked {
			return Revoked, of, false
		}
	}
	if unknown > 0 {
		return Unknown, of, ask && unknown == 1
	}
	return Good, of, false
}

// status is what the issuer's lists say of one of its certificates. One that was revoked stays so when the list has ended.
func (iss *issuer) status(cert *x509.Certificate, now time.Time) Status {
	st := Unknown
	for _, l := range *iss.lists.Load() {
		if !l.covers(cert) {
			continue
		}
		if l.has(cert) {
			return Revoked
		}
		if l.fresh(now) {
			st = Good
		}
	}
	return st
}

// Ask is Known of a chain whose set says what becomes of the unknown: first the set's responder is asked, if it has one, then an
// open set takes it for good. Unknown is trouble of ours, or of the authority's, and nothing against the certificate.
func (c *Checker) Ask(ctx context.Context, chain []*x509.Certificate) Status {
	st, of, ask := c.known(chain, time.Now())
	if ask {
		c.ask(ctx, of, chain[0], chain[1])
		st, of, _ = c.known(chain, time.Now())
	}
	if st != Unknown {
		return st
	}
	if of.Open {
		c.metrics.unknown.WithLabelValues(of.Name, "let-in").Inc()
		return Good
	}
	c.metrics.unknown.WithLabelValues(of.Name, "refused").Inc()
	return Unknown
}
