package exampleapi

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"time"

	_ "modernc.org/sqlite" // the driver "sqlite"
)

const (
	// maxGroup is the greatest number of requests that share a commit. Above it
	// nothing is gained: the fsync is already spread thin.
	maxGroup = 512
	// maxRows is the greatest number of rows that one read returns.
	maxRows = 10_000
)

// schema is the integration recipe: the UUID is unique in the table that the
// API's own work goes to.
const schema = `
CREATE TABLE IF NOT EXISTS calls (
	seq       INTEGER PRIMARY KEY AUTOINCREMENT,
	uuid      TEXT UNIQUE,       -- X-Request-UUID, NULL for a request that did not come through Holdfast
	attempt   INTEGER NOT NULL,
	replay    TEXT NOT NULL,
	method    TEXT NOT NULL,
	target    TEXT NOT NULL,
	body      BLOB,              -- may be NULL for an empty or discarded one
	bytes     INTEGER NOT NULL,
	sha256    TEXT NOT NULL,
	stored_at TEXT NOT NULL
) STRICT`

// Row is a stored request. There is one for each UUID.
type Row struct {
	Seq      int64     `json:"seq"` // in the order of storing, from 1, with gaps
	ID       string    `json:"id"`  // X-Request-UUID, empty without one
	Attempt  int       `json:"attempt"`
	Replay   string    `json:"replay,omitempty"`
	Method   string    `json:"method"`
	Target   string    `json:"target"` // as it stood in the request line
	Body     []byte    `json:"-"`      // nil when it is empty, discarded, or not asked for
	Bytes    int64     `json:"bytes"`
	SHA256   string    `json:"sha256"` // of the body, in hex
	StoredAt time.Time `json:"stored_at"`
}

// store keeps rows in SQLite. Writers share commits: whatever has queued up
// while one commit was under way goes into the next.
type store struct {
	writer *sql.DB // one connection
	reader *sql.DB
	queue  chan *insert
	quit   chan struct{} // closed by close: no more inserts
	done   chan struct{} // closed when the writing goroutine has returned
}

type insert struct {
	row  Row
	seq  int64 // of the row, or of the one that stood there already
	err  error
	done chan struct{} // closed when seq and err are set
}

var errStopped = errors.New("store is closed")

// openStore opens or creates the database. Its goroutine ends with close.
func openStore(path string) (*store, error) {
	writer, err := openDB(path, "rwc")
	if err != nil {
		return nil, err
	}
	writer.SetMaxOpenConns(1)
	if _, err := writer.Exec(schema); err != nil {
		writer.Close()
		return nil, fmt.Errorf("create schema: %w", err)
	}
	reader, err := openDB(path, "ro")
	if err != nil {
		writer.Close()
		return nil, err
	}
	s := &store{
		writer: writer,
		reader: reader,
		queue:  make(chan *insert, maxGroup),
		quit:   make(chan struct{}),
		done:   make(chan struct{}),
	}
	go s.run()
	return s, nil
}

func openDB(path, mode string) (*sql.DB, error) {
	q := url.Values{"mode": {mode}, "_txlock": {"immediate"}, "_pragma": {"busy_timeout(10000)"}}
	if mode != "ro" {
		q["_pragma"] = append(q["_pragma"], "journal_mode(WAL)", "synchronous(FULL)")
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: url.PathEscape(path), RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	return db, nil
}

// add stores a row durably and returns its seq. A row with a UUID that stands
// there already changes nothing and returns the seq of the first one. It waits
// for its commit, whatever becomes of the client.
func (s *store) add(row Row) (int64, error) {
	in := &insert{row: row, done: make(chan struct{})}
	select {
	case s.queue <- in:
	case <-s.quit:
		return 0, errStopped
	}
	select {
	case <-in.done:
		return in.seq, in.err
	case <-s.done: // it may have been done before that
		select {
		case <-in.done:
			return in.seq, in.err
		default:
			return 0, errStopped
		}
	}
}

// close ends the writing after the commit under way. Rows that still wait get
// an error.
func (s *store) close() error {
	close(s.quit)
	<-s.done
	return errors.Join(s.writer.Close(), s.reader.Close())
}

func (s *store) run() {
	defer close(s.done)
	group := make([]*insert, 0, maxGroup)
	for {
		select {
		case <-s.quit:
			return
		case in := <-s.queue:
			group = append(group[:0], in)
		}
	more:
		for len(group) < maxGroup {
			select {
			case in := <-s.queue:
				group = append(group, in)
			default:
				break more
			}
		}
		err := s.commit(group)
		for _, in := range group {
			in.err = err
			close(in.done)
		}
		clear(group) // let go of the bodies
	}
}

// commit stores a group in one transaction.
func (s *store) commit(group []*insert) error {
	tx, err := s.writer.Begin()
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	defer tx.Rollback() // does nothing after the commit
	put, err := tx.Prepare(`INSERT INTO calls (uuid, attempt, replay, method, target, body, bytes, sha256, stored_at)
		VALUES (NULLIF(?, ''), ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uuid) DO NOTHING RETURNING seq`)
	if err != nil {
		return fmt.Errorf("prepare insert: %w", err)
	}
	defer put.Close()
	for _, in := range group {
		r := &in.row
		err := put.QueryRow(r.ID, r.Attempt, r.Replay, r.Method, r.Target, r.Body, r.Bytes, r.SHA256,
			r.StoredAt.UTC().Format(time.RFC3339Nano)).Scan(&in.seq)
		if errors.Is(err, sql.ErrNoRows) { // the UUID stands there already
			err = tx.QueryRow(`SELECT seq FROM calls WHERE uuid = ?`, r.ID).Scan(&in.seq)
		}
		if err != nil {
			return fmt.Errorf("store request: %w", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

// ReadRows reads at most limit rows with a seq above after, in their order,
// from the database at path, whether or not an API has it open. Bodies are left
// out unless asked for.
func ReadRows(ctx context.Context, path string, after int64, limit int, bodies bool) ([]Row, error) {
	db, err := openDB(path, "ro")
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return readRows(ctx, db, after, limit, bodies)
}

func readRows(ctx context.Context, db *sql.DB, after int64, limit int, bodies bool) ([]Row, error) {
	column := "NULL"
	if bodies {
		column = "body"
	}
	rs, err := db.QueryContext(ctx, `SELECT seq, COALESCE(uuid, ''), attempt, replay, method, target, `+column+`, bytes, sha256, stored_at
		FROM calls WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read rows: %w", err)
	}
	defer rs.Close()
	rows := []Row{}
	for rs.Next() {
		var r Row
		var at string
		if err := rs.Scan(&r.Seq, &r.ID, &r.Attempt, &r.Replay, &r.Method, &r.Target, &r.Body, &r.Bytes, &r.SHA256, &at); err != nil {
			return nil, fmt.Errorf("read rows: %w", err)
		}
		if r.StoredAt, err = time.Parse(time.RFC3339Nano, at); err != nil {
			return nil, fmt.Errorf("read rows: %w", err)
		}
		rows = append(rows, r)
	}
	if err := rs.Err(); err != nil {
		return nil, fmt.Errorf("read rows: %w", err)
	}
	return rows, nil
}

func (s *store) count(ctx context.Context) (int64, error) {
	var n int64
	if err := s.reader.QueryRowContext(ctx, `SELECT count(*) FROM calls`).Scan(&n); err != nil {
		return 0, fmt.Errorf("count rows: %w", err)
	}
	return n, nil
}
