package spool

import (
	"context"
	"errors"
	"io"
	"time"
)

// Record is one record of the journal.
type Record struct {
	Position Position
	// Data is valid until the next call on the reader it came from.
	Data       []byte
	AppendedAt time.Time // by the spool's clock
}

// Reader reads the unreleased records in order: those of earlier starts, then
// those of this one as soon as they are written, synced or not. It belongs to one
// goroutine and needs no closing. Any number of readers may be in use.
type Reader struct {
	s   *Spool
	seg *segment
	seq uint64 // everything up to and in this segment is read, or being read
	sc  scanner

	from   uint64 // indexes below it in seg are skipped
	word   uint64 // 64 release bits of seg
	wordNo uint64
	cached bool

	bounded  bool
	untilSeq uint64
	until    uint64 // last index in the segment of untilSeq
	before   int64
}

// NewReader returns a reader at the first unreleased record.
func (s *Spool) NewReader() *Reader { return &Reader{s: s} }

// UnreleasedBefore returns a reader over the records that were appended before t
// by the spool's clock and are not released, for publishing them once more. At
// the end it returns io.EOF and never waits.
func (s *Spool) UnreleasedBefore(t time.Time) *Reader {
	r := s.NewReader()
	s.mu.Lock()
	defer s.mu.Unlock()
	r.bounded, r.before = true, t.UnixNano()
	if n := len(s.segs); n > 0 {
		r.untilSeq, r.until = s.segs[n-1].seq, s.segs[n-1].last()
	}
	return r
}

// Until makes the reader return io.EOF behind p, instead of waiting. Where p is
// gone it ends where p would have been, or at once where that is unknown.
func (r *Reader) Until(p Position) {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	r.bounded, r.untilSeq, r.until = true, 0, 0
	for _, seg := range r.s.segs {
		if seg.start == p.Start && seg.count > 0 && seg.first <= p.Index {
			r.untilSeq, r.until = seg.seq, p.Index
		}
	}
}

// Rewind makes p the next record, or the first unreleased one behind p where p
// is released. A start that is gone or unknown means the very first record.
func (r *Reader) Rewind(p Position) {
	s := r.s
	s.mu.Lock()
	defer s.mu.Unlock()
	r.seg, r.seq = nil, 0
	for _, seg := range s.segs {
		if seg.start != p.Start || seg.count == 0 {
			continue
		}
		if seg.last() >= p.Index {
			r.enter(seg)
			if seg.holds(p.Index) {
				r.from = p.Index
				r.sc.off = seg.before(p.Index).off
			}
			return
		}
		r.seq = seg.seq
	}
}

// enter goes to the begin of a segment. mu is held.
func (r *Reader) enter(seg *segment) {
	r.seg, r.seq, r.from, r.cached = seg, seg.seq, 0, false
	r.sc = scanner{file: pinned{r.s, seg}, salt: seg.salt, off: block, end: seg.written, buf: r.sc.buf}
}

// pinned reads a segment that may be released at any time.
type pinned struct {
	s   *Spool
	seg *segment
}

func (p pinned) ReadAt(b []byte, off int64) (int, error) {
	p.s.mu.Lock()
	if p.seg.freed || p.s.isClosing {
		p.s.mu.Unlock()
		return 0, errFreed
	}
	p.seg.refs++
	p.s.mu.Unlock()
	n, err := p.seg.file.ReadAt(b, off)
	p.s.mu.Lock()
	p.seg.refs--
	p.s.free(p.seg)
	p.s.mu.Unlock()
	return n, err
}

// Next returns the next unreleased record and waits for one where there is none.
// It returns the error of ctx, ErrClosed, or io.EOF from a reader that has an
// end. A record that cannot be read is logged and passed over; it stays
// unreleased.
func (r *Reader) Next(ctx context.Context) (Record, error) {
	for {
		rec, ok, err := r.TryNext()
		if ok || err != nil {
			return rec, err
		}
		r.s.mu.Lock()
		if r.advance() || r.s.isClosing {
			r.s.mu.Unlock()
			continue
		}
		more := waitOn(&r.s.more)
		r.s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return Record{}, ctx.Err()
		}
	}
}

// TryNext is Next without waiting: it returns false where there is no record yet.
func (r *Reader) TryNext() (Record, bool, error) {
	for {
		if r.seg == nil || r.sc.off >= r.sc.end {
			r.s.mu.Lock()
			closed, ok := r.s.isClosing, r.advance()
			r.s.mu.Unlock()
			if closed {
				return Record{}, false, ErrClosed
			}
			if !ok {
				return Record{}, false, r.atEnd()
			}
		}
		rec, err := r.sc.next()
		if rec.hole >= 0 && r.seg.start == r.s.start {
			r.s.unreadable(r.seg, rec.hole, err)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, errFreed) {
				r.s.unreadable(r.seg, r.sc.off, err)
			}
			r.sc.off = r.sc.end
			if errors.Is(err, errFreed) {
				r.sc.off, r.sc.end = r.seg.size, r.seg.size
			}
			continue
		}
		if r.bounded && (r.before != 0 && rec.at >= r.before && r.seg.start == r.s.start || r.seq > r.untilSeq || r.seq == r.untilSeq && rec.index > r.until) {
			r.sc.off = rec.off
			return Record{}, false, io.EOF
		}
		if rec.kind != kindData || rec.index < r.from || r.before != 0 && rec.at >= r.before || r.isReleased(rec.index) {
			continue
		}
		return Record{
			Position:   Position{Start: r.seg.start, Index: rec.index},
			Data:       rec.data,
			AppendedAt: time.Unix(0, rec.at),
		}, true, nil
	}
}

func (r *Reader) atEnd() error {
	if r.bounded {
		return io.EOF
	}
	return nil
}

// advance looks for more to read, in this segment or the next. mu is held.
func (r *Reader) advance() bool {
	if r.seg != nil && !r.seg.freed {
		if r.sc.off < r.seg.written {
			r.sc.end = r.seg.written
			return true
		}
		if !r.seg.sealed || r.seg.written < r.seg.tail {
			return false
		}
	}
	for _, seg := range r.s.segs {
		if seg.seq > r.seq && (seg.tail > block || !seg.sealed) {
			r.enter(seg)
			return r.sc.off < r.sc.end
		}
	}
	return false
}

// isReleased asks for 64 records at once. An answer may be old: a record that was
// released meanwhile is then read once more, which does no harm.
func (r *Reader) isReleased(index uint64) bool {
	i := index - r.seg.first
	if !r.cached || r.wordNo != i/64 {
		r.s.mu.Lock()
		r.word, r.wordNo, r.cached = r.seg.word(i/64), i/64, true
		r.s.mu.Unlock()
	}
	return r.word&(1<<(i%64)) != 0
}

func (s *Spool) unreadable(seg *segment, off int64, err error) {
	if err == nil || errors.Is(err, io.EOF) {
		err = errors.New("invalid record")
	}
	s.log.Error("spool record unreadable", "file", s.path(seg.name), "offset", off, "err", err)
	s.mu.Lock()
	s.lastErr = err
	s.mu.Unlock()
}

// Oldest returns position and time, by the spool's clock, of the first record that
// is not released, or false where there is none. It may read from the disk.
func (s *Spool) Oldest() (Position, time.Time, bool) {
	s.mu.Lock()
	var seg *segment
	for _, g := range s.segs {
		if g.live > 0 {
			seg = g
			break
		}
	}
	if seg == nil {
		s.mu.Unlock()
		return Position{}, time.Time{}, false
	}
	p := Position{Start: seg.start, Index: seg.oldest()}
	if p == s.oldest {
		defer s.mu.Unlock()
		return p, s.oldestAt, true
	}
	// A record that is not yet written, or unreadable, has about the time of its
	// mark.
	at := time.Unix(0, seg.before(p.Index).at)
	c, written := s.scan(seg, p.Index), p.Index <= seg.writtenIndex
	s.mu.Unlock()
	if !written {
		return p, at, true
	}
	rec, err := find(c, p.Index)
	if err == nil {
		at = time.Unix(0, rec.at)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !errors.Is(err, errFreed) {
		s.oldest, s.oldestAt = p, at
	}
	return p, at, true
}

// scan returns a scanner that comes to a record soon. mu is held.
func (s *Spool) scan(seg *segment, index uint64) *scanner {
	return &scanner{file: pinned{s, seg}, salt: seg.salt, off: seg.before(index).off, end: seg.written}
}

// find returns the record of an index.
func find(c *scanner, index uint64) (scanned, error) {
	for {
		rec, err := c.next()
		if err != nil {
			return scanned{}, err
		}
		if rec.kind == kindData && rec.index == index {
			return rec, nil
		}
	}
}
