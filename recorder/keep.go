package recorder

import (
	"context"
	"log/slog"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
)

const (
	// watchEvery is how often the ledger is asked for its state and counts, and
	// so how old the metrics may be; lookTimeout bounds one look.
	watchEvery, lookTimeout = 2 * time.Second, 5 * time.Second
	// expireEvery is how often housekeeping looks for what may go. Bounds on
	// bytes are kept within what comes in during that time.
	expireEvery = 10 * time.Second
	// expireBatch is how many requests one transaction of housekeeping takes, and
	// expirePause how long writers have the ledger to themselves in between.
	expireBatch, expirePause = 500, 20 * time.Millisecond
)

// watchStore is what the watcher asks.
type watchStore interface {
	Ping(ctx context.Context) error
	Stats(ctx context.Context) (ledger.Stats, error)
}

// watcher keeps readiness and metrics up to date.
type watcher struct {
	store   watchStore
	metrics *metrics
	ledger  *service.Flag
	log     *slog.Logger
}

func (w *watcher) run(ctx context.Context) error {
	failing := false
	for ctx.Err() == nil {
		err := w.look(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			w.ledger.NotReady(err.Error())
			if !failing {
				w.log.Warn("the ledger does not answer", "err", err)
			}
		default:
			w.ledger.Ready()
			if failing {
				w.log.Info("the ledger answers again")
			}
		}
		failing = err != nil
		wait(ctx, watchEvery)
	}
	return nil
}

func (w *watcher) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	stats, err := w.store.Stats(ctx)
	if err != nil {
		// Better no figures than old ones.
		w.metrics.stats.Store(nil)
		return err
	}
	w.metrics.stats.Store(&stats)
	return w.store.Ping(ctx)
}

// expirer deletes what may go.
type expirer struct {
	store ledger.Keeper
	keep  ledger.Retention
	log   *slog.Logger
}

func (e *expirer) run(ctx context.Context) error {
	failing := false
	for ctx.Err() == nil {
		deleted, err := e.pass(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			e.log.Warn("nothing expires", "err", err)
		case deleted > 0:
			e.log.Debug("requests expired", "count", deleted)
		}
		failing = err != nil
		wait(ctx, expireEvery)
	}
	return nil
}

// pass deletes until there is nothing more to delete.
func (e *expirer) pass(ctx context.Context) (deleted int, err error) {
	for more := true; more && ctx.Err() == nil; {
		var n int
		bounded, cancel := context.WithTimeout(ctx, commitTimeout)
		n, more, err = e.store.Expire(bounded, e.keep, expireBatch)
		cancel()
		if err != nil {
			return deleted, err
		}
		deleted += n
		if more {
			wait(ctx, expirePause)
		}
	}
	return deleted, nil
}
