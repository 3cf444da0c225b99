package replayer

import (
	"bytes"
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Numbers of a pass.
const (
	// pageSize is how many requests are selected at a time.
	pageSize = 200
	// fenceAge is how long a passage of the fence may have begun before the sends
	// that it is for.
	fenceAge = 2 * time.Second
	// beginBatch bounds how many attempts one transaction begins. All of them
	// have a free place, so that they are sent at once.
	beginBatch = 64
	// keyDepth is how many requests of one key are held behind each other, and
	// heldMost how many behind all keys together. What is beyond is left for the
	// next pass, so that keys with many requests take neither the memory nor the
	// turn of the others.
	keyDepth = 1000
	heldMost = 20_000
	// aloneMost is how many requests may wait to be sent alone, and companyLeast
	// how many are sent in company before suspects interrupt them.
	aloneMost    = 200
	companyLeast = 32
)

// item is a request in a pass.
type item struct {
	c    ledger.Candidate
	key  orderKey
	up   *Upstream
	lane *lane
	// detached says that its key has gone on without it.
	detached bool

	// Of its attempt:
	begun   ledger.Begun
	number  int64 // of the window
	well    bool  // the API was, when it began
	alone   bool
	landed  bool
	written bool
	sent    bool
	lost    bool
	got     answer
	exam    error
	verdict capture.Verdict
	ended   time.Time
}

// died reports whether its attempt may have killed the API.
func (it *item) died() bool { return it.sent && it.well && it.got.death() != "" }

// good reports whether its attempt shows that the API is well.
func (it *item) good() bool { return it.got.whole && it.got.status >= 200 && it.got.status < 400 }

// lane is what waits to be sent to one API.
type lane struct {
	gate  *gate
	ready items
}

// items is a heap, the lowest id first.
type items []*item

func (h items) Len() int           { return len(h) }
func (h items) Less(i, j int) bool { return bytes.Compare(h[i].c.ID[:], h[j].c.ID[:]) < 0 }
func (h items) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *items) Push(x any)        { *h = append(*h, x.(*item)) }
func (h *items) Pop() any {
	old := *h
	x := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	return x
}

// pass goes through the selection once, in the order of ids. It selects pages
// behind passages of the fence, and keeps a queue for each key: what may go now
// is the first of each, and what has no key. A key that is slow holds up nothing
// but itself, not even the next page.
//
// All of it runs on one goroutine; attempts tell it by events what became of them.
type pass struct {
	*runner
	begin, flight context.Context

	fence  *fencePassage // the next one
	fenced time.Time     // when the last one began
	passed bool          // it was waited for, and nothing was begun since

	after   uuid.UUID
	through bool // everything was selected
	holder  *holder

	lanes   map[*api]*lane
	ready   int // in all lanes
	keys    map[orderKey]*keyed
	held    int // waiting in keys
	blocks  map[orderKey]*block
	left    map[orderKey]struct{} // keys of which requests were left for the next pass
	alone   []*item               // to be sent when nothing else is in flight
	pending []*item               // suspects that wait until the API is seen to be well

	open     map[uuid.UUID]*item // begun, and not yet landed and written
	inflight int                 // not landed
	company  int                 // begun since something was sent alone

	begun, failed int
	leased        bool // some are another run's for now
}

// pass goes through the selection once. What it says is good for as far as it
// came.
func (r *runner) pass(begin, flight context.Context) (*pass, error) {
	clear(r.aside)
	p := &pass{
		runner: r, begin: begin, flight: flight, fence: r.passFence(begin),
		lanes: make(map[*api]*lane), keys: make(map[orderKey]*keyed), blocks: make(map[orderKey]*block),
		left: make(map[orderKey]struct{}), open: make(map[uuid.UUID]*item),
	}
	if r.order.given() && r.Target == "" {
		p.holder = newHolder(r.Ledger, r.run.Filter)
	}
	defer func() { p.fence.abandon() }()
	r.take() // of a pass that was cut
	err := p.run()
	if cause := context.Cause(begin); cause != nil {
		err = cause
	}
	r.blocks = p.blocks
	return p, err
}

func (p *pass) run() error {
	for {
		if err := p.settle(); err != nil {
			return err
		}
		if err := context.Cause(p.begin); err != nil {
			return err
		}
		switch it := p.choose(false); {
		case p.lonelyDue():
			if err := p.sendAlone(); err != nil {
				return err
			}
		case p.hungry() && p.fence.isDone():
			if err := p.refill(); err != nil {
				return err
			}
		case it != nil:
			now, err := p.prepare(it)
			if errors.Is(err, errAside) {
				p.abandonLane(it.lane)
				continue
			}
			if err != nil {
				return err
			}
			if !now {
				continue // much may have happened meanwhile
			}
			if err := p.batch(); err != nil {
				return err
			}
		case len(p.open) > 0 || p.hungry():
			if err := p.idle(); err != nil {
				return err
			}
		default:
			// What is left are suspects that nothing speaks for.
			for _, it := range p.pending {
				p.stop(it)
			}
			if p.pending = nil; p.through {
				return nil
			}
		}
	}
}

// hungry reports whether another page is wanted.
func (p *pass) hungry() bool {
	return !p.through && p.held < heldMost && len(p.alone) < aloneMost && p.ready < max(pageSize/2, p.Concurrency)
}

// idle waits for whatever comes first.
func (p *pass) idle() error {
	var passage <-chan struct{}
	if p.hungry() {
		passage = p.fence.done
	}
	select {
	case <-p.signal:
	case <-passage:
	case <-p.begin.Done():
		return context.Cause(p.begin)
	}
	return nil
}

// pastFence waits for a passage of the fence, and has the next one begin.
func (p *pass) pastFence() error {
	if p.fence.isDone() && p.since(p.fence.began) >= fenceAge {
		p.fence = p.passFence(p.begin)
	}
	if err := p.fence.wait(p.begin); err != nil {
		return err
	}
	p.fenced, p.passed = p.fence.began, true
	p.fence = p.passFence(p.begin) // it costs no throughput while this page is sent
	return nil
}

// refill selects the next page.
func (p *pass) refill() error {
	if err := p.pastFence(); err != nil {
		return err
	}
	page, err := p.selectPage(p.begin, p.after, p.selectable())
	if err != nil {
		return err
	}
	p.through = len(page) < pageSize
	if len(page) > 0 {
		p.after = page[len(page)-1].ID
	}
	routed, err := p.routed(page)
	if err != nil {
		return err
	}
	var open []ledger.Request
	if p.holder != nil {
		last := p.after
		if p.through {
			last = uuid.Max
		}
		if open, err = p.holder.upTo(p.begin, last); err != nil {
			return p.explain(p.begin, err)
		}
	}
	for _, c := range routed {
		for len(open) > 0 && bytes.Compare(open[0].ID[:], c.ID[:]) <= 0 {
			if open[0].ID != c.ID {
				if err := p.raise(&open[0]); err != nil {
					return err
				}
			}
			open = open[1:]
		}
		if err := p.add(c); err != nil {
			return err
		}
	}
	for i := range open {
		if err := p.raise(&open[i]); err != nil {
			return err
		}
	}
	if p.beyond(p.after) {
		p.through = true
	}
	return p.look(p.begin)
}

// add takes a candidate into the pass.
func (p *pass) add(c ledger.Candidate) error {
	up, err := p.Upstreams.For(c.Route)
	if err != nil {
		return err
	}
	it := &item{c: c, up: up, lane: p.laneOf(up)}
	if it.key, err = p.keyOf(p.begin, &c.Request); err != nil {
		return p.explain(p.begin, err)
	}
	if !p.admits(c) {
		p.leave(it)
		return nil
	}
	if it.key.none() {
		p.place(it)
		return nil
	}
	if b := p.blocks[it.key]; b != nil {
		b.behind++
		return nil
	}
	if _, left := p.left[it.key]; left {
		return nil
	}
	k := p.keys[it.key]
	switch {
	case k == nil:
		p.keys[it.key] = &keyed{}
		p.place(it)
	case k.wall != nil:
		k.wall.behind++
	case len(k.waiting) >= keyDepth:
		p.left[it.key] = struct{}{}
	default:
		k.waiting = append(k.waiting, it)
		p.held++
	}
	return nil
}

// raise notes that a request is open that this run does not send now: its key
// ends there.
func (p *pass) raise(q *ledger.Request) error {
	if p.PastBlocked {
		return nil
	}
	key, err := p.keyOf(p.begin, q)
	if err != nil || key.none() {
		return p.explain(p.begin, err)
	}
	switch k := p.keys[key]; {
	case p.blocks[key] != nil:
	case k == nil:
		p.blocks[key] = &block{head: q.ID}
	case k.wall == nil:
		k.wall = &block{head: q.ID}
	}
	return nil
}

func (p *pass) laneOf(up *Upstream) *lane {
	l := p.lanes[up.api]
	if l == nil {
		l = &lane{gate: p.gates.before(up)}
		p.lanes[up.api] = l
	}
	return l
}

// place puts an item, the first of its key, where it waits to be sent.
func (p *pass) place(it *item) {
	if it.c.Unresolved || p.suspects[it.c.ID] != nil {
		p.alone = append(p.alone, it)
		return
	}
	heap.Push(&it.lane.ready, it)
	p.ready++
}

// next lets the key of an item go on.
func (p *pass) next(it *item) {
	if it.key.none() || it.detached {
		return
	}
	it.detached = true
	k := p.keys[it.key]
	if len(k.waiting) > 0 {
		first := k.waiting[0]
		k.waiting[0] = nil
		k.waiting = k.waiting[1:]
		p.held--
		p.place(first)
		return
	}
	delete(p.keys, it.key)
	if k.wall != nil {
		p.blocks[it.key] = k.wall
	}
}

// block ends the key of an item, which waits for head.
func (p *pass) block(it *item, head uuid.UUID) {
	if it.key.none() || it.detached {
		return
	}
	it.detached = true
	k := p.keys[it.key]
	delete(p.keys, it.key)
	p.held -= len(k.waiting)
	b := &block{head: head, behind: int64(len(k.waiting))}
	if head != it.c.ID {
		b.behind++
	}
	if k.wall != nil {
		b.behind += k.wall.behind
	}
	p.blocks[it.key] = b
}

// stop ends the key of an item that was not processed.
func (p *pass) stop(it *item) {
	if p.PastBlocked {
		p.next(it)
		return
	}
	p.block(it, it.c.ID)
}

// leave leaves an item, and what is behind it, for another pass.
func (p *pass) leave(it *item) {
	if it.key.none() || it.detached {
		return
	}
	it.detached = true
	if k := p.keys[it.key]; k != nil {
		p.held -= len(k.waiting)
		delete(p.keys, it.key)
	}
	p.left[it.key] = struct{}{}
}

// abandonLane leaves what waits for an API that cannot be sent to now.
func (p *pass) abandonLane(l *lane) {
	for _, it := range l.ready {
		p.leave(it)
	}
	p.ready -= len(l.ready)
	l.ready = nil
}

// choose gives the item that goes next: the lowest id that has a place. With
// open alone of APIs that can be sent to at once.
func (p *pass) choose(open bool) *item {
	if p.inflight >= p.Concurrency {
		return nil
	}
	var best *item
	for _, l := range p.lanes {
		if len(l.ready) == 0 || l.gate.window.room() <= 0 || open && !l.gate.isOpen() {
			continue
		}
		if it := l.ready[0]; best == nil || bytes.Compare(it.c.ID[:], best.c.ID[:]) < 0 {
			best = it
		}
	}
	return best
}

// errAside says that the API of a request cannot be sent to now, while there may
// be requests for others.
var errAside = errors.New("the API is not to be sent to now")

// prepare waits until an item may be begun: for its turn by the rate, for its
// API, for the fence. Where there are other APIs, it does not wait for that one,
// but gives errAside. It says no when it had to wait: then the item is not the
// one to be begun of necessity.
func (p *pass) prepare(it *item) (now bool, err error) {
	now = true
	if !p.turn {
		slept, err := p.pace(p.begin, it.c.ReceivedAt)
		if err != nil {
			return false, err
		}
		p.turn, now = true, !slept
	}
	if gate := it.lane.gate; !gate.isOpen() {
		now = false
		if !p.Upstreams.Several() {
			err = gate.wait(p.begin, gate.probe(it.up))
		} else if open, terr := p.try(p.begin, it.up); terr != nil {
			err = terr
		} else if !open {
			err = errAside
		}
		if err != nil {
			return false, err
		}
	}
	// The first after a passage goes, however long that took: a slow fence does
	// not stop a run.
	if !p.passed && p.since(p.fenced) >= fenceAge {
		return false, p.pastFence()
	}
	return now, nil
}

// batch begins what may go right now.
func (p *pass) batch() error {
	var chosen []*item
	for len(chosen) < beginBatch {
		it := p.choose(true)
		if it == nil {
			break
		}
		if len(chosen) > 0 && !p.allows(it.c.ReceivedAt) {
			break
		}
		heap.Pop(&it.lane.ready)
		p.ready--
		if !p.admits(it.c) {
			p.leave(it)
			continue
		}
		p.seat(it)
		chosen = append(chosen, it)
	}
	if len(chosen) == 0 {
		return nil
	}
	p.company += len(chosen)
	return p.start(chosen)
}

// seat gives an item a place.
func (p *pass) seat(it *item) {
	it.number = it.lane.gate.window.begin()
	p.inflight++
	p.touch(it.c.ID)
}

// start begins items that have a place, in one transaction, and sends them.
func (p *pass) start(chosen []*item) error {
	p.turn, p.passed = false, false
	opts := ledger.BeginOptions{MaxAttempts: p.MaxAttempts, Order: p.order.ledger(), PastBlocked: p.PastBlocked}
	ids := make([]uuid.UUID, len(chosen))
	for i, it := range chosen {
		if it.alone {
			opts.MaxAttempts = p.allowed(it.c.ID) // nothing else is begun with it
		}
		ids[i] = it.c.ID
		opts.Lease = max(opts.Lease, it.c.Policy.Timeout+leaseMargin)
		if p.order.given() && !it.key.none() {
			if opts.Keys == nil {
				opts.Keys = make([]string, len(chosen))
			}
			opts.Keys[i] = string(p.order) + "\x00" + it.key.value
		}
	}
	var results []ledger.Begun
	err := retry(p.begin, p.Clock, func() (err error) {
		results, err = p.Ledger.Begin(p.begin, p.lease, ids, opts)
		return err
	})
	if err != nil {
		return p.explain(p.begin, fmt.Errorf("begin attempts: %w", err))
	}
	for i, b := range results {
		it := chosen[i]
		if b.Skip != "" {
			it.lane.gate.window.end()
			p.inflight--
			p.skip(it, b)
			continue
		}
		p.begun++
		it.begun, it.well = b, it.lane.gate.well()
		it.landed, it.written, it.sent, it.lost = false, false, false, false
		p.open[b.ID] = it
		p.flying.Add(1)
		go p.attempt(p.begin, p.flight, it)
	}
	return nil
}

// skip deals with an item that could not be begun.
func (p *pass) skip(it *item, b ledger.Begun) {
	delete(p.touched, b.ID)
	p.Logger.Debug("not begun", "request_id", b.ID, "reason", b.Skip)
	switch b.Skip {
	case ledger.SkipBlocked:
		p.block(it, b.Head)
		return // it is no request that somebody else has dealt with
	case ledger.SkipLeased:
		p.leased = true
		p.block(it, it.c.ID)
	case ledger.SkipAttempts:
		p.stop(it)
		return
	case ledger.SkipState:
		// Closed meanwhile, or begun by another run. The ledger knows what comes
		// next of captured keys; of others nobody does.
		if p.order.given() && p.Target == "" {
			p.stop(it)
		} else {
			p.next(it)
		}
	default:
		p.next(it)
	}
	p.tally.skipped()
}

// settle takes the events that have come.
func (p *pass) settle() error {
	for _, e := range p.take() {
		it := p.open[e.id]
		if it == nil {
			continue
		}
		if e.landed {
			it.landed, it.sent, it.got, it.exam, it.verdict, it.ended = true, e.sent, e.got, e.exam, e.verdict, e.ended
			it.lane.gate.window.end()
			p.inflight--
			if e.sent {
				p.shape(it, e.ended.Sub(e.began))
			}
		} else {
			it.written, it.lost = true, e.lost
		}
		if !it.landed || !it.written {
			continue
		}
		delete(p.open, e.id)
		if err := p.judge(it); err != nil {
			return err
		}
	}
	return nil
}

// judge says what follows from an attempt whose result is in the ledger.
func (p *pass) judge(it *item) error {
	suspect := false
	if it.got.unconnected {
		p.unsent[it.c.ID]++
		if p.suspects[it.c.ID] != nil {
			p.spare = max(p.spare, p.unsent[it.c.ID])
		}
	}
	switch {
	case it.died() && it.alone:
		p.autopsy(it)
		suspect = true
	case it.died():
		p.suspect(it.c.ID)
		suspect = true
	case it.sent && it.got.status != 0 && it.got.death() == "" && !it.got.overload():
		p.clear(it.c.ID)
	}
	if it.good() {
		for _, id := range p.vindicated(it) {
			if err := p.condemn(id); err != nil {
				return err
			}
		}
		p.alone, p.pending = append(p.alone, p.pending...), nil
	}
	switch {
	case it.lost:
		p.stop(it)
	case it.verdict == capture.Processed, it.verdict == capture.Rejected:
		p.next(it)
	case suspect && p.suspects[it.c.ID].guilty():
		p.pending = append(p.pending, it)
		return p.condemn(it.c.ID)
	case suspect:
		p.failed++
		if p.PastBlocked {
			p.next(it)
		}
		p.pending = append(p.pending, it)
	case it.verdict == capture.NoVerdict:
		p.stop(it)
	default:
		p.failed++
		p.stop(it)
	}
	return nil
}

// condemn puts a request into quarantine; its key ends with it.
func (p *pass) condemn(id uuid.UUID) error {
	if err := p.convict(p.begin, id); err != nil {
		return err
	}
	gone := func(it *item) bool {
		if it.c.ID != id {
			return false
		}
		p.stop(it)
		return true
	}
	p.alone = slices.DeleteFunc(p.alone, gone)
	p.pending = slices.DeleteFunc(p.pending, gone)
	return nil
}

// lonelyDue reports whether it is time to send something alone: nothing else is
// left, many wait for it, or the API was seen to be well since a suspect died,
// which says most while others are still to come.
func (p *pass) lonelyDue() bool {
	switch {
	case len(p.alone) == 0:
		return false
	case len(p.alone) >= aloneMost:
		return true
	case p.ready == 0 && len(p.open) == 0 && !p.hungry():
		return true
	}
	return p.company >= companyLeast && slices.ContainsFunc(p.alone, func(it *item) bool { return it.begun.Attempt > 0 })
}

// sendAlone sends everything that is to go alone, one by one, each when nothing
// else of this run is in flight, and after a probe.
func (p *pass) sendAlone() error {
	batch := p.alone
	p.alone = nil
	slices.SortFunc(batch, func(a, b *item) int { return bytes.Compare(a.c.ID[:], b.c.ID[:]) })
	for len(batch) > 0 {
		if err := p.drain(); err != nil {
			return err
		}
		it := batch[0]
		batch = batch[1:]
		if !p.admits(it.c) {
			p.leave(it)
			continue
		}
		it.lane.gate.doubt()
		for {
			now, err := p.prepare(it)
			if errors.Is(err, errAside) {
				p.leave(it)
				break
			}
			if err != nil {
				return err
			}
			if !now {
				continue
			}
			it.alone = true
			p.seat(it)
			if err := p.start([]*item{it}); err != nil {
				return err
			}
			break
		}
		if err := p.drain(); err != nil {
			return err
		}
	}
	p.company = 0
	return nil
}

// drain returns when nothing is in flight and all results are written.
func (p *pass) drain() error {
	for {
		if err := p.settle(); err != nil {
			return err
		}
		if len(p.open) == 0 {
			return nil
		}
		select {
		case <-p.signal:
		case <-p.begin.Done():
			return context.Cause(p.begin)
		}
	}
}

// hopeful reports whether waiting may help those that could not be sent: another
// run has them, or what is before them waits for its completion.
func (p *pass) hopeful(ctx context.Context) (bool, error) {
	if p.leased || len(p.left) > 0 {
		return true, nil
	}
	for _, b := range p.blocks {
		d, err := p.Ledger.Get(ctx, b.head)
		switch {
		case errors.Is(err, ledger.ErrNotFound):
		case err != nil:
			return false, p.explain(ctx, fmt.Errorf("read head: %w", err))
		case d.State != capture.StateFailed && d.State != capture.StateQuarantined:
			return true, nil
		}
	}
	return false, nil
}

func (r *runner) selectPage(ctx context.Context, after uuid.UUID, maxAttempts int) ([]ledger.Candidate, error) {
	var page []ledger.Candidate
	err := retry(ctx, r.Clock, func() (err error) {
		page, err = r.Ledger.Select(ctx, r.lease, maxAttempts, after, pageSize)
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
	case err == nil:
		return nil
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
	done   chan struct{} // closed when it is over, well or not
	err    error
}

func (r *runner) passFence(ctx context.Context) *fencePassage {
	ctx, cancel := context.WithCancel(ctx)
	p := &fencePassage{began: r.Clock.Now(), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = r.Fence.Pass(ctx)
	}()
	return p
}

func (p *fencePassage) isDone() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *fencePassage) wait(ctx context.Context) error {
	<-p.done
	p.cancel()
	return cmp.Or(context.Cause(ctx), p.err)
}

func (p *fencePassage) abandon() {
	p.cancel()
	<-p.done
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

// pace waits for the next turn by the rate, or by the original pace, and says
// whether it had to.
func (r *runner) pace(ctx context.Context, received time.Time) (bool, error) {
	now := r.Clock.Now()
	delay := time.Duration(0)
	switch {
	case r.limiter != nil:
		delay = r.limiter.ReserveN(now, 1).DelayFrom(now)
	case r.speed != nil:
		delay = r.speed.next(now, received)
	}
	if delay <= 0 {
		return false, nil
	}
	return true, r.Clock.Sleep(ctx, delay)
}

// allows takes the next turn if it is there right now.
func (r *runner) allows(received time.Time) bool {
	switch now := r.Clock.Now(); {
	case r.limiter != nil:
		return r.limiter.AllowN(now, 1)
	case r.speed != nil:
		return r.speed.allows(now, received)
	}
	return true
}
