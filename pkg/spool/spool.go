package spool

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	defaultMaxBytes       = 4 << 30
	defaultSegmentBytes   = 64 << 20
	defaultMaxRecordBytes = 2 << 20
	// maxSegmentBytes keeps offsets within 32 bits.
	maxSegmentBytes = 1 << 30

	// maxPool is how many released segments are kept for reuse. Traffic frees
	// about as many as it fills, so a few are enough to smooth that.
	maxPool = 4
	// reserveWait bounds how long Reserve waits for a segment to be allocated:
	// longer than a healthy disk takes, shorter than a client's patience.
	reserveWait = 2 * time.Second
	// retryAfter is how long a failed allocation is taken as the answer for
	// further ones, so that a full disk is not asked for each request.
	retryAfter = 50 * time.Millisecond
	// pendingWait bounds how long an append waits while the disk takes no writes.
	pendingWait = 10 * time.Second
	// commitEvery is the least time between two commits while there is traffic,
	// which is when the last one had manyRecords. An API under load takes longer to
	// answer, so that hardly anybody waits for it, and it saves most of what fsyncs
	// cost. A few clients wait for nothing.
	commitEvery = time.Millisecond
	manyRecords = 8
	// lazySync is how long a record written by AppendWritten stays without fsync
	// when nothing else asks for one.
	lazySync = 100 * time.Millisecond
	// closeWait bounds Close when the disk hangs.
	closeWait = 10 * time.Second
	// maxFailures bounds the memory of failed commits.
	maxFailures = 1024
)

// StartID names one process start.
type StartID [16]byte

// String returns the id in hexadecimal.
func (id StartID) String() string { return hex.EncodeToString(id[:]) }

// Position names one record for ever: no two records share one, not even after
// a power cut or on a new volume. Indexes of one start rise in the order of
// appending, from 1 on.
type Position struct {
	Start StartID
	Index uint64
}

// Range is the indexes from First to Last, both included.
type Range struct{ First, Last uint64 }

// Options configure a Spool. The zero value of each field but Dir is a default.
type Options struct {
	// Dir is the directory, made where it is missing. The spool owns all of it.
	Dir string
	// MaxBytes limits what is allocated on disk, 4 GiB by default. Records set
	// aside and files kept by a salvage do not count.
	MaxBytes int64
	// SegmentBytes is the size of a segment, a multiple of 4096; by default
	// 64 MiB, or an eighth of MaxBytes where that is less, but room for two
	// records.
	SegmentBytes int64
	// MaxRecordBytes limits the payload of one record, 2 MiB by default.
	MaxRecordBytes int
	// Salvage lets Open go on where it finds damage: everything readable is kept
	// for the readers, the damaged file stays beside it.
	Salvage bool
	// FS is the operating system's by default.
	FS FS
	// Logger is silent by default.
	Logger *slog.Logger
}

// limits sets the defaults and checks what was given.
func (o *Options) limits() error {
	if o.Dir == "" {
		return errors.New("spool directory is not set")
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultMaxBytes
	}
	if o.MaxRecordBytes == 0 {
		o.MaxRecordBytes = defaultMaxRecordBytes
	}
	if o.MaxRecordBytes < 0 || o.MaxRecordBytes > maxSegmentBytes/4 {
		return fmt.Errorf("spool record limit of %d bytes is out of range", o.MaxRecordBytes)
	}
	least := (2*(recordSize(o.MaxRecordBytes)+recordHeader) + 3*block) &^ (block - 1)
	if o.SegmentBytes == 0 {
		o.SegmentBytes = max(min(defaultSegmentBytes, o.MaxBytes/8&^(block-1)), least)
	}
	if o.SegmentBytes < least || o.SegmentBytes > maxSegmentBytes || o.SegmentBytes%block != 0 {
		return fmt.Errorf("spool segments of %d bytes: need a multiple of %d from %d to %d", o.SegmentBytes, block, least, maxSegmentBytes)
	}
	if o.MaxBytes < 3*o.SegmentBytes {
		return fmt.Errorf("spool limit of %d bytes is too small: need at least %d for records of up to %d bytes",
			o.MaxBytes, 3*o.SegmentBytes, o.MaxRecordBytes)
	}
	if o.FS == nil {
		o.FS = osFS{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Stats is a snapshot of a Spool.
type Stats struct {
	Bytes         int64 // allocated on disk, spare segments included
	UsedBytes     int64 // taken by records in segments that are not yet free
	ReservedBytes int64 // promised to reservations
	MaxBytes      int64
	Segments      int // that hold records
	Unreleased    int // records
	// OldestUnreleased is the time of the first record that is not released, by
	// the spool's clock; it is zero where there is none.
	OldestUnreleased time.Time
	// SyncedIndex is the last index of this start up to which the fsyncs have
	// been tried; those that failed are counted by Failures.
	SyncedIndex uint64
	Commits     uint64 // fsync rounds
	Failures    uint64 // segments given up after a write or fsync error
	Aside       int    // records set aside
	// LastError is the last error of the disk, also when it has passed.
	LastError error
}

// generation is one round of group commit.
type generation struct {
	done chan struct{} // closed when each of its records is synced or failed
	upto uint64
}

func newGeneration() *generation { return &generation{done: make(chan struct{})} }

// failure is a range of indexes that will never be synced.
type failure struct {
	first, last uint64
	lost        uint64 // from here on they are not even written
	err         error
}

// chunk is what is to be written to one segment at one place.
type chunk struct {
	seg  *segment
	off  int64
	last uint64 // index; 0 if it holds only a seal
	buf  []byte
}

type pooled struct {
	file File
	name string
}

// Spool is a journal in one directory. All its methods are safe for concurrent
// use.
type Spool struct {
	o     Options
	log   *slog.Logger
	lock  io.Closer
	start StartID
	// The spool's clock: the time of the opening, and how much newer than that the
	// newest record was which stood in the directory.
	opened time.Time
	ahead  time.Duration

	maxSlot    int64 // what a segment may waste at its end
	maxPending int64

	kick     chan struct{} // commit now
	lazyKick chan struct{} // commit soon
	tend     chan struct{} // look after the segments
	closing  chan struct{}
	commits  sync.WaitGroup
	houses   sync.WaitGroup
	asideMu  sync.Mutex

	synced    atomic.Uint64 // index up to which commits are decided
	failCount atomic.Uint64

	// writeMu serializes writing; it is taken before mu.
	writeMu sync.Mutex
	mu      sync.Mutex

	isClosing bool
	closeDone chan struct{}
	closeErr  error

	segs    []*segment // with records, and the active one, by sequence
	active  *segment
	spares  []*segment // empty, named and durable
	pool    []pooled
	garbage []*segment
	busy    int // segments in the house keeper's hands
	nextSeq uint64

	allocated int64
	reserved  int64
	wanted    int64 // by those who wait in Reserve
	growErr   error // of the last try to allocate; nil after success
	growAfter time.Time
	room      chan struct{} // closed and replaced when growErr or the room changes

	nextIndex    uint64
	lastAt       int64
	watermark    uint64
	queue        []*chunk
	taken        []*chunk // the other half of the double buffer
	bufs         [][]byte
	pending      int64
	drained      chan struct{} // closed after a flush; nil if nobody waits
	more         chan struct{} // likewise, for readers
	writtenIndex uint64
	gen          *generation
	inflight     *generation
	kicked       bool
	lazy         bool
	failures     []failure
	forgotten    uint64 // failures up to here are no longer known
	suspects     int
	commitCount  uint64
	lastErr      error
	oldest       Position
	oldestAt     time.Time
	aside        asideUse
}

// Now is the spool's clock, by which all times are that the spool gives. It
// begins with the system's, but never before a record that is there already, and
// then runs evenly: a system clock that is set back makes no record newer than
// now, and one that is set forward makes none old.
func (s *Spool) Now() time.Time { return s.opened.Add(time.Since(s.opened) + s.ahead) }

// Start returns the id of this process start.
func (s *Spool) Start() StartID { return s.start }

// isFull tells a lack of room from other errors of the disk.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func randomUint64() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: it ends the process instead
	return binary.LittleEndian.Uint64(b[:])
}

func (s *Spool) path(name string) string { return filepath.Join(s.o.Dir, name) }

// Release gives back the records of a start in the ranges, and returns how many
// that were. What is unknown, not yet written or released before is passed over
// without error. Releases are not persisted.
func (s *Spool) Release(start StartID, ranges ...Range) (released int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seg := range slices.Clone(s.segs) {
		if seg.start != start || seg.live == 0 {
			continue
		}
		last := seg.last()
		if start == s.start {
			last = min(last, s.writtenIndex)
		}
		n := uint64(0)
		for _, r := range ranges {
			if lo, hi := max(r.First, seg.first), min(r.Last, last); lo <= hi {
				n += seg.set(lo, hi)
			}
		}
		seg.live -= n
		released += int(n)
		s.free(seg)
	}
	return released
}

// free hands a segment that nobody needs any more to the house keeper. mu is
// held.
func (s *Spool) free(seg *segment) {
	if seg.freed || !seg.sealed || seg.live > 0 || seg.refs > 0 || seg.written < seg.tail ||
		!seg.suspect && seg.synced < seg.written {
		return
	}
	i := slices.Index(s.segs, seg)
	if i < 0 {
		return
	}
	s.segs = slices.Delete(s.segs, i, i+1)
	seg.freed = true
	if seg.suspect {
		s.suspects--
	}
	s.garbage = append(s.garbage, seg)
	notify(s.tend)
}

// notify wakes the one who listens on a channel with room for one.
func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// wake closes the channel that others wait on, if any do.
func wake(ch *chan struct{}) {
	if *ch != nil {
		close(*ch)
		*ch = nil
	}
}

// waitOn returns a channel that the next wake closes.
func waitOn(ch *chan struct{}) <-chan struct{} {
	if *ch == nil {
		*ch = make(chan struct{})
	}
	return *ch
}

// Stats returns a snapshot. It may read from the disk to find the time of the
// oldest record: ask it for metrics, not for each request.
func (s *Spool) Stats() Stats {
	_, oldest, _ := s.Oldest()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{
		Bytes:            s.allocated,
		ReservedBytes:    s.reserved,
		MaxBytes:         s.o.MaxBytes,
		Segments:         len(s.segs),
		OldestUnreleased: oldest,
		SyncedIndex:      s.synced.Load(),
		Commits:          s.commitCount,
		Failures:         s.failCount.Load(),
		Aside:            s.aside.count,
		LastError:        s.lastErr,
	}
	for _, seg := range s.segs {
		st.Unreleased += int(seg.live)
		st.UsedBytes += seg.tail - block
	}
	if st.Unreleased == 0 {
		st.OldestUnreleased = time.Time{}
	}
	return st
}

// Close makes what was appended durable, lets everybody who waits go, and gives
// the directory back. Segments whose records are all released are removed. It is
// idempotent, returns the same each time, and gives up with an error after ten
// seconds when the disk hangs.
func (s *Spool) Close() error {
	s.mu.Lock()
	first := !s.isClosing
	if first {
		s.isClosing = true
		close(s.closing)
		wake(&s.more)
		wake(&s.drained)
	}
	s.mu.Unlock()
	if first {
		go func() {
			s.closeErr = s.shutdown()
			close(s.closeDone)
		}()
	}
	timer := time.NewTimer(closeWait)
	defer timer.Stop()
	select {
	case <-s.closeDone:
		return s.closeErr
	case <-timer.C:
		return fmt.Errorf("close spool: %w: no answer in %s", ErrBroken, closeWait)
	}
}

func (s *Spool) shutdown() error {
	s.commits.Wait()
	before := s.failCount.Load()
	s.commit()
	s.mu.Lock()
	active := s.active
	if active != nil && active.live > 0 && s.suspects == 0 {
		// The seal carries the last watermark: damage to the last batch shows, too.
		s.seal()
	}
	s.mu.Unlock()
	s.commit()
	s.houses.Wait()

	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.failCount.Load() > before {
		errs = append(errs, s.lastErr)
	}
	drop := func(f File, name string) {
		errs = append(errs, f.Close(), s.o.FS.Remove(s.path(name)))
	}
	for _, seg := range s.segs {
		if seg.live == 0 {
			drop(seg.file, seg.name)
		} else {
			errs = append(errs, seg.file.Close())
		}
		seg.freed = true
	}
	for _, seg := range slices.Concat(s.garbage, s.spares) {
		drop(seg.file, seg.name)
	}
	for _, p := range s.pool {
		drop(p.file, p.name)
	}
	errs = append(errs, s.o.FS.SyncDir(s.o.Dir), s.lock.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close spool: %w", err)
	}
	return nil
}
