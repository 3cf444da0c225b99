// Package open opens the ledger that HOLDFAST_LEDGER_URL names. It is the one
// place that knows all stores.
package open

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

// Options are what every store understands.
type Options struct {
	// URL is sqlite:// and a path as it stands. The directory of the file is
	// made, 0700, when there is none. It may hold a secret, and stands in no error.
	URL string
	// Retention is how long closed requests are kept: what comes later than that
	// minus a day enters quarantined as late. 0 turns this off; only the recorder
	// needs it.
	Retention time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

// Open opens the ledger, or makes a new one. The caller closes it. Errors:
// ledger.ErrNewerSchema, ledger.ErrDamaged, ledger.ErrUnavailable,
// ledger.ErrFull, and one that names HOLDFAST_LEDGER_URL and what is allowed.
func Open(ctx context.Context, o Options) (ledger.Store, error) {
	path, ok := strings.CutPrefix(o.URL, "sqlite://")
	if !ok || path == "" {
		scheme, _, _ := strings.Cut(o.URL, ":")
		return nil, fmt.Errorf("HOLDFAST_LEDGER_URL: a ledger of scheme %.20q is not supported by this release; write sqlite:// and a path, for instance sqlite:///var/lib/holdfast/ledger.db", scheme)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	return sqlite.Open(ctx, sqlite.Options{Path: path, Retention: o.Retention, Logger: o.Logger})
}
