package oauthserver

import (
	"cmp"
	"context"
	"encoding/base32"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Roles of accounts, and what each of them may do.
const (
	RoleAdmin  = "admin"  // everything, for every owner
	RoleUser   = "user"   // read and command devices of one's own
	RoleViewer = "viewer" // read devices of one's own
)

var roleScopes = map[string][]string{
	RoleAdmin:  {hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin, hub.ScopeDevice, hub.ScopeDeviceSignUp},
	RoleUser:   {hub.ScopeRead, hub.ScopeWrite, hub.ScopeDevice, hub.ScopeDeviceSignUp},
	RoleViewer: {hub.ScopeRead},
}

// firstAccount is the name of the account that a new hub has.
const firstAccount = "admin"

// Account is a local account, without its password.
type Account struct {
	Name  string // also the owner of its devices and the `sub` of its tokens: never changed, never given to another
	Roles []string
	// MustChange: the password has to be changed at its next use.
	MustChange bool
	Created    time.Time
	LastLogin  time.Time // zero: never
}

// account is the document of an account.
type account struct {
	Name       string    `json:"name"`
	Roles      []string  `json:"roles"`
	Password   string    `json:"password"` // PHC string of argon2id
	MustChange bool      `json:"mustChange,omitempty"`
	Created    time.Time `json:"created"`
	LastLogin  time.Time `json:"lastLogin,omitzero"`
	// Initial: the password is the hub's own and was never used, so the next start may replace it.
	Initial bool `json:"initial,omitempty"`
}

func (a account) public() Account {
	return Account{Name: a.Name, Roles: a.Roles, MustChange: a.MustChange, Created: a.Created, LastLogin: a.LastLogin}
}

// scopes is what the account's roles allow.
func (a account) scopes() []string {
	var out []string
	for _, r := range a.Roles {
		out = append(out, roleScopes[r]...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

var (
	errNoAccount = hub.NewError(hub.NotFound, "account-unknown", "there is no such account")
	errName      = hub.NewError(hub.Invalid, "account-name-invalid",
		"an account's name is 1 to 64 characters of a-z, 0-9, dot, dash, underscore and @, and begins with a letter or a digit")
	errRole = hub.NewError(hub.Invalid, "role-unknown", "the roles are admin, user and viewer")
)

// accountName folds and checks a name.
func accountName(s string) (string, error) {
	if len(s) == 0 || len(s) > 64 {
		return "", errName
	}
	s = strings.ToLower(s)
	for i, c := range []byte(s) {
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune(".-_@", rune(c))) {
			return "", errName
		}
	}
	return s, nil
}

func checkRoles(roles []string) ([]string, error) {
	if len(roles) == 0 {
		return nil, errRole
	}
	for _, r := range roles {
		if roleScopes[r] == nil {
			return nil, errRole
		}
	}
	out := slices.Clone(roles)
	slices.Sort(out)
	return slices.Compact(out), nil
}

// account reads an account; NotFound if there is none.
func (s *Server) account(ctx context.Context, name string) (account, error) {
	var a account
	rev, err := read(ctx, s.docs, collAccounts, name, &a)
	if err == nil && rev == 0 {
		err = errNoAccount.With("read account", nil)
	}
	return a, err
}

// AddUser makes an account. Without a password it gets a random one, which is returned and must be changed at its first use.
// Kinds: Invalid, Conflict ("account-exists").
func (s *Server) AddUser(ctx context.Context, name, password string, roles []string) (oneTime string, err error) {
	name, err = accountName(name)
	if err != nil {
		return "", err
	}
	if roles, err = checkRoles(roles); err != nil {
		return "", err
	}
	a := account{Name: name, Roles: roles, Created: time.Now().UTC()}
	if password == "" {
		oneTime, a.MustChange = newPassword(), true
		password = oneTime
	} else if err := checkNew(password); err != nil {
		return "", err
	}
	if a.Password, err = s.hasher.hash(ctx, password, oneTime != ""); err != nil {
		return "", err
	}
	err = write(ctx, s.docs, collAccounts, name, 0, a)
	if hub.IsKind(err, hub.Conflict) {
		err = hub.NewError(hub.Conflict, "account-exists", "there is an account of this name")
	}
	if err != nil {
		return "", err
	}
	return oneTime, nil
}

// ListUsers returns all accounts, by name.
func (s *Server) ListUsers(ctx context.Context) ([]Account, error) {
	var out []Account
	for doc, err := range s.docs.Range(ctx, collAccounts, "", "") {
		if err != nil {
			return nil, trouble("list accounts", err)
		}
		var a account
		if err := decode(collAccounts, doc, &a); err != nil {
			return nil, err
		}
		out = append(out, a.public())
	}
	return out, nil
}

// Administrator returns the oldest account with the role admin: whoever acts on the hub's own machine without naming an owner
// acts for it. NotFound if there is none.
func (s *Server) Administrator(ctx context.Context) (hub.Owner, error) {
	all, err := s.ListUsers(ctx)
	if err != nil {
		return "", err
	}
	all = slices.DeleteFunc(all, func(a Account) bool { return !slices.Contains(a.Roles, RoleAdmin) })
	if len(all) == 0 {
		return "", errNoAccount.With("find administrator", nil)
	}
	first := slices.MinFunc(all, func(a, b Account) int { return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name)) })
	return hub.Owner(first.Name), nil
}

// SetPassword sets a password, or a random one to be changed at its first use if it is empty, and ends everything that the
// account's applications were given; devices keep their tokens. Kinds: NotFound, Invalid.
func (s *Server) SetPassword(ctx context.Context, name, password string) (oneTime string, err error) {
	name, err = accountName(name)
	if err != nil {
		return "", err
	}
	if password == "" {
		oneTime = newPassword()
		password = oneTime
	} else if err := checkNew(password); err != nil {
		return "", err
	}
	return oneTime, s.setPassword(ctx, name, password, oneTime != "", "")
}

var errChanged = errors.New("the password was changed meanwhile")

// setPassword stores a password; oneTime says that newPassword made it, and that it must be changed at its first use. was is the
// fingerprint of the hash that it replaces, "" for any; errChanged if it is another by now.
func (s *Server) setPassword(ctx context.Context, name, password string, oneTime bool, was string) error {
	if _, err := s.account(ctx, name); err != nil {
		return err // before the work of hashing
	}
	phc, err := s.hasher.hash(ctx, password, oneTime)
	if err != nil {
		return err
	}
	err = s.changeAccount(ctx, name, func(a *account) error {
		if was != "" && fingerprint(a.Password) != was {
			return errChanged
		}
		a.Password, a.MustChange, a.Initial = phc, oneTime, false
		return nil
	})
	if err != nil {
		return err
	}
	return s.revokeSubject(ctx, name, func(g grant) bool { return g.Client != s.cfg.Clients.Device.ID })
}

// SetRoles replaces an account's roles. Tokens that are out keep their scopes until they end; the next ones follow the roles.
// Kinds: NotFound, Invalid, Precondition when no administrator would be left.
func (s *Server) SetRoles(ctx context.Context, name string, roles []string) error {
	name, err := accountName(name)
	if err != nil {
		return err
	}
	if roles, err = checkRoles(roles); err != nil {
		return err
	}
	var before []string
	set := func() error {
		return s.changeAccount(ctx, name, func(a *account) error { before, a.Roles = a.Roles, roles; return nil })
	}
	if slices.Contains(roles, RoleAdmin) {
		return set()
	}
	if err := s.othersAdminister(ctx, name); err != nil {
		return err
	}
	if err := set(); err != nil {
		return err
	}
	// Of two that are taken the role at the same time each was the other's reason: who finds nobody puts it back.
	err = s.othersAdminister(ctx, name)
	if hub.IsKind(err, hub.Precondition) {
		roles = before
		err = errors.Join(err, set())
	}
	return err
}

// othersAdminister is Precondition ("last-administrator") if no account but that one has the role admin.
func (s *Server) othersAdminister(ctx context.Context, name string) error {
	all, err := s.ListUsers(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(a Account) bool { return a.Name != name && slices.Contains(a.Roles, RoleAdmin) }) {
		return hub.NewError(hub.Precondition, "last-administrator", "no administrator would be left")
	}
	return nil
}

func (s *Server) changeAccount(ctx context.Context, name string, do func(*account) error) error {
	return change(ctx, s.docs, collAccounts, name, func(a *account, rev uint64) error {
		if rev == 0 {
			return errNoAccount.With("change account", nil)
		}
		return do(a)
	}, nil)
}

// firstLogin makes the first account of a new hub, or gives it a new one-time password as long as the last one was never
// used: it may have been lost with the terminal it was shown on.
func (s *Server) firstLogin(ctx context.Context) error {
	password := s.cfg.InitialPassword.Reveal()
	known := password != ""
	var a account
	rev, err := read(ctx, s.docs, collAccounts, firstAccount, &a)
	if err != nil {
		return err
	}
	if rev == 0 {
		for _, err := range s.docs.Range(ctx, collAccounts, "", "") {
			if err != nil {
				return trouble("list accounts", err)
			}
			return nil // others are there: not a new hub
		}
		a = account{Name: firstAccount, Roles: []string{RoleAdmin}, Created: time.Now().UTC(), Initial: true, MustChange: true}
	}
	if !a.Initial || rev != 0 && s.cfg.Several && !known {
		return nil
	}
	if !known {
		password = newPassword()
	}
	if a.Password, err = s.hasher.hash(ctx, password, !known); err != nil {
		return err
	}
	if err := write(ctx, s.docs, collAccounts, firstAccount, rev, a); hub.IsKind(err, hub.Conflict) {
		return nil // another process was faster and shows its own
	} else if rev != 0 && !known && hub.IsKind(err, hub.Unavailable) {
		// A full disk must not keep a hub from starting: reading goes on. The password of an earlier start is still good.
		s.log.Warn("the first account keeps its one-time password: a new one cannot be stored", "error", err)
		return nil
	} else if err != nil {
		return err
	}
	if !known {
		s.first = password
	}
	return nil
}

// FirstLogin returns the name and the one-time password of the first account, if this start set one.
func (s *Server) FirstLogin() (name, password string, ok bool) {
	return firstAccount, s.first, s.first != ""
}

// newPassword is 100 random bits in five groups that can be typed.
func newPassword() string {
	text := strings.ToLower(base32.StdEncoding.EncodeToString(random(13)))[:20]
	return strings.Join([]string{text[:4], text[4:8], text[8:12], text[12:16], text[16:]}, "-")
}
