package replayer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// VerifyOptions say what is reconciled.
type VerifyOptions struct {
	// Ledger and JS are read, never written. Required.
	Ledger ledger.Reader
	JS     jetstream.JetStream
	// Spools are directories, which may be in use.
	Spools []string
	// Answered are access logs of ingresses: JSON lines, plain or in gzip.
	Answered []string
	// Since and Until bound the ids that are looked at, by the time in them; zero
	// for no bound. Counts are of everything in any case.
	Since, Until time.Time
	// Retention is the recorder's: an id older than that may have been deleted.
	Retention time.Duration
	// Ignore names ingresses that are gone for good.
	Ignore []string
	// Timeout bounds the wait for what is under way.
	Timeout time.Duration
	Clock   Clock
	Logger  *slog.Logger
}

// GapKind says in what way a part of the system lacks what another one has.
type GapKind string

const (
	// GapMissing: an id that an answer, a spool or a stream names, which is neither
	// in the ledger nor set aside, expired or on its way.
	GapMissing GapKind = "missing"
	// GapOutcome and GapEvent: the acker has acknowledged a fact about a request,
	// or an ingress has released it, and the ledger does not have it.
	GapOutcome GapKind = "outcome"
	GapEvent   GapKind = "event"
	// GapPayload: a request in the ledger without its whole head and body.
	GapPayload GapKind = "payload"
	// GapIncomplete: a head that is set aside for want of chunks which nobody has.
	GapIncomplete GapKind = "incomplete"
	// GapUnreadable: an acknowledged message that nobody can read and that is not
	// set aside.
	GapUnreadable GapKind = "unreadable"
	// GapCaptured: a process start of an ingress has captured more than the ledger
	// has recorded of it. It has no id.
	GapCaptured GapKind = "captured"
	// GapCount: a count that the ledger maintains is not what it has. It has no id.
	GapCount GapKind = "count"
)

// Gap is one thing that is not where it must be.
type Gap struct {
	Kind   GapKind    `json:"kind"`
	ID     *uuid.UUID `json:"id,omitempty"`
	SeenIn []string   `json:"seen_in,omitempty"` // where the id was found, of missing ones
	Detail string     `json:"detail,omitempty"`
}

// MaxGaps bounds [Verification.Gaps].
const MaxGaps = 10_000

// Sources, as [Row.Source] and [Gap.SeenIn] name them.
const (
	SourceAnswered = "answered" // access logs
	SourceSpools   = "spools"   // captures in them
	SourceRequests = "requests" // captures in the requests stream
	SourceOutcomes = "outcomes" // in the completions stream
)

// source indexes them.
type source int

const (
	fromAnswered source = iota
	fromSpools
	fromRequests
	fromOutcomes
	sources
)

func (s source) String() string {
	return [...]string{SourceAnswered, SourceSpools, SourceRequests, SourceOutcomes}[s]
}

// Row says what became of what one source names. Seen is the sum of all others.
// A source may name an id more than once (a message that was published again),
// and it counts each time.
type Row struct {
	Source    string                  `json:"source"`
	Seen      int64                   `json:"seen"`
	States    map[capture.State]int64 `json:"states"`
	InFlight  int64                   `json:"in_flight"` // in a stream or spool, and not yet in the ledger
	SetAside  int64                   `json:"set_aside"`
	Expired   int64                   `json:"expired"`
	Missing   int64                   `json:"missing"`
	Undecided int64                   `json:"undecided"` // may be in a spool that was not read
}

// Verification is what a reconciliation found.
type Verification struct {
	// Holds is true when there is neither a gap nor anything undecided.
	Holds bool `json:"holds"`
	// Settled is true when everything that was durable anywhere when it began has
	// reached the ledger; Waits say what has not.
	Settled   bool      `json:"settled"`
	Waits     []string  `json:"waits,omitempty"`
	StartedAt time.Time `json:"started_at"`
	EndedAt   time.Time `json:"ended_at"`
	Seconds   float64   `json:"duration_seconds"`
	Rows      []Row     `json:"rows"`
	// Ledger are its own counts, and Payloads how many were read to their end.
	Ledger   LedgerCounts          `json:"ledger"`
	Payloads int64                 `json:"payloads_read"`
	Gaps     []Gap                 `json:"gaps"` // at most [MaxGaps]
	Counts   map[GapKind]int64     `json:"gap_counts,omitempty"`
	Streams  map[string]StreamRead `json:"streams"`
	// UnknownEvents counts events of the API about ids that the ledger does not
	// have: requests that were not captured have ids, too.
	UnknownEvents int64 `json:"unknown_events"`
	// NotSeen says what could not be looked at, and why.
	NotSeen  []string `json:"not_seen,omitempty"`
	ExitCode int      `json:"exit_code"`
}

// StreamRead is what was read of a stream, by sequences.
type StreamRead struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	Floor uint64 `json:"ack_floor"` // of its durable, when what was under way had been waited for
}

// LedgerCounts are the ledger's maintained counts.
type LedgerCounts struct {
	Requests map[capture.State]int64 `json:"requests"`
	SetAside map[string]int64        `json:"set_aside"`
	Expired  int64                   `json:"expired"`
}

const (
	// verifyBatch is how many ids are asked for at once.
	verifyBatch = 500
	// verifyReaders is how many requests are read at the same time.
	verifyReaders = 4
	// maxUnsettled bounds the ids that are remembered because the ledger does not
	// have them: some 100 MB.
	maxUnsettled = 1 << 20
)

// errUnsettled ends a reconciliation that would take too much memory.
var errUnsettled = fmt.Errorf("more than %d ids are not in the ledger yet: let the recorder catch up first, or bound them by --since and --until", maxUnsettled)

// trail is an id that the ledger did not have when it was looked for.
type trail struct {
	seen    [sources]int32 // how often, where that counts
	in      [sources]bool
	ingress string // whose spool has it
	pending bool   // in the requests stream, not acknowledged
}

// doubt is a fact in a spool that the ledger did not have.
type doubt struct {
	sighting
}

// sighting is one id as a source names it.
type sighting struct {
	id      uuid.UUID
	from    source
	counted bool // it is a row's
	ingress string
	pending bool
	outcome *capture.Outcome // to be found in the ledger
	event   *capture.Event
	stream  string // of the message, and its sequence
	seq     uint64
}

// verifier is one reconciliation.
type verifier struct {
	VerifyOptions
	out    Verification
	rows   [sources]Row
	batch  []sighting
	trails map[uuid.UUID]*trail
	named  map[namedFact]bool
	doubts []doubt
	asides *asides
	// What spools have set aside: ids of captures, and of outcomes.
	moved, movedFacts map[uuid.UUID]bool
	lost              map[startID]int64 // captures that a spool has set aside
	// replays is true when the ledger knows attempts beyond the first.
	replays bool
	settled bool // the fence was waited for
	fence   verifyFence
}

type startID struct{ ingress, id string }

// Verify reconciles, by id, what ingresses say they answered, spools, streams and
// ledger: everything that one of them names must be in the ledger in some state,
// or be set aside, expired, or on its way. It changes nothing, and makes no
// durable consumer.
//
// The sources are read in the order in which requests pass them, and each id is
// looked for in the ledger afterwards, so that a system that is in use gives the
// same answer as one that is not. Between spools and streams it waits until what
// it has seen has arrived, for Timeout at most; what has not is counted as in
// flight where it was seen, and as undecided where only an answer names it.
//
// Memory does not grow with what is in the ledger, but with what is not. An error
// says that it could not look.
func Verify(ctx context.Context, o VerifyOptions) (Verification, error) {
	v := &verifier{
		VerifyOptions: o, trails: make(map[uuid.UUID]*trail), named: make(map[namedFact]bool),
		moved: make(map[uuid.UUID]bool), movedFacts: make(map[uuid.UUID]bool), lost: make(map[startID]int64),
	}
	v.out.StartedAt = o.Clock.Now()
	v.out.Gaps, v.out.Counts, v.out.Streams = []Gap{}, make(map[GapKind]int64), make(map[string]StreamRead)
	for i := range v.rows {
		v.rows[i] = Row{Source: source(i).String(), States: make(map[capture.State]int64)}
	}
	if err := v.run(ctx); err != nil {
		return Verification{}, err
	}
	v.conclude()
	return v.out, nil
}

func (v *verifier) run(ctx context.Context) error {
	stats, err := v.Ledger.Stats(ctx)
	if err != nil {
		return err
	}
	for _, n := range stats.Replays {
		v.replays = v.replays || n > 0
	}
	// Before the fence: what they say must have arrived when it is passed.
	starts, err := v.Ledger.Starts(ctx)
	if err != nil {
		return err
	}
	for _, path := range v.Answered {
		if err := v.readAnswered(ctx, path); err != nil {
			return err
		}
	}
	for _, dir := range v.Spools {
		if err := v.readSpool(ctx, dir); err != nil {
			return err
		}
	}
	if err := v.flush(ctx); err != nil {
		return err
	}
	if err := v.settle(ctx); err != nil {
		return err
	}
	if v.asides, err = readAsides(ctx, v.Ledger); err != nil {
		return err
	}
	if err := v.readRequests(ctx); err != nil {
		return err
	}
	if err := v.readCompletions(ctx); err != nil {
		return err
	}
	if err := v.flush(ctx); err != nil {
		return err
	}
	if err := v.settleDoubts(ctx); err != nil {
		return err
	}
	if err := v.settleTrails(ctx); err != nil {
		return err
	}
	if err := v.checkStarts(ctx, starts); err != nil {
		return err
	}
	v.checkIncomplete()
	return v.checkLedger(ctx)
}

func (v *verifier) conclude() {
	undecided := int64(0)
	for i := range v.rows {
		if v.rows[i].Seen > 0 || source(i) != fromAnswered || len(v.Answered) > 0 {
			v.out.Rows = append(v.out.Rows, v.rows[i])
		}
		undecided += v.rows[i].Undecided
	}
	if len(v.Answered) == 0 {
		v.out.NotSeen = append(v.out.NotSeen, "what clients were told: no access log was given (--answered, from HOLDFAST_ACCESS_LOG=all)")
	}
	if len(v.Spools) == 0 {
		v.out.NotSeen = append(v.out.NotSeen, "spools: no directory was given, and there is none at HOLDFAST_SPOOL_DIR")
	}
	v.out.EndedAt = v.Clock.Now()
	v.out.Seconds = v.out.EndedAt.Sub(v.out.StartedAt).Seconds()
	v.out.Holds = len(v.out.Counts) == 0 && undecided == 0
	switch {
	case len(v.out.Counts) > 0:
		v.out.ExitCode = ExitReplayable
	case undecided > 0:
		v.out.ExitCode = ExitFailed
	}
}

func (v *verifier) gap(g Gap) {
	v.out.Counts[g.Kind]++
	if len(v.out.Gaps) < MaxGaps {
		v.out.Gaps = append(v.out.Gaps, g)
	}
}

// selected reports whether the id is within the bounds of time.
func (v *verifier) selected(id uuid.UUID) bool {
	if v.Since.IsZero() && v.Until.IsZero() {
		return true
	}
	at, ok := timeOf(id)
	return ok && !at.Before(v.Since) && (v.Until.IsZero() || at.Before(v.Until))
}

// timeOf reads the time in a UUID of version 7 (RFC 9562 section 5.7).
func timeOf(id uuid.UUID) (time.Time, bool) {
	if id.Version() != 7 {
		return time.Time{}, false
	}
	ms := int64(0)
	for _, b := range id[:6] {
		ms = ms<<8 | int64(b)
	}
	return time.UnixMilli(ms), true
}

// see takes a sighting.
func (v *verifier) see(ctx context.Context, s sighting) error {
	if !v.selected(s.id) {
		return nil
	}
	v.batch = append(v.batch, s)
	if len(v.batch) < verifyBatch {
		return nil
	}
	return v.flush(ctx)
}

// find reads what the ledger has of these ids.
func (v *verifier) find(ctx context.Context, ids []uuid.UUID) (map[uuid.UUID]*ledger.Request, error) {
	found := make(map[uuid.UUID]*ledger.Request, len(ids))
	for part := range slices.Chunk(ids, verifyBatch) {
		page, err := v.Ledger.List(ctx, ledger.Filter{IDs: part}, "", verifyBatch)
		if err != nil {
			return nil, err
		}
		for i := range page.Requests {
			found[page.Requests[i].ID] = &page.Requests[i]
		}
	}
	return found, nil
}

// flush looks for all that was seen.
func (v *verifier) flush(ctx context.Context) error {
	if len(v.batch) == 0 {
		return nil
	}
	ids := make([]uuid.UUID, 0, len(v.batch))
	asked := make(map[uuid.UUID]bool, len(v.batch))
	for i := range v.batch {
		if id := v.batch[i].id; !asked[id] {
			asked[id] = true
			ids = append(ids, id)
		}
	}
	found, err := v.find(ctx, ids)
	if err != nil {
		return err
	}
	var unclear []*sighting
	for i := range v.batch {
		s := &v.batch[i]
		r := found[s.id]
		if s.counted {
			v.rows[s.from].Seen++
		}
		switch {
		case r == nil && s.event != nil:
			v.out.UnknownEvents++
		case r == nil:
			if err := v.remember(s); err != nil {
				return err
			}
		default:
			if s.counted {
				v.rows[s.from].States[r.State]++
			}
			if (s.outcome != nil || s.event != nil) && !s.pending && !v.plain(s, r) {
				unclear = append(unclear, s)
			}
		}
	}
	lacking, err := v.lacking(ctx, unclear)
	if err != nil {
		return err
	}
	for _, s := range lacking {
		if !v.settled { // in a spool, and perhaps on its way
			if len(v.doubts) == maxUnsettled {
				return errUnsettled
			}
			v.doubts = append(v.doubts, doubt{*s})
			continue
		}
		if err := v.lacks(ctx, s); err != nil {
			return err
		}
	}
	clear(v.batch)
	v.batch = v.batch[:0]
	return nil
}

func (v *verifier) remember(s *sighting) error {
	t := v.trails[s.id]
	if t == nil {
		if len(v.trails) == maxUnsettled {
			return errUnsettled
		}
		t = &trail{}
		v.trails[s.id] = t
	}
	t.in[s.from] = true
	if s.counted {
		t.seen[s.from]++
	}
	if s.ingress != "" {
		t.ingress = s.ingress
	}
	t.pending = t.pending || s.pending && s.from == fromRequests
	return nil
}

// plain reports whether the row alone shows that the fact is known, which is
// nearly always: the only attempt that there is says the same.
func (v *verifier) plain(s *sighting, r *ledger.Request) bool {
	if s.outcome == nil || v.replays || r.Attempts != 1 {
		return false
	}
	a := &s.outcome.Attempt
	if a.Number != capture.FirstAttempt || a.Status != r.Status || a.Error != r.Error {
		return false
	}
	switch a.Verdict {
	case capture.Processed:
		return r.State == capture.StateProcessed
	case capture.Failed:
		return r.State == capture.StateFailed
	case capture.Rejected:
		return r.State == capture.StateRejected
	}
	return r.State == capture.StateReceived
}

// lacking gives those sightings whose fact the ledger does not have, reading
// several requests at the same time.
func (v *verifier) lacking(ctx context.Context, list []*sighting) ([]*sighting, error) {
	lacks := make([]bool, len(list))
	err := parallel(len(list), func(i int) error {
		d, err := v.Ledger.Get(ctx, list[i].id)
		if errors.Is(err, ledger.ErrNotFound) {
			return nil // expired since
		}
		lacks[i] = err == nil && !hasFact(&d, list[i])
		return err
	})
	var lacking []*sighting
	for i, s := range list {
		if lacks[i] {
			lacking = append(lacking, s)
		}
	}
	return lacking, err
}

func hasFact(d *ledger.Detail, s *sighting) bool {
	if s.outcome != nil {
		want := &s.outcome.Attempt
		return slices.ContainsFunc(d.Facts.Attempts, func(a capture.Attempt) bool {
			return a.Number == want.Number && a.Run == want.Run && a.Status == want.Status && a.Error == want.Error &&
				a.Verdict == want.Verdict && a.EndedAt.Equal(want.EndedAt)
		})
	}
	alike := 0
	for _, e := range d.Facts.Events {
		if e.Outcome == s.event.Outcome && e.Attempt == s.event.Attempt {
			if e.Detail == s.event.Detail {
				return true
			}
			alike++
		}
	}
	return alike >= ledger.MaxDetails
}

// parallel calls f for each of n, a few at the same time, and gives the first
// error in their order.
func parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for w := range min(verifyReaders, n) {
		wg.Go(func() {
			for i := w; i < n; i += verifyReaders {
				if errs[i] = f(i); errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return cmp.Or(errs...)
}

// lacks names a fact that the ledger does not have, unless the message that
// carried it is set aside.
func (v *verifier) lacks(ctx context.Context, s *sighting) error {
	if s.outcome != nil && v.movedFacts[s.id] {
		return nil
	}
	if s.seq != 0 {
		aside, err := v.isAside(ctx, s.stream, s.seq)
		if err != nil || aside {
			return err
		}
	}
	id := s.id // the sighting is used again
	g := Gap{Kind: GapOutcome, ID: &id}
	where := "an ingress has released it"
	if s.seq != 0 {
		where = fmt.Sprintf("message %d of %s, acknowledged", s.seq, s.stream)
	}
	attempt := 0
	if s.outcome != nil {
		a := &s.outcome.Attempt
		attempt = a.Number
		g.Detail = fmt.Sprintf("attempt %d, %s, verdict %q: %s", a.Number, reason(a.Status, a.Error), a.Verdict, where)
	} else {
		g.Kind, attempt = GapEvent, s.event.Attempt
		g.Detail = fmt.Sprintf("%s, attempt %d: %s", s.event.Outcome, s.event.Attempt, where)
	}
	// A spool and a stream may have named it both, and a stream more than once.
	f := namedFact{g.Kind, id, attempt}
	if v.named[f] {
		return nil
	}
	if len(v.named) == maxUnsettled {
		return errUnsettled
	}
	v.named[f] = true
	v.gap(g)
	return nil
}

// namedFact is a fact of which a gap was named.
type namedFact struct {
	kind    GapKind
	id      uuid.UUID
	attempt int
}

// settleDoubts looks again for the facts that were in a spool alone.
func (v *verifier) settleDoubts(ctx context.Context) error {
	list := make([]*sighting, 0, len(v.doubts))
	for i := range v.doubts {
		if v.fence.passed(v.doubts[i].ingress) {
			list = append(list, &v.doubts[i].sighting)
		}
	}
	lacking, err := v.lacking(ctx, list)
	if err != nil {
		return err
	}
	for _, s := range lacking {
		if err := v.lacks(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// settleTrails decides what became of each id that the ledger did not have.
func (v *verifier) settleTrails(ctx context.Context) error {
	if len(v.trails) == 0 {
		return nil
	}
	asides, err := readAsides(ctx, v.Ledger) // later than the fence's
	if err != nil {
		return err
	}
	now, err := v.Ledger.Now(ctx)
	if err != nil {
		return err
	}
	stats, err := v.Ledger.Stats(ctx)
	if err != nil {
		return err
	}
	ids := slices.SortedFunc(maps.Keys(v.trails), func(a, b uuid.UUID) int { return strings.Compare(string(a[:]), string(b[:])) })
	for part := range slices.Chunk(ids, verifyBatch) {
		found, err := v.find(ctx, part)
		if err != nil {
			return err
		}
		for _, id := range part {
			t := v.trails[id]
			var count func(r *Row) *int64
			at, timed := timeOf(id)
			switch r := found[id]; {
			case r != nil:
				for i, n := range t.seen {
					v.rows[i].States[r.State] += int64(n)
				}
				continue
			case asides.has(id) || v.moved[id]:
				count = func(r *Row) *int64 { return &r.SetAside }
			case t.pending, t.ingress != "" && !v.fence.passed(t.ingress):
				count = func(r *Row) *int64 { return &r.InFlight }
			case stats.Expired > 0 && timed && v.Retention > 0 && at.Before(now.Add(-v.Retention)):
				count = func(r *Row) *int64 { return &r.Expired }
			case !t.in[fromRequests] && t.ingress == "" && !v.fence.allPassed():
				count = func(r *Row) *int64 { return &r.Undecided }
			default:
				count = func(r *Row) *int64 { return &r.Missing }
				v.gap(Gap{Kind: GapMissing, ID: &id, SeenIn: t.where(), Detail: "neither in the ledger nor set aside nor on its way"})
			}
			for i, n := range t.seen {
				*count(&v.rows[i]) += int64(n)
			}
		}
	}
	return nil
}

func (t *trail) where() []string {
	var list []string
	for i, in := range t.in {
		if in {
			list = append(list, source(i).String())
		}
	}
	return list
}
