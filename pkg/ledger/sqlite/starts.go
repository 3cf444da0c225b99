package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"slices"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// startCounter names a counter of one process start.
func startCounter(counter, ingress, start string) string { return counter + ingress + "/" + start }

// saveCaptured keeps what a heartbeat says of its captures. The first one of a
// start makes the balanced ones before it superfluous.
func (t *tx) saveCaptured(b *capture.Heartbeat) error {
	if b.Captured <= 0 || b.Start == "" {
		return nil
	}
	name := startCounter(counterCaptured, b.Ingress, b.Start)
	var n int64
	known, err := t.get([]any{&n}, "SELECT n FROM counters WHERE name = ?", name)
	if err != nil || known && n >= b.Captured {
		return err
	}
	if !known {
		if b.Stopped {
			return nil // a goodbye that comes late may be of a start that is forgotten
		}
		if err := t.forgetStarts(b.Ingress); err != nil {
			return err
		}
	}
	_, err = t.exec("INSERT INTO counters (name, n) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = excluded.n", name, b.Captured)
	return err
}

// forgetStarts deletes the counters of the ingress's starts of which everything
// is recorded. One that has recorded and said nothing may be about to speak, and
// stays.
func (t *tx) forgetStarts(ingress string) error {
	starts := make(map[string]*ledger.Start)
	for _, counter := range []string{counterCaptured, counterRecorded} {
		// "0" follows "/".
		err := t.each(readStart(starts), "SELECT name, n FROM counters WHERE name >= ? AND name < ?",
			startCounter(counter, ingress, ""), counter+ingress+"0")
		if err != nil {
			return err
		}
	}
	for _, s := range starts {
		if s.Captured == 0 || s.Recorded < s.Captured {
			continue
		}
		for _, counter := range []string{counterCaptured, counterRecorded} {
			if _, err := t.exec("DELETE FROM counters WHERE name = ?", startCounter(counter, s.Ingress, s.ID)); err != nil {
				return err
			}
		}
	}
	return nil
}

// readStart reads counters of starts into a map by "<ingress>/<start>".
func readStart(starts map[string]*ledger.Start) func(scan func(...any) error) error {
	return func(scan func(...any) error) error {
		var name string
		var n int64
		if err := scan(&name, &n); err != nil {
			return err
		}
		captured := strings.HasPrefix(name, counterCaptured)
		_, key, _ := strings.Cut(name, ":")
		s := starts[key]
		if s == nil {
			s = &ledger.Start{}
			s.Ingress, s.ID, _ = strings.Cut(key, "/")
			starts[key] = s
		}
		if captured {
			s.Captured = n
		} else {
			s.Recorded = n
		}
		return nil
	}
}

// Starts implements [ledger.Reader].
func (s *Store) Starts(ctx context.Context) ([]ledger.Start, error) {
	starts := make(map[string]*ledger.Start)
	err := s.read(ctx, "list starts", func(q *sql.Tx) error {
		return eachRow(func() (*sql.Rows, error) {
			// ";" follows ":".
			return q.QueryContext(ctx, "SELECT name, n FROM counters WHERE name >= ? AND name < ? OR name >= ? AND name < ?",
				counterCaptured, "captured;", counterRecorded, "recorded;")
		}, readStart(starts))
	})
	if err != nil {
		return nil, err
	}
	list := make([]ledger.Start, 0, len(starts))
	for _, one := range starts {
		list = append(list, *one)
	}
	slices.SortFunc(list, func(a, b ledger.Start) int {
		return cmp.Or(strings.Compare(a.Ingress, b.Ingress), strings.Compare(a.ID, b.ID))
	})
	return list, nil
}
