// Package figures puts what was measured into a document. It must not know what was.
package figures

import (
	"fmt"
	"os"
	"strings"
)

const end = "<!-- end of figures -->"

// Replace puts tables between the marks of a file, of which the first says which make target wrote them.
func Replace(path, target, tables string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	begin := "<!-- figures: written by make " + target + " -->"
	before, rest, ok := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s has not the marks %q and %q", path, begin, end)
	}
	return os.WriteFile(path, []byte(before+begin+"\n\n"+tables+"\n"+end+after), 0o644)
}
