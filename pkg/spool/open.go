package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Open takes the directory, reads all segments, and starts a new process start.
// Reading takes as long as the disk needs for what is unreleased, so up to some
// seconds for a full spool. It returns a *DamageError, ErrNewer or ErrLocked,
// wrapped, without having changed a file that holds records. What it has found
// is durable when it returns. The caller closes the spool.
func Open(o Options) (*Spool, error) {
	if err := o.limits(); err != nil {
		return nil, err
	}
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return nil, fmt.Errorf("make spool directory: %w", err)
	}
	s := &Spool{
		o:         o,
		log:       o.Logger,
		maxSlot:   recordSize(o.MaxRecordBytes) + recordHeader,
		kick:      make(chan struct{}, 1),
		lazyKick:  make(chan struct{}, 1),
		tend:      make(chan struct{}, 1),
		closing:   make(chan struct{}),
		closeDone: make(chan struct{}),
		room:      make(chan struct{}),
		gen:       newGeneration(),
		opened:    time.Now(),
		nextIndex: 1,
		nextSeq:   1,
	}
	s.maxPending = max(4<<20, 2*s.maxSlot)
	for _, half := range [][]byte{s.start[:8], s.start[8:]} {
		binary.LittleEndian.PutUint64(half, randomUint64())
	}
	lock, err := o.FS.Lock(s.path("LOCK"))
	if err != nil {
		return nil, fmt.Errorf("lock spool directory %s: %w", o.Dir, err)
	}
	s.lock = lock
	if err := s.recover(); err != nil {
		return nil, errors.Join(err, s.abandon())
	}
	spare, err := s.prepare()
	switch {
	case err == nil:
		s.spares = append(s.spares, spare)
	case errors.Is(err, ErrFull):
		s.growErr = err
		s.log.Warn("spool opened without room", "err", err)
	default:
		return nil, errors.Join(fmt.Errorf("open spool %s: %w", o.Dir, err), s.abandon())
	}
	s.commits.Add(1)
	go s.committer()
	s.houses.Add(1)
	go s.keepHouse()
	notify(s.tend)
	return s, nil
}

// abandon lets everything go after a failed Open.
func (s *Spool) abandon() error {
	var errs []error
	for _, seg := range s.segs {
		errs = append(errs, seg.file.Close())
	}
	for _, p := range s.pool {
		errs = append(errs, p.file.Close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

func segmentName(seq uint64, gen int) string { return fmt.Sprintf("%016x-%d.seg", seq, gen) }

// loaded is a segment as found on disk.
type loaded struct {
	*segment
	gen       int
	holes     []hole
	sealed    bool
	end       int64 // of the last valid record
	newest    int64 // time of a record
	records   int
	watermark uint64
	bad       string // damage whatever the watermark says
}

type hole struct {
	at     int64
	before int // valid records
}

// recover reads the directory. It changes nothing before everything is read and
// found in order, or a salvage is allowed.
func (s *Spool) recover() (err error) {
	names, err := s.o.FS.ReadDir(s.o.Dir)
	if err != nil {
		return fmt.Errorf("read spool directory: %w", err)
	}
	slices.Sort(names)
	// The sequence is in the name of every file of ours; the generation counts
	// the salvages of a segment, and only the newest one counts.
	pattern := regexp.MustCompile(`^([0-9a-f]{16})(?:-([0-9]+)\.seg|\.free|\.tmp)?(\.damaged)?`)
	newest := map[uint64]int{}
	for _, name := range names {
		m := pattern.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		seq, _ := strconv.ParseUint(m[1], 16, 64) // the pattern has checked it
		s.nextSeq = max(s.nextSeq, seq+1)
		if gen, err := strconv.Atoi(m[2]); err == nil && m[3] == "" {
			newest[seq] = max(newest[seq], gen)
		}
	}
	seqs := make([]uint64, 0, len(newest))
	for seq := range newest {
		seqs = append(seqs, seq)
	}
	slices.Sort(seqs)

	var found []*loaded
	defer func() {
		if err != nil {
			for _, l := range found {
				if l.file != nil {
					err = errors.Join(err, l.file.Close())
				}
			}
		}
	}()
	for _, seq := range seqs {
		l, err := s.load(seq, newest[seq])
		if err != nil {
			return err
		}
		found = append(found, l)
	}
	damages := make([]*DamageError, len(found))
	for i, l := range found {
		damages[i] = s.judge(l, found)
		if damages[i] != nil && !s.o.Salvage {
			return damages[i]
		}
	}
	for i, l := range found {
		damage := damages[i]
		if damage == nil {
			continue
		}
		s.log.Error("spool segment salvaged", "file", damage.File, "offset", damage.Offset,
			"records", l.records, "err", damage.Reason)
		if found[i], err = s.salvage(l); err != nil {
			found[i] = l
			return fmt.Errorf("salvage %s: %w", damage.File, err)
		}
		newest[l.seq] = found[i].gen
	}
	if names, err = s.o.FS.ReadDir(s.o.Dir); err != nil { // a salvage has changed it
		return fmt.Errorf("read spool directory: %w", err)
	}
	found = slices.DeleteFunc(found, func(l *loaded) bool { return l.file == nil })

	// From here on files are changed.
	for _, name := range names {
		m := pattern.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		switch {
		case strings.HasSuffix(name, ".tmp"):
			err = s.o.FS.Remove(s.path(name))
		case strings.HasSuffix(name, ".free"):
			err = s.reuse(name)
		case strings.HasSuffix(name, ".seg"):
			seq, _ := strconv.ParseUint(m[1], 16, 64)
			if name != segmentName(seq, newest[seq]) {
				// A salvage was interrupted after its copy was complete.
				err = s.o.FS.Rename(s.path(name), s.path(name+".damaged"))
			}
		}
		if err != nil {
			return fmt.Errorf("tidy spool directory: %w", err)
		}
	}
	for len(found) > 0 {
		l := found[0]
		found = found[1:]
		if l.records == 0 {
			if err := l.file.Close(); err != nil {
				return fmt.Errorf("close empty segment: %w", err)
			}
			free := fmt.Sprintf("%016x.free", l.seq)
			if err := s.o.FS.Rename(s.path(l.name), s.path(free)); err != nil {
				return fmt.Errorf("recycle empty segment: %w", err)
			}
			if err := s.reuse(free); err != nil {
				return fmt.Errorf("recycle empty segment: %w", err)
			}
			continue
		}
		for _, h := range l.holes {
			if h.before < l.records {
				s.log.Warn("spool lost records that were not synced", "file", s.path(l.name), "offset", h.at)
			}
		}
		// After a kill the tail may be in the page cache only.
		if err := l.file.Datasync(); err != nil {
			return errors.Join(fmt.Errorf("sync segment: %w", err), l.file.Close())
		}
		l.segment.sealed = true
		l.tail, l.written, l.synced = l.end, l.end, l.end
		l.writtenIndex, l.syncedIndex = l.last(), l.last()
		s.segs = append(s.segs, l.segment)
		s.allocated += l.size
		// One more, so that it lies before all that this start does.
		s.ahead = max(s.ahead, time.Unix(0, l.newest+1).Sub(s.opened))
	}
	if err := s.o.FS.SyncDir(s.o.Dir); err != nil {
		return fmt.Errorf("sync spool directory: %w", err)
	}
	return s.countAside()
}

// reuse takes a free file into the pool, or removes it.
func (s *Spool) reuse(name string) error {
	f, err := s.o.FS.Open(s.path(name))
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil && size == s.o.SegmentBytes && len(s.pool) < maxPool && s.allocated+size <= s.o.MaxBytes {
		s.pool = append(s.pool, pooled{f, name})
		s.allocated += size
		return nil
	}
	return errors.Join(err, f.Close(), s.o.FS.Remove(s.path(name)))
}

// load reads one segment. It returns an error only where neither use nor salvage
// is possible.
func (s *Spool) load(seq uint64, gen int) (_ *loaded, err error) {
	l := &loaded{gen: gen, segment: &segment{name: segmentName(seq, gen)}}
	f, err := s.o.FS.Open(s.path(l.name))
	if err != nil {
		return nil, fmt.Errorf("open segment: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	l.file = f
	l.header, err = readHeader(f)
	switch {
	case errors.Is(err, ErrNewer):
		return nil, fmt.Errorf("segment %s: %w: start the version that wrote it, or let it publish everything first", s.path(l.name), err)
	case errors.Is(err, errHeader):
		l.bad = "its header is invalid"
	case err != nil:
		return nil, fmt.Errorf("read segment %s: %w", s.path(l.name), err)
	case l.seq != seq:
		l.bad = fmt.Sprintf("its header is that of segment %016x", l.seq)
	}
	l.end = block
	if l.salt == 0 && l.size == 0 { // both headers are gone, and with them the salt
		l.seq = seq
		return l, nil
	}
	l.seq = seq
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("size of segment: %w", err)
	}
	c := &scanner{file: f, salt: l.salt, off: block, end: min(size, l.size-block)}
	l.size = size
	for {
		rec, err := c.next()
		if rec.hole >= 0 {
			l.holes = append(l.holes, hole{rec.hole, l.records})
		}
		if errors.Is(err, io.EOF) {
			return l, nil
		}
		if err != nil {
			l.bad = err.Error()
			return l, nil
		}
		l.watermark = max(l.watermark, rec.synced)
		l.end = c.off
		if rec.kind == kindSeal {
			l.sealed = true
			return l, nil
		}
		// Each index lost has taken a record's bytes, so gaps are small.
		if l.records > 0 && (rec.index <= l.last() || rec.index-l.last() > uint64(l.size/recordHeader)) {
			l.bad = "its records are out of order"
			l.holes = append(l.holes, hole{rec.off, l.records})
			l.end = rec.off
			return l, nil
		}
		l.records++
		l.newest = max(l.newest, rec.at)
		l.note(rec.index, rec.off, rec.at)
	}
}

// judge tells damage from what a crash may leave behind: a segment below the
// newest watermark of its start must be whole, and the one in which that
// watermark lies must be whole up to there.
func (s *Spool) judge(l *loaded, all []*loaded) *DamageError {
	path := s.path(l.name)
	if l.bad != "" {
		at := int64(0)
		if len(l.holes) > 0 {
			at = l.holes[0].at
		}
		return &DamageError{File: path, Offset: at, Following: l.records, Reason: l.bad}
	}
	watermark := uint64(0)
	for _, o := range all {
		if o.start == l.start {
			watermark = max(watermark, o.watermark)
		}
	}
	seq, off := watermark>>32, int64(watermark&0xffffffff)
	if l.seq > seq {
		return nil
	}
	whole := l.seq < seq
	for _, h := range l.holes {
		if whole || h.at < off {
			return &DamageError{File: path, Offset: h.at, Following: l.records - h.before, Reason: "records are gone that were synced"}
		}
	}
	if !l.sealed && (whole || l.end < off) {
		return &DamageError{File: path, Offset: l.end, Reason: "its end is gone, which was synced"}
	}
	return nil
}

// salvage copies the valid records of a segment into a new one, and only then
// renames the damaged file. Its result has no file where nothing was readable.
func (s *Spool) salvage(l *loaded) (*loaded, error) {
	kept := &loaded{segment: &segment{}}
	if l.records > 0 {
		gen := l.gen + 1
		if err := s.copyValid(l, gen); err != nil {
			return nil, err
		}
		var err error
		if kept, err = s.load(l.seq, gen); err != nil {
			return nil, err
		}
	}
	err := s.o.FS.Rename(s.path(l.name), s.path(l.name+".damaged"))
	if err == nil {
		err = s.o.FS.SyncDir(s.o.Dir)
	}
	if err != nil {
		if kept.file != nil {
			err = errors.Join(err, kept.file.Close())
		}
		return nil, err
	}
	return kept, l.file.Close()
}

func (s *Spool) copyValid(l *loaded, gen int) (err error) {
	tmp := s.path(fmt.Sprintf("%016x.tmp", l.seq))
	if err := s.o.FS.Remove(tmp); err != nil && !errors.Is(err, errNotExist) {
		return err
	}
	f, err := s.o.FS.Create(tmp)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
	}()
	h := l.header
	h.salt, h.size = randomUint64(), l.size+2*block
	if err := f.Allocate(h.size); err != nil {
		return err
	}
	off := int64(block)
	var buf []byte
	c := &scanner{file: l.file, salt: l.salt, off: block, end: l.end}
	for {
		rec, err := c.next()
		last := err != nil || rec.kind == kindSeal // an error was reported as the damage
		if last {
			buf = putRecord(buf[:0], h.salt, kindSeal, l.last()+1, 0, 0, 0, 0, nil)
		} else {
			buf = putRecord(buf[:0], h.salt, kindData, rec.index, rec.at, 0, sum(rec.data), len(rec.data), [][]byte{rec.data})
		}
		if _, err := f.WriteAt(buf, off); err != nil {
			return err
		}
		off += int64(len(buf))
		if last {
			break
		}
	}
	if err := writeHeader(f, h); err != nil {
		return err
	}
	if err := s.o.FS.Rename(tmp, s.path(segmentName(l.seq, gen))); err != nil {
		return err
	}
	return s.o.FS.SyncDir(s.o.Dir)
}

// writeHeader writes both copies and makes the file durable.
func writeHeader(f File, h header) error {
	b := h.encode()
	for _, off := range []int64{0, h.size - block} {
		if _, err := f.WriteAt(b, off); err != nil {
			return fmt.Errorf("write segment header: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync segment header: %w", err)
	}
	return nil
}
