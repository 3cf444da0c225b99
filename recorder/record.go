package recorder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// recordStore is what a commit needs.
type recordStore interface {
	Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error)
	SetAside(ctx context.Context, messages []ledger.Aside) error
}

const (
	// kind of what is set aside here.
	kindCapture = "capture"
	// commitTimeout bounds one try at a batch: some MiB take well below a second,
	// and a store that is locked says so by itself after a few.
	commitTimeout = 30 * time.Second
)

// writer commits batches. It is not safe for concurrent use: the loop that
// consumes hands over one batch at a time.
type writer struct {
	store   recordStore
	words   *stream.Words
	metrics *metrics
	log     *slog.Logger

	decoder capture.Decoder
	items   []ledger.Item // reused from batch to batch
	at      []int         // items[i] is message at[i] of the batch
}

// commit is a [stream.Handler].
func (w *writer) commit(ctx context.Context, batch []stream.Msg) error {
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	err := w.try(ctx, batch)
	w.metrics.committed(err)
	return err
}

func (w *writer) try(ctx context.Context, batch []stream.Msg) error {
	// What was held for the last batch must not keep its messages in memory.
	defer func() { clear(w.items) }()
	w.items, w.at = w.items[:0], w.at[:0]
	var refs []capture.SpoolRef
	var aside []ledger.Aside
	refuse := func(i int, ref capture.SpoolRef, reason error) {
		aside = append(aside, batch[i].Aside(kindCapture, reason))
		batch[i].Terminate(reason.Error())
		refs = append(refs, ref) // set aside is durable too
	}
	for i := range batch {
		m := &batch[i]
		// Without a ref nobody waits for a word.
		ref, _ := capture.ParseSpoolRef(m.Header)
		captured, err := w.decoder.Decode(m.Subject, m.Header, m.Data)
		if err != nil {
			refuse(i, ref, err)
			continue
		}
		w.items, w.at = append(w.items, ledger.Item{Captured: captured, Ref: ref}), append(w.at, i)
	}
	if len(w.items) > 0 {
		results, err := w.store.Record(ctx, w.items)
		if err != nil {
			return steady("record", err)
		}
		for i := range results {
			refs = append(refs, results[i].Released...)
			if results[i].Err != nil {
				refuse(w.at[i], w.items[i].Ref, results[i].Err)
			}
		}
	}
	if len(aside) > 0 {
		if err := w.store.SetAside(ctx, aside); err != nil {
			return steady("set aside", err)
		}
		w.log.Warn("messages were set aside", "kind", kindCapture, "count", len(aside), "subject", aside[0].Subject, "err", aside[0].Reason)
	}
	// All of it is durable now, and not before.
	w.words.Add(refs...)
	w.words.Publish()
	return nil
}

// steady drops from the error what changes from try to try, such as how many
// bytes are free, so that a condition that lasts is logged once.
func steady(what string, err error) error {
	if errors.Is(err, ledger.ErrFull) {
		err = ledger.ErrFull
	}
	return fmt.Errorf("%s: %w", what, err)
}
