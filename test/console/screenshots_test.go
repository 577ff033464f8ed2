//go:build screenshots

package console_test

import (
	"os"
	"testing"
)

// TestScreenshots is `make screenshots`.
func TestScreenshots(t *testing.T) {
	installed(t)
	vitest(t, "vitest.e2e.config.ts", "COAPHUB_PROGRAM="+build(t), "COAPHUB_SCREENSHOTS="+os.Getenv("COAPHUB_SCREENSHOTS"))
}
