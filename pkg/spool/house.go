package spool

import (
	"errors"
	"fmt"
	"time"
)

// keepHouse recycles released segments and keeps one ahead of what is needed,
// so that neither happens on the way of a request.
func (s *Spool) keepHouse() {
	defer s.houses.Done()
	for {
		select {
		case <-s.tend:
		case <-s.closing:
			return
		}
		for s.tidy() {
		}
	}
}

// tidy does one thing and says whether there may be more to do.
func (s *Spool) tidy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.isClosing {
		return false
	}
	if len(s.garbage) > 0 {
		seg := s.garbage[0]
		s.garbage = s.garbage[1:]
		keep := !seg.suspect && seg.size == s.o.SegmentBytes && len(s.pool) < maxPool && s.allocated <= s.o.MaxBytes
		s.busy++
		s.mu.Unlock()
		p, err := s.recycle(seg, keep)
		s.mu.Lock()
		s.busy--
		switch {
		case err != nil:
			// The file still counts; the next Open reads it again.
			s.lastErr = err
			s.log.Error("spool segment not recycled", "file", s.path(seg.name), "err", err)
		case keep:
			s.pool = append(s.pool, p)
		default:
			s.allocated -= seg.size
		}
		s.roomChanged()
		return true
	}
	if !s.lowOnRoom() {
		return false
	}
	if s.growErr != nil && time.Now().Before(s.growAfter) {
		s.roomChanged()
		return false
	}
	if len(s.pool) == 0 && s.allocated+s.o.SegmentBytes > s.o.MaxBytes {
		s.roomChanged()
		return false
	}
	s.busy++
	s.mu.Unlock()
	spare, err := s.prepare()
	s.mu.Lock()
	s.busy--
	if err != nil {
		if s.growErr == nil {
			s.log.Warn("spool cannot grow", "err", err)
		}
		s.growErr, s.growAfter = err, time.Now().Add(retryAfter)
		s.lastErr = err
	} else {
		s.growErr = nil
		s.spares = append(s.spares, spare)
	}
	s.roomChanged()
	return err == nil
}

// roomChanged lets those look again who wait for room. mu is held.
func (s *Spool) roomChanged() {
	close(s.room)
	s.room = make(chan struct{})
}

// recycle takes a segment's name away, durably before anything in it is
// overwritten. Without keep it removes the file.
func (s *Spool) recycle(seg *segment, keep bool) (pooled, error) {
	if !keep {
		if err := errors.Join(seg.file.Close(), s.o.FS.Remove(s.path(seg.name))); err != nil {
			return pooled{}, fmt.Errorf("remove segment: %w", err)
		}
		return pooled{}, nil
	}
	p := pooled{seg.file, fmt.Sprintf("%016x.free", seg.seq)}
	if err := s.o.FS.Rename(s.path(seg.name), s.path(p.name)); err != nil {
		return pooled{}, errors.Join(fmt.Errorf("recycle segment: %w", err), seg.file.Close())
	}
	return p, nil
}

// prepare makes an empty segment, from the pool or new, and returns when it
// would survive a power cut. Only one call runs at a time. It returns ErrFull or
// ErrBroken, wrapped.
func (s *Spool) prepare() (*segment, error) {
	s.mu.Lock()
	seq := s.nextSeq
	s.nextSeq++
	var p pooled
	fresh := len(s.pool) == 0
	if fresh {
		if s.allocated+s.o.SegmentBytes > s.o.MaxBytes {
			s.mu.Unlock()
			return nil, fmt.Errorf("%w: %d of %d bytes are allocated", ErrFull, s.allocated, s.o.MaxBytes)
		}
		s.allocated += s.o.SegmentBytes
	} else {
		p, s.pool = s.pool[0], s.pool[1:]
	}
	s.mu.Unlock()

	seg := &segment{
		header:  header{start: s.start, seq: seq, salt: randomUint64(), size: s.o.SegmentBytes},
		name:    segmentName(seq, 0),
		tail:    block,
		written: block,
		synced:  block,
	}
	err := s.build(seg, p, fresh)
	if err == nil {
		return seg, nil
	}
	s.mu.Lock()
	s.allocated -= s.o.SegmentBytes
	s.mu.Unlock()
	if isFull(err) {
		return nil, fmt.Errorf("%w: %w", ErrFull, err)
	}
	return nil, fmt.Errorf("%w: %w", ErrBroken, err)
}

func (s *Spool) build(seg *segment, p pooled, fresh bool) (err error) {
	if fresh {
		p.name = fmt.Sprintf("%016x.tmp", seg.seq)
		if p.file, err = s.o.FS.Create(s.path(p.name)); err != nil {
			return fmt.Errorf("create segment: %w", err)
		}
	}
	defer func() {
		if err != nil {
			// Its name is one of the two; what is left over the next Open removes.
			err = errors.Join(err, p.file.Close())
			for _, name := range []string{p.name, seg.name} {
				if e := s.o.FS.Remove(s.path(name)); e != nil && !errors.Is(e, errNotExist) {
					err = errors.Join(err, e)
				}
			}
		}
	}()
	if err := p.file.Allocate(seg.size); err != nil {
		return fmt.Errorf("allocate segment: %w", err)
	}
	if !fresh {
		// The old name must be gone for good before its content goes.
		if err := s.o.FS.SyncDir(s.o.Dir); err != nil {
			return fmt.Errorf("sync spool directory: %w", err)
		}
	}
	if err := writeHeader(p.file, seg.header); err != nil {
		return err
	}
	if err := s.o.FS.Rename(s.path(p.name), s.path(seg.name)); err != nil {
		return fmt.Errorf("name segment: %w", err)
	}
	if err := s.o.FS.SyncDir(s.o.Dir); err != nil {
		return fmt.Errorf("sync spool directory: %w", err)
	}
	seg.file = p.file
	return nil
}
