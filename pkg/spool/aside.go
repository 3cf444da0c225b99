package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	asideDir = "aside"
	// maxAside and a quarter of MaxBytes bound what is set aside: enough for an
	// operator to see what is wrong, too little to fill the disk.
	maxAside = 10_000
	// maxReason keeps the first line of a file readable at once.
	maxReason = 4096
)

type asideUse struct {
	count int
	bytes int64
}

// Aside describes a record that was set aside. Its file holds this as one line
// of JSON, then the record as it was.
type Aside struct {
	Start      string    `json:"start"`
	Index      uint64    `json:"index"`
	AppendedAt time.Time `json:"appended_at"`
	Reason     string    `json:"reason"`
	Bytes      int       `json:"bytes"`
	CRC32C     uint32    `json:"crc32c"`
	Path       string    `json:"-"`
}

// SetAside copies a record with the reason into a file of its own below
// <dir>/aside, durably, and releases it. It does nothing for a record that is
// released or unknown. At most 10,000 records and a quarter of MaxBytes are set
// aside; beyond that it returns ErrAsideFull and the record stays where it is.
// Operators remove these files; the spool never does.
func (s *Spool) SetAside(p Position, reason string) error {
	s.asideMu.Lock()
	defer s.asideMu.Unlock()
	s.mu.Lock()
	i := slices.IndexFunc(s.segs, func(g *segment) bool {
		return g.start == p.Start && g.holds(p.Index) && p.Index <= g.writtenIndex && !g.released(p.Index)
	})
	if s.isClosing || i < 0 {
		closed := s.isClosing
		s.mu.Unlock()
		if closed {
			return ErrClosed
		}
		return nil
	}
	c := s.scan(s.segs[i], p.Index)
	s.mu.Unlock()
	rec, err := find(c, p.Index)
	if errors.Is(err, errFreed) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	if len(reason) > maxReason {
		reason = reason[:maxReason]
	}
	a := Aside{
		Start: p.Start.String(), Index: p.Index, AppendedAt: time.Unix(0, rec.at).UTC(),
		Reason: strings.ToValidUTF8(reason, "?"), Bytes: len(rec.data), CRC32C: sum(rec.data),
	}
	if err := s.saveAside(a, rec.data); err != nil {
		return fmt.Errorf("set record aside: %w", err)
	}
	s.Release(p.Start, Range{p.Index, p.Index})
	return nil
}

func (s *Spool) saveAside(a Aside, data []byte) error {
	head, err := json.Marshal(a)
	if err != nil {
		return err
	}
	content := slices.Concat(head, []byte("\n"), data)
	name := fmt.Sprintf("%s-%016x.record", a.Start, a.Index)
	if !s.asideFits(int64(len(content))) {
		// Operators may have removed some.
		if err := s.countAside(); err != nil {
			return err
		}
		if !s.asideFits(int64(len(content))) {
			return ErrAsideFull
		}
	}
	dir := s.path(asideDir)
	if err := s.o.FS.MkdirAll(dir); err != nil {
		return err
	}
	if err := s.o.FS.SyncDir(s.o.Dir); err != nil {
		return err
	}
	tmp := filepath.Join(dir, name+".tmp")
	if err := s.o.FS.Remove(tmp); err != nil && !errors.Is(err, errNotExist) {
		return err
	}
	f, err := s.o.FS.Create(tmp)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(content, 0); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, s.o.FS.Remove(tmp))
	}
	if err := s.o.FS.Rename(tmp, filepath.Join(dir, name)); err != nil {
		return err
	}
	if err := s.o.FS.SyncDir(dir); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aside.count++
	s.aside.bytes += int64(len(content))
	return nil
}

func (s *Spool) asideFits(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aside.count < maxAside && s.aside.bytes+n <= s.o.MaxBytes/4
}

func (s *Spool) asideNames() ([]string, error) {
	names, err := s.o.FS.ReadDir(s.path(asideDir))
	if errors.Is(err, errNotExist) {
		return nil, nil
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, ".record") })
	slices.Sort(names)
	return names, err
}

// countAside counts the files anew.
func (s *Spool) countAside() error {
	names, err := s.asideNames()
	if err != nil {
		return fmt.Errorf("read records set aside: %w", err)
	}
	use := asideUse{count: len(names)}
	for _, name := range names {
		f, err := s.o.FS.Open(filepath.Join(s.path(asideDir), name))
		if errors.Is(err, errNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read records set aside: %w", err)
		}
		size, err := f.Size()
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("read records set aside: %w", err)
		}
		use.bytes += size
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aside = use
	return nil
}

// Aside lists what was set aside, by start and index.
func (s *Spool) Aside() ([]Aside, error) {
	names, err := s.asideNames()
	if err != nil {
		return nil, fmt.Errorf("read records set aside: %w", err)
	}
	list := make([]Aside, 0, len(names))
	for _, name := range names {
		a, err := s.readAside(filepath.Join(s.path(asideDir), name))
		if errors.Is(err, errNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		list = append(list, a)
	}
	return list, nil
}

func (s *Spool) readAside(path string) (Aside, error) {
	f, err := s.o.FS.Open(path)
	if err != nil {
		return Aside{}, err
	}
	size, err := f.Size()
	if err != nil {
		return Aside{}, errors.Join(err, f.Close())
	}
	// JSON makes of a byte of the reason six at most.
	line := make([]byte, min(size, 6*maxReason+1024))
	_, err = f.ReadAt(line, 0)
	if err = errors.Join(err, f.Close()); err != nil {
		return Aside{}, err
	}
	a := Aside{Path: path}
	line, _, _ = bytes.Cut(line, []byte("\n"))
	return a, json.Unmarshal(line, &a)
}

func sum(b []byte) uint32 { return crc32.Checksum(b, castagnoli()) }
