package compare_test

import (
	"os"
	"testing"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// What TestMain has built.
var bin, natsServer string

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, "../..", func(b, n string) { bin, natsServer = b, n }))
}
