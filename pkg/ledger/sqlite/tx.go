package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// tx is a write transaction. Its methods take no context: whether a
// transaction happens is decided before it begins and before it commits, and in
// between it takes milliseconds.
type tx struct {
	s   *Store
	now int64 // one time for the whole transaction
	// deltas to the counters, written once, at the end.
	deltas map[string]int64
	// counters as they were, where they have been read.
	counters map[string]int64
	// fresh are origins that this transaction has made.
	fresh map[origin]int64
	// newest is the greatest id known to be in requests; ids are time-ordered,
	// so that most new ones need no look-up.
	newest     uuid.UUID
	haveNewest bool
	early      bool // there are facts about unknown ids
	haveEarly  bool
	met        capture.SpoolRef // of the request that was recorded last
	recorded   string           // the counter of its start
	answered   answered
}

// write runs f in a transaction and commits it. Nothing is written when f, or
// the context at the end of it, has an error.
func (s *Store) write(ctx context.Context, what string, f func(*tx) error) error {
	if err := s.transact(ctx, f); err != nil {
		return fmt.Errorf("%s: %w", what, classify(err))
	}
	return nil
}

func (s *Store) transact(ctx context.Context, f func(*tx) error) error {
	select {
	case <-s.lock:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { s.lock <- struct{}{} }()
	if s.closed.Load() {
		return errClosed
	}
	t := &tx{s: s, deltas: make(map[string]int64), counters: make(map[string]int64)}
	if err := s.begin(ctx, t); err != nil {
		return err
	}
	t.now = s.o.Now().UnixNano()
	err := f(t)
	if err == nil {
		err = t.flush()
	}
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		_, err = t.exec("COMMIT")
	}
	if err != nil {
		// SQLite has rolled back by itself after some errors (disk full); then
		// this one says so, and the first error is the one to report.
		_, _ = t.exec("ROLLBACK")
		return err
	}
	s.origins.add(t.fresh)
	return nil
}

// begin takes the file's write lock. The waits grow to 20 ms: other processes
// hold the lock for a batch, which takes about that long.
func (s *Store) begin(ctx context.Context, t *tx) error {
	deadline := time.Now().Add(s.o.BusyTimeout)
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		_, err := t.exec("BEGIN IMMEDIATE")
		if err == nil || !isBusy(err) || time.Now().Add(wait).After(deadline) {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// batch runs item for each of n items in one transaction. An item that fails on
// its data is refused by its error, and the others are held: the first such
// error rolls everything back, and the batch runs again with a savepoint around
// each item, which good batches are so spared.
func (s *Store) batch(ctx context.Context, what string, n int, around func(t *tx, items func() error) error, item func(t *tx, i int) error) ([]error, error) {
	errs := make([]error, n)
	bold := func(t *tx) error {
		return around(t, func() error {
			for i := range n {
				if err := item(t, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	careful := func(t *tx) error {
		return around(t, func() error {
			for i := range n {
				err := t.savepoint(func() error { return item(t, i) })
				if isData(err) {
					errs[i] = fmt.Errorf("%s: %w", what, err)
				} else if err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := s.write(ctx, what, bold)
	if isData(err) {
		clear(errs)
		err = s.write(ctx, what, careful)
	}
	if err != nil {
		return nil, err
	}
	return errs, nil
}

// savepoint runs f, and undoes all of it when it fails on data.
func (t *tx) savepoint(f func() error) error {
	if _, err := t.exec("SAVEPOINT item"); err != nil {
		return err
	}
	deltas, fresh, answered := maps.Clone(t.deltas), maps.Clone(t.fresh), t.answered
	err := f()
	if isData(err) {
		if _, undo := t.exec("ROLLBACK TO item"); undo != nil {
			return undo
		}
		t.deltas, t.fresh, t.answered = deltas, fresh, answered
	} else if err != nil {
		return err
	}
	if _, done := t.exec("RELEASE item"); done != nil {
		return done
	}
	return err
}

func (t *tx) stmt(query string) (*sql.Stmt, error) {
	if stmt, ok := t.s.stmts[query]; ok {
		return stmt, nil
	}
	stmt, err := t.s.conn.PrepareContext(context.Background(), query)
	if err != nil {
		return nil, err
	}
	t.s.stmts[query] = stmt
	return stmt, nil
}

// exec runs a statement, prepared once for the life of the store, and says how
// many rows it changed. Queries are therefore constants, or few.
func (t *tx) exec(query string, args ...any) (int64, error) {
	stmt, err := t.stmt(query)
	if err != nil {
		return 0, err
	}
	res, err := stmt.ExecContext(context.Background(), args...)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// get reads the only row of a query into dest. found is false when there is
// none.
func (t *tx) get(dest []any, query string, args ...any) (found bool, err error) {
	stmt, err := t.stmt(query)
	if err != nil {
		return false, err
	}
	switch err := stmt.QueryRowContext(context.Background(), args...).Scan(dest...); {
	case errors.Is(err, sql.ErrNoRows):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, nil
}

// each calls f for every row of a query. f reads the row with scan, and must
// not use the transaction.
func (t *tx) each(f func(scan func(dest ...any) error) error, query string, args ...any) error {
	stmt, err := t.stmt(query)
	if err != nil {
		return err
	}
	return eachRow(func() (*sql.Rows, error) { return stmt.QueryContext(context.Background(), args...) }, f)
}

func eachRow(query func() (*sql.Rows, error), f func(scan func(dest ...any) error) error) (err error) {
	rows, err := query()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := f(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

// counter reads a counter as this transaction sees it.
func (t *tx) counter(name string) (int64, error) {
	n, ok := t.counters[name]
	if !ok {
		if _, err := t.get([]any{&n}, "SELECT n FROM counters WHERE name = ?", name); err != nil {
			return 0, err
		}
		t.counters[name] = n
	}
	return n + t.deltas[name], nil
}

func (t *tx) add(name string, n int64) {
	t.deltas[name] += n
}

// moved counts a request out of one state and into another.
func (t *tx) moved(from, to int) {
	if from != to {
		t.add(counterRequests+string(states[from]), -1)
		t.add(counterRequests+string(states[to]), 1)
	}
}

// next gives the next number of a counter.
func (t *tx) next(name string) (int64, error) {
	t.add(name, 1)
	return t.counter(name)
}

func (t *tx) flush() error {
	for _, name := range slices.Sorted(maps.Keys(t.deltas)) {
		n := t.deltas[name]
		if n == 0 {
			continue
		}
		if _, err := t.exec("INSERT INTO counters (name, n) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", name, n); err != nil {
			return err
		}
	}
	return nil
}

// origin is what many requests have in common.
type origin struct {
	route, ingress string
	policy         capture.Policy
}

func (c *originCache) add(fresh map[origin]int64) {
	if len(fresh) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// A bound against a sender of ever new ones; there are as many as routes,
	// ingresses and releases.
	if c.byID == nil || len(c.byID) > 4096 {
		c.byID, c.byData = make(map[int64]origin), make(map[origin]int64)
	}
	for o, id := range fresh {
		c.byID[id], c.byData[o] = o, id
	}
}

func (c *originCache) id(o origin) (int64, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	id, ok := c.byData[o]
	return id, ok
}

func (c *originCache) get(id int64) (origin, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	o, ok := c.byID[id]
	return o, ok
}

// origin gives the id of o, and makes it if it is new.
func (t *tx) origin(o origin) (int64, error) {
	if id, ok := t.s.origins.id(o); ok {
		return id, nil
	}
	if id, ok := t.fresh[o]; ok {
		return id, nil
	}
	policy := o.policy.String()
	// What could not be read again must not come in.
	if p, err := capture.ParsePolicy(policy); err != nil || p != o.policy {
		return 0, refuse("policy %q cannot be kept", policy)
	}
	var id int64
	found, err := t.get([]any{&id}, "SELECT id FROM origins WHERE route = ? AND ingress = ? AND policy = ?", o.route, o.ingress, policy)
	if err != nil {
		return 0, err
	}
	if !found {
		if _, err := t.exec("INSERT INTO origins (route, ingress, policy, grace) VALUES (?, ?, ?, ?)",
			o.route, o.ingress, policy, o.policy.Grace.Nanoseconds()); err != nil {
			return 0, err
		}
		if _, err := t.get([]any{&id}, "SELECT last_insert_rowid()"); err != nil {
			return 0, err
		}
	}
	if t.fresh == nil {
		t.fresh = make(map[origin]int64)
	}
	t.fresh[o] = id
	return id, nil
}

// queryer is a connection or transaction to read from.
type queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// loadOrigin reads an origin by its id. The caller holds no open rows of q that
// q could not serve beside this.
func (s *Store) loadOrigin(ctx context.Context, q queryer, id int64) (origin, error) {
	if o, ok := s.origins.get(id); ok {
		return o, nil
	}
	var o origin
	var policy string
	if err := q.QueryRowContext(ctx, "SELECT route, ingress, policy FROM origins WHERE id = ?", id).Scan(&o.route, &o.ingress, &policy); err != nil {
		return origin{}, fmt.Errorf("read origin %d: %w", id, err)
	}
	var err error
	if o.policy, err = capture.ParsePolicy(policy); err != nil {
		return origin{}, fmt.Errorf("%w: %w", ledger.ErrDamaged, err)
	}
	s.origins.add(map[origin]int64{o: id})
	return o, nil
}

// states and verdicts by their codes.
var (
	states = [...]capture.State{
		codeReceived: capture.StateReceived, codeFailed: capture.StateFailed, codeQuarantined: capture.StateQuarantined,
		codeRejected: capture.StateRejected, codeDiscarded: capture.StateDiscarded, codeProcessed: capture.StateProcessed,
	}
	verdicts = [...]capture.Verdict{capture.NoVerdict, capture.Rejected, capture.Failed, capture.Processed}
)

func stateCode(s capture.State) int       { return slices.Index(states[:], s) }
func verdictCode(v capture.Verdict) int64 { return int64(slices.Index(verdicts[:], v)) }

// never stands for the zero time.
const never = math.MinInt64

// nanos is t in nanoseconds since 1970; a time that this cannot express is
// refused.
func nanos(t time.Time) (int64, error) {
	if t.IsZero() {
		return never, nil
	}
	if y := t.UTC().Year(); y < 1678 || y > 2261 {
		return 0, refuse("time %s is out of range", t)
	}
	return t.UnixNano(), nil
}

func moment(ns int64) time.Time {
	if ns == never {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}

// orNull is what is stored of a time that may be unknown.
func orNull(ns int64) any {
	if ns == never {
		return nil
	}
	return ns
}

func fromNull(n sql.NullInt64) int64 {
	if !n.Valid {
		return never
	}
	return n.Int64
}
