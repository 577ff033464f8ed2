package certificateauthority

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxReported bounds each list of a report.
const maxReported = 1000

// weakRSA is below which an RSA key gives less than the 128 bits of the other kinds (NIST SP 800-57 Part 1, Table 2).
const weakRSA = 3072

// Report reads the ledger of an owner, or all of it if owner is "". What ends within that time ends soon.
func (s *Service) Report(ctx context.Context, owner hub.Owner, within time.Duration) (hub.CertificateReport, error) {
	r := hub.CertificateReport{Keys: map[string]int{}}
	now := time.Now()
	last := map[hub.DeviceID]hub.Certificate{} // without PEM
	keys := map[string]map[hub.DeviceID]string{}
	for c, err := range s.Certificates(ctx, hub.CertificateFilter{All: owner == "", Owner: owner}) {
		switch {
		case err != nil:
			return hub.CertificateReport{}, err
		case c.Profile != hub.ForDevice:
			continue
		case !c.Revoked.IsZero():
			r.Revoked++
			continue
		case !now.Before(c.NotAfter):
			r.Ended++
			continue
		}
		r.Good++
		kind := c.Algorithm
		if kind == "" { // of an older version
			kind = "unknown"
			if leaf, err := parsePEM(c.PEM); err == nil {
				kind = algorithmOf(leaf.PublicKey)
			}
		}
		r.Keys[kind]++
		c.PEM = ""
		if bits, rsa := strings.CutPrefix(kind, "RSA-"); rsa {
			if n, err := strconv.Atoi(bits); err == nil && n < weakRSA {
				if r.WeakKeys++; len(r.Weak) < maxReported {
					r.Weak = append(r.Weak, c)
				}
			}
		}
		if old, ok := last[c.Device]; !ok || c.NotAfter.After(old.NotAfter) {
			last[c.Device] = c
		}
		if keys[c.Key] == nil {
			keys[c.Key] = map[hub.DeviceID]string{}
		}
		keys[c.Key][c.Device] = c.Serial
	}
	for _, c := range last {
		if c.NotAfter.Sub(now) <= within {
			r.Expiring = append(r.Expiring, c)
		}
	}
	r.Expires = len(r.Expiring)
	slices.SortFunc(r.Expiring, func(a, b hub.Certificate) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.Device, b.Device))
	})
	r.Expiring = r.Expiring[:min(maxReported, len(r.Expiring))]
	for key, devices := range keys {
		if len(devices) == 1 {
			continue
		}
		r.SharedKeys++
		for dev, serial := range devices {
			if len(r.Shared) < maxReported {
				r.Shared = append(r.Shared, hub.Certificate{Serial: serial, Key: key, Device: dev, NotAfter: last[dev].NotAfter})
			}
		}
	}
	slices.SortFunc(r.Weak, func(a, b hub.Certificate) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Serial, b.Serial))
	})
	slices.SortFunc(r.Shared, func(a, b hub.Certificate) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Device, b.Device))
	})
	return r, nil
}

// algorithmOf names the kind of a key: P-256, P-384, Ed25519, RSA-2048.
func algorithmOf(key crypto.PublicKey) string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return k.Curve.Params().Name
	case ed25519.PublicKey:
		return "Ed25519"
	case *rsa.PublicKey:
		return "RSA-" + strconv.Itoa(k.N.BitLen())
	}
	return "unknown"
}

// measure makes the report's numbers metrics.
func (s *Service) measure(ctx context.Context) {
	r, err := s.Report(ctx, "", soon)
	if err != nil {
		if ctx.Err() == nil {
			s.log.WarnContext(ctx, "the certificates of the fleet could not be counted, trying again", "error", err)
		}
		return
	}
	for state, n := range map[string]int{
		"good": r.Good, "revoked": r.Revoked, "ends-soon": r.Expires, "shared-key": r.SharedKeys, "weak-key": r.WeakKeys,
	} {
		s.fleet.WithLabelValues(state).Set(float64(n))
	}
}
