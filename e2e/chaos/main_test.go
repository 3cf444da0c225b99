package chaos_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

var (
	duration = flag.Duration("chaos.duration", 0, "go on with one seed after the other for so long; 0 runs one seed")
	keep     = flag.String("chaos.keep", "", "`directory` that keeps the data and logs of a run that failed")
)

// What TestMain has built, and the seed of the first run.
var (
	bin, natsServer string
	firstSeed       uint64
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	firstSeed = rand.Uint64N(1_000_000)
	if text := os.Getenv("CHAOS_SEED"); text != "" {
		if firstSeed, err = strconv.ParseUint(text, 10, 64); err != nil {
			return 0, fmt.Errorf("CHAOS_SEED: %w", err)
		}
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return 0, err
	}
	if bin, err = os.MkdirTemp("", "holdfast-bin-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if natsServer, err = harness.Build(ctx, root, bin); err != nil {
		return 0, err
	}
	// They wait most of the time, for leases, graces and words.
	if err := flag.Set("test.parallel", "5"); err != nil {
		return 0, err
	}
	code = m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		err = goleak.Find()
	}
	return code, err
}
