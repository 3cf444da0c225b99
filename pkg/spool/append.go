package spool

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"time"
)

// Reservation is room that belongs to its holder until Release: appending out
// of it meets neither the limit nor a full disk. It must not be copied once it
// is in use. Its methods are safe for concurrent use.
type Reservation struct {
	s       *Spool
	records int
	bytes   int64
}

// Reserve sets room aside for a number of records with together at most bytes
// of payload; allocated blocks stand behind it. It waits up to two seconds for
// a segment to be allocated, but not for records to be released. It returns
// ErrFull, ErrBroken or ErrClosed.
func (s *Spool) Reserve(records int, bytes int64) (Reservation, error) {
	if records < 0 || bytes < 0 || bytes > int64(records)*int64(s.o.MaxRecordBytes) {
		return Reservation{}, fmt.Errorf("reserve %d bytes for %d records: %w", bytes, records, ErrTooLarge)
	}
	cost := int64(records)*recordOverhead + bytes
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosing {
		return Reservation{}, ErrClosed
	}
	if s.reserved+cost > s.capacity() {
		if err := s.grow(cost); err != nil {
			return Reservation{}, err
		}
	}
	s.reserved += cost
	if s.lowOnRoom() {
		notify(s.tend)
	}
	return Reservation{s: s, records: records, bytes: bytes}, nil
}

// capacity is how many bytes of records are sure to fit into what is allocated,
// whatever their sizes. mu is held.
func (s *Spool) capacity() int64 {
	n := int64(len(s.spares)) * s.perSegment()
	if s.active != nil {
		n += max(0, s.active.limit()-s.active.tail-s.maxSlot)
	}
	return n
}

func (s *Spool) perSegment() int64 { return s.o.SegmentBytes - 2*block - s.maxSlot }

// lowOnRoom says whether a further segment should stand ready. mu is held.
func (s *Spool) lowOnRoom() bool {
	return s.capacity() < s.reserved+s.wanted+s.perSegment()
}

// grow waits until there is room for cost. mu is held.
func (s *Spool) grow(cost int64) error {
	timer := time.NewTimer(reserveWait)
	defer timer.Stop()
	s.wanted += cost
	defer func() { s.wanted -= cost }()
	for s.reserved+cost > s.capacity() {
		switch {
		case s.isClosing:
			return ErrClosed
		case s.growErr != nil && time.Now().Before(s.growAfter):
			return s.growErr
		case !s.expecting() && s.allocated+s.o.SegmentBytes > s.o.MaxBytes:
			// What the active segment has used comes back by leaving it, where
			// nothing in it is needed any more.
			if s.active == nil || s.active.count == 0 || s.active.live > 0 || len(s.spares) == 0 {
				return fmt.Errorf("%w: %d of %d bytes are allocated", ErrFull, s.allocated, s.o.MaxBytes)
			}
			s.roll()
			s.kickCommit()
		}
		room := s.room
		notify(s.tend)
		s.mu.Unlock()
		late := false
		select {
		case <-room:
		case <-s.closing:
		case <-timer.C:
			late = true
		}
		s.mu.Lock()
		if late && s.reserved+cost > s.capacity() {
			return fmt.Errorf("%w: no new segment in %s", ErrBroken, reserveWait)
		}
	}
	return nil
}

// expecting says whether segments are on their way back into use. mu is held.
func (s *Spool) expecting() bool {
	return len(s.garbage) > 0 || len(s.pool) > 0 || s.busy > 0 ||
		slices.ContainsFunc(s.segs, func(g *segment) bool { return g.sealed && g.live == 0 })
}

// Release gives back what was not used. It is idempotent; appending afterwards
// returns ErrReservation.
func (r *Reservation) Release() {
	if r.s == nil {
		return
	}
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.s.reserved -= int64(r.records)*recordOverhead + r.bytes
	r.records, r.bytes = 0, 0
}

// Append queues one record made of the parts, which are copied. The record is
// neither written nor durable when it returns: WaitSynced tells. The fsync is
// already on its way. It waits, for ten seconds at most, while too much is
// queued. Besides ErrTooLarge, ErrReservation and ErrClosed it returns
// ErrBroken when the disk fails.
func (r *Reservation) Append(parts ...[]byte) (Position, error) {
	return r.append(true, parts)
}

// AppendWritten appends one record and returns when write(2) has returned: the
// record survives the death of the process. The fsync is not awaited; it comes
// with the next group commit, or within 100 ms. A running fsync does not hold it
// up.
func (r *Reservation) AppendWritten(parts ...[]byte) (Position, error) {
	p, err := r.append(false, parts)
	if err != nil {
		return Position{}, err
	}
	s := r.s
	s.writeMu.Lock()
	s.mu.Lock()
	if s.writtenIndex < p.Index {
		s.flush(false)
	}
	f, failed := s.failed(p.Index)
	if !s.kicked && !s.lazy {
		s.lazy = true
		notify(s.lazyKick)
	}
	s.mu.Unlock()
	s.writeMu.Unlock()
	if failed && p.Index >= f.lost {
		return Position{}, f.err
	}
	return p, nil
}

func (r *Reservation) append(wantSync bool, parts [][]byte) (Position, error) {
	s := r.s
	if s == nil {
		return Position{}, ErrReservation
	}
	length, sum := 0, uint32(0)
	for _, p := range parts {
		length += len(p)
		sum = crc32.Update(sum, castagnoli(), p)
	}
	if length > s.o.MaxRecordBytes {
		return Position{}, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, length, s.o.MaxRecordBytes)
	}
	now := s.Now().UnixNano()
	size := recordSize(length)

	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.waitPending(size); err != nil {
		return Position{}, err
	}
	if r.records < 1 || r.bytes < int64(length) {
		return Position{}, ErrReservation
	}
	if s.active == nil || s.active.limit()-s.active.tail < size+recordHeader {
		if len(s.spares) == 0 {
			// Only errors of the disk take away what a reservation was given.
			return Position{}, errors.Join(ErrBroken, s.lastErr)
		}
		s.roll()
	}
	r.records--
	r.bytes -= int64(length)
	s.reserved -= int64(length) + recordOverhead

	// Times rise with the indexes, whichever of two appends came here first.
	s.lastAt = max(s.lastAt, now)
	index := s.nextIndex
	s.nextIndex++
	s.active.note(index, s.active.tail, s.lastAt)
	s.put(kindData, index, sum, length, parts)
	if wantSync {
		s.kickCommit()
	}
	return Position{Start: s.start, Index: index}, nil
}

// waitPending waits until size more bytes may be queued. mu is held.
func (s *Spool) waitPending(size int64) error {
	if s.isClosing {
		return ErrClosed
	}
	if s.pending == 0 || s.pending+size <= s.maxPending {
		return nil
	}
	timer := time.NewTimer(pendingWait)
	defer timer.Stop()
	for s.pending > 0 && s.pending+size > s.maxPending {
		s.kickCommit()
		drained := waitOn(&s.drained)
		s.mu.Unlock()
		late := false
		select {
		case <-drained:
		case <-timer.C:
			late = true
		}
		s.mu.Lock()
		if s.isClosing {
			return ErrClosed
		}
		if late {
			return fmt.Errorf("%w: no write in %s", ErrBroken, pendingWait)
		}
	}
	return nil
}

// put queues a record for the active segment. mu is held.
func (s *Spool) put(kind uint32, index uint64, sum uint32, length int, parts [][]byte) {
	seg := s.active
	var c *chunk
	if n := len(s.queue); n > 0 && s.queue[n-1].seg == seg {
		c = s.queue[n-1]
	} else {
		c = &chunk{seg: seg, off: seg.tail}
		if n := len(s.bufs); n > 0 {
			c.buf, s.bufs = s.bufs[n-1], s.bufs[:n-1]
		}
		s.queue = append(s.queue, c)
	}
	size := recordSize(length)
	c.buf = putRecord(c.buf, seg.salt, kind, index, s.lastAt, s.watermark, sum, length, parts)
	if kind == kindData {
		c.last = index
	}
	seg.tail += size
	s.pending += size
}

// seal ends the active segment. mu is held.
func (s *Spool) seal() {
	s.put(kindSeal, s.nextIndex, 0, 0, nil)
	s.active.sealed = true
	s.active = nil
}

// roll makes the first spare the active segment. mu is held, and there is one.
func (s *Spool) roll() {
	if s.active != nil {
		s.seal()
	}
	s.active, s.spares = s.spares[0], s.spares[1:]
	s.active.first = s.nextIndex
	s.active.writtenIndex, s.active.syncedIndex = s.nextIndex-1, s.nextIndex-1
	s.segs = append(s.segs, s.active)
	notify(s.tend)
}

func (s *Spool) kickCommit() {
	if !s.kicked {
		s.kicked = true
		notify(s.kick)
	}
}

// flush writes what is queued. With commit it also begins the next generation
// and returns the one before, all of whose records are then written or failed.
// writeMu and mu are held; mu is let go while writing.
func (s *Spool) flush(commit bool) (g *generation) {
	chunks := s.queue
	s.queue, s.taken = s.taken[:0], nil
	if commit {
		g, s.gen = s.gen, newGeneration()
		g.upto = s.nextIndex - 1
		s.inflight = g
		s.kicked, s.lazy = false, false
	}
	for _, c := range chunks {
		if c.seg.suspect {
			continue
		}
		s.mu.Unlock()
		_, err := c.seg.file.WriteAt(c.buf, c.off)
		s.mu.Lock()
		if err != nil {
			s.fail(c.seg, fmt.Errorf("write to spool: %w", err))
			continue
		}
		c.seg.written = c.off + int64(len(c.buf))
		if c.last > 0 {
			c.seg.writtenIndex = c.last
			s.writtenIndex = c.last
		}
	}
	for i, c := range chunks {
		s.pending -= int64(len(c.buf))
		if len(s.bufs) < 2 {
			s.bufs = append(s.bufs, c.buf[:0])
		}
		chunks[i] = nil
	}
	s.taken = chunks[:0]
	if len(chunks) > 0 {
		wake(&s.drained)
		wake(&s.more)
	}
	return g
}

// fail gives a segment up: what is not synced in it never will be, for a later
// fsync of the same file proves nothing. What was written stays readable.
// writeMu and mu are held.
func (s *Spool) fail(seg *segment, err error) {
	if seg.suspect {
		return
	}
	s.log.Error("spool segment given up", "file", s.path(seg.name), "err", err)
	f := failure{first: seg.syncedIndex + 1, last: seg.last(), lost: seg.writtenIndex + 1, err: errors.Join(ErrBroken, err)}
	s.lastErr = err
	if f.first <= f.last {
		if len(s.failures) == maxFailures {
			s.forgotten = s.failures[0].last
			s.failures = s.failures[1:]
		}
		s.failures = append(s.failures, f)
	}
	s.failCount.Add(1)
	if f.lost <= f.last {
		seg.live -= f.last - f.lost + 1
		seg.count -= f.last - f.lost + 1
		s.writtenIndex = max(s.writtenIndex, f.last)
	}
	for i := 0; i < len(s.queue); i++ {
		if c := s.queue[i]; c.seg == seg {
			s.pending -= int64(len(c.buf))
			s.queue = append(s.queue[:i], s.queue[i+1:]...)
			i--
		}
	}
	seg.suspect, seg.sealed = true, true
	seg.tail = seg.written
	s.suspects++
	if s.active == seg {
		s.active = nil
	}
	s.free(seg)
	notify(s.tend)
}

func (s *Spool) failed(index uint64) (failure, bool) {
	for i := len(s.failures) - 1; i >= 0; i-- {
		if f := s.failures[i]; index >= f.first && index <= f.last {
			return f, true
		}
	}
	return failure{}, false
}

// WaitSynced returns nil once the record is durable, or the error that made this
// impossible, or that of ctx. It returns ErrUnknown for a position that this
// start has not appended, and ErrClosed when the spool was closed before.
func (s *Spool) WaitSynced(ctx context.Context, p Position) error {
	if p.Start != s.start {
		return ErrUnknown
	}
	if s.synced.Load() >= p.Index {
		return s.verdict(p.Index)
	}
	s.mu.Lock()
	if p.Index >= s.nextIndex {
		s.mu.Unlock()
		return ErrUnknown
	}
	g := s.gen
	if s.inflight != nil && p.Index <= s.inflight.upto {
		g = s.inflight
	} else if s.synced.Load() < p.Index {
		s.kickCommit()
	}
	s.mu.Unlock()
	if s.synced.Load() >= p.Index {
		return s.verdict(p.Index)
	}
	select {
	case <-g.done:
		return s.verdict(p.Index)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Synced is WaitSynced without waiting: done is false while the record is
// neither durable nor failed.
func (s *Spool) Synced(p Position) (done bool, err error) {
	if p.Start != s.start {
		return true, ErrUnknown
	}
	if s.synced.Load() < p.Index {
		return false, nil
	}
	return true, s.verdict(p.Index)
}

// verdict says how the commit of a record ended.
func (s *Spool) verdict(index uint64) error {
	if s.synced.Load() >= index && s.failCount.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.synced.Load() < index {
		return ErrClosed
	}
	if index <= s.forgotten {
		return fmt.Errorf("%w: too long ago to tell", ErrUnknown)
	}
	if f, ok := s.failed(index); ok {
		return f.err
	}
	return nil
}

// committer runs group commits until the spool closes.
func (s *Spool) committer() {
	defer s.commits.Done()
	timer := time.NewTimer(lazySync)
	timer.Stop()
	defer timer.Stop()
	var begun time.Time
	var records uint64 // of the last commit
	for {
		select {
		case <-s.kick:
		case <-s.lazyKick:
			timer.Reset(lazySync)
			continue
		case <-timer.C:
		case <-s.closing:
			return
		}
		// Under load the records of a short while share an fsync.
		if wait := commitEvery - time.Since(begun); wait > 0 && records >= manyRecords {
			time.Sleep(wait)
		}
		begun = time.Now()
		synced := s.synced.Load()
		s.commit()
		records = s.synced.Load() - synced
	}
}

// commit makes durable what was appended before the call. One call runs at a
// time.
func (s *Spool) commit() {
	s.writeMu.Lock()
	s.mu.Lock()
	g := s.flush(true)
	s.writeMu.Unlock()

	type target struct {
		seg   *segment
		off   int64
		index uint64
	}
	var room [4]target
	targets := room[:0]
	for i := len(s.segs) - 1; i >= 0; i-- {
		seg := s.segs[i]
		if seg.start != s.start {
			break
		}
		if !seg.suspect && seg.synced < seg.written {
			seg.refs++
			targets = append(targets, target{seg, seg.written, seg.writtenIndex})
		}
	}
	upto := s.writtenIndex
	s.mu.Unlock()

	errs := make([]error, 0, 4)
	for _, t := range targets {
		errs = append(errs, t.seg.file.Datasync())
	}

	s.writeMu.Lock()
	s.mu.Lock()
	for i, t := range targets {
		if errs[i] != nil {
			s.fail(t.seg, fmt.Errorf("fsync of spool: %w", errs[i]))
		} else if !t.seg.suspect {
			t.seg.synced, t.seg.syncedIndex = t.off, t.index
		}
	}
	if len(targets) > 0 {
		s.commitCount++
		// While a suspect segment is there the watermark stays, for above it
		// nothing may be taken for damage.
		if s.suspects == 0 {
			s.watermark = targets[0].seg.seq<<32 | uint64(targets[0].off)
		}
	}
	s.synced.Store(max(s.synced.Load(), upto))
	s.inflight = nil
	close(g.done)
	for _, t := range targets {
		t.seg.refs--
		s.free(t.seg)
	}
	s.mu.Unlock()
	s.writeMu.Unlock()
}
