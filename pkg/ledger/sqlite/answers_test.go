package sqlite_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

// TestAFullDiskKeepsOutcomesWithoutTheirAnswers: what is held back on the disk is
// for the outcomes.
func TestAFullDiskKeepsOutcomesWithoutTheirAnswers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	store, err := sqlite.Open(t.Context(), sqlite.Options{Path: path})
	require.NoError(t, err)
	id := uuid.Must(uuid.NewV7())
	now := time.Now()
	results, err := store.Record(t.Context(), []ledger.Item{{Captured: capture.Captured{Request: &capture.Request{
		ID: id, Route: "default", Ingress: "gw", ReceivedAt: now, Policy: capture.DefaultPolicy(), Head: []byte("POST / HTTP/1.1\r\n\r\n"),
	}}}})
	require.NoError(t, err)
	require.NoError(t, results[0].Err)
	require.NoError(t, store.Close())

	store, err = sqlite.Open(t.Context(), sqlite.Options{Path: path, ReserveBytes: 1 << 60})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	errs, err := store.Complete(t.Context(), []ledger.Fact{{Outcome: &capture.Outcome{
		ID: id, Answer: &capture.Answer{Body: []byte("{}")},
		Attempt: capture.Attempt{Number: 1, StartedAt: now, EndedAt: now, Status: 200, Verdict: capture.Processed},
	}}})
	require.NoError(t, err)
	require.NoError(t, errs[0])
	d, err := store.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, capture.StateProcessed, d.State)
	answers, err := store.Answers(t.Context(), id)
	require.NoError(t, err)
	require.Empty(t, answers)
}
