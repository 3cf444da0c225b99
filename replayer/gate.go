package replayer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// gate stands before every send of a run. It is shut while the API cannot be
// reached and while the API has asked to be left alone. It is safe for
// concurrent use.
type gate struct {
	clock  Clock
	logger *slog.Logger
	limit  time.Duration

	mu sync.Mutex
	// until is when the API may be asked again.
	until time.Time
	// unreachable says that a probe must succeed before the next send.
	unreachable bool
	// broke says that connections broke: one must hold to be a proof of life.
	broke bool
	// shutSince is when the gate was shut after the last good answer; zero while
	// all is well. The limit counts from it.
	shutSince time.Time
	tried     time.Time // when try was called last
	// troubles are the times that the API seemed to die since its last answer.
	troubles int

	window window // of the goroutine that sends
}

// maxTroubles is how often an API may die without an answer in between and still
// count as well before: several killers may stand side by side. A balancer whose
// APIs are all gone accepts every connect, and proves nothing by it.
const maxTroubles = 10

// newGate makes a gate that asks for a probe before the first send: an API that
// is down costs no attempt. most is how much may be in flight.
func newGate(clock Clock, logger *slog.Logger, limit time.Duration, most int) *gate {
	return &gate{clock: clock, logger: logger, limit: limit, unreachable: true, window: newWindow(most)}
}

// gates has a gate for each API. It is safe for concurrent use.
type gates struct {
	make func() *gate
	mu   sync.Mutex
	of   map[*api]*gate
}

// before gives the gate of the upstream's API.
func (g *gates) before(u *Upstream) *gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	one, ok := g.of[u.api]
	if !ok {
		one = g.make()
		g.of[u.api] = one
	}
	return one
}

// pace says how much was in flight. Nothing is any more.
func (g *gates) pace(concurrency int) Pace {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := Pace{Concurrency: concurrency}
	for _, one := range g.of {
		p.Reached = max(p.Reached, one.window.reached)
		p.Cuts += one.window.cuts
	}
	return p
}

// refused shuts the gate until a connect succeeds.
func (g *gate) refused() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unreachable = true
	g.shut()
}

// askedToWait shuts the gate for d.
func (g *gate) askedToWait(d time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut()
	if until := g.clock.Now().Add(d); until.After(g.until) {
		g.until = until
	}
}

// died notes that an attempt ended as if the API had died: a probe must succeed
// before the next send. broke says that a connection broke.
func (g *gate) died(broke bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.broke = g.broke || broke
	if !g.unreachable {
		g.troubles++
	}
	g.unreachable = true
}

// probe gives what asks after the API at this gate.
func (g *gate) probe(up *Upstream) func(context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.broke {
		return up.Examine
	}
	return up.Probe
}

// doubt asks for a probe before the next send.
func (g *gate) doubt() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unreachable = true
}

// well reports whether the API was well when it was heard of last: an attempt
// that begins now and ends with its death is suspect.
func (g *gate) well() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.unreachable && g.troubles < maxTroubles
}

// answered notes that the API works.
func (g *gate) answered() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.troubles, g.broke = 0, false
	if !g.unreachable && !g.until.After(g.clock.Now()) {
		g.shutSince = time.Time{}
	}
}

func (g *gate) shut() {
	if g.shutSince.IsZero() {
		g.shutSince = g.clock.Now()
	}
}

// isOpen reports whether wait would return at once.
func (g *gate) isOpen() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !g.unreachable && !g.until.After(g.clock.Now())
}

// Probes of an API that cannot be reached: soon at first, for a restart takes
// a second or two, then seldom enough to be no load.
const (
	firstProbe = 250 * time.Millisecond
	lastProbe  = 5 * time.Second
)

// try asks once whether the API may be sent to, and probes it where a
// probe must succeed first. It does not sleep. The error is that of wait.
func (g *gate) try(ctx context.Context, probe func(context.Context) error) (bool, error) {
	g.mu.Lock()
	g.tried = g.clock.Now()
	now, until, unreachable, since := g.tried, g.until, g.unreachable, g.shutSince
	g.mu.Unlock()
	switch {
	case until.After(now):
		if until.Sub(since) > g.limit {
			return false, g.asked(until.Sub(now))
		}
		return false, nil
	case !unreachable:
		return true, nil
	}
	err := probe(ctx)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if errors.Is(err, ErrProduction) {
		return false, err
	}
	if err == nil {
		g.unreachable = false
		return !g.until.After(g.clock.Now()), nil
	}
	if g.shutSince.IsZero() {
		g.logger.Warn("api cannot be reached, its requests wait", "err", err)
	}
	g.shut()
	if g.clock.Now().Sub(g.shutSince) >= g.limit {
		return false, g.away(err)
	}
	return false, nil
}

func (g *gate) lastTry() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tried
}

func (g *gate) asked(pause time.Duration) error {
	return fmt.Errorf("the API asks to wait %s, --pause-limit is %s: %w", pause.Round(time.Second), g.limit, ErrPaused)
}

func (g *gate) away(err error) error {
	return fmt.Errorf("the API could not be reached for %s: %w: %w", g.limit, err, ErrPaused)
}

// wait returns nil when the API may be sent to. probe connects to it. It gives
// an error that wraps [ErrPaused] when the gate was shut for longer than the
// limit, and the cause when ctx ends.
func (g *gate) wait(ctx context.Context, probe func(context.Context) error) error {
	delay := firstProbe
	said := false
	for {
		g.mu.Lock()
		now := g.clock.Now()
		pause, unreachable := g.until.Sub(now), g.unreachable
		since := g.shutSince
		g.mu.Unlock()
		switch {
		case pause > 0:
			if now.Add(pause).Sub(since) > g.limit {
				return g.asked(pause)
			}
			g.logger.Info("pausing, as the api asks", "for", pause)
			if err := g.clock.Sleep(ctx, pause); err != nil {
				return err
			}
		case unreachable:
			err := probe(ctx)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, ErrProduction) {
				return err
			}
			g.mu.Lock()
			if err == nil {
				// The count goes on until an answer comes: an API that accepts and
				// refuses in turn is not well.
				g.unreachable = false
				g.mu.Unlock()
				continue
			}
			g.shut()
			since = g.shutSince
			g.mu.Unlock()
			if !said {
				g.logger.Warn("api cannot be reached, pausing", "err", err)
				said = true
			}
			if left := g.limit - g.clock.Now().Sub(since); left <= 0 {
				return g.away(err)
			} else if err := g.clock.Sleep(ctx, min(delay, left)); err != nil {
				return err
			}
			delay = min(delay*2, lastProbe)
		default:
			return nil
		}
	}
}
