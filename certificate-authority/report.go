package certificateauthority

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxReported bounds each list of a report.
const maxReported = 1000

// Report is how the fleet is off for certificates.
type Report struct {
	Good    int // devices' certificates that let somebody in
	Ended   int // that did until they ended, in the last 90 days
	Revoked int
	// Expiring are devices whose last certificate that is good ends soon, the first to end first; there are Expires of them, and
	// the list has at most 1000.
	Expiring []hub.Certificate
	Expires  int
	// Shared are certificates of one key for several devices, which whoever has one of them can be; by key. There are SharedKeys
	// such keys, and the list has at most 1000 certificates.
	Shared     []hub.Certificate
	SharedKeys int
}

// Report reads the whole ledger. Soon is within that time.
func (s *Service) Report(ctx context.Context, within time.Duration) (Report, error) {
	var r Report
	now := time.Now()
	last := map[hub.DeviceID]hub.Certificate{} // without PEM
	keys := map[string]map[hub.DeviceID]string{}
	for c, err := range s.Certificates(ctx, hub.CertificateFilter{All: true}) {
		switch {
		case err != nil:
			return Report{}, err
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
		c.PEM = ""
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
	slices.SortFunc(r.Shared, func(a, b hub.Certificate) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Device, b.Device))
	})
	return r, nil
}
