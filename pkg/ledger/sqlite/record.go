package sqlite

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Record implements [ledger.Recorder].
func (s *Store) Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error) {
	if len(items) == 0 {
		return nil, nil
	}
	if err := s.room(items); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	results := make([]ledger.Result, len(items))
	errs, err := s.batch(ctx, "record", len(items),
		func(_ *tx, items func() error) error { return items() },
		func(t *tx, i int) (err error) {
			if results[i], err = t.record(&items[i]); err == nil && results[i].New {
				err = t.meet(items[i].Ref)
			}
			return err
		})
	if err != nil {
		return nil, err
	}
	for i, err := range errs {
		if err != nil {
			results[i] = ledger.Result{Err: err}
		}
	}
	for i := range results {
		if results[i].Err != nil {
			results[i].New = false
		}
	}
	return results, nil
}

// room refuses new captures before they eat into the reserve.
func (s *Store) room(items []ledger.Item) error {
	var need int64
	for i := range items {
		switch c := items[i].Captured; {
		case c.Request != nil:
			need += int64(len(c.Request.Head)+len(c.Request.Body)) + 512
		case c.Chunk != nil:
			need += int64(len(c.Chunk.Data)) + 512
		}
	}
	return s.roomFor(need)
}

// roomFor refuses so many bytes where they would eat into the reserve.
func (s *Store) roomFor(need int64) error {
	if need == 0 || s.o.ReserveBytes < 0 {
		return nil
	}
	free, total, err := diskRoom(filepath.Dir(s.path))
	if err != nil {
		return fmt.Errorf("%w: %w", ledger.ErrUnavailable, err)
	}
	reserve := s.o.ReserveBytes
	if reserve == 0 {
		reserve = min(DefaultReserve, total/8)
	}
	// Each byte is written twice: to the WAL, and to the file at a checkpoint.
	// What stands in the WAL may still have to go to the file.
	var pending int64
	if wal, err := os.Stat(s.path + "-wal"); err == nil {
		pending = wal.Size()
	}
	if free-pending-2*need < reserve {
		return fmt.Errorf("%w: %d bytes are free, %d are held back", ledger.ErrFull, free, reserve)
	}
	return nil
}

func (t *tx) record(item *ledger.Item) (ledger.Result, error) {
	switch c := item.Captured; {
	case c.Request != nil && c.Request.Chunks > 0:
		return t.recordHead(c.Request, item.Ref)
	case c.Request != nil:
		return t.recordInline(c.Request, item.Ref)
	case c.Chunk != nil:
		return t.recordChunk(c.Chunk, item.Ref)
	case c.Abandon != nil:
		return t.recordAbandon(c.Abandon, item.Ref)
	}
	return ledger.Result{}, refuse("an item without capture, chunk or abandon record")
}

// meet counts a new request for the start it came from, and makes its ingress
// known, as one that was never heard from: a replay has to wait for what its
// spool may hold.
func (t *tx) meet(ref capture.SpoolRef) error {
	if ref.Ingress == "" {
		return nil
	}
	if t.met.Ingress == ref.Ingress && t.met.Start == ref.Start {
		t.add(t.recorded, 1)
		return nil
	}
	t.met, t.recorded = ref, startCounter(counterRecorded, ref.Ingress, ref.Start)
	t.add(t.recorded, 1)
	_, err := t.exec("INSERT INTO ingresses (id, start, own, seen, unreleased) VALUES (?, ?, 0, 0, 0) ON CONFLICT DO NOTHING", ref.Ingress, ref.Start)
	return err
}

func released(refs ...capture.SpoolRef) ledger.Result {
	var r ledger.Result
	for _, ref := range refs {
		if ref != (capture.SpoolRef{}) {
			r.Released = append(r.Released, ref)
		}
	}
	return r
}

// known reports whether the request is in the ledger.
func (t *tx) known(id uuid.UUID) (bool, error) {
	if !t.haveNewest {
		t.haveNewest = true
		var newest []byte
		if _, err := t.get([]any{&newest}, "SELECT max(id) FROM requests"); err != nil {
			return false, err
		}
		copy(t.newest[:], newest)
	}
	if bytes.Compare(id[:], t.newest[:]) > 0 {
		return false, nil
	}
	var one int
	return t.get([]any{&one}, "SELECT 1 FROM requests WHERE id = ?", id[:])
}

func (t *tx) recordInline(r *capture.Request, ref capture.SpoolRef) (ledger.Result, error) {
	known, err := t.known(r.ID)
	if err != nil {
		return ledger.Result{}, err
	}
	if known {
		return released(ref), nil
	}
	if int64(len(r.Body)) != r.Size {
		return ledger.Result{}, refuse("body has %d bytes, %d announced", len(r.Body), r.Size)
	}
	received, err := nanos(r.ReceivedAt)
	if err != nil {
		return ledger.Result{}, err
	}
	org, err := t.origin(origin{route: r.Route, ingress: r.Ingress, policy: r.Policy})
	if err != nil {
		return ledger.Result{}, err
	}
	body := r.Body
	if body == nil {
		body = []byte{}
	}
	n := row{id: r.ID, origin: org, method: r.Method(), target: []byte(r.Target()), size: r.Size, received: received}
	if r.OrderKey != "" {
		n.orderKey = []byte(r.OrderKey)
	}
	if err := t.insert(&n, r.Policy, r.Head, body); err != nil {
		return ledger.Result{}, err
	}
	res := released(ref)
	res.New = true
	return res, nil
}

// insert makes a request known. body is nil when it is in chunks.
func (t *tx) insert(r *row, policy capture.Policy, head, body []byte) error {
	if r.received == never {
		return refuse("no time of receipt")
	}
	var err error
	if r.seq, err = t.next(counterSeq); err != nil {
		return err
	}
	r.recorded, r.changed = t.now, t.now
	r.payload = int64(len(head)) + r.size
	u := &subject{t: t, row: *r, policy: policy}
	if err := u.takeEarly(); err != nil {
		return err
	}
	if late(t.s.o.Retention, t.now-r.received) {
		if err := u.addQuarantine(capture.QuarantineLate, ""); err != nil {
			return err
		}
	}
	*r = u.row
	r.derive(&u.facts, policy)
	if u.spilt {
		r.facts = factsTables
	}
	if r.facts == factsInline {
		r.changed = u.facts.attempts[0].known
	}
	args := []any{r.id[:], r.seq, r.state, r.kept, r.payload, r.due, r.facts, r.changed, r.origin, r.method, r.target, r.orderKey,
		r.size, r.received, r.recorded, r.attempts, r.unresolved}
	query := "INSERT INTO requests (id, seq, state, kept, payload, due, facts, changed, origin, method, target, order_key, " +
		"size, received, recorded, attempts, unresolved) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
	if r.facts != factsNone { // nearly always there are none, and six values less to bind
		args = append(args, orNull(r.started), orNull(r.ended), r.status, orEmpty(r.error), r.verdict, orSame(r))
		query = "INSERT INTO requests (id, seq, state, kept, payload, due, facts, changed, origin, method, target, order_key, " +
			"size, received, recorded, attempts, unresolved, started, ended, status, error, verdict, match_status) " +
			"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
	}
	if _, err := t.exec(query, args...); err != nil {
		return err
	}
	if _, err := t.exec("INSERT INTO payloads (seq, head, body) VALUES (?, ?, ?)", r.seq, head, body); err != nil {
		return err
	}
	t.add(counterRequests+string(states[r.state]), 1)
	if r.kept {
		t.add(counterPayloadBytes, r.payload)
	}
	if bytes.Compare(r.id[:], t.newest[:]) > 0 {
		t.newest = r.id
	}
	return nil
}

// late reports whether a capture of that age comes so late that its equals may
// have been deleted already.
func late(retention time.Duration, age int64) bool {
	if retention <= 0 {
		return false
	}
	return age > max(retention-24*time.Hour, retention/2).Nanoseconds()
}

// takeEarly moves the facts that came before the capture to the request.
func (u *subject) takeEarly() error {
	t := u.t
	if !t.haveEarly {
		n, err := t.counter(counterEarly)
		if err != nil {
			return err
		}
		t.early, t.haveEarly = n > 0, true
	}
	if !t.early {
		return nil
	}
	attempts, events, err := t.readEarly(u.row.id)
	if err != nil || len(attempts)+len(events) == 0 {
		return err
	}
	for _, a := range attempts {
		if _, err := u.addAttempt(a); err != nil {
			return err
		}
	}
	if len(attempts) > 0 {
		n, err := t.answerBytes(u.row.id)
		if err != nil {
			return err
		}
		u.row.payload += n
	}
	for _, e := range events {
		if _, err := u.addEvent(e); err != nil {
			return err
		}
	}
	if _, err := t.exec("DELETE FROM early WHERE id = ?", u.row.id[:]); err != nil {
		return err
	}
	t.add(counterEarly, -int64(len(attempts)+len(events)))
	t.add(counterEarlyEvents, -int64(len(events)))
	return nil
}

func (t *tx) readEarly(id uuid.UUID) (attempts []attempt, events []event, err error) {
	err = t.each(func(scan func(...any) error) error {
		var isEvent bool
		var a attempt
		var started, ended sql.NullInt64
		if err := scan(&isEvent, &a.number, &a.run, &started, &ended, &a.status, &a.error, &a.verdict, &a.known); err != nil {
			return err
		}
		if isEvent {
			events = append(events, event{verdict: a.verdict, attempt: a.number, detail: a.error, known: a.known})
			return nil
		}
		a.started, a.ended = fromNull(started), fromNull(ended)
		attempts = append(attempts, a)
		return nil
	}, "SELECT event, attempt, run, started, ended, status, text, verdict, known FROM early WHERE id = ? ORDER BY seq", id[:])
	return attempts, events, err
}

// assembly is a body in chunks and what is known of its head.
type assembly struct {
	status   int
	origin   int64
	orderKey []byte
	size     int64
	received int64
	chunks   int64
	sha256   string
	head     []byte
}

func (t *tx) assembly(id uuid.UUID) (a assembly, found bool, err error) {
	var org, size, received, chunks sql.NullInt64
	var sum sql.NullString
	found, err = t.get([]any{&a.status, &org, &a.orderKey, &size, &received, &chunks, &sum, &a.head},
		"SELECT status, origin, order_key, size, received, chunks, sha256, head FROM assemblies WHERE id = ?", id[:])
	a.origin, a.size, a.received, a.chunks, a.sha256 = org.Int64, size.Int64, received.Int64, chunks.Int64, sum.String
	return a, found, err
}

func (t *tx) hold(id uuid.UUID, ref capture.SpoolRef) error {
	if ref == (capture.SpoolRef{}) {
		return nil
	}
	_, err := t.exec("INSERT INTO refs (id, ref) VALUES (?, ?) ON CONFLICT DO NOTHING", id[:], ref.String())
	return err
}

// release gives up the refs that wait for this request.
func (t *tx) release(id uuid.UUID) ([]capture.SpoolRef, error) {
	var refs []capture.SpoolRef
	err := t.each(func(scan func(...any) error) error {
		var text string
		if err := scan(&text); err != nil {
			return err
		}
		if ref, ok := parseRef(text); ok {
			refs = append(refs, ref)
		}
		return nil
	}, "SELECT ref FROM refs WHERE id = ?", id[:])
	if err != nil {
		return nil, err
	}
	_, err = t.exec("DELETE FROM refs WHERE id = ?", id[:])
	return refs, err
}

// parseRef is the inverse of [capture.SpoolRef.String], for whatever was held.
func parseRef(text string) (capture.SpoolRef, bool) {
	start, end := strings.IndexByte(text, '/'), strings.LastIndexByte(text, '/')
	if start < 0 || start == end {
		return capture.SpoolRef{}, false
	}
	index, err := strconv.ParseUint(text[end+1:], 10, 64)
	return capture.SpoolRef{Ingress: text[:start], Start: text[start+1 : end], Index: index}, err == nil
}

func (t *tx) recordChunk(c *capture.Chunk, ref capture.SpoolRef) (ledger.Result, error) {
	a, found, err := t.assembly(c.ID)
	if err != nil {
		return ledger.Result{}, err
	}
	if found && a.status >= assemblyComplete {
		return released(ref), nil
	}
	if !found {
		// A request that is known without an assembly has its body inline.
		if known, err := t.known(c.ID); err != nil || known {
			return released(ref), err
		}
		if _, err := t.exec("INSERT INTO assemblies (id, status, changed) VALUES (?, ?, ?)", c.ID[:], assemblyChunks, t.now); err != nil {
			return ledger.Result{}, err
		}
	}
	n, err := t.exec("INSERT INTO chunks (id, number, data) VALUES (?, ?, ?) ON CONFLICT (id, number) DO NOTHING", c.ID[:], c.Number, c.Data)
	if err != nil {
		return ledger.Result{}, err
	}
	if err := t.hold(c.ID, ref); err != nil {
		return ledger.Result{}, err
	}
	if n == 0 || a.status != assemblyWaiting {
		return ledger.Result{}, nil
	}
	return t.complete(c.ID, a)
}

func (t *tx) recordHead(r *capture.Request, ref capture.SpoolRef) (ledger.Result, error) {
	a, found, err := t.assembly(r.ID)
	if err != nil {
		return ledger.Result{}, err
	}
	switch {
	case found && (a.status == assemblyComplete || a.status == assemblyBroken):
		return released(ref), nil
	case found && a.status == assemblyWaiting:
		return ledger.Result{}, t.hold(r.ID, ref)
	}
	if known, err := t.known(r.ID); err != nil || known {
		return released(ref), err
	}
	switch {
	case len(r.Head) == 0 || r.Method() == "" || r.Target() == "":
		return ledger.Result{}, refuse("head has no request line")
	case len(r.Body) > 0:
		return ledger.Result{}, refuse("a body of %d bytes beside %d chunks", len(r.Body), r.Chunks)
	case len(r.SHA256) != hex.EncodedLen(sha256.Size):
		return ledger.Result{}, refuse("sha256 %q", r.SHA256)
	case r.ReceivedAt.IsZero():
		return ledger.Result{}, refuse("no time of receipt")
	}
	a = assembly{status: assemblyWaiting, size: r.Size, chunks: int64(r.Chunks), sha256: strings.ToLower(r.SHA256), head: r.Head}
	if a.received, err = nanos(r.ReceivedAt); err != nil {
		return ledger.Result{}, err
	}
	if r.OrderKey != "" {
		a.orderKey = []byte(r.OrderKey)
	}
	if a.origin, err = t.origin(origin{route: r.Route, ingress: r.Ingress, policy: r.Policy}); err != nil {
		return ledger.Result{}, err
	}
	if _, err := t.exec("INSERT INTO assemblies (id, status, changed, origin, order_key, size, received, chunks, sha256, head) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "+
		"ON CONFLICT (id) DO UPDATE SET status = excluded.status, changed = excluded.changed, origin = excluded.origin, order_key = excluded.order_key, "+
		"size = excluded.size, received = excluded.received, chunks = excluded.chunks, sha256 = excluded.sha256, head = excluded.head",
		r.ID[:], a.status, t.now, a.origin, a.orderKey, a.size, a.received, a.chunks, a.sha256, a.head); err != nil {
		return ledger.Result{}, err
	}
	if err := t.hold(r.ID, ref); err != nil {
		return ledger.Result{}, err
	}
	res, err := t.complete(r.ID, a)
	if err != nil || res.New || res.Err != nil {
		return res, err
	}
	_, err = t.setAside(&ledger.Aside{
		Kind: kindIncomplete, Reason: fmt.Sprintf("waits for its body of %d chunks", r.Chunks),
		Subject: capture.RequestSubject(r.Route, r.Method()), RequestID: r.ID, Data: r.Head,
		At: moment(t.now), Fingerprint: incompleteFingerprint(r.ID),
	})
	return ledger.Result{}, err
}

const kindIncomplete = "incomplete"

func incompleteFingerprint(id uuid.UUID) [32]byte {
	return sha256.Sum256(append([]byte(kindIncomplete+" "), id[:]...))
}

// complete makes the request known if all its chunks are there and whole.
func (t *tx) complete(id uuid.UUID, a assembly) (ledger.Result, error) {
	var n int64
	if _, err := t.get([]any{&n}, "SELECT count(*) FROM chunks WHERE id = ? AND number < ?", id[:], a.chunks); err != nil || n < a.chunks {
		return ledger.Result{}, err
	}
	hash := sha256.New()
	var size int64
	err := t.each(func(scan func(...any) error) error {
		var data sql.RawBytes
		if err := scan(&data); err != nil {
			return err
		}
		size += int64(len(data))
		_, err := hash.Write(data)
		return err
	}, "SELECT data FROM chunks WHERE id = ? AND number < ? ORDER BY number", id[:], a.chunks)
	if err != nil {
		return ledger.Result{}, err
	}
	refs, err := t.release(id)
	if err != nil {
		return ledger.Result{}, err
	}
	res := released(refs...)
	if sum := hex.EncodeToString(hash.Sum(nil)); size != a.size || sum != a.sha256 {
		reason := fmt.Sprintf("body has %d bytes and sha256 %s, the head announced %d and %s", size, sum, a.size, a.sha256)
		res.Err = refuse("%s", reason)
		return res, t.breakOff(id, a, reason)
	}
	if _, err := t.exec("UPDATE assemblies SET status = ?, changed = ?, head = NULL WHERE id = ?", assemblyComplete, t.now, id[:]); err != nil {
		return ledger.Result{}, err
	}
	if _, err := t.exec("DELETE FROM chunks WHERE id = ? AND number >= ?", id[:], a.chunks); err != nil {
		return ledger.Result{}, err
	}
	if err := t.dropIncomplete(id); err != nil {
		return ledger.Result{}, err
	}
	o, err := t.s.loadOriginIn(t, a.origin)
	if err != nil {
		return ledger.Result{}, err
	}
	req := capture.Request{Head: a.head}
	r := row{id: id, origin: a.origin, method: req.Method(), target: []byte(req.Target()), orderKey: a.orderKey, size: a.size, received: a.received}
	if err := t.insert(&r, o.policy, a.head, nil); err != nil {
		return ledger.Result{}, err
	}
	res.New = true
	return res, nil
}

func (t *tx) dropIncomplete(id uuid.UUID) error {
	print := incompleteFingerprint(id)
	n, err := t.exec("DELETE FROM asides WHERE fingerprint = ?", print[:])
	t.add(counterAside+kindIncomplete, -n)
	return err
}

// breakOff sets a head aside for good whose chunks are not its body. The chunks
// stay, for whoever wants to look.
func (t *tx) breakOff(id uuid.UUID, a assembly, reason string) error {
	if _, err := t.exec("UPDATE assemblies SET status = ?, changed = ? WHERE id = ?", assemblyBroken, t.now, id[:]); err != nil {
		return err
	}
	o, err := t.s.loadOriginIn(t, a.origin)
	if err != nil {
		return err
	}
	print := incompleteFingerprint(id)
	n, err := t.exec("UPDATE asides SET reason = ? WHERE fingerprint = ?", reason, print[:])
	if err != nil || n > 0 {
		return err
	}
	req := capture.Request{Head: a.head}
	_, err = t.setAside(&ledger.Aside{
		Kind: kindIncomplete, Reason: reason, Subject: capture.RequestSubject(o.route, req.Method()),
		RequestID: id, Data: a.head, At: moment(t.now), Fingerprint: print,
	})
	return err
}

// loadOriginIn also finds origins that this transaction has made.
func (s *Store) loadOriginIn(t *tx, id int64) (origin, error) {
	for o, have := range t.fresh {
		if have == id {
			return o, nil
		}
	}
	return s.loadOrigin(context.Background(), s.conn, id)
}

func (t *tx) recordAbandon(a *capture.Abandon, ref capture.SpoolRef) (ledger.Result, error) {
	have, found, err := t.assembly(a.ID)
	if err != nil {
		return ledger.Result{}, err
	}
	if found && have.status != assemblyChunks {
		return released(ref), nil
	}
	if !found {
		if known, err := t.known(a.ID); err != nil || known {
			return released(ref), err
		}
	}
	refs, err := t.release(a.ID)
	if err != nil {
		return ledger.Result{}, err
	}
	if _, err := t.exec("DELETE FROM chunks WHERE id = ?", a.ID[:]); err != nil {
		return ledger.Result{}, err
	}
	_, err = t.exec("INSERT INTO assemblies (id, status, changed) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET status = excluded.status, changed = excluded.changed",
		a.ID[:], assemblyAbandoned, t.now)
	return released(append(refs, ref)...), err
}

// SetAside implements [ledger.Recorder].
func (s *Store) SetAside(ctx context.Context, messages []ledger.Aside) error {
	if len(messages) == 0 {
		return nil
	}
	return s.write(ctx, "set aside", func(t *tx) error {
		for i := range messages {
			if _, err := t.setAside(&messages[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (t *tx) setAside(a *ledger.Aside) (int64, error) {
	print := a.Fingerprint
	if print == [32]byte{} {
		h := sha256.New()
		h.Write([]byte(a.Subject))
		h.Write(a.Header)
		h.Write(a.Data)
		h.Sum(print[:0])
	}
	at := t.now
	if !a.At.IsZero() {
		var err error
		if at, err = nanos(a.At); err != nil {
			at = t.now
		}
	}
	var request []byte
	if a.RequestID != uuid.Nil {
		request = a.RequestID[:]
	}
	n, err := t.exec("INSERT INTO asides (kind, reason, subject, request, header, data, at, fingerprint) VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (fingerprint) DO NOTHING",
		a.Kind, a.Reason, a.Subject, request, a.Header, a.Data, at, print[:])
	t.add(counterAside+a.Kind, n)
	return n, err
}

// SaveHeartbeats implements [ledger.Recorder].
func (s *Store) SaveHeartbeats(ctx context.Context, beats []capture.Heartbeat) error {
	if len(beats) == 0 {
		return nil
	}
	// Not the transaction's time: it may have waited for a lock, and a replay
	// must not take an old heartbeat for a new one.
	called := s.o.Now().UnixNano()
	return s.write(ctx, "save heartbeats", func(t *tx) error {
		for i := range beats {
			if err := t.saveHeartbeat(&beats[i], called-beats[i].Age.Nanoseconds()); err != nil {
				return err
			}
		}
		return nil
	})
}

func (t *tx) saveHeartbeat(b *capture.Heartbeat, sent int64) error {
	own, err := nanos(b.Now)
	if err != nil {
		return err
	}
	if err := t.saveCaptured(b); err != nil {
		return err
	}
	if b.Stopped {
		// The word of a process that has been followed by another is not about
		// the other one's spool.
		_, err := t.exec("DELETE FROM ingresses WHERE id = ? AND start = ?", b.Ingress, b.Start)
		return err
	}
	var oldest any
	if b.Unreleased > 0 && !b.OldestUnreleased.IsZero() {
		oldest = sent - b.UnreleasedFor().Nanoseconds()
	}
	_, err = t.exec("INSERT INTO ingresses (id, start, own, seen, unreleased, oldest) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "+
		"start = excluded.start, own = excluded.own, seen = excluded.seen, unreleased = excluded.unreleased, oldest = excluded.oldest "+
		"WHERE start <> excluded.start OR own <= excluded.own", b.Ingress, b.Start, own, sent, b.Unreleased, oldest)
	return err
}
