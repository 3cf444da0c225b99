package replayer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Bounds of waiting for a ledger that is busy or gone for the moment: long
// enough for a restart of a database, shorter than it takes a person to wonder.
const (
	ledgerPatience = 30 * time.Second
	firstRetry     = 50 * time.Millisecond
	lastRetry      = 2 * time.Second
)

// retry calls do until it succeeds, fails for another reason than the ledger's
// absence, or patience is over.
func retry(ctx context.Context, clock Clock, do func() error) error {
	began, delay := clock.Now(), firstRetry
	for {
		err := do()
		if err == nil || !errors.Is(err, ledger.ErrUnavailable) || clock.Now().Sub(began) >= ledgerPatience {
			return err
		}
		if serr := clock.Sleep(ctx, delay); serr != nil {
			return err
		}
		delay = min(delay*2, lastRetry)
	}
}

// ender is the part of the ledger that the writer needs.
type ender interface {
	End(ctx context.Context, l ledger.RunLease, results []ledger.Ended) ([]error, error)
}

// writer writes results in groups: while one transaction runs, the results that
// come meanwhile wait for the next.
type writer struct {
	in   chan ledger.Ended
	done chan struct{}
}

// writeBatch bounds one transaction.
const writeBatch = 256

// newWriter starts a writer. It takes results until close, with room for queue
// of them. wrote is called for each result after its transaction; lost means
// that another process had taken the request's lease, and nothing was written.
// failed is called when a transaction fails for good; the results that follow
// are given up, and their attempts stay unresolved until their leases end.
func newWriter(
	ctx context.Context, l ledger.RunLease, store ender, clock Clock, queue int,
	wrote func(e ledger.Ended, lost bool), failed func(error),
) *writer {
	w := &writer{in: make(chan ledger.Ended, queue), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		broken := false
		for first := range w.in {
			batch := append(make([]ledger.Ended, 0, writeBatch), first)
		gather:
			for len(batch) < writeBatch {
				select {
				case e, ok := <-w.in:
					if !ok {
						break gather
					}
					batch = append(batch, e)
				default:
					break gather
				}
			}
			if broken {
				continue
			}
			var errs []error
			err := retry(ctx, clock, func() (err error) {
				errs, err = store.End(ctx, l, batch)
				return err
			})
			if err != nil {
				broken = true
				failed(fmt.Errorf("write results: %w", err))
				continue
			}
			for i, e := range batch {
				if errs[i] != nil && !errors.Is(errs[i], ledger.ErrFenced) {
					broken = true
					failed(fmt.Errorf("write result of %s: %w", e.ID, errs[i]))
					continue
				}
				wrote(e, errs[i] != nil)
			}
		}
	}()
	return w
}

// add hands a result over. It waits while the queue is full.
func (w *writer) add(e ledger.Ended) {
	w.in <- e
}

// close returns when everything has been written or given up.
func (w *writer) close() {
	close(w.in)
	<-w.done
}
