package acker

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

// slow is the store, with a first commit that takes until it is told to go on.
type slow struct {
	*sqlite.Store
	once          sync.Once
	entered, goOn chan struct{}
	sizes         []int // by the one goroutine that commits
}

func (s *slow) Complete(ctx context.Context, facts []ledger.Fact) ([]error, error) {
	s.sizes = append(s.sizes, len(facts))
	s.once.Do(func() {
		close(s.entered)
		<-s.goOn
	})
	return s.Store.Complete(ctx, facts)
}

func newSlow(t *testing.T) *slow {
	store, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "ledger.db")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return &slow{Store: store, entered: make(chan struct{}), goOn: make(chan struct{})}
}

func fact() []ledger.Fact {
	return eventFacts([]capture.Event{{ID: uuid.Must(uuid.NewV7()), Outcome: capture.Processed, Attempt: 1}})
}

// A commit costs an fsync: callers that wait share one.
func TestCallersThatWaitShareACommit(t *testing.T) {
	store := newSlow(t)
	c := newCommitter(store, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	var run, callers sync.WaitGroup
	run.Go(func() { _ = c.run(ctx) })
	submit := func() {
		callers.Go(func() {
			refused, err := c.submit(t.Context(), fact())
			if err != nil || len(refused) > 1 {
				t.Errorf("%v %v", refused, err)
			}
		})
	}
	submit()
	<-store.entered
	for range 100 {
		submit()
	}
	require.Eventually(t, func() bool { return len(c.queue) == 100 }, 20*time.Second, time.Millisecond)
	close(store.goOn)
	callers.Wait()
	cancel()
	run.Wait()
	require.Equal(t, []int{1, 100}, store.sizes)
}

func TestAFullQueueIsRefusedAndAStopAnswersAll(t *testing.T) {
	c := newCommitter(newSlow(t), slog.New(slog.DiscardHandler))
	var callers sync.WaitGroup
	errs := make(chan error, queueLimit)
	for range queueLimit {
		callers.Go(func() {
			_, err := c.submit(t.Context(), fact())
			errs <- err
		})
	}
	require.Eventually(t, func() bool { return len(c.queue) == queueLimit }, 20*time.Second, time.Millisecond)
	_, err := c.submit(t.Context(), fact())
	require.ErrorIs(t, err, errBusy)
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	// The select of a loop that has both to do takes either: until it sees the
	// stop it commits, and afterwards it refuses. Nobody is left waiting.
	close(c.store.(*slow).goOn)
	require.NoError(t, c.run(stopped))
	callers.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			require.ErrorIs(t, err, errStopped)
		}
	}
}
