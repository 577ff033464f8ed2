package resourcedirectory

import (
	"context"
	"encoding/json"

	"github.com/coaphub/coaphub/hub"
)

// SetLabels changes the labels of owner's device and returns them. A device without owner's stamp is NotFound; see
// hub.LabelChange for what is wrong with labels. A change that changes nothing makes no event.
func (d *Directory) SetLabels(ctx context.Context, owner hub.Owner, dev hub.DeviceID, change hub.LabelChange, user string) (hub.Labels, error) {
	const op = "directory.SetLabels"
	var now hub.Labels // decide runs on the worker, before the answer
	r := &request{dev: dev, op: op}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if owner == "" || s.owner != owner {
			return nil, &hub.Error{Kind: hub.NotFound, Op: op}
		}
		labels, err := change.Apply(s.labels)
		if err != nil {
			return nil, err
		}
		now = labels
		if labels.Equal(s.labels) {
			return nil, nil
		}
		b, err := json.Marshal(labels)
		if err != nil {
			return nil, &hub.Error{Kind: hub.Internal, Op: op, Err: err}
		}
		return []hub.Event{{
			Kind: hub.LabelsChanged, User: user, Content: hub.Content{Type: "application/json", Format: hub.FormatJSON, Data: b},
		}}, nil
	}
	if err := d.do(ctx, r); err != nil {
		return nil, err
	}
	return now, nil
}

// labelsOf reads what SetLabels wrote. Anything else is the log of a later version: no labels then.
func labelsOf(ev *hub.Event) hub.Labels {
	var l hub.Labels
	if json.Unmarshal(ev.Content.Data, &l) != nil || len(l) == 0 {
		return nil
	}
	return l
}
