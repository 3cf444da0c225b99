package sqlite_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/ledgertest"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

func TestConformance(t *testing.T) {
	ledgertest.Run(t, func(t testing.TB, o ledgertest.Options) ledger.Store {
		s, err := sqlite.Open(context.Background(), sqlite.Options{
			Path: filepath.Join(o.Dir, "ledger.db"), Now: o.Now, Retention: o.Retention, MaxEarly: o.MaxEarly,
		})
		require.NoError(t, err)
		return s
	})
}
