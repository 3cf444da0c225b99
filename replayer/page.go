package replayer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

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
	begun, waited := 0, false
	send := func(from []ledger.Candidate, most int) (int, error) {
		took, n, err := r.batch(begin, flight, from, most, func(c ledger.Candidate) error {
			return r.ready(begin, c, selected, begun == 0, &waited)
		})
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

// errAside says that the API of a request cannot be sent to now, while there may
// be requests for others.
var errAside = errors.New("the API is not to be sent to now")

// ready waits until a request may be sent: for its turn by the rate, and for its
// API. Where there are others, it does not wait for that, but gives errAside. A
// page that has grown old meanwhile gives errOld, and the turn is kept for the
// next; but the first of a page goes if nothing of the page had to wait, so that
// a slow fence does not stop a run.
func (r *runner) ready(ctx context.Context, c ledger.Candidate, selected time.Time, first bool, waited *bool) error {
	if !r.turn {
		*waited = true
		if err := r.pace(ctx); err != nil {
			return err
		}
		r.turn = true
	}
	up, err := r.Upstreams.For(c.Route)
	if err != nil {
		return err
	}
	if gate := r.gates.before(up); !gate.isOpen() {
		*waited = true
		if !r.Upstreams.Several() {
			err = gate.wait(ctx, up.Probe)
		} else if open, terr := r.try(ctx, up); terr != nil {
			err = terr
		} else if !open {
			err = errAside
		}
		if err != nil {
			return err
		}
	}
	if r.since(selected) >= pageAge && (*waited || !first) {
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
	begin, flight context.Context, from []ledger.Candidate, most int, ready func(ledger.Candidate) error,
) (took, begun int, err error) {
	for took < len(from) && !r.admits(from[took]) {
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
	switch err := ready(from[took]); {
	case errors.Is(err, errAside):
		return took + 1, 0, nil // it is passed over
	case err != nil:
		return 0, 0, err
	}
	r.turn = false
	chosen := []ledger.Candidate{from[took]}
	r.touch(from[took].ID)
	took++
more:
	for took < len(from) && len(chosen) < most && r.admits(from[took]) {
		select {
		case r.places <- struct{}{}:
			places++
		default:
			break more
		}
		if !r.open(from[took]) || r.limiter != nil && !r.limiter.AllowN(r.Clock.Now(), 1) {
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

// open reports whether the API of a request may be sent to right now.
func (r *runner) open(c ledger.Candidate) bool {
	up, err := r.Upstreams.For(c.Route)
	return err == nil && r.gates.before(up).isOpen()
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
