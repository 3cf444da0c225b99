package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

const runColumns = "id, filter, target, max_seq, state, created, updated, ended, owner, until, sent, processed, failed, rejected, unknown, skipped, report, token"

// scanRun reads runColumns.
func scanRun(scan func(...any) error) (r ledger.Run, token int64, err error) {
	var filter string
	var created, updated, until int64
	var ended sql.NullInt64
	c := &r.Counts
	if err := scan(&r.ID, &filter, &r.Target, &r.MaxSeq, &r.State, &created, &updated, &ended, &r.Owner, &until,
		&c.Sent, &c.Processed, &c.Failed, &c.Rejected, &c.Unknown, &c.Skipped, &r.Report, &token); err != nil {
		return r, 0, err
	}
	r.CreatedAt, r.UpdatedAt, r.EndedAt, r.LeaseUntil = moment(created), moment(updated), moment(fromNull(ended)), moment(until)
	if err := json.Unmarshal([]byte(filter), &r.Filter); err != nil {
		return r, 0, fmt.Errorf("%w: filter of run %s: %w", ledger.ErrDamaged, r.ID, err)
	}
	return r, token, nil
}

func (t *tx) run(id string) (r ledger.Run, token int64, err error) {
	found := false
	err = t.each(func(scan func(...any) error) error {
		found = true
		r, token, err = scanRun(scan)
		return err
	}, "SELECT "+runColumns+" FROM runs WHERE id = ?", id)
	if err == nil && !found {
		err = fmt.Errorf("run %s: %w", id, ledger.ErrNotFound)
	}
	return r, token, err
}

// held gives the run if the lease is its newest.
func (t *tx) held(l ledger.RunLease) (ledger.Run, error) {
	r, token, err := t.run(l.RunID)
	if err == nil && token != l.Token {
		err = fmt.Errorf("run %s: %w", l.RunID, ledger.ErrFenced)
	}
	return r, err
}

// OpenRun implements [ledger.Replayer].
func (s *Store) OpenRun(ctx context.Context, f ledger.Filter, target, owner string, lease time.Duration) (r ledger.Run, l ledger.RunLease, picked bool, err error) {
	filter, err := f.Canonical()
	if err != nil {
		return r, l, false, fmt.Errorf("open run: %w", err)
	}
	err = s.write(ctx, "open run", func(t *tx) error {
		token, err := t.next(counterToken)
		if err != nil {
			return err
		}
		var id string
		picked, err = t.get([]any{&id}, "SELECT id FROM runs WHERE filter = ? AND target = ? AND state = 'active' AND until <= ? ORDER BY id LIMIT 1", filter, target, t.now)
		if err != nil {
			return err
		}
		until := t.now + lease.Nanoseconds()
		if picked {
			_, err = t.exec("UPDATE runs SET owner = ?, until = ?, token = ?, updated = ? WHERE id = ?", owner, until, token, t.now, id)
		} else {
			var maxSeq int64
			if maxSeq, err = t.counter(counterSeq); err != nil {
				return err
			}
			var u uuid.UUID
			if u, err = uuid.NewV7(); err != nil {
				return err
			}
			id = u.String()
			_, err = t.exec("INSERT INTO runs (id, filter, target, max_seq, state, created, updated, owner, until, token) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
				id, filter, target, maxSeq, string(ledger.RunActive), t.now, t.now, owner, until, token)
		}
		if err != nil {
			return err
		}
		l = ledger.RunLease{RunID: id, Owner: owner, Token: token}
		r, _, err = t.run(id)
		return err
	})
	if err != nil {
		return ledger.Run{}, ledger.RunLease{}, false, err
	}
	return r, l, picked, nil
}

// KeepRun implements [ledger.Replayer].
func (s *Store) KeepRun(ctx context.Context, l ledger.RunLease, lease time.Duration) (ledger.Run, error) {
	var r ledger.Run
	err := s.write(ctx, "keep run", func(t *tx) error {
		var err error
		if r, err = t.held(l); err != nil || r.State != ledger.RunActive {
			return err
		}
		r.LeaseUntil, r.UpdatedAt = moment(t.now+lease.Nanoseconds()), moment(t.now)
		_, err = t.exec("UPDATE runs SET until = ?, updated = ? WHERE id = ?", t.now+lease.Nanoseconds(), t.now, l.RunID)
		return err
	})
	return r, err
}

// EndRun implements [ledger.Replayer].
func (s *Store) EndRun(ctx context.Context, l ledger.RunLease, report []byte) error {
	return s.write(ctx, "end run", func(t *tx) error {
		r, err := t.held(l)
		if err != nil {
			return err
		}
		state, ended := ledger.RunFinished, t.now
		if r.State != ledger.RunActive {
			state, ended = r.State, r.EndedAt.UnixNano()
		}
		_, err = t.exec("UPDATE runs SET state = ?, ended = ?, updated = ?, until = ?, report = ? WHERE id = ?", string(state), ended, t.now, t.now, report, l.RunID)
		return err
	})
}

// LeaveRun implements [ledger.Replayer].
func (s *Store) LeaveRun(ctx context.Context, l ledger.RunLease) error {
	return s.write(ctx, "leave run", func(t *tx) error {
		if _, err := t.held(l); err != nil {
			return err
		}
		_, err := t.exec("UPDATE runs SET until = min(until, ?), updated = ? WHERE id = ?", t.now, t.now, l.RunID)
		return err
	})
}

// CancelRun implements [ledger.Replayer].
func (s *Store) CancelRun(ctx context.Context, id string) error {
	return s.write(ctx, "cancel run", func(t *tx) error {
		r, _, err := t.run(id)
		if err != nil {
			return err
		}
		if r.State != ledger.RunActive {
			return fmt.Errorf("run %s is %s: %w", id, r.State, ledger.ErrConflict)
		}
		_, err = t.exec("UPDATE runs SET state = ?, ended = ?, updated = ? WHERE id = ?", string(ledger.RunCancelled), t.now, t.now, id)
		return err
	})
}

// Runs implements [ledger.Reader].
func (s *Store) Runs(ctx context.Context, cursor string, limit int) ([]ledger.Run, string, error) {
	before := "~" // after every id
	if cursor != "" {
		id, err := decodeCursor(cursor)
		if err != nil {
			return nil, "", err
		}
		before = id.String()
	}
	limit = clamp(limit)
	var list []ledger.Run
	next := ""
	err := s.read(ctx, "list runs", func(q *sql.Tx) error {
		return eachRow(func() (*sql.Rows, error) {
			return q.QueryContext(ctx, "SELECT "+runColumns+" FROM runs WHERE id < ? ORDER BY id DESC LIMIT ?", before, limit+1)
		}, func(scan func(...any) error) error {
			r, _, err := scanRun(scan)
			if err != nil {
				return err
			}
			if len(list) == limit {
				id, err := uuid.Parse(list[limit-1].ID)
				next = encodeCursor(id)
				return err
			}
			list = append(list, r)
			return nil
		})
	})
	return list, next, err
}

// Run implements [ledger.Reader].
func (s *Store) Run(ctx context.Context, id string) (ledger.Run, error) {
	var r ledger.Run
	err := s.read(ctx, "read run", func(q *sql.Tx) error {
		var err error
		r, err = readRun(ctx, q, id)
		return err
	})
	return r, err
}

func readRun(ctx context.Context, q queryer, id string) (ledger.Run, error) {
	r, _, err := scanRun(q.QueryRowContext(ctx, "SELECT "+runColumns+" FROM runs WHERE id = ?", id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		err = fmt.Errorf("run %s: %w", id, ledger.ErrNotFound)
	}
	return r, err
}

// leaseKey names what a lease is about: one request.
func leaseKey(id string) string { return "id:" + id }

// Columns beside a request's own that tell what a run did with it.
const (
	ownAttempts = ", CASE WHEN r.facts = 2 THEN (SELECT count(DISTINCT a.number) FROM attempts a WHERE a.id = r.id AND a.run = ?) ELSE 0 END, -1, 0"
	// The last attempt of a run to another target: its verdict, and whether its
	// end is not known.
	targetAttempts = ", (SELECT count(*) FROM target_attempts a WHERE a.id = r.id AND a.run = ?)" +
		", coalesce((SELECT a.verdict FROM target_attempts a WHERE a.id = r.id AND a.run = ? AND a.ended IS NOT NULL ORDER BY a.number DESC LIMIT 1), -1)" +
		", coalesce((SELECT a.ended IS NULL FROM target_attempts a WHERE a.id = r.id AND a.run = ? ORDER BY a.number DESC LIMIT 1), 0)"
)

// done is what a run has done with a request.
type done struct {
	attempts   int
	verdict    int // of the last ended attempt at another target, -1 for none
	unresolved bool
}

// over reports whether a run to another target has nothing left to do: only a
// failure is tried again.
func (d *done) over() bool { return d.verdict >= 0 && verdicts[d.verdict] != capture.Failed }

func (d *done) columns(r *ledger.Run) (columns string, args []any) {
	if r.Target == "" {
		return ownAttempts, []any{r.ID}
	}
	return targetAttempts, []any{r.ID, r.ID, r.ID}
}

// unfinished are the states that a run or an operator may do something about.
func unfinished() []int {
	return []int{codeReceived, codeFailed, codeQuarantined, codeRejected}
}

// sendableOf are the states of what a run may send: a test replay may send what
// is processed, too.
func sendableOf(r *ledger.Run) []int {
	if r.Target != "" && slices.Contains(r.Filter.States, capture.StateProcessed) {
		return append(unfinished(), codeProcessed)
	}
	return unfinished()
}

// sends reports whether the run may send the request.
func sends(run *ledger.Run, r *ledger.Request, matchStatus int) bool {
	if run.Target != "" {
		return run.Filter.Testable(r, matchStatus)
	}
	return run.Filter.Sendable(r, matchStatus)
}

// Select implements [ledger.Replayer].
func (s *Store) Select(ctx context.Context, l ledger.RunLease, maxAttempts int, after uuid.UUID, limit int) ([]ledger.Candidate, error) {
	now := s.o.Now().UnixNano()
	limit = clamp(limit)
	var list []ledger.Candidate
	err := s.read(ctx, "select", func(q *sql.Tx) error {
		run, err := readRun(ctx, q, l.RunID)
		if err != nil {
			return err
		}
		var d done
		sel := selection{f: &run.Filter, states: sendableOf(&run), dueOnly: true, after: after, maxSeq: frozen(&run)}
		sel.columns, sel.args = d.columns(&run)
		return s.walk(ctx, q, &sel, now, func(r *row, req *ledger.Request) error {
			if !sends(&run, req, r.matchStatus) || r.seq > run.MaxSeq || d.attempts >= maxAttempts || d.over() {
				return nil
			}
			list = append(list, ledger.Candidate{Request: *req, Unresolved: r.unresolved || d.unresolved})
			if len(list) == limit {
				return errStop
			}
			return nil
		}, &d.attempts, &d.verdict, &d.unresolved)
	})
	return list, err
}

// frozen is the bound of a run's selection, which may be of nothing at all.
func frozen(r *ledger.Run) int64 { return max(r.MaxSeq, 1) }

// Left implements [ledger.Replayer].
func (s *Store) Left(ctx context.Context, l ledger.RunLease) (ledger.Left, error) {
	now := s.o.Now().UnixNano()
	var left ledger.Left
	err := s.read(ctx, "count what is left", func(q *sql.Tx) error {
		run, err := readRun(ctx, q, l.RunID)
		if err != nil {
			return err
		}
		var d done
		var until int64
		sel := selection{f: &run.Filter, states: sendableOf(&run), maxSeq: frozen(&run)}
		sel.columns, sel.args = d.columns(&run)
		sel.columns += ", coalesce((SELECT l.until FROM leases l WHERE l.key = 'id:' || " + uuidText + "), 0)"
		return s.walk(ctx, q, &sel, now, func(r *row, req *ledger.Request) error {
			if r.seq > run.MaxSeq || !run.Filter.Covers(req) || d.over() {
				return nil
			}
			sendable := sends(&run, req, r.matchStatus)
			switch {
			case r.state == codeQuarantined:
				left.Quarantined++
			case r.state == codeRejected:
				// Live traffic's own rejections are no business of a run's.
				if sendable || d.attempts > 0 {
					left.Rejected++
				}
			case until > now, r.state == codeReceived && !req.Replayable:
				if sendable || d.attempts > 0 || waits(&run.Filter, r, req) {
					left.Waiting++
				}
			case sendable || d.attempts > 0:
				left.Replayable++
			}
			return nil
		}, &d.attempts, &d.verdict, &d.unresolved, &until)
	})
	return left, err
}

// waits reports whether the run would send the request once its grace or lease
// is over.
func waits(f *ledger.Filter, r *row, req *ledger.Request) bool {
	then := *req
	then.Replayable = true
	return f.Sendable(&then, r.matchStatus)
}

// uuidText is r.id as [uuid.UUID.String] writes it.
const uuidText = "lower(substr(hex(r.id), 1, 8) || '-' || substr(hex(r.id), 9, 4) || '-' || substr(hex(r.id), 13, 4) || '-' || substr(hex(r.id), 17, 4) || '-' || substr(hex(r.id), 21))"

// Begin implements [ledger.Replayer].
func (s *Store) Begin(ctx context.Context, l ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) ([]ledger.Begun, error) {
	var list []ledger.Begun
	err := s.write(ctx, "begin attempts", func(t *tx) error {
		// Taken inside the transaction: waiting for the lock is no part of the
		// lease, and what comes after it only makes Expires too early.
		expires := time.Now().Add(o.Lease)
		run, err := t.held(l)
		if err != nil {
			return err
		}
		if run.State != ledger.RunActive {
			return fmt.Errorf("run %s is %s: %w", run.ID, run.State, ledger.ErrFenced)
		}
		list = make([]ledger.Begun, 0, len(ids))
		var sent, skipped int
		for i, id := range ids {
			given := ""
			if o.Order == ledger.OrderGiven && i < len(o.Keys) {
				given = o.Keys[i]
			}
			b, err := t.begin(&run, id, given, o)
			if err != nil {
				return err
			}
			switch b.Skip {
			case "":
				b.Expires = expires
				sent++
			case ledger.SkipState, ledger.SkipLeased:
				skipped++
			}
			list = append(list, b)
		}
		_, err = t.exec("UPDATE runs SET sent = sent + ?, skipped = skipped + ?, updated = ? WHERE id = ?", sent, skipped, t.now, run.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

func (t *tx) begin(run *ledger.Run, id uuid.UUID, given string, o ledger.BeginOptions) (ledger.Begun, error) {
	skip := func(why ledger.SkipReason) (ledger.Begun, error) { return ledger.Begun{ID: id, Skip: why}, nil }
	u, found, err := t.load(id)
	if err != nil {
		return ledger.Begun{}, err
	}
	if !found {
		return skip(ledger.SkipState)
	}
	key := leaseKey(id.String())
	var until int64
	if _, err := t.get([]any{&until}, "SELECT until FROM leases WHERE key = ?", key); err != nil {
		return ledger.Begun{}, err
	}
	og, err := t.s.loadOrigin(context.Background(), t.s.conn, u.row.origin)
	if err != nil {
		return ledger.Begun{}, err
	}
	req := u.row.request(og, t.now)
	var made int
	last := u.facts.last()
	if run.Target == "" {
		numbers := make(map[int64]bool)
		for _, a := range u.facts.attempts {
			if a.run == run.ID {
				numbers[a.number] = true
			}
		}
		made = len(numbers)
	} else {
		var highest int64
		if _, err := t.get([]any{&made, &highest}, "SELECT count(*), coalesce(max(number), 0) FROM target_attempts WHERE id = ? AND run = ?", id[:], run.ID); err != nil {
			return ledger.Begun{}, err
		}
		last = max(last, highest)
	}
	switch {
	case until > t.now:
		return skip(ledger.SkipLeased)
	case u.row.seq > run.MaxSeq || !sends(run, &req, u.row.matchStatus):
		return skip(ledger.SkipState)
	case u.row.payload == 0:
		return skip(ledger.SkipPayload)
	case made >= o.MaxAttempts, last >= math.MaxInt32:
		return skip(ledger.SkipAttempts)
	}
	captured := orderLease(run.Target, og.route, u.row.orderKey)
	ordered := orderLease(run.Target, og.route, []byte(given))
	head, err := t.inTheWay(run, u, captured, ordered, o)
	if err != nil {
		return ledger.Begun{}, err
	}
	if head != uuid.Nil {
		return ledger.Begun{ID: id, Skip: ledger.SkipBlocked, Head: head}, nil
	}
	token, err := t.next(counterToken)
	if err != nil {
		return ledger.Begun{}, err
	}
	end := t.now + o.Lease.Nanoseconds()
	if _, err := t.exec("INSERT INTO leases (key, run, token, until, captured, given) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "+
		"run = excluded.run, token = excluded.token, until = excluded.until, captured = excluded.captured, given = excluded.given",
		key, run.ID, token, end, captured, ordered); err != nil {
		return ledger.Begun{}, err
	}
	a := attempt{number: last + 1, run: run.ID, started: t.now, ended: never, known: t.now}
	if run.Target != "" {
		_, err = t.exec("INSERT INTO target_attempts (run, id, number, started, status, error, verdict) VALUES (?, ?, ?, ?, 0, '', 0)", run.ID, id[:], a.number, a.started)
	} else if _, err = u.addAttempt(a); err == nil {
		err = u.save()
	}
	return ledger.Begun{ID: id, Attempt: int(a.number), Token: token, Until: moment(end)}, err
}

// orderLease names an ordering key among leases, nil where there is none. A
// target is a URL, and a route's name short text: neither holds a NUL.
func orderLease(target, route string, key []byte) []byte {
	if len(key) == 0 {
		return nil
	}
	return append([]byte(target+"\x00"+route+"\x00"), key...)
}

// Questions that Begin asks about an ordering key. Each takes as many steps as
// the route has origins, or the key has leases, however much is open.
const (
	queryHead = "SELECT min(h) FROM (SELECT (SELECT r.id FROM requests r WHERE r.origin = o.id AND r.order_key = ? AND r.order_key IS NOT NULL AND r.state < 3 AND r.id < ? " +
		"ORDER BY r.id LIMIT 1) AS h FROM origins o WHERE o.route = ?)"
	queryCapturedLease = "SELECT min(key) FROM leases WHERE captured = ? AND until > ?"
	queryGivenLease    = "SELECT min(key) FROM leases WHERE given = ? AND until > ?"
)

// inTheWay gives the request of the same key that comes first, or uuid.Nil when
// there is none.
func (t *tx) inTheWay(run *ledger.Run, u *subject, captured, given []byte, o ledger.BeginOptions) (uuid.UUID, error) {
	query, key := queryCapturedLease, captured
	if o.Order == ledger.OrderGiven {
		query, key = queryGivenLease, given
	}
	if o.Order == ledger.OrderNone || key == nil {
		return uuid.Nil, nil
	}
	if o.Order == ledger.OrderCaptured && run.Target == "" && !o.PastBlocked {
		og, err := t.s.loadOrigin(context.Background(), t.s.conn, u.row.origin)
		if err != nil {
			return uuid.Nil, err
		}
		var head []byte
		if _, err := t.get([]any{&head}, queryHead, u.row.orderKey, u.row.id[:], og.route); err != nil {
			return uuid.Nil, err
		}
		if len(head) > 0 {
			return uuid.FromBytes(head)
		}
	}
	var lease sql.NullString
	if _, err := t.get([]any{&lease}, query, key, t.now); err != nil || !lease.Valid {
		return uuid.Nil, err
	}
	return uuid.Parse(strings.TrimPrefix(lease.String, leaseKey("")))
}

// End implements [ledger.Replayer].
func (s *Store) End(ctx context.Context, l ledger.RunLease, results []ledger.Ended) ([]error, error) {
	if len(results) == 0 {
		return nil, nil
	}
	var size int64
	for i := range results {
		size += costOf(results[i].Answer)
	}
	answers, err := s.roomForAnswers(size)
	if err != nil {
		return nil, fmt.Errorf("end attempts: %w", err)
	}
	fenced := make([]error, len(results))
	errs, err := s.batch(ctx, "end attempts", len(results),
		func(t *tx, items func() error) error {
			err := items()
			t.add(counterPayloadBytes, t.answered.now+t.answered.before)
			return err
		},
		func(t *tx, i int) (err error) {
			e := &results[i]
			if fenced[i], err = t.end(l.RunID, e); err == nil && fenced[i] == nil && answers && e.Answer != nil {
				var run ledger.Run
				if run, _, err = t.run(l.RunID); err == nil {
					err = t.keepAnswer(e.ID, l.RunID, e.Attempt.Number, e.Answer, run.Target != "")
				}
			}
			return err
		})
	if err != nil {
		return nil, err
	}
	for i := range errs {
		if errs[i] == nil {
			errs[i] = fenced[i]
		}
	}
	return errs, nil
}

// end writes one result. fenced says why it is not written.
func (t *tx) end(runID string, e *ledger.Ended) (fenced, err error) {
	a, err := newAttempt(e.Attempt, t.now)
	if err != nil {
		return nil, err
	}
	a.run = runID
	if a.ended == never {
		return nil, refuse("attempt %d has not ended", a.number)
	}
	run, _, err := t.run(runID)
	if err != nil {
		return nil, err
	}
	var token int64
	key := leaseKey(e.ID.String())
	held, err := t.get([]any{&token}, "SELECT token FROM leases WHERE key = ? AND run = ?", key, runID)
	if err != nil {
		return nil, err
	}
	held = held && token == e.Token
	lost := fmt.Errorf("attempt %d of %s: %w", a.number, e.ID, ledger.ErrFenced)
	if run.Target != "" {
		var b attempt
		var ended sql.NullInt64
		found, err := t.get([]any{&ended, &b.status, &b.error, &b.verdict}, "SELECT ended, status, error, verdict FROM target_attempts WHERE id = ? AND run = ? AND number = ?", e.ID[:], runID, a.number)
		switch {
		case err != nil:
			return nil, err
		case found && ended.Valid && ended.Int64 == a.ended && b.status == a.status && b.error == a.error && b.verdict == a.verdict:
			return nil, nil
		case !found, !held, ended.Valid:
			return lost, nil
		}
		if _, err := t.exec("UPDATE target_attempts SET started = ?, ended = ?, status = ?, error = ?, verdict = ? WHERE id = ? AND run = ? AND number = ?",
			orNull(a.started), a.ended, a.status, a.error, a.verdict, e.ID[:], runID, a.number); err != nil {
			return nil, err
		}
	} else {
		u, found, err := t.load(e.ID)
		if err != nil {
			return nil, err
		}
		if !found {
			return lost, nil
		}
		begun := false
		for _, b := range u.facts.attempts {
			if a.same(b) {
				return nil, nil
			}
			begun = begun || b.number == a.number && b.run == a.run && b.ended == never
		}
		if !begun || !held {
			return lost, nil
		}
		if _, err := u.addAttempt(a); err != nil {
			return nil, err
		}
		if err := u.save(); err != nil {
			return nil, err
		}
	}
	if _, err := t.exec("DELETE FROM leases WHERE key = ?", key); err != nil {
		return nil, err
	}
	name := string(verdicts[a.verdict])
	if name == "" {
		name = "unknown"
	}
	t.add(counterReplays+name, 1)
	_, err = t.exec("UPDATE runs SET "+name+" = "+name+" + 1, updated = ? WHERE id = ?", t.now, runID)
	return nil, err
}

// Discard implements [ledger.Operator].
func (s *Store) Discard(ctx context.Context, f ledger.Filter, reason string, limit int) (int, error) {
	if reason == "" {
		return 0, errors.New("discard: no reason")
	}
	n := 0
	err := s.write(ctx, "discard", func(t *tx) error {
		n = 0
		codes, all := statesOf(&f)
		if all {
			codes = unfinished()
		}
		open := make([]int, 0, len(codes))
		for _, c := range codes {
			if c != codeProcessed && c != codeDiscarded {
				open = append(open, c)
			}
		}
		var ids []uuid.UUID
		sel := selection{f: &f, states: open, dueOnly: f.Replayable}
		err := s.walk(context.Background(), s.conn, &sel, t.now, func(r *row, req *ledger.Request) error {
			if r.state == codeProcessed || r.state == codeDiscarded || !f.Selects(req, r.matchStatus) {
				return nil
			}
			if len(ids) >= limit {
				return errStop
			}
			ids = append(ids, r.id)
			return nil
		})
		if err != nil {
			return err
		}
		for _, id := range ids {
			u, _, err := t.load(id)
			if err != nil {
				return err
			}
			if err := u.spill(); err != nil {
				return err
			}
			if _, err := t.exec("INSERT INTO discards (id, reason, at) VALUES (?, ?, ?)", id[:], reason, t.now); err != nil {
				return err
			}
			u.facts.discarded, u.facts.discardReason, u.facts.discardedAt = true, reason, t.now
			if err := u.save(); err != nil {
				return err
			}
		}
		n = len(ids)
		return nil
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// mustLoad loads a request that has to be there.
func (t *tx) mustLoad(id uuid.UUID) (*subject, error) {
	u, found, err := t.load(id)
	if err == nil && !found {
		err = fmt.Errorf("request %s: %w", id, ledger.ErrNotFound)
	}
	return u, err
}

// Quarantine implements [ledger.Operator].
func (s *Store) Quarantine(ctx context.Context, id uuid.UUID, reason, detail string) error {
	return s.write(ctx, "quarantine", func(t *tx) error {
		u, err := t.mustLoad(id)
		if err != nil {
			return err
		}
		if !states[u.row.state].Open() {
			return fmt.Errorf("request %s is %s: %w", id, states[u.row.state], ledger.ErrConflict)
		}
		for _, q := range u.facts.quarantines {
			if q.released == never && q.reason == reason && q.detail == detail {
				return nil
			}
		}
		if err := u.addQuarantine(reason, detail); err != nil {
			return err
		}
		return u.save()
	})
}

// ReleaseQuarantine implements [ledger.Operator].
func (s *Store) ReleaseQuarantine(ctx context.Context, id uuid.UUID) error {
	return s.write(ctx, "release quarantine", func(t *tx) error {
		u, err := t.mustLoad(id)
		if err != nil {
			return err
		}
		n := 0
		last := u.facts.last()
		for i := range u.facts.quarantines {
			q := &u.facts.quarantines[i]
			if q.released != never {
				continue
			}
			n++
			q.released, q.releasedAfter = t.now, last
			if _, err := t.exec("UPDATE quarantines SET released = ?, released_after = ? WHERE id = ? AND number = ?", q.released, last, id[:], q.number); err != nil {
				return err
			}
		}
		if n == 0 {
			return fmt.Errorf("request %s has no quarantine: %w", id, ledger.ErrConflict)
		}
		return u.save()
	})
}
