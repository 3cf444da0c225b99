package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"math"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// row is a request as the table has it.
type row struct {
	id          uuid.UUID
	seq         int64
	state       int
	kept        bool
	payload     int64
	due         int64
	facts       int
	changed     int64
	origin      int64
	method      string
	target      []byte
	orderKey    []byte
	size        int64
	received    int64
	recorded    int64
	attempts    int
	unresolved  bool
	started     int64
	ended       int64
	status      int
	error       string
	verdict     int
	matchStatus int
}

// rowColumns are what scanRow reads, in its order.
const rowColumns = "r.id, r.seq, r.state, r.kept, r.payload, r.due, r.facts, r.changed, r.origin, r.method, r.target, r.order_key, " +
	"r.size, r.received, r.recorded, r.attempts, r.unresolved, r.started, r.ended, r.status, r.error, r.verdict, r.match_status"

func scanRow(scan func(...any) error, r *row, more ...any) error {
	var id []byte
	var started, ended, status, verdict, match sql.NullInt64
	var text sql.NullString
	dest := append([]any{&id, &r.seq, &r.state, &r.kept, &r.payload, &r.due, &r.facts, &r.changed, &r.origin, &r.method, &r.target, &r.orderKey,
		&r.size, &r.received, &r.recorded, &r.attempts, &r.unresolved, &started, &ended, &status, &text, &verdict, &match}, more...)
	if err := scan(dest...); err != nil {
		return err
	}
	copy(r.id[:], id)
	r.started, r.ended = fromNull(started), fromNull(ended)
	r.status, r.error, r.verdict = int(status.Int64), text.String, int(verdict.Int64)
	r.matchStatus = r.status
	if match.Valid {
		r.matchStatus = int(match.Int64)
	}
	return nil
}

// attempt is one result of an attempt, or the beginning of one, and when the
// ledger got to know it.
type attempt struct {
	number  int64
	run     string
	started int64
	ended   int64
	status  int
	error   string
	verdict int64
	known   int64
	variant int64 // its place in the table
}

func newAttempt(a capture.Attempt, known int64) (attempt, error) {
	started, err := nanos(a.StartedAt)
	if err != nil {
		return attempt{}, err
	}
	ended, err := nanos(a.EndedAt)
	if err != nil {
		return attempt{}, err
	}
	verdict := verdictCode(a.Verdict)
	switch {
	case verdict < 0:
		return attempt{}, refuse("verdict %q is unknown", a.Verdict)
	case ended == never && a.Verdict != capture.NoVerdict:
		return attempt{}, refuse("an attempt that has not ended has verdict %q", a.Verdict)
	case int64(a.Number) > math.MaxInt32:
		return attempt{}, refuse("attempt %d is out of range", a.Number)
	}
	return attempt{
		number: int64(a.Number), run: a.Run, started: started, ended: ended,
		status: a.Status, error: a.Error, verdict: verdict, known: known,
	}, nil
}

func (a attempt) capture() capture.Attempt {
	return capture.Attempt{
		Number: int(a.number), Run: a.run, StartedAt: moment(a.started), EndedAt: moment(a.ended),
		Status: a.status, Error: a.error, Verdict: verdicts[a.verdict],
	}
}

func (a attempt) same(b attempt) bool {
	b.known, b.variant = a.known, a.variant
	return a == b
}

// inline reports whether a may stand in the request's row when it is the only
// fact: the usual case by far.
func (a attempt) inline() bool {
	return a.number == capture.FirstAttempt && a.run == "" && a.ended != never
}

// order of attempts: by number; of one attempt, the best result last.
func compareAttempts(a, b attempt) int {
	rank := func(x attempt) int {
		if x.ended == never {
			return -1
		}
		return int(x.verdict) // codes grow with what wins
	}
	return cmp.Or(
		cmp.Compare(a.number, b.number), cmp.Compare(rank(a), rank(b)),
		cmp.Compare(a.ended, b.ended), cmp.Compare(a.started, b.started), cmp.Compare(a.status, b.status),
		strings.Compare(a.error, b.error), strings.Compare(a.run, b.run),
	)
}

type event struct {
	verdict int64
	attempt int64
	detail  string
	known   int64
}

func newEvent(e *capture.Event, known int64) (event, error) {
	if e.Outcome != capture.Processed && e.Outcome != capture.Failed {
		return event{}, refuse("outcome %q is neither processed nor failed", e.Outcome)
	}
	if int64(e.Attempt) > math.MaxInt32 {
		return event{}, refuse("attempt %d is out of range", e.Attempt)
	}
	return event{verdict: verdictCode(e.Outcome), attempt: int64(e.Attempt), detail: e.Detail, known: known}, nil
}

func compareEvents(a, b event) int {
	return cmp.Or(cmp.Compare(a.attempt, b.attempt), cmp.Compare(a.verdict, b.verdict), strings.Compare(a.detail, b.detail))
}

// newEventAmong reports whether e says something that is to be kept beside
// events: of those that differ in their detail alone there are enough at some
// point, for each costs all that come after it.
func newEventAmong(e event, events []event) bool {
	alike := 0
	for _, b := range events {
		if compareEvents(e, b) == 0 {
			return false
		}
		if e.attempt == b.attempt && e.verdict == b.verdict {
			alike++
		}
	}
	return alike < ledger.MaxDetails
}

type quarantine struct {
	number        int64
	reason        string
	detail        string
	at            int64
	released      int64
	releasedAfter int64
}

// facts are all that is known of one request, sorted.
type facts struct {
	attempts      []attempt
	events        []event
	quarantines   []quarantine
	discarded     bool
	discardReason string
	discardedAt   int64
}

func (f *facts) sort() {
	slices.SortFunc(f.attempts, compareAttempts)
	slices.SortFunc(f.events, compareEvents)
	slices.SortFunc(f.quarantines, func(a, b quarantine) int { return cmp.Compare(a.number, b.number) })
}

func (f *facts) capture() capture.Facts {
	c := capture.Facts{Discarded: f.discarded}
	for _, a := range f.attempts {
		c.Attempts = append(c.Attempts, a.capture())
	}
	for _, e := range f.events {
		c.Events = append(c.Events, e.capture())
	}
	for _, q := range f.quarantines {
		c.Quarantines = append(c.Quarantines, capture.Quarantine{
			Number: int(q.number), Reason: q.reason, Detail: q.detail,
			At: moment(q.at), ReleasedAt: moment(q.released), ReleasedAfter: int(q.releasedAfter),
		})
	}
	return c
}

func (e event) capture() capture.Event {
	return capture.Event{Outcome: verdicts[e.verdict], Attempt: int(e.attempt), Detail: e.detail}
}

// last is the number of the last known attempt, at least the first try's.
func (f *facts) last() int64 {
	last := int64(capture.FirstAttempt)
	for _, a := range f.attempts {
		last = max(last, a.number)
	}
	return last
}

// merge says what a new result does to what is known: nothing (it is known, or
// the beginning of an attempt whose end is), take the place of the beginning at
// index at, or come in addition (at is -1).
func (f *facts) merge(a attempt) (at int, news bool) {
	for i, b := range f.attempts {
		if a.same(b) {
			return -1, false
		}
		if a.number != b.number || a.run != b.run {
			continue
		}
		switch {
		case a.ended == never && b.ended != never:
			return -1, false
		case a.ended != never && b.ended == never:
			return i, true
		}
	}
	return -1, true
}

// derive computes from the facts, which are sorted, all of the row that depends
// on them.
func (r *row) derive(f *facts, policy capture.Policy) {
	r.state = stateCode(f.capture().State())
	r.kept = r.state == codeProcessed && r.payload > 0
	r.started, r.ended, r.status, r.error, r.verdict, r.matchStatus = never, never, 0, "", 0, 0
	r.attempts, r.unresolved = 0, false
	last := int64(capture.FirstAttempt)
	started, ended, known := r.received, false, r.recorded
	for i, a := range f.attempts {
		if i == 0 || f.attempts[i-1].number != a.number {
			r.attempts++
			r.unresolved = true
		}
		if a.number > last {
			last, started, ended = a.number, a.started, false
		}
		if a.number == last {
			if a.ended != never {
				ended = true
			} else {
				started = max(started, a.started)
			}
			known = max(known, a.known)
		}
		if a.ended == never {
			continue
		}
		r.unresolved = false
		r.started, r.ended, r.status, r.error, r.verdict = a.started, a.ended, a.status, a.error, int(a.verdict)
		if a.status != 0 {
			r.matchStatus = a.status
		}
	}
	r.due = 0
	if r.state == codeReceived {
		// The zero time is so long ago that it makes no difference.
		r.due = policy.GraceEnd(moment(max(started, 0)), ended, moment(known)).UnixNano()
	}
	switch {
	case len(f.attempts) == 0 && len(f.events) == 0 && len(f.quarantines) == 0 && !f.discarded:
		r.facts = factsNone
	case len(f.attempts) == 1 && f.attempts[0].inline() && len(f.events) == 0 && len(f.quarantines) == 0 && !f.discarded:
		r.facts = factsInline
	default:
		r.facts = factsTables
	}
}

// loadFacts reads the facts of a request.
func loadFacts(ctx context.Context, q queryer, r *row) (facts, error) {
	var f facts
	switch r.facts {
	case factsNone:
		return f, nil
	case factsInline:
		f.attempts = []attempt{{
			number: capture.FirstAttempt, started: r.started, ended: r.ended,
			status: r.status, error: r.error, verdict: int64(r.verdict), known: r.changed,
		}}
		return f, nil
	}
	err := eachRow(func() (*sql.Rows, error) {
		return q.QueryContext(ctx, "SELECT number, variant, run, started, ended, status, error, verdict, known FROM attempts WHERE id = ?", r.id[:])
	}, func(scan func(...any) error) error {
		var a attempt
		var started, ended sql.NullInt64
		err := scan(&a.number, &a.variant, &a.run, &started, &ended, &a.status, &a.error, &a.verdict, &a.known)
		a.started, a.ended = fromNull(started), fromNull(ended)
		f.attempts = append(f.attempts, a)
		return err
	})
	if err != nil {
		return f, err
	}
	err = eachRow(func() (*sql.Rows, error) {
		return q.QueryContext(ctx, "SELECT verdict, attempt, detail, known FROM events WHERE id = ?", r.id[:])
	}, func(scan func(...any) error) error {
		var e event
		err := scan(&e.verdict, &e.attempt, &e.detail, &e.known)
		f.events = append(f.events, e)
		return err
	})
	if err != nil {
		return f, err
	}
	err = eachRow(func() (*sql.Rows, error) {
		return q.QueryContext(ctx, "SELECT number, reason, detail, at, released, released_after FROM quarantines WHERE id = ?", r.id[:])
	}, func(scan func(...any) error) error {
		var c quarantine
		var released sql.NullInt64
		err := scan(&c.number, &c.reason, &c.detail, &c.at, &released, &c.releasedAfter)
		c.released = fromNull(released)
		f.quarantines = append(f.quarantines, c)
		return err
	})
	if err != nil {
		return f, err
	}
	err = eachRow(func() (*sql.Rows, error) {
		return q.QueryContext(ctx, "SELECT reason, at FROM discards WHERE id = ?", r.id[:])
	}, func(scan func(...any) error) error {
		f.discarded = true
		return scan(&f.discardReason, &f.discardedAt)
	})
	f.sort()
	return f, err
}

// subject is a request in a write transaction: its row, its facts, and what is
// to be written of them.
type subject struct {
	t      *tx
	row    row
	facts  facts
	policy capture.Policy
	before row
	spilt  bool // all facts stand in the tables
}

// load reads a request. found is false when there is none of that id.
func (t *tx) load(id uuid.UUID) (*subject, bool, error) {
	u := &subject{t: t}
	found := false
	err := t.each(func(scan func(...any) error) error {
		found = true
		return scanRow(scan, &u.row)
	}, "SELECT "+rowColumns+" FROM requests r WHERE r.id = ?", id[:])
	if err != nil || !found {
		return nil, false, err
	}
	if u.facts, err = loadFacts(context.Background(), t.cached(), &u.row); err != nil {
		return nil, false, err
	}
	o, err := t.s.loadOrigin(context.Background(), t.s.conn, u.row.origin)
	if err != nil {
		return nil, false, err
	}
	u.policy, u.before, u.spilt = o.policy, u.row, u.row.facts == factsTables
	return u, true, nil
}

// cached is the transaction as a queryer with prepared statements.
func (t *tx) cached() queryer { return cachedQueryer{t} }

type cachedQueryer struct{ t *tx }

func (c cachedQueryer) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	stmt, err := c.t.stmt(query)
	if err != nil {
		return nil, err
	}
	return stmt.QueryContext(ctx, args...)
}

func (c cachedQueryer) QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row {
	return c.t.s.conn.QueryRowContext(ctx, query, args...)
}

// spill moves the facts that stand in the row into the tables, before others
// join them.
func (u *subject) spill() error {
	if u.spilt {
		return nil
	}
	u.spilt = true
	for i := range u.facts.attempts {
		if err := u.t.insertAttempt(u.row.id, &u.facts.attempts[i], u.facts.attempts[:i]); err != nil {
			return err
		}
	}
	return nil
}

func (t *tx) insertAttempt(id uuid.UUID, a *attempt, others []attempt) error {
	a.variant = 0
	for _, b := range others {
		if b.number == a.number {
			a.variant = max(a.variant, b.variant+1)
		}
	}
	_, err := t.exec("INSERT INTO attempts (id, number, variant, run, started, ended, status, error, verdict, known) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
		id[:], a.number, a.variant, a.run, orNull(a.started), orNull(a.ended), a.status, a.error, a.verdict, a.known)
	return err
}

// addAttempt takes a result or beginning of an attempt. It reports whether that
// was news.
func (u *subject) addAttempt(a attempt) (bool, error) {
	at, news := u.facts.merge(a)
	if !news {
		return false, nil
	}
	if at < 0 && len(u.facts.attempts) == 0 && !u.spilt && a.inline() {
		u.facts.attempts = []attempt{a}
		return true, nil
	}
	if err := u.spill(); err != nil {
		return false, err
	}
	if at >= 0 {
		old := u.facts.attempts[at]
		a.variant = old.variant
		if _, err := u.t.exec("DELETE FROM attempts WHERE id = ? AND number = ? AND variant = ?", u.row.id[:], old.number, old.variant); err != nil {
			return false, err
		}
		u.facts.attempts = slices.Delete(u.facts.attempts, at, at+1)
	}
	if err := u.t.insertAttempt(u.row.id, &a, u.facts.attempts); err != nil {
		return false, err
	}
	u.facts.attempts = append(u.facts.attempts, a)
	u.facts.sort()
	return true, nil
}

// addEvent takes an event. It reports whether that was news.
func (u *subject) addEvent(e event) (bool, error) {
	if !newEventAmong(e, u.facts.events) {
		return false, nil
	}
	if err := u.spill(); err != nil {
		return false, err
	}
	if _, err := u.t.exec("INSERT INTO events (id, number, verdict, attempt, detail, known) VALUES (?, ?, ?, ?, ?, ?)",
		u.row.id[:], len(u.facts.events), e.verdict, e.attempt, e.detail, e.known); err != nil {
		return false, err
	}
	u.facts.events = append(u.facts.events, e)
	u.facts.sort()
	return true, nil
}

// addQuarantine holds the request back.
func (u *subject) addQuarantine(reason, detail string) error {
	if err := u.spill(); err != nil {
		return err
	}
	q := quarantine{number: int64(len(u.facts.quarantines) + 1), reason: reason, detail: detail, at: u.t.now, released: never}
	if _, err := u.t.exec("INSERT INTO quarantines (id, number, reason, detail, at, released_after) VALUES (?, ?, ?, ?, ?, 0)",
		u.row.id[:], q.number, q.reason, q.detail, q.at); err != nil {
		return err
	}
	u.facts.quarantines = append(u.facts.quarantines, q)
	return nil
}

// save derives the row from the facts and writes it.
func (u *subject) save() error {
	r := &u.row
	r.derive(&u.facts, u.policy)
	if u.spilt {
		r.facts = factsTables
	}
	// The payloads of processed ones go by the time at which they became so.
	if !r.kept || !u.before.kept {
		r.changed = u.t.now
	}
	if r.state != u.before.state {
		u.t.moved(u.before.state, r.state)
	}
	if r.kept != u.before.kept {
		if r.kept {
			u.t.add(counterPayloadBytes, r.payload)
		} else {
			u.t.add(counterPayloadBytes, -r.payload)
		}
	}
	_, err := u.t.exec("UPDATE requests SET state = ?, kept = ?, due = ?, facts = ?, changed = ?, attempts = ?, unresolved = ?, "+
		"started = ?, ended = ?, status = ?, error = ?, verdict = ?, match_status = ? WHERE id = ?",
		r.state, r.kept, r.due, r.facts, r.changed, r.attempts, r.unresolved,
		orNull(r.started), orNull(r.ended), r.status, orEmpty(r.error), r.verdict, orSame(r), r.id[:])
	return err
}

func orEmpty(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// orSame is match_status as it is stored.
func orSame(r *row) any {
	if r.matchStatus == r.status {
		return nil
	}
	return r.matchStatus
}
