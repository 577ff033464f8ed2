package bundle

import (
	"bytes"
	"slices"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const lamp = hub.DeviceID("00000000-0000-4000-8000-000000000001")

// content is a small hub at rest, and what a test changes of it.
type content struct {
	hubID   string
	commit  hub.Commit
	more    bool // a second commit
	docs    []store.StateDoc
	base    store.StateDoc
	written []store.Doc // in the collection
	in      string      // name of the collection
	secrets map[string]string
}

func small() *content {
	return &content{
		hubID: "7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a",
		commit: hub.Commit{
			Device: lamp, Seq: 7, ID: [16]byte{1}, Writer: "w", Number: 3, Time: 1000, Owner: "alice", Generation: 1,
			Events: []hub.Event{{Kind: hub.ResourceChanged, Href: "/light/1", Version: 6, Content: hub.Content{Type: "text/plain", Data: []byte("on")}}},
		},
		docs: []store.StateDoc{{Key: "d", Value: []byte("device")}, {Key: "r/light/1", Value: []byte("on")}},
		base: store.StateDoc{Key: "bd", Value: []byte("base")},
		written: []store.Doc{
			{Key: "one", Value: []byte("1"), Index: []string{"owner=alice", "kind=a"}}, {Key: "two", Value: []byte("2")},
		},
		in: "things", secrets: map[string]string{"psk": "secret", "cursor": "another"},
	}
}

// kept writes the content into a store of its own and weighs it.
func (c *content) kept(t *testing.T, backwards bool) (string, Tally) {
	t.Helper()
	ctx, s, keys := t.Context(), openTestStore(t), t.TempDir()
	var errs []error
	do := func(err error) { errs = append(errs, err) }
	commits := []hub.Commit{c.commit}
	if c.more {
		next := c.commit
		next.Seq++
		commits = append(commits, next)
	}
	do(s.ImportCommits(ctx, commits))
	do(s.ImportDocs(ctx, lamp, c.commit.Seq, c.docs))
	do(s.Trim(ctx, lamp, c.commit.Seq, []store.StateDoc{c.base}))
	docs := &withSecrets{Documents: s, dir: keys}
	written := slices.Clone(c.written)
	if backwards { // and with other revisions and logs
		slices.Reverse(written)
		rev, err := s.Put(ctx, c.in, store.Doc{Key: "gone"})
		do(err)
		do(s.Delete(ctx, c.in, "gone", rev))
	}
	for _, doc := range written {
		if backwards {
			doc.Index = slices.Clone(doc.Index)
			slices.Reverse(doc.Index)
		}
		_, err := docs.Put(ctx, c.in, doc)
		do(err)
	}
	for name, value := range c.secrets {
		_, err := docs.Put(ctx, secretCollection, store.Doc{Key: name, Value: []byte(value)})
		do(err)
	}
	_, err := s.Put(ctx, hubCollection, store.Doc{Key: hubIDKey, Value: []byte(c.hubID)})
	do(err)
	r, err := folderAtRest(ctx, s, keys)
	do(err)
	digest, tally, err := r.digest(ctx, nil)
	do(err)
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	return digest, tally
}

// TestDigestIsOfWhatCounts: whoever has the same stored has the same digest, and whoever has one bit of it otherwise another.
func TestDigestIsOfWhatCounts(t *testing.T) {
	t.Parallel()
	want, tally := small().kept(t, false)
	if (tally != Tally{Devices: 1, Commits: 1, Events: 1, Documents: 2, Secrets: 2}) {
		t.Errorf("weighed %+v", tally)
	}
	if again, _ := small().kept(t, true); again != want {
		t.Errorf("the same, written in another order, has the digest %s and not %s", again, want)
	}
	seen := map[string]string{want: "the original"}
	for name, change := range map[string]func(c *content){
		"hub":             func(c *content) { c.hubID = "7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5b" },
		"seq":             func(c *content) { c.commit.Seq++ },
		"a commit more":   func(c *content) { c.more = true },
		"commit's ID":     func(c *content) { c.commit.ID[15] = 1 },
		"writer":          func(c *content) { c.commit.Writer = "v" },
		"number":          func(c *content) { c.commit.Number++ },
		"time":            func(c *content) { c.commit.Time++ },
		"owner":           func(c *content) { c.commit.Owner = "bob" },
		"generation":      func(c *content) { c.commit.Generation++ },
		"event":           func(c *content) { c.commit.Events[0].Content.Data = []byte("oo") },
		"state":           func(c *content) { c.docs[1].Value = []byte("of") },
		"state's key":     func(c *content) { c.docs[1].Key = "r/light/2" },
		"a state less":    func(c *content) { c.docs = c.docs[:1] },
		"base":            func(c *content) { c.base.Value = []byte("bass") },
		"document":        func(c *content) { c.written[1].Value = []byte("3") },
		"document's key":  func(c *content) { c.written[1].Key = "owt" },
		"a document less": func(c *content) { c.written = c.written[:1] },
		"secondary key":   func(c *content) { c.written[0].Index[1] = "kind=b" },
		"one key less":    func(c *content) { c.written[0].Index = c.written[0].Index[:1] },
		"key or value":    func(c *content) { c.written[1].Key, c.written[1].Value = "tw", []byte("o2") },
		"collection":      func(c *content) { c.in = "thing" },
		"secret":          func(c *content) { c.secrets["psk"] = "secreu" },
		"secret's name":   func(c *content) { delete(c.secrets, "cursor"); c.secrets["cursos"] = "another" },
	} {
		c := small()
		change(c)
		got, _ := c.kept(t, false)
		if same := seen[got]; same != "" {
			t.Errorf("%s: it has the digest of %s", name, same)
		}
		seen[got] = name
	}
}

// TestDigestOfALogWithAHole: what is not whole is not weighed.
func TestDigestOfALogWithAHole(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), openTestStore(t)
	c := small().commit
	for _, seq := range []uint64{7, 9} {
		c.Seq = seq
		if err := s.ImportCommits(ctx, []hub.Commit{c}); err != nil {
			t.Fatal(err)
		}
	}
	r, err := folderAtRest(ctx, s, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	digest, _, err := r.digest(ctx, nil)
	if code, text := hub.Public(err); code != "data-damaged" || digest != "" || !bytes.Contains([]byte(text), []byte("8 is missing")) {
		t.Errorf("a log with a hole is %q, %v", digest, err)
	}
}
