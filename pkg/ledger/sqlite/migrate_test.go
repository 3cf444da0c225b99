package sqlite

import (
	"context"
	"database/sql"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// shape is what a file's schema says.
func shape(t *testing.T, path string) (lines []string) {
	t.Helper()
	db, err := openDB(path)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	require.NoError(t, eachRow(func() (*sql.Rows, error) {
		return db.Query("SELECT type || ' ' || name || ' ' || coalesce(sql, '') FROM sqlite_master ORDER BY 1")
	}, func(scan func(...any) error) error {
		var line string
		err := scan(&line)
		lines = append(lines, line)
		return err
	}))
	return lines
}

// A ledger of any earlier version becomes what a new one is, also when several
// processes open it at once, and keeps what it holds.
func TestMigrates(t *testing.T) {
	ctx := context.Background()
	fresh := filepath.Join(t.TempDir(), "ledger.db")
	s, err := Open(ctx, Options{Path: fresh})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	for version := 1; version < schemaVersion; version++ {
		t.Run(strconv.Itoa(version), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "ledger.db")
			db, err := openDB(path, "page_size("+strconv.Itoa(pageSize)+")", "auto_vacuum(INCREMENTAL)", "journal_mode(WAL)")
			require.NoError(t, err)
			script := schema
			for i := range version - 1 {
				script += migrations[i]
			}
			_, err = db.Exec(script + "PRAGMA application_id=" + strconv.Itoa(applicationID) + ";PRAGMA user_version=" + strconv.Itoa(version) +
				";INSERT INTO leases (key, run, token, until) VALUES ('id:x', 'r', 7, 8);PRAGMA wal_checkpoint(TRUNCATE)")
			require.NoError(t, err)
			var all sync.WaitGroup
			errs := make([]error, 4)
			for i := range errs {
				all.Go(func() {
					s, err := Open(ctx, Options{Path: path})
					if err == nil {
						err = s.Close()
					}
					errs[i] = err
				})
			}
			all.Wait()
			for _, err := range errs {
				require.NoError(t, err)
			}
			require.Equal(t, shape(t, fresh), shape(t, path))
			var token int
			require.NoError(t, db.QueryRow("SELECT token FROM leases WHERE key = 'id:x'").Scan(&token), "a process of the version before goes on")
			require.Equal(t, 7, token)
			_, err = db.Exec("INSERT INTO leases (key, run, token, until) VALUES ('id:y', 'r', 7, 8)")
			require.NoError(t, err)
			require.NoError(t, db.Close())
		})
	}
}
