package store

import (
	"fmt"

	"github.com/coaphub/coaphub/hub"
)

// Limits that every back end keeps, so that a document or key that fits one fits all. Beyond them: hub.TooLarge.
const (
	MaxKey        = 2048     // bytes of a document's key; hrefs (1024) with a prefix fit
	MaxCollection = 64       // bytes of a collection's name
	MaxIndexes    = 8        // secondary keys of a document
	MaxIndex      = 1024     // bytes of a secondary key
	MaxValue      = 1 << 20  // bytes of one document's value
	MaxEntryDocs  = 16 << 20 // bytes of all documents of one entry or one Trim
)

// CheckDocs says whether an entry's or a Trim's documents keep the limits.
func CheckDocs(docs []StateDoc) error {
	total := 0
	for i := range docs {
		d := &docs[i]
		switch {
		case d.Key == "":
			return &hub.Error{Kind: hub.Invalid, Op: "store.CheckDocs", Code: "document-key-empty"}
		case len(d.Key) > MaxKey, len(d.Value) > MaxValue:
			return tooLarge("document-too-large", fmt.Errorf("state document %.64q: %d bytes", d.Key, len(d.Value)))
		}
		if total += len(d.Key) + len(d.Value); total > MaxEntryDocs {
			return tooLarge("documents-too-large", fmt.Errorf("state documents take more than %d bytes together", MaxEntryDocs))
		}
	}
	return nil
}

// CheckCommit says whether a commit, of the given encoded size, keeps hub's limits.
func CheckCommit(c *hub.Commit, size int) error {
	switch {
	case len(c.Events) == 0:
		return &hub.Error{Kind: hub.Invalid, Op: "store.CheckCommit", Code: "commit-empty"}
	case c.Seq == 0:
		return &hub.Error{Kind: hub.Invalid, Op: "store.CheckCommit", Code: "commit-without-seq"}
	case len(c.Events) > hub.MaxCommitEvents, size > hub.MaxCommitBytes:
		return tooLarge("commit-too-large", fmt.Errorf("commit of %d events, %d bytes", len(c.Events), size))
	}
	return nil
}

// CheckDoc says whether a document and its collection keep the limits. A collection's name must not be empty, nor a key.
func CheckDoc(collection string, d *Doc) error {
	if collection == "" || d.Key == "" {
		return &hub.Error{Kind: hub.Invalid, Op: "store.CheckDoc", Code: "document-key-empty"}
	}
	if len(collection) > MaxCollection || len(d.Key) > MaxKey || len(d.Value) > MaxValue || len(d.Index) > MaxIndexes {
		return tooLarge("document-too-large", fmt.Errorf("document %.64q of %.64q", d.Key, collection))
	}
	for _, ix := range d.Index {
		if len(ix) > MaxIndex {
			return tooLarge("document-too-large", fmt.Errorf("secondary key of document %.64q of %.64q", d.Key, collection))
		}
	}
	return nil
}

func tooLarge(code string, cause error) error {
	return &hub.Error{Kind: hub.TooLarge, Op: "store.Check", Code: code, Err: cause}
}
