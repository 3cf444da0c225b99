package replayer

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

// TestTheKeeperSeesThatTheRunIsLost: between two pages nothing else would.
func TestTheKeeperSeesThatTheRunIsLost(t *testing.T) {
	for want, happen := range map[error]func(t *testing.T, s *sqlite.Store, id string, later func()){
		ErrCancelled: func(t *testing.T, s *sqlite.Store, id string, _ func()) {
			require.NoError(t, s.CancelRun(t.Context(), id))
		},
		ErrLost: func(t *testing.T, s *sqlite.Store, _ string, later func()) {
			later()
			_, _, picked, err := s.OpenRun(t.Context(), ledger.Filter{Replayable: true}, "", "another", time.Minute)
			require.NoError(t, err)
			require.True(t, picked)
		},
	} {
		t.Run(want.Error(), func(t *testing.T) {
			ahead := time.Duration(0)
			store, err := sqlite.Open(t.Context(), sqlite.Options{
				Path: filepath.Join(t.TempDir(), "ledger.db"), Now: func() time.Time { return time.Now().Add(ahead) },
			})
			require.NoError(t, err)
			defer func() { require.NoError(t, store.Close()) }()
			run, lease, _, err := store.OpenRun(t.Context(), ledger.Filter{Replayable: true}, "", "me", runLease)
			require.NoError(t, err)

			begin, halt := context.WithCancelCause(t.Context())
			o := Options{Ledger: store}
			o.setDefaults()
			r := &runner{Options: o, run: run, lease: lease, halt: halt}
			tick := make(chan time.Time)
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				r.keep(ctx, tick)
			}()
			tick <- time.Now()
			tick <- time.Now() // taken after the first was dealt with
			require.NoError(t, begin.Err())
			kept, err := store.Run(t.Context(), run.ID)
			require.NoError(t, err)
			require.False(t, kept.LeaseUntil.Before(run.LeaseUntil))
			stop()
			<-done

			happen(t, store, run.ID, func() { ahead = time.Hour })
			tick = make(chan time.Time, 1)
			tick <- time.Now()
			r.keep(t.Context(), tick)
			require.ErrorIs(t, context.Cause(begin), want)
		})
	}
}
