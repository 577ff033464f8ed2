package resourcedirectory

import (
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

func TestLabels(t *testing.T) {
	t.Parallel()
	h := open(t)
	ctx := t.Context()
	h.must(h.d.Register(ctx, own(lamp, alice, 1), "u"))
	set := func(owner hub.Owner, c hub.LabelChange) (hub.Labels, error) {
		return h.d.SetLabels(ctx, owner, lamp, c, "alice-sub")
	}

	got, err := set(alice, hub.LabelChange{Set: hub.Labels{"room": "kitchen", "floor": "1"}})
	h.must(err)
	wantLabels(t, got, hub.Labels{"room": "kitchen", "floor": "1"})
	got, err = set(alice, hub.LabelChange{Set: hub.Labels{"room": "hall"}, Remove: []string{"floor", "none"}})
	h.must(err)
	wantLabels(t, got, hub.Labels{"room": "hall"})

	// Nothing changes, nothing is written.
	before := len(h.commits(lamp))
	_, err = set(alice, hub.LabelChange{Set: hub.Labels{"room": "hall"}})
	h.must(err)
	if n := len(h.commits(lamp)); n != before {
		t.Errorf("%d commits for no change", n-before)
	}
	if _, err := set(bob, hub.LabelChange{Set: hub.Labels{"room": "mine"}}); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("another owner: %v", err)
	}
	if _, err := h.d.SetLabels(ctx, alice, stove, hub.LabelChange{Replace: true}, "u"); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("an unknown device: %v", err)
	}

	h.restart()
	wantLabels(t, h.device(alice, lamp).Labels, hub.Labels{"room": "hall"})
	last := h.commits(lamp)[len(h.commits(lamp))-1].Events[0]
	if last.User != "alice-sub" || last.Version != 1 {
		t.Errorf("the event is %+v", last)
	}
	if _, err := Verify(ctx, h.base, func(_ hub.DeviceID, p string) { t.Error(p) }); err != nil {
		t.Fatal(err)
	}
	// They are the owner's, and go with the ownership.
	h.must(h.d.Unregister(ctx, own(lamp, alice, 1), "u"))
	h.must(h.d.Register(ctx, own(lamp, bob, 2), "u"))
	wantLabels(t, h.device(bob, lamp).Labels, nil)
}

func TestLabelsAreBounded(t *testing.T) {
	t.Parallel()
	h := open(t)
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), "u"))
	many := hub.Labels{}
	for i := range hub.MaxLabels + 1 {
		many["n"+strings.Repeat("x", i)] = "v"
	}
	for what, c := range map[string]struct {
		labels hub.Labels
		kind   hub.Kind
	}{
		"too many":           {many, hub.TooLarge},
		"no name":            {hub.Labels{"": "v"}, hub.Invalid},
		"name with a slash":  {hub.Labels{"a/b": "v"}, hub.Invalid},
		"long name":          {hub.Labels{strings.Repeat("n", hub.MaxLabelName+1): "v"}, hub.Invalid},
		"long value":         {hub.Labels{"n": strings.Repeat("v", hub.MaxLabelValue+1)}, hub.Invalid},
		"value of two lines": {hub.Labels{"n": "a\nb"}, hub.Invalid},
		"value that is none": {hub.Labels{"n": "\xff"}, hub.Invalid},
	} {
		if _, err := h.d.SetLabels(t.Context(), alice, lamp, hub.LabelChange{Set: c.labels}, "u"); !hub.IsKind(err, c.kind) {
			t.Errorf("%s: %v", what, err)
		}
	}
	wantLabels(t, h.device(alice, lamp).Labels, nil)
	widest := hub.Labels{strings.Repeat("n", hub.MaxLabelName): strings.Repeat("v", hub.MaxLabelValue), "a.B-_9": "", "x": "wörter und=zeichen"}
	got, err := h.d.SetLabels(t.Context(), alice, lamp, hub.LabelChange{Set: widest}, "u")
	h.must(err)
	wantLabels(t, got, widest)
}

func wantLabels(t *testing.T, got, want hub.Labels) {
	t.Helper()
	if !got.Equal(want) {
		t.Errorf("labels %v, want %v", got, want)
	}
}
