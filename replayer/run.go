package replayer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Ledger is what a run needs of the store.
type Ledger interface {
	ledger.Replayer
	payloads
	lister
	comparer
	Now(ctx context.Context) (time.Time, error)
	getter
	Quarantine(ctx context.Context, id uuid.UUID, reason, detail string) error
	Run(ctx context.Context, id string) (ledger.Run, error)
	Runs(ctx context.Context, cursor string, limit int) ([]ledger.Run, string, error)
}

// Passer is what each page waits for; [*Fence] is the real one.
type Passer interface {
	Pass(ctx context.Context) error
}

// Progress is told how a run goes. Calls do not overlap.
type Progress interface {
	Update(Status)
	Close()
}

// Status is how far a run is.
type Status struct {
	Total int64 // to be sent when it began; 0 until that is known
	ledger.RunCounts
}

// Options of a run. Zero numbers take the defaults of the command.
type Options struct {
	Ledger    Ledger
	Fence     Passer
	Upstreams Upstreams
	Selection Selection
	// Target is empty, or the URL of another system that Upstreams leads to:
	// then attempts change no state.
	Target string
	// Owner names this process among those that hold runs.
	Owner string
	// OrderBy says by which key requests keep their order: empty for the one that
	// was captured, OrderNone for none, "header:NAME" for the value of a header.
	// The route is part of every key.
	OrderBy string
	// PastBlocked goes on with a key though an earlier request of it is open.
	PastBlocked bool
	Concurrency int     // requests in flight, default 4
	Rate        float64 // sends per second, 0 is unlimited
	// Speed sends at the pace at which requests were received, times this factor;
	// 0 has no pace of its own. Pauses are no longer than MaxGap, default 1m,
	// before the factor. Not together with Rate.
	Speed  float64
	MaxGap time.Duration
	// Again makes a new run though one with the same filter and target was left
	// unfinished, and cancels that.
	Again bool
	// Ignore are parts of JSON bodies that a test replay does not compare.
	Ignore      []JSONPath
	MaxAttempts int           // of one request in this run, default 3
	Limit       int           // requests that this process sends at most, 0 is unlimited
	Wait        time.Duration // how long to wait for those that are not yet replayable
	PauseLimit  time.Duration // how long the API may be away, default 5m
	Clock       Clock         // default SystemClock
	Logger      *slog.Logger  // default discards
	Progress    Progress      // default none
	// Stop is closed when nothing more is to be begun. What is in flight is
	// finished and written.
	Stop <-chan struct{}
}

func (o *Options) setDefaults() {
	if o.Concurrency == 0 {
		o.Concurrency = 4
	}
	if o.MaxAttempts == 0 {
		o.MaxAttempts = 3
	}
	if o.MaxGap == 0 {
		o.MaxGap = time.Minute
	}
	if o.PauseLimit == 0 {
		o.PauseLimit = 5 * time.Minute
	}
	if o.Clock == nil {
		o.Clock = SystemClock{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Progress == nil {
		o.Progress = noProgress{}
	}
}

// Numbers of a run.
const (
	// runLease is how long a run stays a dead process's. It bounds how long the
	// next one waits before it picks the run up; it is kept three times in that
	// time, so that one late transaction does not lose it.
	runLease = 10 * time.Second
	// leaseMargin is how much longer than the send timeout the lease of an
	// attempt holds: for a begun attempt to be sent and its result to be written,
	// by a ledger that may be busy for some seconds.
	leaseMargin = 10 * time.Second
	// Delays between passes: what failed is tried again after the first, and
	// twice as long each time.
	firstBackoff = time.Second
	lastBackoff  = 30 * time.Second
	// shortBackoff is the delay where nothing has failed: some wait for a
	// completion event that is on its way, or for another run.
	shortBackoff = 100 * time.Millisecond
	// waitPoll is how often a waiting run looks whether something has become
	// replayable.
	waitPoll = time.Second
	// asideProbe is how often one API is looked after while others are sent to.
	// A connect that gets no answer takes probeTimeout, a sixth of it.
	asideProbe = 30 * time.Second
	// settle bounds the last words of a run to the ledger after it was cut.
	settle = 10 * time.Second
)

// runner is one process's work on one run.
type runner struct {
	Options
	run     ledger.Run
	lease   ledger.RunLease
	writer  *writer
	gates   gates
	limiter *rate.Limiter
	speed   *speed // nil without one
	order   order
	tally   tally

	flying   sync.WaitGroup // attempts
	signal   chan struct{}  // something was posted
	eventsMu sync.Mutex
	events   []event

	turn bool                    // the rate's, for the next request
	halt context.CancelCauseFunc // nothing more is begun, for the given cause

	mu      sync.Mutex // of Progress and total
	total   int64
	touched map[uuid.UUID]struct{} // what was begun, kept when there is a limit
	highest uuid.UUID              // of touched

	// Of the goroutine that goes through the selection:
	aside    map[*api]*Upstream // APIs whose requests are passed over for now
	given    map[*api]error     // APIs that were away for too long, and why
	unrouted map[string]int64   // requests whose route is gone, by route; nil without any
	counted  uuid.UUID          // the highest of them

	blocks      map[orderKey]*block      // of the last pass
	suspects    map[uuid.UUID]*suspicion // requests that may have killed an API
	unexplained map[uuid.UUID]*suspicion // of those, whose last death nothing explains
	guilty      map[uuid.UUID]struct{}   // killers of another target, which are not sent again
	unsent      map[uuid.UUID]int        // attempts that found no connection
	spare       int                      // the most of them that a suspect has had
	killers     []Killer                 // the first ones
	convicted   int64
}

// Run makes or picks up a run and works on it until its selection has been gone
// through, Stop is closed, or something is in the way. When ctx ends, what is in
// flight is no longer waited for. A new run is made behind a passage of the
// fence; a report without a run says that it did not pass. The report tells how
// it ended and the exit code; the error is not nil only when there was no run to
// work on for another reason.
func Run(ctx context.Context, o Options) (Report, error) {
	o.setDefaults()
	begin, halt := context.WithCancelCause(ctx)
	defer halt(nil)
	if o.Stop != nil {
		stopped := make(chan struct{})
		defer func() { <-stopped }()
		over, release := context.WithCancel(begin)
		defer release()
		go func() {
			defer close(stopped)
			select {
			case <-o.Stop:
				halt(ErrInterrupted)
			case <-over.Done():
			}
		}()
	}

	// What a cut run has to say to the ledger is said all the same, in bounded
	// time.
	last, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(settle, cancel) })()

	found, err := openRun(begin, o)
	if fence := (*FenceError)(nil); errors.As(err, &fence) {
		now := o.Clock.Now().UTC()
		report := Report{Target: o.Target, Limit: o.Limit, StartedAt: now, EndedAt: now, End: EndFailed, Reason: err.Error(), ExitCode: ExitFailed}
		report.Next = report.next()
		return report, nil
	}
	if err != nil {
		return Report{}, fmt.Errorf("open run: %w", err)
	}
	r := &runner{
		Options: o, run: found.run, lease: found.lease, halt: halt,
		gates: gates{
			make: func() *gate { return newGate(o.Clock, o.Logger, o.PauseLimit, o.Concurrency) },
			of:   make(map[*api]*gate),
		},
		aside: make(map[*api]*Upstream), given: make(map[*api]error),
		order: order(o.OrderBy), signal: make(chan struct{}, 1),
		suspects: make(map[uuid.UUID]*suspicion), unexplained: make(map[uuid.UUID]*suspicion), guilty: make(map[uuid.UUID]struct{}),
		unsent: make(map[uuid.UUID]int),
	}
	if o.Rate > 0 {
		// A burst of a twentieth of a second: even pacing below 20 a second, and
		// batches worth a transaction above.
		r.limiter = rate.NewLimiter(rate.Limit(o.Rate), max(1, int(o.Rate/20)))
	}
	if o.Speed > 0 {
		r.speed = &speed{factor: o.Speed, maxGap: o.MaxGap}
	}
	if o.Limit > 0 {
		r.touched = make(map[uuid.UUID]struct{})
	}
	report := Report{
		Run: r.run.ID, PickedUp: found.picked, Target: r.run.Target, Filter: r.run.Filter, Limit: o.Limit,
		Unfinished: found.others, StartedAt: o.Clock.Now().UTC(),
	}
	o.Logger.Info("replaying", "run", r.run.ID, "picked_up", found.picked, "filter", describe(r.run.Filter))

	keeping, stopKeeping := context.WithCancel(last)
	var keeper sync.WaitGroup
	keeper.Go(func() {
		// By real time: leases are about what other processes see.
		tick := time.NewTicker(runLease / 3)
		defer tick.Stop()
		r.keep(keeping, tick.C)
	})
	r.writer = newWriter(last, r.lease, o.Ledger, o.Clock, 2*o.Concurrency, r.wrote, halt)

	if left, err := o.Ledger.Left(begin, r.lease); err == nil {
		report.Selected = left.Replayable
		if o.Limit > 0 {
			report.Selected = min(report.Selected, int64(o.Limit))
		}
		r.mu.Lock()
		r.total = report.Selected
		r.mu.Unlock()
	}
	err = r.passes(begin, ctx)
	if cause := context.Cause(begin); cause != nil {
		err = cause
	}
	r.flying.Wait()
	r.writer.close()
	stopKeeping()
	keeper.Wait()
	if cause := context.Cause(begin); err == nil && cause != nil {
		err = cause // of the last results
	}
	o.Progress.Close()
	r.conclude(last, &report, err)
	return report, nil
}

// fenced tells a run that was cancelled from one that another process took.
func (r *runner) fenced(ctx context.Context) error {
	if run, err := r.Ledger.Run(ctx, r.run.ID); err == nil && run.State == ledger.RunCancelled {
		return ErrCancelled
	}
	return ErrLost
}

// passes goes through the selection until nothing in it can be sent any more.
// begin ends when nothing more is to be begun, flight when what is in flight is
// not waited for.
func (r *runner) passes(begin, flight context.Context) error {
	backoff, patience := firstBackoff, r.Wait
	for {
		p, err := r.pass(begin, flight)
		if err != nil {
			return err
		}
		again, err := r.anything(begin)
		if err != nil {
			return err
		}
		if again && p.begun > 0 {
			// Some have failed and have attempts left. Those that were put aside
			// have not: they need not wait for longer than their API asks.
			wait, rest := backoff, time.Duration(0)
			switch {
			case len(r.aside) > 0:
				wait, rest = firstBackoff, backoff-firstBackoff
			case p.failed == 0 && len(p.left) > 0:
				continue // there is more behind the keys that went on
			case p.failed == 0:
				wait = shortBackoff
			case len(p.left) > 0:
				wait = firstBackoff
			}
			if err := r.Clock.Sleep(begin, wait); err != nil {
				return err
			}
			opened, err := r.awaitAPI(begin, rest)
			if err != nil {
				return err
			}
			if !opened && p.failed > 0 {
				backoff = min(backoff*2, lastBackoff)
			}
			continue
		}
		if again && len(r.aside) > 0 {
			// Bounded by Options.PauseLimit.
			if _, err := r.awaitAPI(begin, math.MaxInt64); err != nil {
				return err
			}
			continue
		}
		held := false
		if again && patience > 0 {
			if held, err = p.hopeful(begin); err != nil {
				return err
			}
		}
		if more, err := r.await(begin, &patience, held); err != nil || !more {
			return errors.Join(append([]error{err}, slices.Collect(maps.Values(r.given))...)...)
		}
	}
}

// awaitAPI waits until one of the APIs that were put aside may be sent to, or
// all of them were away for too long, but at most for the given time. It reports
// whether one may be sent to.
func (r *runner) awaitAPI(ctx context.Context, most time.Duration) (bool, error) {
	delay := firstProbe
	for {
		for _, up := range r.aside {
			if open, err := r.try(ctx, up); err != nil || open {
				return open, err
			}
		}
		if len(r.aside) == 0 || most <= 0 {
			return false, nil
		}
		step := min(delay, most)
		if err := r.Clock.Sleep(ctx, step); err != nil {
			return false, err
		}
		most -= step
		delay = min(delay*2, lastProbe)
	}
}

// look asks, in the middle of a pass, after the APIs that were put aside: one
// that only asked to wait is back without a connect, the others are not asked
// often, for a connect that gets no answer holds up the rest.
func (r *runner) look(ctx context.Context) error {
	for _, up := range r.aside {
		if gate := r.gates.before(up); gate.isOpen() || r.since(gate.lastTry()) >= asideProbe {
			if _, err := r.try(ctx, up); err != nil {
				return err
			}
		}
	}
	return nil
}

// try asks whether an API may be sent to. One that was away for too long is
// given up: its requests stay replayable. The error is the cause when ctx ends.
func (r *runner) try(ctx context.Context, up *Upstream) (bool, error) {
	gate := r.gates.before(up)
	open, err := gate.try(ctx, gate.probe(up))
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case err != nil:
		r.given[up.api] = fmt.Errorf("%s: %w", up.addr, err)
		delete(r.aside, up.api)
	case open:
		delete(r.aside, up.api)
	default:
		r.aside[up.api] = up
	}
	return open, nil
}

// await waits until there is something to send again, and takes the time from
// patience. It says no when nothing is waited for, or patience is over. held
// says that something may be sent, but could not be begun: another run has it.
func (r *runner) await(ctx context.Context, patience *time.Duration, held bool) (bool, error) {
	for {
		if !held {
			left, err := r.Ledger.Left(ctx, r.lease)
			if err != nil {
				return false, r.explain(ctx, fmt.Errorf("count what is left: %w", err))
			}
			if left.Waiting == 0 {
				return false, nil
			}
		}
		if *patience <= 0 {
			return false, nil
		}
		step := min(waitPoll, *patience)
		*patience -= step
		if err := r.Clock.Sleep(ctx, step); err != nil {
			return false, err
		}
		if held {
			return true, nil
		}
		if again, err := r.anything(ctx); err != nil || again {
			return again, err
		}
	}
}

// anything reports whether another pass would find something to send.
func (r *runner) anything(ctx context.Context) (bool, error) {
	after := uuid.Nil
	for {
		page, err := r.selectPage(ctx, after, r.MaxAttempts+r.spare)
		if err != nil {
			return false, err
		}
		for _, c := range page {
			switch up, err := r.upstream(c); {
			case err != nil:
				return false, err
			case up != nil && r.given[up.api] == nil && r.within(c.ID):
				return true, nil
			}
		}
		if len(page) < pageSize || r.beyond(page[len(page)-1].ID) {
			return false, nil
		}
		after = page[len(page)-1].ID
	}
}

// upstream gives where a request is sent, nil when its route is gone.
func (r *runner) upstream(c ledger.Candidate) (*Upstream, error) {
	up, err := r.Upstreams.For(c.Route)
	if errors.Is(err, ErrNoUpstream) {
		return nil, nil
	}
	return up, err
}

// routed gives what of a page has a route, and counts the rest.
func (r *runner) routed(page []ledger.Candidate) ([]ledger.Candidate, error) {
	kept := make([]ledger.Candidate, 0, len(page))
	for _, c := range page {
		up, err := r.upstream(c)
		switch {
		case err != nil:
			return nil, err
		case up != nil:
			kept = append(kept, c)
		case bytes.Compare(c.ID[:], r.counted[:]) > 0:
			if r.unrouted == nil {
				r.unrouted = make(map[string]int64)
			}
			if r.unrouted[c.Route]++; r.unrouted[c.Route] == 1 {
				r.Logger.Warn("route is gone, its requests are left alone", "route", printable(c.Route))
			}
			r.counted = c.ID
		}
	}
	return kept, nil
}

// admits reports whether a request may be begun now.
func (r *runner) admits(c ledger.Candidate) bool {
	if _, guilty := r.guilty[c.ID]; guilty {
		return false
	}
	up, err := r.upstream(c)
	return err == nil && up != nil && r.aside[up.api] == nil && r.given[up.api] == nil && r.within(c.ID)
}

// within reports whether the limit lets a request be begun.
func (r *runner) within(id uuid.UUID) bool {
	if r.touched == nil || len(r.touched) < r.Limit {
		return true
	}
	_, ok := r.touched[id]
	return ok
}

// beyond reports whether the limit lets nothing after id be begun.
func (r *runner) beyond(id uuid.UUID) bool {
	return r.touched != nil && len(r.touched) >= r.Limit && bytes.Compare(id[:], r.highest[:]) >= 0
}

func (r *runner) since(t time.Time) time.Duration { return r.Clock.Now().Sub(t) }
