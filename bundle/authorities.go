package bundle

import (
	"context"
	"errors"
	"time"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
)

// AuthorityPart is a root or an issuing certificate of the hub.
type AuthorityPart struct {
	Root  string    `json:"root"` // device, https, internal
	Kind  string    `json:"kind"` // root, issuing
	ID    string    `json:"id"`   // of its key
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	State string    `json:"state"` // in use, announced, believed, ended, retired
	Key   bool      `json:"key"`   // its key can be used here

	// ListUntil is until when a root's revocation list is good; nil for one without, and for an issuing certificate, whose list is made when
	// it is asked for. ListLacks is how many certificates were retired that are not on it: its key was not there.
	ListUntil *time.Time `json:"listUntil,omitempty"`
	ListLacks int        `json:"listLacks,omitempty"`
}

// RollRequest is one step of rolling an authority over.
type RollRequest struct {
	Which string `json:"which"`
	// Step is issuing, root, finish or list.
	Step string `json:"step"`
	// RootKey is PEM, for a root whose key is not in the data folder. It is used once and not kept.
	RootKey string `json:"rootKey,omitempty"`
}

type retireRequest struct {
	ID      string `json:"id"`
	RootKey string `json:"rootKey,omitempty"` // as RollRequest has it
}

type forgetRequest struct {
	Which string `json:"which"`
	Safe  string `json:"safe"` // PEM
}

func (a *assembly) authorities(context.Context, struct{}) ([]AuthorityPart, error) {
	var out []AuthorityPart
	for _, p := range a.authorityHere().Parts() {
		part := AuthorityPart{
			Root: string(p.Root), Kind: p.Kind, ID: p.ID, Since: p.Since, Until: p.Until, State: p.State, Key: p.Key, ListLacks: p.Lacks,
		}
		if !p.ListUntil.IsZero() {
			part.ListUntil = &p.ListUntil
		}
		out = append(out, part)
	}
	return out, nil
}

func (a *assembly) roll(ctx context.Context, q RollRequest) ([]AuthorityPart, error) {
	return a.rolled(ctx, func() error {
		return a.authorityHere().Roll(certificateauthority.Root(q.Which), certificateauthority.Step(q.Step), []byte(q.RootKey))
	})
}

func (a *assembly) retire(ctx context.Context, q retireRequest) ([]AuthorityPart, error) {
	return a.rolled(ctx, func() error { return a.authorityHere().Retire(q.ID, []byte(q.RootKey)) })
}

// rolled makes a change of the authorities, and has the devices' door use what there is then. That is so after an error, too: what
// was written counts.
func (a *assembly) rolled(ctx context.Context, change func() error) ([]AuthorityPart, error) {
	a.rolling.Lock()
	defer a.rolling.Unlock()
	err := change()
	if a.certificateClient != nil {
		err = errors.Join(err, a.certificateClient.Refresh(ctx))
	}
	if a.devices != nil {
		err = errors.Join(err, a.trust())
	}
	if err != nil {
		return nil, err
	}
	return a.authorities(ctx, struct{}{})
}

// trust has the gateway here believe the authorities that there are now.
func (a *assembly) trust() error {
	a.trusting.Lock() // what is read last is what stays
	defer a.trusting.Unlock()
	return a.devices.Trust(a.authority.DevicePool(), a.authority.DeviceIntermediates(), a.authority.DeviceRoots())
}

// authorityHere is the authority with its keys, where they are in this process, since keys of roots do not travel.
func (a *assembly) authorityHere() authority {
	if a.authorityKeys != nil {
		return a.authorityKeys
	}
	return a.authority
}

func (a *assembly) rootKeys(_ context.Context, q rootRequest) (string, error) {
	pem, err := a.authorityHere().RootKeys(certificateauthority.Root(q.Which))
	return string(pem), err
}

func (a *assembly) forgetRootKeys(_ context.Context, q forgetRequest) (struct{}, error) {
	return struct{}{}, a.authorityHere().ForgetRootKeys(certificateauthority.Root(q.Which), []byte(q.Safe))
}
