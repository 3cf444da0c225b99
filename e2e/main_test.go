package e2e_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// What TestMain has built: our binaries, and the stock nats and nats-server.
var bin, natsServer, natsCLI string

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, "..", func(b, n string) {
		bin, natsServer, natsCLI = b, n, filepath.Join(filepath.Dir(n), "nats")
	}))
}
