// Package sqlite is the embedded store: one file, written by several processes.
//
// # Durability
//
// The file is in WAL mode with synchronous=FULL: a commit returns when it has
// been fsynced. One transaction holds a whole batch.
//
// # Concurrency
//
// SQLite allows one writer at a time. Within a process writers queue for one
// connection; between processes they wait for the file's lock, at most
// [Options.BusyTimeout], after which a call fails with [ledger.ErrUnavailable].
// Readers never wait for writers.
//
// # Times
//
// Times are kept in nanoseconds and in UTC: what goes in between 1678 and 2261
// comes out as the same instant. A time beyond that is refused.
package sqlite

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	_ "modernc.org/sqlite" // the driver

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Options say where the ledger is and how it behaves. Only Path is required.
type Options struct {
	// Path is the file. It is made, 0600, when it does not exist; its directory
	// must exist.
	Path string
	// Retention is how long closed requests are kept: what comes later than
	// that minus a day (or than half of it, where that is more) enters
	// quarantined as late. 0 turns this off.
	Retention time.Duration
	// MaxEarly bounds the facts about unknown ids; 0 means DefaultMaxEarly.
	MaxEarly int
	// ReserveBytes of the disk are left free by Record, for everything that is
	// not a new capture; 0 means DefaultReserve, or an eighth of a disk that is
	// smaller than eight times that; below 0, nothing.
	ReserveBytes int64
	// BusyTimeout bounds the wait for another process's transaction; 0 means
	// DefaultBusyTimeout.
	BusyTimeout time.Duration
	// Now is the ledger's clock; nil means time.Now.
	Now func() time.Time
	// Logger may be nil.
	Logger *slog.Logger
}

// Defaults of Options.
const (
	DefaultMaxEarly    = 1_000_000
	DefaultReserve     = 64 << 20
	DefaultBusyTimeout = 5 * time.Second
)

// readers is how many questions are answered at the same time. Each costs a
// connection with a cache of its own.
const readers = 4

// Store is a ledger in one SQLite file. It is safe for concurrent use.
type Store struct {
	path    string
	o       Options
	log     *slog.Logger
	readDB  *sql.DB
	writeDB *sql.DB
	lock    chan struct{} // holds one element; whoever takes it may use what follows
	conn    *sql.Conn
	stmts   map[string]*sql.Stmt
	closed  atomic.Bool
	origins originCache
}

var _ ledger.Store = (*Store)(nil)

// Open opens the ledger, or makes a new one. Errors: [ledger.ErrNewerSchema],
// [ledger.ErrDamaged]: the file is left as it is; [ledger.ErrUnavailable],
// [ledger.ErrFull].
func Open(ctx context.Context, o Options) (*Store, error) {
	s, err := open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("open ledger %s: %w", o.Path, classify(err))
	}
	return s, nil
}

func open(ctx context.Context, o Options) (*Store, error) {
	if o.Path == "" {
		return nil, errors.New("no path")
	}
	path, err := filepath.Abs(o.Path)
	if err != nil {
		return nil, err
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.MaxEarly == 0 {
		o.MaxEarly = DefaultMaxEarly
	}
	if o.BusyTimeout == 0 {
		o.BusyTimeout = DefaultBusyTimeout
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	switch err := inspect(path); {
	case errors.Is(err, fs.ErrNotExist):
		if err := create(ctx, path); err != nil {
			return nil, fmt.Errorf("create: %w", err)
		}
	case err != nil:
		return nil, err
	}
	s := &Store{
		path: path, o: o, log: o.Logger,
		lock:  make(chan struct{}, 1),
		stmts: make(map[string]*sql.Stmt),
	}
	s.lock <- struct{}{}
	if err := s.connect(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Store) connect(ctx context.Context) error {
	busy := "busy_timeout(" + strconv.FormatInt(s.o.BusyTimeout.Milliseconds(), 10) + ")"
	var err error
	// Waiting for the write lock is our own loop, which a context can end;
	// SQLite's own wait is for the moments when the file itself is opened.
	if s.writeDB, err = openDB(s.path, busy, "cache_size(-16384)", "synchronous(FULL)", "journal_mode(WAL)",
		"wal_autocheckpoint(3000)", "journal_size_limit(33554432)", "temp_store(MEMORY)"); err != nil {
		return err
	}
	s.writeDB.SetMaxOpenConns(1)
	if s.conn, err = s.writeDB.Conn(ctx); err != nil {
		return err
	}
	var mode string
	var version, app int64
	if err := s.conn.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode); err != nil {
		return err
	}
	if mode != "wal" {
		return fmt.Errorf("journal mode is %s, not wal: the file system does not allow it", mode)
	}
	if err := s.conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if err := s.conn.QueryRowContext(ctx, "PRAGMA application_id").Scan(&app); err != nil {
		return err
	}
	if err := checkIdentity(uint32(app), uint32(version)); err != nil {
		return err
	}
	// Reading the counters finds out whether the file's tables are there.
	var n int64
	if err := s.conn.QueryRowContext(ctx, "SELECT count(*) FROM counters").Scan(&n); err != nil {
		return fmt.Errorf("%w: %w; %s", ledger.ErrDamaged, err, advice)
	}
	if err := migrate(ctx, s.conn, s.log, int(version)); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if _, err := s.conn.ExecContext(ctx, "PRAGMA busy_timeout=0"); err != nil {
		return err
	}
	if s.readDB, err = openDB(s.path, busy, "cache_size(-4096)", "query_only(1)", "temp_store(MEMORY)"); err != nil {
		return err
	}
	s.readDB.SetMaxOpenConns(readers)
	s.readDB.SetMaxIdleConns(readers)
	return nil
}

func openDB(path string, pragmas ...string) (*sql.DB, error) {
	u := url.URL{Scheme: "file", Path: path, RawQuery: url.Values{"_pragma": pragmas}.Encode()}
	return sql.Open("sqlite", u.String())
}

const advice = "the file is left as it is: restore it from a copy, or move it away together with its -wal and -shm files, " +
	"start again, and rebuild it from the streams"

// inspect looks at the file's header without SQLite, which would alter files
// that it opens.
func inspect(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var h [100]byte
	if _, err := io.ReadFull(f, h[:]); err != nil {
		return fmt.Errorf("%w: shorter than a header; %s", ledger.ErrDamaged, advice)
	}
	if string(h[:16]) != "SQLite format 3\x00" {
		return fmt.Errorf("%w: not an SQLite file; %s", ledger.ErrDamaged, advice)
	}
	if err := checkIdentity(binary.BigEndian.Uint32(h[68:]), binary.BigEndian.Uint32(h[60:])); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// With a WAL the file may rightly lag behind its header: a crash in the
	// middle of a checkpoint leaves it so, and the next open mends it.
	if wal, err := os.Stat(path + "-wal"); err == nil && wal.Size() > 0 {
		return nil
	}
	size := int64(binary.BigEndian.Uint16(h[16:]))
	if pages := int64(binary.BigEndian.Uint32(h[28:])); info.Size() < size*pages {
		return fmt.Errorf("%w: it has %d bytes, its header says %d; %s", ledger.ErrDamaged, info.Size(), size*pages, advice)
	}
	return nil
}

func checkIdentity(app, version uint32) error {
	switch {
	case app != applicationID:
		return fmt.Errorf("%w: an SQLite file of another program (application id %#x); %s", ledger.ErrDamaged, app, advice)
	case version > uint32(schemaVersion):
		return fmt.Errorf("%w: schema %d, this release knows %d: run the newer release, or point it to another file", ledger.ErrNewerSchema, version, schemaVersion)
	case version < 1:
		return fmt.Errorf("%w: schema %d was never used; %s", ledger.ErrDamaged, version, advice)
	}
	return nil
}

// create makes the ledger beside its place and links it there when it is whole
// and synced, so that a crash leaves a ledger or none, and of two processes that
// do this at once both find the first one's.
func create(ctx context.Context, path string) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".new-*") // 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	if err := f.Close(); err != nil {
		return err
	}
	if err := fill(ctx, f.Name()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func fill(ctx context.Context, path string) (err error) {
	db, err := openDB(path, "page_size("+strconv.Itoa(pageSize)+")", "auto_vacuum(INCREMENTAL)", "synchronous(FULL)")
	if err != nil {
		return err
	}
	db.SetMaxOpenConns(1)
	defer func() { err = errors.Join(err, db.Close()) }()
	script := "BEGIN;" + schema + strings.Join(migrations[:], "") +
		"PRAGMA application_id=" + strconv.Itoa(applicationID) + ";PRAGMA user_version=" + strconv.Itoa(schemaVersion) + ";COMMIT"
	_, err = db.ExecContext(ctx, script)
	return err
}

// migrate brings the file up to this release's version. Of several processes
// that do this at once the first does it; the others wait and find it done.
func migrate(ctx context.Context, conn *sql.Conn, log *slog.Logger, version int) (err error) {
	if version == schemaVersion {
		return nil
	}
	if _, err := conn.ExecContext(ctx, "BEGIN IMMEDIATE"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_, _ = conn.ExecContext(context.WithoutCancel(ctx), "ROLLBACK") // the first error counts
		}
	}()
	if err := conn.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	for ; version < schemaVersion; version++ {
		if _, err := conn.ExecContext(ctx, migrations[version-1]+"PRAGMA user_version="+strconv.Itoa(version+1)); err != nil {
			return err
		}
		log.Info("ledger brought to a newer version", "version", version+1)
	}
	_, err = conn.ExecContext(ctx, "COMMIT")
	return err
}

// diskRoom says how much room an unprivileged process has on dir's disk, and
// how big that is.
func diskRoom(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("statfs: %w", err)
	}
	return int64(st.Bavail) * int64(st.Bsize), int64(st.Blocks) * int64(st.Bsize), nil
}

// Close implements [ledger.Store]. It waits for the transaction under way.
func (s *Store) Close() error {
	<-s.lock
	defer func() { s.lock <- struct{}{} }()
	if s.closed.Swap(true) {
		return nil
	}
	var errs []error
	if s.readDB != nil {
		errs = append(errs, s.readDB.Close())
	}
	for _, stmt := range s.stmts {
		errs = append(errs, stmt.Close())
	}
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.writeDB != nil {
		errs = append(errs, s.writeDB.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close ledger: %w", err)
	}
	return nil
}

// Ping implements [ledger.Store]: it takes the write lock and gives it back.
func (s *Store) Ping(ctx context.Context) error {
	return s.write(ctx, "ping", func(t *tx) error {
		_, err := t.counter(counterSeq)
		return err
	})
}

// Now implements [ledger.Reader].
func (s *Store) Now(context.Context) (time.Time, error) { return s.o.Now(), nil }

// originCache remembers what requests have in common. Rows are never changed,
// and deleted with the file only.
type originCache struct {
	mu     sync.RWMutex
	byID   map[int64]origin
	byData map[origin]int64
}
