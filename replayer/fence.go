package replayer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Completions is what the fence asks about the completions stream. Both methods
// are safe for concurrent use.
type Completions interface {
	// Last is the sequence of the last message that the stream has stored.
	Last(ctx context.Context) (uint64, error)
	// Floor is the acker's ack floor: it has committed everything up to it.
	Floor(ctx context.Context) (uint64, error)
}

// FenceLedger is what the fence asks the ledger.
type FenceLedger interface {
	Now(ctx context.Context) (time.Time, error)
	Ingresses(ctx context.Context) ([]ledger.Ingress, error)
}

// Fence holds a page back until the ledger knows everything that was durable
// when the page began: what the completions stream held then has passed the
// acker, and every known ingress has said since that it sits on no older
// record. It is safe for concurrent use.
type Fence struct {
	Ledger      FenceLedger
	Completions Completions
	// Ignore names ingresses that are not waited for.
	Ignore []string
	// Timeout bounds one passage.
	Timeout time.Duration
	Clock   Clock
}

// fencePoll is how often the fence looks. An ingress speaks about once a second,
// so that looking more often would only load the broker.
const fencePoll = 200 * time.Millisecond

// Pass returns when everything that was durable when it was called has reached
// the ledger. It gives a [*FenceError] when that takes longer than the timeout,
// and the cause when ctx ends.
func (f *Fence) Pass(ctx context.Context) error {
	began := f.Clock.Now()
	var p passage
	for {
		waits := p.look(ctx, f)
		if len(waits) == 0 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if f.Clock.Now().Sub(began) >= f.Timeout {
			return &FenceError{Waits: waits}
		}
		if err := f.Clock.Sleep(ctx, fencePoll); err != nil {
			return err
		}
	}
}

// passage is one passing of the fence: what it has to see and what it has seen.
type passage struct {
	at      time.Time // by the ledger's clock
	last    uint64
	haveAt  bool
	haveSeq bool
	acker   bool // has passed
	spools  bool // have passed
}

// askTimeout bounds one question to the broker, so that a broker that is gone
// does not keep the ingresses from being named.
const askTimeout = 2 * time.Second

// look gives what is still waited for.
func (p *passage) look(ctx context.Context, f *Fence) []string {
	if !p.haveAt {
		at, err := f.Ledger.Now(ctx)
		if err != nil {
			return []string{"the ledger's clock: " + err.Error()}
		}
		p.at, p.haveAt = at, true
	}
	var waits []string
	if !p.acker {
		wait := p.lookAtAcker(ctx, f)
		if p.acker = wait == ""; !p.acker {
			waits = append(waits, wait)
		}
	}
	if !p.spools {
		found := p.lookAtSpools(ctx, f)
		p.spools = len(found) == 0
		waits = append(waits, found...)
	}
	return waits
}

func (p *passage) lookAtAcker(ctx context.Context, f *Fence) string {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	// The floor first: read in this order it is above the last sequence only
	// after the stream was rolled back (a power cut, a restored volume). The
	// sequences above the last one will then be given again, and a floor that
	// does not know that would let completions pass as committed that are not.
	floor, err := f.Completions.Floor(ctx)
	if err != nil {
		return "the acker cannot be asked for: " + err.Error()
	}
	last, err := f.Completions.Last(ctx)
	if err != nil {
		return "the completions stream cannot be asked for: " + err.Error()
	}
	if !p.haveSeq {
		p.last, p.haveSeq = last, true
	}
	// After a rollback in the middle of the passage the old target is never
	// reached; what was lost with it comes again from spools and publishers.
	p.last = min(p.last, last)
	switch {
	case floor > last:
		return fmt.Sprintf("the acker's consumer is ahead of its stream (%d, the stream ends at %d): the stream was rolled back; restart nats-server, which mends the consumer", floor, last)
	case floor < p.last:
		return fmt.Sprintf("the acker is %d messages behind", p.last-floor)
	}
	return ""
}

func (p *passage) lookAtSpools(ctx context.Context, f *Fence) []string {
	ingresses, err := f.Ledger.Ingresses(ctx)
	if err != nil {
		return []string{"the ledger's list of ingresses: " + err.Error()}
	}
	var waits []string
	for _, i := range ingresses {
		switch {
		case slices.Contains(f.Ignore, i.ID):
		case i.SeenAt.Unix() <= 0:
			waits = append(waits, fmt.Sprintf("ingress %s was never heard from, and requests of it are known (start it, or --ignore-ingress %s)", i.ID, i.ID))
		case i.SeenAt.Before(p.at):
			waits = append(waits, fmt.Sprintf("ingress %s was not heard from since %s (start it, or --ignore-ingress %s)", i.ID, stamp(i.SeenAt), i.ID))
		case !i.OldestUnreleased.IsZero() && i.OldestUnreleased.Before(p.at):
			waits = append(waits, fmt.Sprintf("ingress %s has %d records unreleased, the oldest since %s", i.ID, i.Unreleased, stamp(i.OldestUnreleased)))
		}
	}
	return waits
}

// JetStream asks a NATS server. It needs STREAM.INFO and CONSUMER.INFO of the
// completions stream and nothing else.
type JetStream struct {
	JS jetstream.JetStream
}

// Last implements [Completions].
func (j JetStream) Last(ctx context.Context) (uint64, error) {
	s, err := j.JS.Stream(ctx, capture.CompletionsStream)
	if err != nil {
		return 0, unreachable(err)
	}
	return s.CachedInfo().State.LastSeq, nil
}

// Floor implements [Completions].
func (j JetStream) Floor(ctx context.Context) (uint64, error) {
	c, err := j.JS.Consumer(ctx, capture.CompletionsStream, capture.AckerDurable)
	if err != nil {
		return 0, unreachable(err)
	}
	return c.CachedInfo().AckFloor.Stream, nil
}

// unreachable says in words what the client library says as a deadline.
func unreachable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("nats does not answer: %w", err)
	}
	return err
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
