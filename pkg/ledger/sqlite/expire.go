package sqlite

import (
	"context"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Expire implements [ledger.Keeper].
func (s *Store) Expire(ctx context.Context, r ledger.Retention, limit int) (deleted int, more bool, err error) {
	limit = max(limit, 1)
	err = s.write(ctx, "expire", func(t *tx) error {
		e := expiry{t: t, left: limit}
		for _, step := range []func(ledger.Retention) error{e.payloadsByAge, e.payloadsByBytes, e.requests, e.early, e.assemblies} {
			if err := step(r); err != nil {
				return err
			}
		}
		deleted, more = limit-e.left, e.left == 0
		return nil
	})
	if err != nil {
		return 0, false, err
	}
	if err := s.shrink(ctx); err != nil && ctx.Err() == nil {
		// What was to be deleted is deleted; the next call tries again.
		s.log.Warn("ledger file not shrunk", "err", err)
	}
	return deleted, more, nil
}

// expiry is one call of Expire, which may still touch so many requests.
type expiry struct {
	t    *tx
	left int
}

// before is the time at which what happened is older than age. ok is false when
// that never is.
func (e *expiry) before(age time.Duration) (int64, bool) {
	return e.t.now - age.Nanoseconds(), age > 0
}

func (e *expiry) payloadsByAge(r ledger.Retention) error {
	before, ok := e.before(r.KeepProcessed)
	if !ok {
		return nil
	}
	list, err := e.closed("WHERE kept = 1 AND state >= 3 AND changed < ? ORDER BY changed LIMIT ?", before, e.left)
	if err != nil {
		return err
	}
	return e.dropPayloads(list)
}

func (e *expiry) payloadsByBytes(r ledger.Retention) error {
	if r.KeepProcessedBytes <= 0 || e.left == 0 {
		return nil
	}
	bytes, err := e.t.counter(counterPayloadBytes)
	if err != nil || bytes <= r.KeepProcessedBytes {
		return err
	}
	list, err := e.closed("WHERE kept = 1 AND state >= 3 ORDER BY changed LIMIT ?", e.left)
	if err != nil {
		return err
	}
	over := bytes - r.KeepProcessedBytes
	for i := range list {
		if over <= 0 {
			list = list[:i]
			break
		}
		over -= list[i].payload
	}
	return e.dropPayloads(list)
}

func (e *expiry) requests(r ledger.Retention) error {
	before, ok := e.before(r.Retention)
	if !ok {
		return nil
	}
	for _, where := range []string{
		"WHERE kept = 0 AND state >= 3 AND changed < ? ORDER BY changed LIMIT ?",
		"WHERE kept = 1 AND state >= 3 AND changed < ? ORDER BY changed LIMIT ?",
	} {
		if e.left == 0 {
			return nil
		}
		list, err := e.closed(where, before, e.left)
		if err != nil {
			return err
		}
		for i := range list {
			if err := e.delete(&list[i]); err != nil {
				return err
			}
		}
		e.left -= len(list)
	}
	return nil
}

// closed reads rows by the index on what is closed.
func (e *expiry) closed(where string, args ...any) ([]row, error) {
	var list []row
	err := e.t.each(func(scan func(...any) error) error {
		var r row
		var id []byte
		err := scan(&id, &r.seq, &r.state, &r.kept, &r.payload, &r.facts)
		copy(r.id[:], id)
		list = append(list, r)
		return err
	}, "SELECT id, seq, state, kept, payload, facts FROM requests "+where, args...)
	return list, err
}

func (e *expiry) dropPayloads(list []row) error {
	for i := range list {
		r := &list[i]
		if err := e.dropPayload(r); err != nil {
			return err
		}
		if _, err := e.t.exec("UPDATE requests SET kept = 0, payload = 0 WHERE id = ?", r.id[:]); err != nil {
			return err
		}
		e.t.add(counterPayloadBytes, -r.payload)
	}
	e.left -= len(list)
	return nil
}

func (e *expiry) dropPayload(r *row) error {
	if _, err := e.t.exec("DELETE FROM payloads WHERE seq = ?", r.seq); err != nil {
		return err
	}
	if _, err := e.t.exec("DELETE FROM answers WHERE id = ?", r.id[:]); err != nil {
		return err
	}
	_, err := e.t.exec("DELETE FROM chunks WHERE id = ?", r.id[:])
	return err
}

// delete removes a request and every fact about it.
func (e *expiry) delete(r *row) error {
	t := e.t
	if err := e.dropPayload(r); err != nil {
		return err
	}
	queries := []string{"DELETE FROM requests WHERE id = ?", "DELETE FROM assemblies WHERE id = ?", "DELETE FROM target_attempts WHERE id = ?"}
	if r.facts == factsTables {
		queries = append(queries, "DELETE FROM attempts WHERE id = ?", "DELETE FROM events WHERE id = ?",
			"DELETE FROM quarantines WHERE id = ?", "DELETE FROM discards WHERE id = ?")
	}
	for _, q := range queries {
		if _, err := t.exec(q, r.id[:]); err != nil {
			return err
		}
	}
	if _, err := t.exec("DELETE FROM leases WHERE key = ?", leaseKey(r.id.String())); err != nil {
		return err
	}
	if r.kept {
		t.add(counterPayloadBytes, -r.payload)
	}
	t.add(counterRequests+string(states[r.state]), -1)
	t.add(counterExpired, 1)
	return nil
}

// early deletes facts whose capture never came.
func (e *expiry) early(r ledger.Retention) error {
	before, ok := e.before(r.Retention)
	if !ok || e.left == 0 {
		return nil
	}
	var seqs []int64
	var events int64
	err := e.t.each(func(scan func(...any) error) error {
		var seq, event, known int64
		err := scan(&seq, &event, &known)
		// They are in the order of their insertion; clocks may step, so each
		// is looked at.
		if known < before {
			seqs = append(seqs, seq)
			events += event
		}
		return err
	}, "SELECT seq, event, known FROM early ORDER BY seq LIMIT ?", e.left)
	if err != nil {
		return err
	}
	for _, seq := range seqs {
		if _, err := e.t.exec("DELETE FROM answers WHERE id = (SELECT y.id FROM early y WHERE y.seq = ?)", seq); err != nil {
			return err
		}
		if _, err := e.t.exec("DELETE FROM early WHERE seq = ?", seq); err != nil {
			return err
		}
	}
	e.t.add(counterEarly, -int64(len(seqs)))
	e.t.add(counterEarlyEvents, -events)
	e.left -= len(seqs)
	return nil
}

// assemblies deletes chunks whose head never came, and the memory of abandoned
// ones.
func (e *expiry) assemblies(r ledger.Retention) error {
	before, ok := e.before(r.Retention)
	if !ok || e.left == 0 {
		return nil
	}
	var ids []uuid.UUID
	err := e.t.each(func(scan func(...any) error) error {
		var id []byte
		err := scan(&id)
		ids = append(ids, uuid.UUID(id))
		return err
	}, "SELECT id FROM assemblies WHERE status IN (0, 4) AND changed < ? ORDER BY changed LIMIT ?", before, e.left)
	if err != nil {
		return err
	}
	for _, id := range ids {
		for _, q := range []string{"DELETE FROM chunks WHERE id = ?", "DELETE FROM refs WHERE id = ?", "DELETE FROM assemblies WHERE id = ?"} {
			if _, err := e.t.exec(q, id[:]); err != nil {
				return err
			}
		}
	}
	e.left -= len(ids)
	return nil
}

// Pages are given back to the file system where so many are free: fewer are
// used again by the next captures. Moving a page costs a page in the WAL, so
// that a step is small enough for a disk that is nearly full.
const (
	shrinkAbove = 1024
	shrinkSteps = 8
	shrinkStep  = "PRAGMA incremental_vacuum(256)"
)

// shrink gives free pages back, so that the file follows what it holds.
func (s *Store) shrink(ctx context.Context) error {
	for range shrinkSteps {
		var free, pages int64
		err := s.write(ctx, "shrink", func(t *tx) error {
			if _, err := t.get([]any{&free}, "PRAGMA freelist_count"); err != nil {
				return err
			}
			if _, err := t.get([]any{&pages}, "PRAGMA page_count"); err != nil {
				return err
			}
			if free <= max(shrinkAbove, pages/10) {
				free = 0
				return nil
			}
			_, err := t.exec(shrinkStep)
			return err
		})
		if err != nil || free == 0 {
			return err
		}
		// The file is cut when the WAL has been written to it.
		if err := s.checkpoint(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkpoint writes the WAL to the file, as far as readers allow.
func (s *Store) checkpoint(ctx context.Context) error {
	select {
	case <-s.lock:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { s.lock <- struct{}{} }()
	if s.closed.Load() {
		return errClosed
	}
	_, err := s.conn.ExecContext(context.Background(), "PRAGMA wal_checkpoint(PASSIVE)")
	return classify(err)
}
