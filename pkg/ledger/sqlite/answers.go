package sqlite

import (
	"context"
	"database/sql"
	"errors"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// answerCost is what a row of the table takes beside the body, about.
const answerCost = 512

func costOf(a *capture.Answer) int64 {
	if a == nil {
		return 0
	}
	return int64(len(a.Body)) + answerCost
}

// roomForAnswers reports whether there is room for so many bytes of answers
// beside the reserve, which is for outcomes, deletes and trims.
func (s *Store) roomForAnswers(need int64) (bool, error) {
	if need == 0 {
		return false, nil
	}
	err := s.roomFor(need)
	if errors.Is(err, ledger.ErrFull) {
		return false, nil
	}
	return err == nil, err
}

// answered is by how many bytes of answers the payloads have grown that were
// those of processed requests before: since this transaction began to be, or
// since an earlier one.
type answered struct {
	now, before int64
}

// keepAnswer keeps the answer of an attempt, unless one is kept. Its bytes count
// among those of the request's payload where that is known. elsewhere says that it
// is a test system's.
func (t *tx) keepAnswer(id uuid.UUID, run string, number int, a *capture.Answer, elsewhere bool) error {
	if len(a.Body) > capture.MaxAnswer {
		return refuse("an answer of %d bytes", len(a.Body))
	}
	body := a.Body
	if body == nil {
		body = []byte{}
	}
	var kept bool
	var payload, changed int64
	known, err := t.get([]any{&kept, &payload, &changed}, "SELECT kept, payload, changed FROM requests WHERE id = ?", id[:])
	if err != nil || known && payload == 0 {
		return err // what it would go with has gone
	}
	var freed int64
	if elsewhere {
		if freed, err = t.supersede(id, run, number); err != nil {
			return err
		}
	}
	n, err := t.exec("INSERT INTO answers (id, run, number, type, encoding, cut, body) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
		id[:], run, number, a.Type, a.Encoding, a.Cut, body)
	grown := n*int64(len(body)) - freed
	if err != nil || !known || grown == 0 {
		return err
	}
	switch {
	case kept && changed == t.now:
		t.answered.now += grown
	case kept:
		t.answered.before += grown
	}
	_, err = t.exec("UPDATE requests SET payload = payload + ? WHERE id = ?", grown, id[:])
	return err
}

// superseded are the answers of test systems that an attempt of a run to another
// target takes the place of: those of the run's earlier attempts, and of such
// runs that have ended, whose reports have said what there was to say.
const superseded = " FROM answers WHERE id = ? AND (run = ? AND number < ? OR run IN " +
	"(SELECT r.id FROM runs r WHERE r.id = answers.run AND r.target <> '' AND r.state <> 'active'))"

// supersede deletes them, and says how many bytes that frees: so repeated test
// replays take no more room than one.
func (t *tx) supersede(id uuid.UUID, run string, number int) (freed int64, err error) {
	if _, err := t.get([]any{&freed}, "SELECT coalesce(sum(length(body)), 0)"+superseded, id[:], run, number); err != nil {
		return 0, err
	}
	_, err = t.exec("DELETE"+superseded, id[:], run, number)
	return freed, err
}

// answerBytes is how much the answers take that came before their request.
func (t *tx) answerBytes(id uuid.UUID) (int64, error) {
	var n int64
	_, err := t.get([]any{&n}, "SELECT coalesce(sum(length(body)), 0) FROM answers WHERE id = ?", id[:])
	return n, err
}

// Answers implements [ledger.Reader].
func (s *Store) Answers(ctx context.Context, id uuid.UUID) ([]ledger.Answer, error) {
	var list []ledger.Answer
	err := s.read(ctx, "read answers", func(q *sql.Tx) error {
		return eachRow(func() (*sql.Rows, error) {
			return q.QueryContext(ctx, "SELECT a.run, a.number, a.type, a.encoding, a.cut, a.body, coalesce(r.target, '') <> '' AS elsewhere "+
				"FROM answers a LEFT JOIN runs r ON r.id = a.run WHERE a.id = ? ORDER BY elsewhere, a.run, a.number", id[:])
		}, func(scan func(...any) error) error {
			var a ledger.Answer
			err := scan(&a.Run, &a.Attempt, &a.Type, &a.Encoding, &a.Cut, &a.Body, &a.Elsewhere)
			list = append(list, a)
			return err
		})
	})
	return list, err
}

// queryTested reads the last attempt that has ended of each request of a run to
// another target.
const queryTested = "SELECT " + rowColumns + ", a.number, a.started, a.ended, a.status, a.error, a.verdict FROM target_attempts a JOIN requests r ON r.id = a.id " +
	"WHERE a.run = ? AND a.id > ? AND a.ended IS NOT NULL AND NOT EXISTS " +
	"(SELECT 1 FROM target_attempts b WHERE b.run = a.run AND b.id = a.id AND b.ended IS NOT NULL AND b.number > a.number) ORDER BY a.id LIMIT ?"

// Tested implements [ledger.Replayer].
func (s *Store) Tested(ctx context.Context, run string, after uuid.UUID, limit int) ([]ledger.TestResult, error) {
	now := s.o.Now().UnixNano()
	var list []ledger.TestResult
	err := s.read(ctx, "read test results", func(q *sql.Tx) error {
		if _, err := readRun(ctx, q, run); err != nil {
			return err
		}
		var rows []row
		err := eachRow(func() (*sql.Rows, error) {
			return q.QueryContext(ctx, queryTested, run, after[:], clamp(limit))
		}, func(scan func(...any) error) error {
			var r row
			var a attempt
			var started, ended sql.NullInt64
			if err := scanRow(scan, &r, &a.number, &started, &ended, &a.status, &a.error, &a.verdict); err != nil {
				return err
			}
			a.run, a.started, a.ended = run, fromNull(started), fromNull(ended)
			rows, list = append(rows, r), append(list, ledger.TestResult{Attempt: a.capture()})
			return nil
		})
		if err != nil {
			return err
		}
		for i := range rows {
			o, err := s.loadOrigin(ctx, q, rows[i].origin)
			if err != nil {
				return err
			}
			list[i].Request = rows[i].request(o, now)
		}
		return nil
	})
	return list, err
}
