package sqlite

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// request is the row as the contract has it.
func (r *row) request(o origin, now int64) ledger.Request {
	q := ledger.Request{
		ID: r.id, Seq: r.seq, State: states[r.state],
		Route: o.route, Ingress: o.ingress, Method: r.method, Target: string(r.target), OrderKey: string(r.orderKey),
		Policy: o.policy, Size: r.size,
		ReceivedAt: moment(r.received), RecordedAt: moment(r.recorded),
		Status: r.status, Error: r.error, Attempts: r.attempts,
		Replayable:     r.state == codeFailed || r.state == codeReceived && r.due <= now,
		PayloadExpired: r.payload == 0,
	}
	if r.state == codeReceived {
		q.GraceEnd = moment(r.due)
	}
	return q
}

// selection is what to walk through: one arm of a query for each group of
// states, all in the order of ids, so that SQLite merges them without sorting.
type selection struct {
	f       *ledger.Filter
	states  []int // nil: all, by the table itself
	dueOnly bool  // of the received ones, only those past their grace
	after   uuid.UUID
	maxSeq  int64  // 0: no bound
	columns string // beyond rowColumns, with columnArgs
	args    []any  // of columns
}

// query builds the statement. It only narrows what is read: Filter.Selects
// decides.
func (s *selection) query(now int64, ids []uuid.UUID) (string, []any) {
	var b strings.Builder
	var args []any
	arm := func(state string, stateArgs ...any) {
		b.WriteString("SELECT ")
		b.WriteString(rowColumns)
		b.WriteString(s.columns)
		args = append(args, s.args...)
		b.WriteString(" FROM requests r WHERE ")
		b.WriteString(state)
		args = append(args, stateArgs...)
		if len(ids) > 0 {
			b.WriteString("r.id IN (?" + strings.Repeat(",?", len(ids)-1) + ")")
			for i := range ids {
				args = append(args, ids[i][:])
			}
		} else {
			b.WriteString("r.id > ?")
			args = append(args, s.after[:])
		}
		if s.maxSeq > 0 {
			b.WriteString(" AND r.seq <= ?")
			args = append(args, s.maxSeq)
		}
		if since, err := nanos(s.f.Since); err == nil && since != never {
			b.WriteString(" AND r.received >= ?")
			args = append(args, since)
		}
		if until, err := nanos(s.f.Until); err == nil && until != never {
			b.WriteString(" AND r.received < ?")
			args = append(args, until)
		}
		if n := len(s.f.Methods); n > 0 {
			b.WriteString(" AND r.method IN (?" + strings.Repeat(",?", n-1) + ")")
			for _, m := range s.f.Methods {
				args = append(args, m)
			}
		}
		if n := len(s.f.Routes); n > 0 {
			b.WriteString(" AND r.origin IN (SELECT o.id FROM origins o WHERE o.route IN (?" + strings.Repeat(",?", n-1) + "))")
			for _, route := range s.f.Routes {
				args = append(args, route)
			}
		}
	}
	switch {
	case len(ids) > 0 || s.states == nil:
		arm("")
	case slices.Contains(s.states, codeProcessed):
		arm("r.state IN (" + join(s.states) + ") AND ")
	default:
		for i, state := range s.states {
			if i > 0 {
				b.WriteString(" UNION ALL ")
			}
			// The second condition is the index's own: SQLite uses a partial
			// index only where its condition is found word for word.
			if state == codeReceived && s.dueOnly {
				arm("r.state = 0 AND r.state <> 5 AND r.due <= ? AND ", now)
			} else {
				arm("r.state = " + strconv.Itoa(state) + " AND r.state <> 5 AND ")
			}
		}
	}
	b.WriteString(" ORDER BY 1")
	return b.String(), args
}

func join(codes []int) string {
	var text []string
	for _, c := range codes {
		text = append(text, strconv.Itoa(c))
	}
	return strings.Join(text, ", ")
}

var errStop = errors.New("enough")

// maxIDs bounds how many ids one statement asks for.
const maxIDs = 500

// walk calls f with every row of the selection in the order of ids, until it
// answers errStop. more are read beside each row's own columns. f must not read
// from q.
func (s *Store) walk(ctx context.Context, q queryer, sel *selection, now int64, f func(r *row, req *ledger.Request) error, more ...any) error {
	if sel.states != nil && len(sel.states) == 0 {
		return nil
	}
	one := func(ids []uuid.UUID) error {
		query, args := sel.query(now, ids)
		return eachRow(func() (*sql.Rows, error) { return q.QueryContext(ctx, query, args...) }, func(scan func(...any) error) error {
			var r row
			if err := scanRow(scan, &r, more...); err != nil {
				return err
			}
			o, err := s.loadOrigin(ctx, q, r.origin)
			if err != nil {
				return err
			}
			req := r.request(o, now)
			return f(&r, &req)
		})
	}
	var err error
	if len(sel.f.IDs) == 0 {
		err = one(nil)
	} else {
		ids := slices.Clone(sel.f.IDs)
		slices.SortFunc(ids, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
		ids = slices.Compact(ids)
		from, found := slices.BinarySearchFunc(ids, sel.after, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
		if found {
			from++
		}
		for part := range slices.Chunk(ids[from:], maxIDs) {
			if err = one(part); err != nil {
				break
			}
		}
	}
	if errors.Is(err, errStop) {
		return nil
	}
	return err
}

// statesOf are the codes of the states that a filter may select. all is true
// when that is every one.
func statesOf(f *ledger.Filter) (codes []int, all bool) {
	for _, s := range f.States {
		if c := stateCode(s); c >= 0 && !slices.Contains(codes, c) {
			codes = append(codes, c)
		}
	}
	all = len(f.States) == 0
	if f.Replayable {
		replayable := []int{codeReceived, codeFailed}
		if all {
			return replayable, false
		}
		codes = slices.DeleteFunc(codes, func(c int) bool { return !slices.Contains(replayable, c) })
	}
	slices.Sort(codes)
	if codes == nil {
		codes = []int{}
	}
	return codes, all
}

// read runs f on one connection, in one snapshot.
func (s *Store) read(ctx context.Context, what string, f func(q *sql.Tx) error) error {
	tx, err := s.readDB.BeginTx(ctx, nil)
	if err == nil {
		err = f(tx)
		_ = tx.Rollback() // nothing was written; an error here says only that ctx is done
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		err = errors.Join(ctx.Err(), err)
	case s.closed.Load():
		err = errors.Join(errClosed, err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, classify(err))
	}
	return nil
}

// List implements [ledger.Reader].
func (s *Store) List(ctx context.Context, f ledger.Filter, cursor string, limit int) (ledger.Page, error) {
	after, err := decodeCursor(cursor)
	if err != nil {
		return ledger.Page{}, err
	}
	limit = clamp(limit)
	sel := selection{f: &f, after: after, dueOnly: f.Replayable}
	var all bool
	if sel.states, all = statesOf(&f); all {
		sel.states = nil
	}
	now := s.o.Now().UnixNano()
	var page ledger.Page
	err = s.read(ctx, "list", func(q *sql.Tx) error {
		return s.walk(ctx, q, &sel, now, func(r *row, req *ledger.Request) error {
			if !f.Selects(req, r.matchStatus) {
				return nil
			}
			if len(page.Requests) == limit {
				page.Next = encodeCursor(page.Requests[limit-1].ID)
				return errStop
			}
			page.Requests = append(page.Requests, *req)
			return nil
		})
	})
	if err != nil {
		return ledger.Page{}, err
	}
	return page, nil
}

// maxPage bounds every listing.
const maxPage = 1000

func clamp(limit int) int { return max(1, min(limit, maxPage)) }

func encodeCursor(id uuid.UUID) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte{'i'}, id[:]...))
}

func decodeCursor(cursor string) (uuid.UUID, error) {
	if cursor == "" {
		return uuid.Nil, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || len(b) != 17 || b[0] != 'i' {
		return uuid.Nil, fmt.Errorf("list: %w", ledger.ErrInvalidCursor)
	}
	return uuid.UUID(b[1:]), nil
}

func encodeSeq(seq int64) string {
	return base64.RawURLEncoding.EncodeToString([]byte("s" + strconv.FormatInt(seq, 10)))
}

func decodeSeq(cursor string) (int64, error) {
	if cursor == "" {
		return 0, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err == nil && len(b) > 1 && b[0] == 's' {
		if n, err := strconv.ParseInt(string(b[1:]), 10, 64); err == nil {
			return n, nil
		}
	}
	return 0, fmt.Errorf("list: %w", ledger.ErrInvalidCursor)
}

// find reads one row.
func (s *Store) find(ctx context.Context, q queryer, id uuid.UUID) (r row, o origin, err error) {
	found := false
	err = eachRow(func() (*sql.Rows, error) {
		return q.QueryContext(ctx, "SELECT "+rowColumns+" FROM requests r WHERE r.id = ?", id[:])
	}, func(scan func(...any) error) error {
		found = true
		return scanRow(scan, &r)
	})
	switch {
	case err != nil:
		return r, o, err
	case !found:
		return r, o, fmt.Errorf("request %s: %w", id, ledger.ErrNotFound)
	}
	o, err = s.loadOrigin(ctx, q, r.origin)
	return r, o, err
}

// Get implements [ledger.Reader].
func (s *Store) Get(ctx context.Context, id uuid.UUID) (ledger.Detail, error) {
	now := s.o.Now().UnixNano()
	var d ledger.Detail
	err := s.read(ctx, "get", func(q *sql.Tx) error {
		r, o, err := s.find(ctx, q, id)
		if err != nil {
			return err
		}
		f, err := loadFacts(ctx, q, &r)
		if err != nil {
			return err
		}
		d.Request, d.Facts = r.request(o, now), f.capture()
		for i, e := range f.events {
			d.Facts.Events[i].ID = id
			d.EventTimes = append(d.EventTimes, moment(e.known))
		}
		if f.discarded {
			d.DiscardReason, d.DiscardedAt = f.discardReason, moment(f.discardedAt)
		}
		return nil
	})
	if err != nil {
		return ledger.Detail{}, err
	}
	return d, nil
}

// Payload implements [ledger.Reader].
func (s *Store) Payload(ctx context.Context, id uuid.UUID) ([]byte, io.ReadCloser, error) {
	var head []byte
	var body sql.Null[[]byte]
	var inline bool
	err := s.read(ctx, "read payload", func(q *sql.Tx) error {
		err := q.QueryRowContext(ctx, "SELECT p.head, p.body, p.body IS NOT NULL FROM requests r JOIN payloads p ON p.seq = r.seq WHERE r.id = ?", id[:]).
			Scan(&head, &body, &inline)
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("request %s: %w", id, ledger.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	if inline {
		return head, io.NopCloser(bytes.NewReader(body.V)), nil
	}
	return head, &chunkReader{ctx: ctx, s: s, id: id}, nil
}

// chunkReader reads a body chunk by chunk. It holds one chunk, and nothing of
// the ledger's between two.
type chunkReader struct {
	ctx  context.Context
	s    *Store
	id   uuid.UUID
	next int
	rest []byte
	err  error
}

func (c *chunkReader) Read(p []byte) (int, error) {
	for len(c.rest) == 0 && c.err == nil {
		c.err = c.s.read(c.ctx, "read chunk", func(q *sql.Tx) error {
			var total sql.NullInt64
			err := q.QueryRowContext(c.ctx, "SELECT chunks FROM assemblies WHERE id = ?", c.id[:]).Scan(&total)
			switch {
			case errors.Is(err, sql.ErrNoRows):
				return fmt.Errorf("chunk %d of %s: %w", c.next, c.id, ledger.ErrNotFound)
			case err != nil:
				return err
			case int64(c.next) >= total.Int64:
				return io.EOF
			}
			err = q.QueryRowContext(c.ctx, "SELECT data FROM chunks WHERE id = ? AND number = ?", c.id[:], c.next).Scan(&c.rest)
			if errors.Is(err, sql.ErrNoRows) {
				return fmt.Errorf("chunk %d of %s: %w", c.next, c.id, ledger.ErrNotFound)
			}
			return err
		})
		c.next++
	}
	if len(c.rest) == 0 {
		if errors.Is(c.err, io.EOF) {
			return 0, io.EOF
		}
		return 0, c.err
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *chunkReader) Close() error {
	c.rest = nil
	if c.err == nil {
		c.err = errors.New("body is closed")
	}
	return nil
}

// Stats implements [ledger.Reader].
func (s *Store) Stats(ctx context.Context) (ledger.Stats, error) {
	st := ledger.Stats{
		Requests: make(map[capture.State]int64), Aside: make(map[string]int64), Replays: make(map[string]int64),
	}
	for _, state := range capture.States() {
		st.Requests[state] = 0
	}
	now := s.o.Now().UnixNano()
	err := s.read(ctx, "read stats", func(q *sql.Tx) error {
		err := eachRow(func() (*sql.Rows, error) { return q.QueryContext(ctx, "SELECT name, n FROM counters") }, func(scan func(...any) error) error {
			var name string
			var n int64
			if err := scan(&name, &n); err != nil {
				return err
			}
			switch name {
			case counterEarly:
				st.Early = n
			case counterEarlyDropped:
				st.EarlyDropped = n
			case counterExpired:
				st.Expired = n
			case counterPayloadBytes:
				st.PayloadBytes = n
			}
			if label, ok := strings.CutPrefix(name, counterRequests); ok {
				st.Requests[capture.State(label)] = n
			} else if label, ok := strings.CutPrefix(name, counterAside); ok {
				st.Aside[label] = n
			} else if label, ok := strings.CutPrefix(name, counterReplays); ok {
				st.Replays[label] = n
			}
			return nil
		})
		if err != nil {
			return err
		}
		oldest := int64(never)
		for _, query := range []string{
			"SELECT received FROM requests WHERE state = 1 AND state <> 5 AND due <= ? ORDER BY id LIMIT 1",
			"SELECT received FROM requests WHERE state = 0 AND state <> 5 AND due <= ? ORDER BY id LIMIT 1",
		} {
			var received int64
			switch err := q.QueryRowContext(ctx, query, now).Scan(&received); {
			case errors.Is(err, sql.ErrNoRows):
			case err != nil:
				return err
			case oldest == never || received < oldest:
				oldest = received
			}
		}
		st.OldestReplayable = moment(oldest)
		return nil
	})
	if err != nil {
		return ledger.Stats{}, err
	}
	st.FreeBytes = -1
	if free, _, err := diskRoom(filepath.Dir(s.path)); err == nil {
		st.FreeBytes = free
	}
	return st, nil
}

// asideDataShown is how much of a message a listing shows.
const asideDataShown = 64 << 10

// AsideList implements [ledger.Reader].
func (s *Store) AsideList(ctx context.Context, cursor string, limit int) ([]ledger.Aside, string, error) {
	after, err := decodeSeq(cursor)
	if err != nil {
		return nil, "", err
	}
	limit = clamp(limit)
	var list []ledger.Aside
	next := ""
	err = s.read(ctx, "list what is set aside", func(q *sql.Tx) error {
		return eachRow(func() (*sql.Rows, error) {
			return q.QueryContext(ctx, "SELECT seq, kind, reason, subject, request, header, substr(data, 1, ?), at, fingerprint FROM asides WHERE seq > ? ORDER BY seq LIMIT ?",
				asideDataShown, after, limit+1)
		}, func(scan func(...any) error) error {
			var a ledger.Aside
			var request, print []byte
			var at int64
			if err := scan(&a.Seq, &a.Kind, &a.Reason, &a.Subject, &request, &a.Header, &a.Data, &at, &print); err != nil {
				return err
			}
			copy(a.RequestID[:], request)
			copy(a.Fingerprint[:], print)
			a.At = moment(at)
			if len(list) == limit {
				next = encodeSeq(list[limit-1].Seq)
				return nil
			}
			list = append(list, a)
			return nil
		})
	})
	return list, next, err
}

// Ingresses implements [ledger.Reader].
func (s *Store) Ingresses(ctx context.Context) ([]ledger.Ingress, error) {
	var list []ledger.Ingress
	err := s.read(ctx, "list ingresses", func(q *sql.Tx) error {
		return eachRow(func() (*sql.Rows, error) {
			return q.QueryContext(ctx, "SELECT id, start, seen, unreleased, oldest FROM ingresses ORDER BY id")
		}, func(scan func(...any) error) error {
			var i ledger.Ingress
			var seen int64
			var oldest sql.NullInt64
			err := scan(&i.ID, &i.Start, &seen, &i.Unreleased, &oldest)
			i.SeenAt, i.OldestUnreleased = moment(seen), moment(fromNull(oldest))
			list = append(list, i)
			return err
		})
	})
	return list, err
}
