package bundle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/coaphub/coaphub/internal/store/mongostore"
)

// keepFirstLogin puts the first account's one-time password where its owner finds it: on the terminal (the ready line), or in
// a file that only the hub's user can read. A file that is of no use any more goes. In a cluster whichever process was first has made
// it, in a folder where nobody looks: there the password is one of a Secret's (oauthServer.initialPassword), or is made anew by command.
func (a *assembly) keepFirstLogin(ctx context.Context) error {
	path := a.folder.sub(firstLoginFile)
	if a.first.password == "" {
		a.firstLoginFile(ctx) // the one of an earlier start may still be good
		return nil
	}
	if _, shared := a.store.(*mongostore.Store); shared && !a.terminal {
		a.log.InfoContext(ctx, "the first account has no password that anybody knows: `coaphub user passwd` in any process but a resource-directory's makes one",
			"account", a.first.name)
		return nil
	}
	if a.terminal {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the first login: %w", err)
		}
		return nil
	}
	return writeFile(path, fmt.Appendf(nil, "name: %s\npassword: %s\n", a.first.name, a.first.password))
}

// firstLoginFile is the path of the first login while it is of use: empty once the password was changed.
func (a *assembly) firstLoginFile(ctx context.Context) string {
	path := a.folder.sub(firstLoginFile)
	if _, err := os.Stat(path); err != nil || a.provider == nil {
		return ""
	}
	accounts, err := a.provider.ListUsers(ctx)
	if err != nil {
		return path
	}
	for _, acc := range accounts {
		if acc.Name == a.first.name && acc.MustChange {
			return path
		}
	}
	if err := os.Remove(path); err != nil {
		a.log.Warn("the first login could not be removed", "error", err)
	}
	return ""
}
