package bundle

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"time"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
)

// errNoProvider answers what only the embedded provider can do.
var errNoProvider = hub.NewError(hub.Precondition, "no-embedded-provider",
	"this hub uses an external OpenID provider (authorization.issuers); accounts and tokens come from there")

// owner is the account somebody acts for on the hub's own machine: the one that was named, else the first administrator.
func (a *assembly) owner(ctx context.Context, named string) (hub.Owner, error) {
	if a.provider == nil {
		return "", errNoProvider.With("owner", nil)
	}
	if named != "" {
		return hub.Owner(named), nil
	}
	return a.provider.Administrator(ctx)
}

func (a *assembly) token(ctx context.Context, q TokenRequest) (Token, error) {
	owner, err := a.owner(ctx, q.Owner)
	if err != nil {
		return Token{}, err
	}
	text, err := a.provider.IssueToken(ctx, owner, q.Scopes, q.TTL)
	if err != nil {
		return Token{}, err
	}
	claims, err := a.verifier.Verify(ctx, text)
	if err != nil {
		return Token{}, fmt.Errorf("the hub refuses its own token: %w", err)
	}
	return Token{text, claims.Expiry.UTC()}, nil
}

// The socket's calls about accounts are the API's in other words.

func (a *assembly) users(ctx context.Context, _ struct{}) ([]User, error) {
	accounts, err := administration{a}.Accounts(ctx)
	if err != nil {
		return nil, err
	}
	out := []User{}
	for _, acc := range accounts {
		out = append(out, userFrom(acc))
	}
	return out, nil
}

func (a *assembly) addUser(ctx context.Context, q UserRequest) (UserAnswer, error) {
	acc, oneTime, err := administration{a}.AddAccount(ctx, q.Name, q.Password, q.Roles)
	return UserAnswer{userFrom(acc), oneTime}, err
}

func (a *assembly) setPassword(ctx context.Context, q UserRequest) (UserAnswer, error) {
	acc, oneTime, err := administration{a}.SetPassword(ctx, q.Name, q.Password)
	return UserAnswer{userFrom(acc), oneTime}, err
}

func (a *assembly) setRoles(ctx context.Context, q UserRequest) (UserAnswer, error) {
	acc, err := administration{a}.SetRoles(ctx, q.Name, q.Roles)
	return UserAnswer{User: userFrom(acc)}, err
}

func userFrom(acc grpcgateway.Account) User {
	return User{Name: acc.Name, Roles: acc.Roles, MustChange: acc.MustChange}
}

// checkpoint makes a consistent copy of the store below the scratch folder, which is on the same disk, so that it costs
// little; whoever asked copies it elsewhere and releases it. What nobody releases is removed at the next start.
func (a *assembly) checkpoint(ctx context.Context, _ struct{}) (string, error) {
	if a.pebble == nil {
		return "", hub.NewError(hub.Unsupported, "backup-elsewhere",
			"this hub is kept in MongoDB: back that up with MongoDB's tools, and the keys of the certificate authority beside it")
	}
	if err := os.MkdirAll(a.folder.sub(scratchFolder), 0o700); err != nil {
		return "", fmt.Errorf("make the scratch folder: %w", err)
	}
	var name [8]byte
	_, _ = rand.Read(name[:]) // never fails
	path := filepath.Join(scratchFolder, time.Now().UTC().Format("20060102T150405")+"-"+hex.EncodeToString(name[:]))
	if err := a.pebble.Checkpoint(ctx, a.folder.sub(path)); err != nil {
		return "", err
	}
	return path, nil
}

func (a *assembly) releaseCheckpoint(_ context.Context, q releaseRequest) (struct{}, error) {
	// Only what checkpoint made: one level below the scratch folder.
	if filepath.Dir(q.Path) != scratchFolder || filepath.Base(q.Path) == ".." || filepath.Clean(q.Path) != q.Path {
		return struct{}{}, hub.NewError(hub.Invalid, "checkpoint-unknown", "this is no checkpoint")
	}
	return struct{}{}, os.RemoveAll(a.folder.sub(q.Path))
}
