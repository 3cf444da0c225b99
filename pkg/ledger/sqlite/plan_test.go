package sqlite

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// How a question is answered is what keeps it quick when processed rows pile
// up: by the index on what is not processed, without sorting.
func TestNothingWalksProcessedRows(t *testing.T) {
	ctx := context.Background()
	s, err := Open(ctx, Options{Path: filepath.Join(t.TempDir(), "ledger.db")})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	plan := func(query string, args ...any) string {
		var lines []string
		err := eachRow(func() (*sql.Rows, error) { return s.readDB.QueryContext(ctx, "EXPLAIN QUERY PLAN "+query, args...) }, func(scan func(...any) error) error {
			var a, b, c int
			var line string
			err := scan(&a, &b, &c, &line)
			lines = append(lines, line)
			return err
		})
		require.NoError(t, err)
		return strings.Join(lines, "\n")
	}
	for _, f := range []ledger.Filter{
		{Replayable: true},
		{States: []capture.State{capture.StateFailed}},
		{States: []capture.State{capture.StateRejected, capture.StateQuarantined, capture.StateDiscarded}},
		{Replayable: true, Since: time.Now(), Until: time.Now(), Methods: []string{"POST"}, Routes: []string{"a", "b"}, Path: "/x", Statuses: "5xx"},
	} {
		codes, all := statesOf(&f)
		require.False(t, all)
		sel := selection{f: &f, states: codes, dueOnly: f.Replayable, after: uuid.New(), maxSeq: 7}
		query, args := sel.query(1, nil)
		p := plan(query, args...)
		require.Equal(t, len(codes), strings.Count(p, "SEARCH r USING INDEX requests_unprocessed (state=? AND id>?"), p)
		require.NotContains(t, p, "SCAN r", p)
		require.NotContains(t, p, "TEMP B-TREE FOR ORDER BY", p)
	}
	p := plan(queryHead, []byte("k"), make([]byte, 16), "calls")
	require.Contains(t, p, "SEARCH r USING INDEX requests_keyed (origin=? AND order_key=? AND id<?)", p)
	require.NotContains(t, p, "TEMP B-TREE", p)
	require.Regexp(t, `SEARCH o USING (COVERING )?INDEX`, p)
	for _, query := range []string{queryCapturedLease, queryGivenLease} {
		require.Regexp(t, `SEARCH leases USING INDEX leases_(captured|given)`, plan(query, []byte("k"), 1))
	}
	for _, query := range []string{
		"SELECT received FROM requests WHERE state = 0 AND state <> 5 AND due <= 1 ORDER BY id LIMIT 1",
		"SELECT coalesce(sum(payload), 0) FROM requests WHERE kept = 1 AND changed = 1 AND state >= 3",
		"SELECT id FROM requests WHERE kept = 1 AND state >= 3 AND changed < 1 ORDER BY changed LIMIT 1",
		"SELECT id FROM requests WHERE kept = 1 AND state >= 3 ORDER BY changed LIMIT 1",
		"SELECT id FROM assemblies WHERE status IN (0, 4) AND changed < 1 ORDER BY changed LIMIT 1",
		"SELECT id FROM runs WHERE filter = '' AND target = '' AND state = 'active' AND until <= 1 ORDER BY id LIMIT 1",
		"DELETE FROM early WHERE seq IN (SELECT seq FROM early WHERE event = 1 ORDER BY seq LIMIT 1)",
	} {
		p := plan(query)
		require.Regexp(t, `USING (COVERING )?INDEX (requests_unprocessed|requests_closed|assemblies_headless|runs_active|early_events)`, p, query)
		require.NotContains(t, p, "TEMP B-TREE", p)
	}
}
