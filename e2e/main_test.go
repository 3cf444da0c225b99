package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// What TestMain has built: our binaries, and the stock nats and nats-server.
var bin, natsServer, natsCLI string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// run builds what the scenarios run; see harness.Build.
func run(m *testing.M) (code int, err error) {
	if bin, err = os.MkdirTemp("", "holdfast-bin-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	root, err := filepath.Abs("..")
	if err != nil {
		return 0, err
	}
	if natsServer, err = harness.Build(context.Background(), root, bin); err != nil {
		return 0, err
	}
	natsCLI = filepath.Join(filepath.Dir(natsServer), "nats")
	code = m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		err = goleak.Find()
	}
	return code, err
}
