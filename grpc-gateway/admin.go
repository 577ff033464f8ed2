package grpcgateway

import (
	"cmp"
	"context"
	"encoding/json"
	"iter"
	"net/http"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coaphub/coaphub/hub"
)

// What administrators see and do. Their tokens have the scope admin; nothing here looks at the owner, but for refusals, which
// owners may see, too. These calls have one form, JSON with times as in RFC 3339, and exist over HTTP only: no other hub has them.

// Administration is what the door needs for administrators.
type Administration interface {
	// Refused lists the newest refused connections and sign-ups, newest first.
	Refused(ctx context.Context) []Refusal
	// RefusedOf lists those of Refused that name a device of the owner's, or one that nobody has and for which the owner has an
	// onboarding code or an enrolment token that was not used.
	RefusedOf(ctx context.Context, owner hub.Owner) ([]Refusal, error)
	// Accounts lists the accounts by name. All calls about accounts are Precondition where the accounts are elsewhere.
	Accounts(ctx context.Context) ([]Account, error)
	// AddAccount makes an account. Without a password it gets one that works once, which is returned.
	AddAccount(ctx context.Context, name, password string, roles []string) (a Account, oneTime string, err error)
	// SetPassword gives an account another password; as in AddAccount.
	SetPassword(ctx context.Context, name, password string) (a Account, oneTime string, err error)
	// SetRoles gives an account these roles and no others.
	SetRoles(ctx context.Context, name string, roles []string) (Account, error)
}

// Refusal is a connection, sign-up or sign-in that was refused.
type Refusal struct {
	Time   time.Time `json:"time"`
	Remote string    `json:"remote"`
	Device string    `json:"device,omitempty"` // empty if it never got so far
	What   string    `json:"what"`             // connection, sign-up, sign-in, refresh
	Reason string    `json:"reason"`
}

// Account is an account of the embedded provider.
type Account struct {
	Name  string   `json:"name"`
	Roles []string `json:"roles"`
	// MustChange reports that the password works once, to set another one.
	MustChange bool      `json:"mustChange"`
	Created    time.Time `json:"created,omitzero"`
	LastLogin  time.Time `json:"lastLogin,omitzero"`
}

// nobody stands for the device in places of lists that are not about devices.
const nobody hub.DeviceID = "00000000-0000-0000-0000-000000000000"

// appendDocument appends one of our own documents, with a cursor as its last member.
func appendDocument(b []byte, v any, cursor string) []byte {
	doc, err := json.Marshal(v)
	if err != nil { // texts, numbers and times only
		doc = []byte("{}")
	}
	b = append(b, doc[:len(doc)-1]...)
	return append(appendText(b, "cursor", cursor), '}')
}

// simple is the request of a call that has one form only.
func (r *request) simple() *request {
	r.proto = false
	return r
}

type refusalElement struct{ Refusal }

func (refusalElement) message(string) proto.Message { return nil } // there is no such call over gRPC

func (e refusalElement) appendJSON(b []byte, cursor string) []byte {
	return appendDocument(b, e.Refusal, cursor)
}

// refusals is for administrators; refusalsOf is for others.
func (g *Gateway) refusals(ctx context.Context, _ hub.Owner, f *filter) iter.Seq2[found, error] {
	return refusalsFrom(f, func() ([]Refusal, error) { return g.deps.Administration.Refused(ctx), nil })
}

func (g *Gateway) refusalsOf(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return refusalsFrom(f, func() ([]Refusal, error) { return g.deps.Administration.RefusedOf(ctx, owner) })
}

func refusalsFrom(f *filter, list func() ([]Refusal, error)) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		all, err := list()
		if err != nil {
			yield(found{}, err)
			return
		}
		for _, r := range all {
			at := place{device: nobody, time: r.Time.UnixNano()}
			if f.from.time != 0 && at.time >= f.from.time {
				continue
			}
			if !yield(found{refusalElement{r}, at}, nil) {
				return
			}
		}
	}
}

func (g *Gateway) getRefusals(w http.ResponseWriter, r *request) error {
	if g.deps.Administration == nil {
		return errNoRoute
	}
	read := g.refusalsOf
	if r.claims.Has(hub.ScopeAdmin) {
		read = g.refusals
	}
	return g.writeList(w, r.simple(), listRefusals, &filter{}, read)
}

type accountElement struct{ Account }

func (accountElement) message(string) proto.Message { return nil } // there is no such call over gRPC

func (e accountElement) appendJSON(b []byte, cursor string) []byte {
	return appendDocument(b, e.Account, cursor)
}

func (g *Gateway) accounts(ctx context.Context, _ hub.Owner, f *filter) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		all, err := g.deps.Administration.Accounts(ctx)
		if err != nil {
			yield(found{}, err)
			return
		}
		slices.SortFunc(all, func(a, b Account) int { return cmp.Compare(a.Name, b.Name) })
		for _, a := range all {
			if a.Name <= string(f.from.href) {
				continue
			}
			if !yield(found{accountElement{a}, place{device: nobody, href: hub.Href(a.Name)}}, nil) {
				return
			}
		}
	}
}

func (g *Gateway) getAccounts(w http.ResponseWriter, r *request) error {
	if g.deps.Administration == nil {
		return errNoRoute
	}
	return g.writeList(w, r.simple(), listAccounts, &filter{}, g.accounts)
}

// accountAnswer is an account after a change. Password is one that the hub made: it works once, and is shown here only.
type accountAnswer struct {
	Account  Account `json:"account"`
	Password string  `json:"password,omitempty"`
}

// changeAccount reads a body and answers with what the change made of the account. Nobody may keep an answer that holds a
// password.
func changeAccount[B any](g *Gateway, w http.ResponseWriter, r *request, change func(B) (Account, string, error)) error {
	if g.deps.Administration == nil {
		return errNoRoute
	}
	var body B
	if err := readJSON(r, &body); err != nil {
		return err
	}
	a, password, err := change(body)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	return writeJSON(w, r, accountAnswer{a, password})
}

func (g *Gateway) addAccount(w http.ResponseWriter, r *request) error {
	type body struct {
		Name     string   `json:"name"`
		Password string   `json:"password"`
		Roles    []string `json:"roles"`
	}
	return changeAccount(g, w, r, func(b body) (Account, string, error) {
		return g.deps.Administration.AddAccount(r.Context(), b.Name, b.Password, b.Roles)
	})
}

func (g *Gateway) putPassword(w http.ResponseWriter, r *request) error {
	type body struct {
		Password string `json:"password"`
	}
	return changeAccount(g, w, r, func(b body) (Account, string, error) {
		return g.deps.Administration.SetPassword(r.Context(), r.vars.name, b.Password)
	})
}

func (g *Gateway) putRoles(w http.ResponseWriter, r *request) error {
	type body struct {
		Roles []string `json:"roles"`
	}
	return changeAccount(g, w, r, func(b body) (Account, string, error) {
		a, err := g.deps.Administration.SetRoles(r.Context(), r.vars.name, b.Roles)
		return a, "", err
	})
}
