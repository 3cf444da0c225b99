package open_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/ledger/open"
)

func TestOpensSQLiteInADirectoryThatItMakes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a %20, b", "ledger.db")
	store, err := open.Open(t.Context(), open.Options{URL: "sqlite://" + path})
	require.NoError(t, err)
	require.NoError(t, store.Ping(t.Context()))
	require.NoError(t, store.Close())
	require.FileExists(t, path)
}

func TestRefusesOtherStoresByNameAndKeepsTheSecret(t *testing.T) {
	for _, url := range []string{"postgres://user:secret@host/db", "mysql://x", "sqlite://", "ledger.db", ""} {
		_, err := open.Open(t.Context(), open.Options{URL: url})
		require.ErrorContains(t, err, "HOLDFAST_LEDGER_URL")
		require.ErrorContains(t, err, "sqlite://")
		require.NotContains(t, err.Error(), "secret")
	}
}
