package main

import (
	"encoding/json"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

func newAudit(p process) *cobra.Command {
	var f apiFlags
	var limit int
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Show who changed what through the API and the command line, newest first",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 1 || limit > maxAudit {
				return usage("--limit is from 1 to %d", maxAudit)
			}
			seq, done, err := f.audit(cmd, p, limit)
			if err != nil {
				return err
			}
			defer done()
			t := newTable(p.out, "TIME", "USER", "DOOR", "CALL", "TARGET", "OUTCOME")
			raw := func(e *client.AuditEntry) json.RawMessage { return e.Raw }
			err = lines(p, f.asJSON, seq, raw, func(e *client.AuditEntry) {
				t.row(e.Time.Local().Format(time.DateTime), e.User, e.Door, e.Call, e.Target, e.Outcome)
			})
			if f.asJSON {
				return err
			}
			if err == nil && t.rows == 1 {
				t.note = "nothing was changed yet"
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	cmd.Flags().IntVar(&limit, "limit", 100, "at most so many entries, up to 10000")
	return cmd
}

const maxAudit = 10000

// audit reads the log over the API, of this data folder's hub over its socket: asking for a token would be one more entry, and
// without an embedded provider there is none.
func (f *apiFlags) audit(cmd *cobra.Command, p process, limit int) (seq func(func(client.AuditEntry, error) bool), done func(), err error) {
	if f.server != "" {
		c, err := f.open(cmd, p, hub.ScopeAdmin)
		if err != nil {
			return nil, nil, err
		}
		return c.ListAudit(cmd.Context(), limit), c.Close, nil
	}
	c, err := control(cmd)
	if err != nil {
		return nil, nil, err
	}
	return func(yield func(client.AuditEntry, error) bool) {
		es, err := c.Audit(cmd.Context(), 0, limit)
		for _, e := range es {
			var one client.AuditEntry
			raw, err := json.Marshal(e) // the API has the same form
			if err == nil {
				err = json.Unmarshal(raw, &one)
			}
			if one.Raw = raw; !yield(one, err) || err != nil {
				return
			}
		}
		if err != nil {
			yield(client.AuditEntry{}, err)
		}
	}, func() {}, nil
}
