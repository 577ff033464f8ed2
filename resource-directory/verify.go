package resourcedirectory

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/hub"
)

// Verify rebuilds each device from its bases and its log and compares the result with the stored documents, byte by byte. It
// reports what does not fit, device by device, and how many devices it looked at; err says that it could not look. It may run
// beside a serving directory.
func Verify(ctx context.Context, st Kept, report func(dev hub.DeviceID, problem string)) (devices int, err error) {
	k, err := newCodec()
	if err != nil {
		return 0, err
	}
	for dev, err := range st.Devices(ctx, "") {
		if err != nil {
			return devices, fmt.Errorf("list devices: %w", err)
		}
		devices++
		for try := 0; ; try++ {
			problems, err := verifyDevice(ctx, k, st, dev)
			if try < 4 && errors.Is(err, errTrimmed) {
				continue // or the log has a hole: then it is still there
			}
			if errors.Is(err, errTrimmed) {
				problems, err = append(problems, "the log has a hole, or does not begin after its base"), nil
			}
			if err != nil {
				return devices, fmt.Errorf("verify device %s: %w", dev, err)
			}
			for _, p := range problems {
				report(dev, p)
			}
			break
		}
	}
	return devices, nil
}

func verifyDevice(ctx context.Context, k codec, st Kept, dev hub.DeviceID) (problems []string, err error) {
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	stored, err := st.Load(ctx, dev)
	if err != nil {
		return nil, err
	}
	s, err := k.read(dev, stored.Docs, basePrefix)
	if err != nil {
		bad("%v", err)
		return problems, nil
	}
	// The documents contain the log up to foldedTo only (Pebble: all of it); what is later is not theirs to show.
	now, err := k.read(dev, stored.Docs, "")
	if err != nil {
		bad("%v", err)
		return problems, nil
	}
	if base := s.seq; base > now.seq {
		bad("the base is of seq %d, the device's document of seq %d", base, now.seq)
		return problems, nil
	}
	keys := map[string]bool{deviceKey: stored.FoldedTo > 0} // what no document contains yet makes none
	for _, d := range stored.Docs {
		if d.Key != "" && d.Key[0] == basePrefix[0] {
			keys[d.Key[1:]] = true // what is only in the base must be in the documents too, unless the log deletes it
		}
	}
	for c, err := range st.Commits(ctx, dev, s.seq+1) {
		if err != nil {
			return problems, err
		}
		if c.Seq > now.seq {
			break
		}
		if c.Seq != s.seq+1 {
			return problems, errTrimmed
		}
		if c.Time < s.time {
			bad("the time of seq %d is before that of seq %d", c.Seq, s.seq)
		}
		for i := range c.Events {
			// Versions are counted before each event is applied, so apply one by one on a state of their own.
			if i == 0 {
				s = s.begin(&c)
			}
			ev := &c.Events[i]
			if want := s.version(ev); ev.Version != want {
				bad("event %d of seq %d has version %d of its aggregate, expected %d", i, c.Seq, ev.Version, want)
			}
			if p := s.breaksCommand(ev); p != "" {
				bad("event %d of seq %d: command %s %s", i, c.Seq, ev.Correlation, p)
			}
			for _, key := range s.apply(&c, i, nil) {
				keys[key] = true
			}
		}
	}
	if s.seq != now.seq {
		bad("the documents are of seq %d, the log ends at %d", now.seq, s.seq)
		return problems, nil
	}
	all := make([]string, 0, len(keys))
	for key, is := range keys {
		if is {
			all = append(all, key)
		}
	}
	rebuilt, err := k.docs(s, all, "")
	if err != nil {
		return nil, err
	}
	have := make(map[string][]byte, len(stored.Docs))
	for _, d := range stored.Docs {
		if d.Key == "" || d.Key[0] != basePrefix[0] {
			have[d.Key] = d.Value
		}
	}
	for _, d := range rebuilt {
		old, ok := have[d.Key]
		delete(have, d.Key)
		switch {
		case d.Value == nil && ok:
			bad("document %.64q should not exist", d.Key)
		case d.Value != nil && !ok:
			bad("document %.64q is missing", d.Key)
		case !bytes.Equal(old, d.Value):
			bad("document %.64q differs from what base and log say", d.Key)
		}
	}
	for key := range have {
		bad("document %.64q is of no event", key)
	}
	return problems, nil
}

// breaksCommand says what is wrong with an event of a command, "" if nothing is: each is bound at most once, and ends once.
func (s *state) breaksCommand(ev *hub.Event) string {
	c := s.command(ev.Correlation)
	switch ev.Kind {
	case hub.CommandPending:
		if c != nil {
			return "begins twice"
		}
	case hub.CommandBound:
		if c == nil || c.Session != 0 {
			return "is bound twice, or after its end"
		}
	case hub.CommandEnded:
		if c == nil {
			return "ends twice, or never began"
		}
	case hub.Registered, hub.Unregistered:
		if len(s.commands) > 0 {
			return s.commands[0].ID + " is left behind by a change of ownership"
		}
	case hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.ResourceChanged, hub.LabelsChanged, hub.CommandLate:
	}
	return ""
}
