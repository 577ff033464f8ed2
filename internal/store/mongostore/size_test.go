package mongostore

import (
	"testing"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// BenchmarkCommitSize says how many bytes of BSON a notification of 90 bytes of CBOR is, before the database compresses it, and how many
// of them are its key and the writer's ID, which stand in an index each, too.
func BenchmarkCommitSize(b *testing.B) {
	c := hub.Commit{
		Device: "d0000000-0000-4000-8000-000000000001", Seq: 1000, Writer: randomID(), Number: 100_000, Time: time.Now().UnixNano(), Owner: "admin", Generation: 1,
		Events: []hub.Event{{
			Kind: hub.ResourceChanged, Href: "/light/1", Version: 900, Session: 990, Message: 900, Connection: "127.0.0.1:40000", Status: hub.StatusOK,
			ETag: make([]byte, 8), Content: hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatCBOR, Data: make([]byte, 90)},
		}},
	}
	for b.Loop() {
		value := store.AppendCommit(nil, &c)
		doc := commitDoc{commitKey(c.Device, c.Seq), value, c.Time, randomID(), int64(c.Number)}
		raw, err := bson.Marshal(doc)
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(len(raw)), "B/commit")
		b.ReportMetric(float64(len(value)), "B/encoded")
		b.ReportMetric(float64(len(doc.ID)), "B/key")
		b.ReportMetric(float64(len(doc.Writer)), "B/writer")
	}
}
