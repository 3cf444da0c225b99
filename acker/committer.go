package acker

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

const (
	// queueLimit is how many HTTP requests may wait for a commit. A commit takes
	// milliseconds and takes many of them, so a full queue means that the ledger
	// stands still.
	queueLimit = 1024
	// groupLimit is the number of facts at which a commit takes no more requests.
	groupLimit = 1000
	// commitTimeout bounds one commit: longer than the store itself waits for
	// another process's transaction (5 s), shorter than a caller waits.
	commitTimeout = 10 * time.Second
	// waitLimit is how long a caller waits: a commit that is under way and its
	// own.
	waitLimit = 15 * time.Second
)

var (
	errBusy    = errors.New("too many completions wait for the ledger")
	errStopped = errors.New("the acker stops")
)

// submission is one HTTP request's facts, all or none of which are committed
// together.
type submission struct {
	facts []ledger.Fact
	done  chan result // of room one: nobody may be there any more
}

type result struct {
	refused []error // by fact; nil when the store took all
	err     error
}

// committer groups what concurrent callers submit into one commit, so that a
// thousand single completions do not cost a thousand fsyncs.
type committer struct {
	store  Store
	logger *slog.Logger
	queue  chan *submission
}

func newCommitter(store Store, logger *slog.Logger) *committer {
	return &committer{store: store, logger: logger, queue: make(chan *submission, queueLimit)}
}

// submit waits until the facts are committed. An error that is not about the
// facts means that it is not known whether they are; sending them again does no
// harm.
func (c *committer) submit(ctx context.Context, facts []ledger.Fact) ([]error, error) {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	s := &submission{facts: facts, done: make(chan result, 1)}
	select {
	case c.queue <- s:
	default:
		return nil, errBusy
	}
	select {
	case r := <-s.done:
		return r.refused, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// run commits until ctx is done. The HTTP server has stopped by then, so nobody
// submits any more; what still waits, because its caller was cut off, is
// answered.
func (c *committer) run(ctx context.Context) error {
	var failing bool
	for {
		select {
		case <-ctx.Done():
			for {
				select {
				case s := <-c.queue:
					s.done <- result{err: errStopped}
				default:
					return nil
				}
			}
		case first := <-c.queue:
			err := c.commit(ctx, c.group(first))
			if err != nil && !failing {
				c.logger.Error("completions over HTTP are not committed", "err", err)
			} else if err == nil && failing {
				c.logger.Info("completions over HTTP are committed again")
			}
			failing = err != nil
		}
	}
}

// group takes what waits beside the first one.
func (c *committer) group(first *submission) []*submission {
	group, facts := []*submission{first}, len(first.facts)
	for facts < groupLimit {
		select {
		case s := <-c.queue:
			group, facts = append(group, s), facts+len(s.facts)
		default:
			return group
		}
	}
	return group
}

func (c *committer) commit(ctx context.Context, group []*submission) error {
	// A commit under way at the stop is finished.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitTimeout)
	defer cancel()
	var facts []ledger.Fact
	for _, s := range group {
		facts = append(facts, s.facts...)
	}
	refused, err := c.store.Complete(ctx, facts)
	at := 0
	for _, s := range group {
		r := result{err: err}
		if err == nil {
			r.refused = refused[at : at+len(s.facts)]
		}
		at += len(s.facts)
		s.done <- r
	}
	return err
}
