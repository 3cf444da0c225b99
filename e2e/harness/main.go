package harness

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/goleak"
)

// buildTime bounds building everything from an empty cache.
const buildTime = 5 * time.Minute

// Main is the whole of a TestMain but for os.Exit: it builds what a System runs,
// from the tree at root, tells built where, runs the tests, and fails them for
// goroutines that are left. It gives the exit code.
func Main(m interface{ Run() int }, root string, built func(bin, natsServer string)) int {
	code, err := runTests(m, root, built)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func runTests(m interface{ Run() int }, root string, built func(bin, natsServer string)) (code int, err error) {
	bin, err := os.MkdirTemp("", "holdfast-bin-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	if root, err = filepath.Abs(root); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildTime)
	defer cancel()
	natsServer, err := Build(ctx, root, bin)
	if err != nil {
		return 0, err
	}
	built(bin, natsServer)
	code = m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		err = goleak.Find()
	}
	return code, err
}
