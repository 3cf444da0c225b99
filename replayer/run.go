package replayer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/time/rate"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Ledger is what a run needs of the store.
type Ledger interface {
	ledger.Replayer
	payloads
	lister
	Now(ctx context.Context) (time.Time, error)
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
	// Probe connects to the API, to see whether it can be reached.
	Probe     func(context.Context) error
	Selection Selection
	// Target is empty, or the URL of another system that Upstreams leads to:
	// then attempts change no state.
	Target string
	// Owner names this process among those that hold runs.
	Owner       string
	Concurrency int           // requests in flight, default 4
	Rate        float64       // sends per second, 0 is unlimited
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
	// pageSize and pageAge bound how much, and for how long, is sent behind one
	// passage of the fence; fenceAge how long ago that may have begun.
	pageSize = 200
	pageAge  = 2 * time.Second
	fenceAge = 5 * time.Second
	// beginBatch bounds how many attempts one transaction begins. All of them
	// have a free place, so that they are sent at once.
	beginBatch = 64
	// Delays between passes: what failed is tried again after the first, and
	// twice as long each time.
	firstBackoff = time.Second
	lastBackoff  = 30 * time.Second
	// waitPoll is how often a waiting run looks whether something has become
	// replayable.
	waitPoll = time.Second
	// settle bounds the last words of a run to the ledger after it was cut.
	settle = 10 * time.Second
)

// runner is one process's work on one run.
type runner struct {
	Options
	run     ledger.Run
	lease   ledger.RunLease
	writer  *writer
	gate    *gate
	limiter *rate.Limiter
	places  chan struct{} // one element for each request in flight
	tally   tally
	turn    bool                    // the rate's, for the next request
	halt    context.CancelCauseFunc // nothing more is begun, for the given cause

	mu      sync.Mutex // of Progress and total
	total   int64
	touched map[uuid.UUID]struct{} // what was begun, kept when there is a limit
	highest uuid.UUID              // of touched
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
		gate:   newGate(o.Clock, o.Logger, o.PauseLimit),
		places: make(chan struct{}, o.Concurrency),
	}
	if o.Rate > 0 {
		// A burst of a twentieth of a second: even pacing below 20 a second, and
		// batches worth a transaction above.
		r.limiter = rate.NewLimiter(rate.Limit(o.Rate), max(1, int(o.Rate/20)))
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
	r.drain()
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

// opened is a run to work on.
type opened struct {
	run    ledger.Run
	lease  ledger.RunLease
	picked bool     // it had been begun before
	others []string // ids of runs that are unfinished too
}

// openRun picks up the unfinished run of this selection, or makes one.
func openRun(ctx context.Context, o Options) (found opened, err error) {
	var now time.Time
	err = retry(ctx, o.Clock, func() (err error) {
		now, err = o.Ledger.Now(ctx)
		return err
	})
	if err != nil {
		return opened{}, err
	}
	filter := o.Selection.Resolve(now)
	unfinished, err := activeRuns(ctx, o.Ledger)
	if err != nil {
		return opened{}, err
	}
	free := false
	for _, r := range unfinished {
		if free {
			found.others = append(found.others, r.ID)
			continue
		}
		if r.Target != o.Target || !o.Selection.Same(r) {
			o.Logger.Info("another run is unfinished", "run", r.ID, "created_at", stamp(r.CreatedAt),
				"filter", describe(r.Filter), "target", r.Target, "owner", r.Owner)
			found.others = append(found.others, r.ID)
			continue
		}
		if free, err = abandoned(ctx, o, r); err != nil {
			return opened{}, err
		}
		if free {
			filter = r.Filter
			continue
		}
		found.others = append(found.others, r.ID)
		o.Logger.Info("another process works on a run with the same filter", "run", r.ID, "owner", r.Owner)
	}
	if !free {
		// A new selection is frozen once all that was durable anywhere when the
		// command began is in the ledger: else it would leave out what a recorder
		// that was away has yet to take, and call the rest everything.
		if err := o.Fence.Pass(ctx); err != nil {
			return opened{}, err
		}
	}
	err = retry(ctx, o.Clock, func() (err error) {
		found.run, found.lease, found.picked, err = o.Ledger.OpenRun(ctx, filter, o.Target, o.Owner, runLease)
		return err
	})
	if err != nil {
		return opened{}, err
	}
	return found, nil
}

// activeRuns gives the unfinished runs, the oldest first.
func activeRuns(ctx context.Context, l Ledger) ([]ledger.Run, error) {
	var active []ledger.Run
	cursor := ""
	for {
		runs, next, err := l.Runs(ctx, cursor, 1000)
		if err != nil {
			return nil, fmt.Errorf("list runs: %w", err)
		}
		for _, r := range runs {
			if r.State == ledger.RunActive {
				active = append(active, r)
			}
		}
		if next == "" {
			slices.SortFunc(active, func(a, b ledger.Run) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
			return active, nil
		}
		cursor = next
	}
}

// abandoned reports whether nobody works on the run any more. A process that was
// killed leaves a lease behind: its run is watched until the lease is renewed,
// which only the living do, or over.
func abandoned(ctx context.Context, o Options, r ledger.Run) (bool, error) {
	until := r.LeaseUntil
	said := false
	for {
		now, err := o.Ledger.Now(ctx)
		if err != nil {
			return false, err
		}
		if !until.After(now) {
			return true, nil
		}
		if !said {
			o.Logger.Info("waiting to see whether an unfinished run is still worked on", "run", r.ID, "owner", r.Owner, "until", stamp(until))
			said = true
		}
		if err := o.Clock.Sleep(ctx, min(until.Sub(now), runLease/10)); err != nil {
			return false, err
		}
		seen, err := o.Ledger.Run(ctx, r.ID)
		switch {
		case err != nil:
			return false, err
		case seen.State != ledger.RunActive || seen.LeaseUntil.After(until):
			return false, nil
		}
		until = seen.LeaseUntil // a holder that leaves makes it earlier
	}
}

// keep extends the run's lease at each tick until ctx ends or the lease is lost.
func (r *runner) keep(ctx context.Context, tick <-chan time.Time) {
	held := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		asked := time.Now()
		run, err := r.Ledger.KeepRun(ctx, r.lease, runLease)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && run.State == ledger.RunCancelled:
			r.halt(ErrCancelled)
			return
		case err == nil:
			held = asked
		case errors.Is(err, ledger.ErrFenced):
			r.halt(r.fenced(ctx))
			return
		case time.Since(held) >= runLease:
			r.halt(fmt.Errorf("keep run: %w", err))
			return
		default:
			r.Logger.Warn("lease of the run could not be extended", "err", err)
		}
	}
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
		begun, err := r.pass(begin, flight)
		if err != nil {
			return err
		}
		r.drain()
		again, err := r.anything(begin)
		if err != nil {
			return err
		}
		if again && begun > 0 {
			// Some have failed and have attempts left.
			if err := r.Clock.Sleep(begin, backoff); err != nil {
				return err
			}
			backoff = min(backoff*2, lastBackoff)
			continue
		}
		if more, err := r.await(begin, &patience, again); err != nil || !more {
			return err
		}
	}
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
		page, err := r.selectPage(ctx, after)
		if err != nil {
			return false, err
		}
		for _, c := range page {
			if r.admits(c.ID) {
				return true, nil
			}
		}
		if len(page) < pageSize || r.beyond(page[len(page)-1].ID) {
			return false, nil
		}
		after = page[len(page)-1].ID
	}
}

// admits reports whether the limit lets a request be begun.
func (r *runner) admits(id uuid.UUID) bool {
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

func (r *runner) selectPage(ctx context.Context, after uuid.UUID) ([]ledger.Candidate, error) {
	var page []ledger.Candidate
	err := retry(ctx, r.Clock, func() (err error) {
		page, err = r.Ledger.Select(ctx, r.lease, r.MaxAttempts, after, pageSize)
		return err
	})
	if err != nil {
		return nil, r.explain(ctx, fmt.Errorf("select: %w", err))
	}
	return page, nil
}

// explain gives the cause where ctx has ended, and says what a lost lease means.
func (r *runner) explain(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, ledger.ErrFenced):
		return r.fenced(ctx)
	}
	return err
}

// pass goes through the selection once, page by page, each behind its own
// passage of the fence, and says how many attempts it has begun.
func (r *runner) pass(begin, flight context.Context) (int, error) {
	total := 0
	after := uuid.Nil
	passage := r.passFence(begin)
	defer func() { passage.abandon() }()
	for {
		if err := passage.wait(begin); err != nil {
			return total, err
		}
		page, err := r.selectPage(begin, after)
		if err != nil || len(page) == 0 {
			return total, err
		}
		// The next page's fence costs no throughput while this page is sent.
		passage = r.passFence(begin)
		n, last, err := r.page(begin, flight, page)
		total += n
		if err != nil {
			return total, err
		}
		cut := last != page[len(page)-1].ID
		if len(page) < pageSize && !cut || r.beyond(last) {
			return total, nil
		}
		if r.since(passage.began) >= fenceAge {
			// The run has paused meanwhile.
			passage.abandon()
			passage = r.passFence(begin)
		}
		if cut && last == uuid.Nil {
			continue // nothing of it was sent
		}
		after = last
	}
}

func (r *runner) since(t time.Time) time.Duration { return r.Clock.Now().Sub(t) }

// fencePassage is a passage of the fence on its own goroutine.
type fencePassage struct {
	began  time.Time
	cancel context.CancelFunc
	err    chan error
}

func (r *runner) passFence(ctx context.Context) *fencePassage {
	ctx, cancel := context.WithCancel(ctx)
	p := &fencePassage{began: r.Clock.Now(), cancel: cancel, err: make(chan error, 1)}
	go func() { p.err <- r.Fence.Pass(ctx) }()
	return p
}

func (p *fencePassage) wait(ctx context.Context) error {
	err := <-p.err
	p.err <- nil // for abandon
	p.cancel()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

func (p *fencePassage) abandon() {
	p.cancel()
	<-p.err
}

// schedule decides in which company the candidates of a page are sent. Those
// whose last attempt never ended go alone: whoever sent them died, perhaps of
// them. Order by key and the isolation of killers have their place here.
func schedule(page []ledger.Candidate) (together, alone []ledger.Candidate) {
	for _, c := range page {
		if c.Unresolved {
			alone = append(alone, c)
		} else {
			together = append(together, c)
		}
	}
	return together, alone
}

// page sends a page, and says how many attempts it has begun and up to which id
// it came: the page's last, or less when the page has grown too old, because it
// is large or the run has paused.
func (r *runner) page(begin, flight context.Context, page []ledger.Candidate) (int, uuid.UUID, error) {
	together, alone := schedule(page)
	selected := r.Clock.Now()
	last := page[len(page)-1].ID
	begun := 0
	send := func(from []ledger.Candidate, most int) (int, error) {
		took, n, err := r.batch(begin, flight, from, most, func() error { return r.ready(begin, selected, begun == 0) })
		begun += n
		return took, err
	}
	for len(together) > 0 {
		took, err := send(together, beginBatch)
		if errors.Is(err, errOld) {
			last = previous(page, together[0].ID)
			break
		}
		if err != nil {
			return begun, last, err
		}
		together = together[took:]
	}
	for _, c := range alone {
		if bytes.Compare(c.ID[:], last[:]) > 0 {
			break
		}
		r.drain()
		_, err := send([]ledger.Candidate{c}, 1)
		if errors.Is(err, errOld) {
			last = previous(page, c.ID)
			break
		}
		if err != nil {
			return begun, last, err
		}
		r.drain()
	}
	return begun, last, nil
}

// errOld says that a page has grown too old to send more of it.
var errOld = errors.New("page is too old")

// ready waits until one request may be sent: for its turn by the rate, and for
// the API. A page that has grown old meanwhile gives errOld, and the turn is
// kept for the next; but the first of a page goes if it did not have to wait, so
// that a slow fence does not stop a run.
func (r *runner) ready(ctx context.Context, selected time.Time, first bool) error {
	waited := false
	if !r.turn {
		waited = true
		if err := r.pace(ctx); err != nil {
			return err
		}
		r.turn = true
	}
	if !r.gate.isOpen() {
		waited = true
		if err := r.gate.wait(ctx, r.Probe); err != nil {
			return err
		}
	}
	if r.since(selected) >= pageAge && (waited || !first) {
		return errOld
	}
	return nil
}

// previous gives the id before id in the page.
func previous(page []ledger.Candidate, id uuid.UUID) uuid.UUID {
	last := uuid.Nil
	for _, c := range page {
		if c.ID == id {
			break
		}
		last = c.ID
	}
	return last
}

// batch waits for a place and until it is ready, begins the first candidate and
// those after it for which there is a place right now, and sends them. It says
// how many candidates it took and how many of them were begun.
func (r *runner) batch(
	begin, flight context.Context, from []ledger.Candidate, most int, ready func() error,
) (took, begun int, err error) {
	for took < len(from) && !r.admits(from[took].ID) {
		took++
	}
	if took == len(from) {
		return took, 0, nil
	}
	select {
	case r.places <- struct{}{}:
	case <-begin.Done():
		return took, 0, context.Cause(begin)
	}
	places := 1
	defer func() {
		for range places {
			<-r.places
		}
	}()
	// With a place at hand: whatever the last answer said of the API is known.
	if err := ready(); err != nil {
		return 0, 0, err
	}
	r.turn = false
	chosen := []ledger.Candidate{from[took]}
	r.touch(from[took].ID)
	took++
more:
	for took < len(from) && len(chosen) < most && r.admits(from[took].ID) {
		select {
		case r.places <- struct{}{}:
			places++
		default:
			break more
		}
		if !r.gate.isOpen() || r.limiter != nil && !r.limiter.AllowN(r.Clock.Now(), 1) {
			break
		}
		chosen = append(chosen, from[took])
		r.touch(from[took].ID)
		took++
	}
	opts := ledger.BeginOptions{MaxAttempts: r.MaxAttempts}
	ids := make([]uuid.UUID, len(chosen))
	for i, c := range chosen {
		ids[i] = c.ID
		opts.Lease = max(opts.Lease, c.Policy.Timeout+leaseMargin)
	}
	var results []ledger.Begun
	err = retry(begin, r.Clock, func() (err error) {
		results, err = r.Ledger.Begin(begin, r.lease, ids, opts)
		return err
	})
	if err != nil {
		return took, 0, r.explain(begin, fmt.Errorf("begin attempts: %w", err))
	}
	for i, b := range results {
		if b.Skip != "" {
			r.tally.skipped()
			delete(r.touched, b.ID)
			r.Logger.Debug("not begun", "request_id", b.ID, "reason", b.Skip)
			continue
		}
		begun++
		places-- // the attempt gives it back
		go r.attempt(begin, flight, chosen[i], b)
	}
	return took, begun, nil
}

func (r *runner) touch(id uuid.UUID) {
	if r.touched == nil {
		return
	}
	r.touched[id] = struct{}{}
	if bytes.Compare(id[:], r.highest[:]) > 0 {
		r.highest = id
	}
}

func (r *runner) pace(ctx context.Context) error {
	if r.limiter == nil {
		return nil
	}
	now := r.Clock.Now()
	delay := r.limiter.ReserveN(now, 1).DelayFrom(now)
	if delay <= 0 {
		return nil
	}
	return r.Clock.Sleep(ctx, delay)
}

// drain returns when nothing is in flight and all results are written.
func (r *runner) drain() {
	defer r.writer.flush()
	for range cap(r.places) {
		r.places <- struct{}{}
	}
	for range cap(r.places) {
		<-r.places
	}
}

// attempt sends one begun request and hands its result to the writer.
func (r *runner) attempt(begin, flight context.Context, c ledger.Candidate, b ledger.Begun) {
	defer func() { <-r.places }()
	a := capture.Attempt{Number: b.Attempt, Run: r.run.ID, StartedAt: r.Clock.Now().UTC()}
	got, sent := r.send(begin, flight, c, b, a)
	a.EndedAt = r.Clock.Now().UTC()
	a.Status = got.status
	if got.err != nil {
		a.Error = got.err.Error()
	}
	a.Verdict = c.Policy.Verdict(got.status, got.whole, true)
	if sent {
		r.tally.sent()
		r.shape(got)
	}
	r.writer.add(ledger.Ended{ID: b.ID, Token: b.Token, Attempt: a})
}

// send sends unless that is no longer allowed.
func (r *runner) send(begin, flight context.Context, c ledger.Candidate, b ledger.Begun, a capture.Attempt) (got answer, sent bool) {
	if begin.Err() != nil {
		return answer{err: fmt.Errorf("not sent: %w", context.Cause(begin))}, false
	}
	up, err := r.Upstreams.For(c.Route)
	if err != nil {
		return answer{err: fmt.Errorf("not sent: %w", err)}, false
	}
	// On its own goroutine, so that a cut run need not wait for the API. The
	// goroutine ends by the timeout.
	done := make(chan answer, 1)
	go func() { done <- up.send(flight, r.Ledger, c, a, b.Expires) }()
	select {
	case got = <-done:
		return got, !got.unsent
	case <-flight.Done():
		return answer{err: errors.New("interrupted before the answer came")}, true
	}
}

// shape lets an answer shape the pace of the run.
func (r *runner) shape(got answer) {
	switch wait, ok := waitOf(got.retryAfter, r.Clock.Now()); {
	case got.unconnected:
		r.gate.refused()
	case ok && (got.status == 429 || got.status == 503):
		r.gate.askedToWait(wait)
	case got.whole:
		r.gate.answered()
	}
}

// wrote counts a result that is in the ledger, or that somebody else's lease
// kept out of it.
func (r *runner) wrote(e ledger.Ended, lost bool) {
	if lost {
		r.Logger.Warn("result came after the lease was lost", "request_id", e.ID, "attempt", e.Attempt.Number)
		return
	}
	r.tally.ended(e)
	counts, _ := r.tally.read()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Progress.Update(Status{Total: r.total, RunCounts: counts})
}

// conclude fills the report and tells the ledger how the run ended.
func (r *runner) conclude(ctx context.Context, report *Report, err error) {
	report.RunCounts, report.Failures = r.tally.read()
	report.EndedAt = r.Clock.Now().UTC()
	report.Seconds = report.EndedAt.Sub(report.StartedAt).Seconds()
	if report.Seconds > 0 {
		report.Rate = float64(report.Sent) / report.Seconds
	}
	report.End = EndFinished
	switch {
	case err == nil:
	case errors.Is(err, ErrInterrupted) || errors.Is(err, context.Canceled):
		report.End = EndInterrupted
	case errors.Is(err, ErrCancelled):
		report.End = EndCancelled
	case errors.Is(err, ErrPaused):
		report.End, report.Reason = EndPaused, err.Error()
	default:
		report.End, report.Reason = EndFailed, err.Error()
	}
	if run, rerr := r.Ledger.Run(ctx, r.run.ID); rerr == nil {
		report.Total = run.Counts
	}
	left, lerr := r.left(ctx)
	report.Left = left
	if lerr == nil && report.End == EndFinished {
		report.Newer, lerr = r.newer(ctx)
	}
	if lerr != nil && report.End == EndFinished {
		report.End, report.Reason = EndFailed, "count what is left: "+lerr.Error()
	}
	report.ExitCode = report.exitCode()
	report.Next = report.next()

	// A run that did not go through its selection is left for the next process.
	var cerr error
	switch report.End {
	case EndFinished, EndCancelled: // which stays cancelled
		var body []byte
		if body, cerr = json.Marshal(report); cerr == nil {
			cerr = retry(ctx, r.Clock, func() error { return r.Ledger.EndRun(ctx, r.lease, body) })
		}
	default:
		cerr = r.Ledger.LeaveRun(ctx, r.lease)
	}
	if cerr != nil && !errors.Is(cerr, ledger.ErrFenced) {
		r.Logger.Warn("run could not be ended in the ledger", "run", r.run.ID, "err", cerr)
	}
}

// exitCode gives the command's exit code but for signals, whose number the
// command knows.
func (r *Report) exitCode() int {
	switch {
	case r.End == EndFailed:
		return ExitFailed
	case r.End != EndFinished:
		return ExitReplayable
	case r.Left.Replayable > 0 || r.Left.Waiting > 0:
		return ExitReplayable
	case r.Left.Rejected > 0 || r.Left.Quarantined > 0:
		return ExitHeld
	}
	return ExitOK
}

// left counts what is left: of the run's selection, or with a limit of what this
// process has begun.
func (r *runner) left(ctx context.Context) (LeftCounts, error) {
	if r.touched == nil {
		left, err := r.Ledger.Left(ctx, r.lease)
		return LeftCounts{
			Replayable: left.Replayable, Waiting: left.Waiting, Quarantined: left.Quarantined, Rejected: left.Rejected,
		}, err
	}
	ids := make([]uuid.UUID, 0, len(r.touched))
	for id := range r.touched {
		ids = append(ids, id)
	}
	var left LeftCounts
	for part := range slices.Chunk(ids, 500) {
		err := each(ctx, r.Ledger, ledger.Filter{IDs: part}, func(q ledger.Request) {
			switch {
			case q.State == capture.StateQuarantined:
				left.Quarantined++
			case q.State == capture.StateRejected:
				left.Rejected++
			case q.Replayable:
				left.Replayable++
			case q.State.Open():
				left.Waiting++
			}
		})
		if err != nil {
			return left, err
		}
	}
	return left, nil
}

// newer reports whether requests match that came after the selection was frozen.
func (r *runner) newer(ctx context.Context) (bool, error) {
	now, err := r.Ledger.Now(ctx)
	if err != nil {
		return false, err
	}
	filter := r.Selection.Resolve(now)
	cursor := ""
	for {
		page, err := r.Ledger.List(ctx, filter, cursor, 1000)
		if err != nil {
			return false, err
		}
		for _, q := range page.Requests {
			if q.Seq > r.run.MaxSeq && filter.Sendable(&q, q.Status) {
				return true, nil
			}
		}
		if cursor = page.Next; cursor == "" {
			return false, nil
		}
	}
}
