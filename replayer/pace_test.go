package replayer_test

import (
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/replayer"
)

// TestFindsWhatTheAPICanBear: an API that takes four at a time, and refuses the
// fifth, gets about four, and everything ends well.
func TestFindsWhatTheAPICanBear(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(300)...)
	var mu sync.Mutex
	now, refused := 0, 0
	// The first rounds are answered when all of them is there: so it is known that
	// the window grows beyond four.
	round, size := 0, 1
	whole, over := make(chan struct{}), make(chan struct{})
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		mu.Lock()
		now++
		mine, wait := now, whole
		if round++; round == size {
			close(whole)
			whole, round, size = make(chan struct{}), 0, 2*size
		}
		if mine > 4 {
			if refused++; refused == 1 {
				close(over)
			}
		}
		mu.Unlock()
		defer func() {
			mu.Lock()
			now--
			mu.Unlock()
		}()
		if mine > 4 {
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		select {
		case <-wait:
		case <-over:
		}
	})
	o := options(t, b, a.URL)
	o.Concurrency, o.MaxAttempts = 64, 50
	report := mustRun(t, o)
	require.Equal(t, int64(300), report.Processed)
	require.Equal(t, int64(refused), report.Failed)
	require.GreaterOrEqual(t, report.Pace.Cuts, 1)
	require.GreaterOrEqual(t, report.Pace.Reached, 5)
	require.Less(t, report.Pace.Reached, 64)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
}
