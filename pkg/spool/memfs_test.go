package spool_test

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/holdfast-io/holdfast/pkg/spool"
)

var errPower = errors.New("power is off")

const sector = 512

// memFS is a file system that knows what is durable and what is not. crash makes
// the one that the next process finds.
type memFS struct {
	mu      sync.Mutex
	rng     *rand.Rand
	live    map[string]*inode
	durable map[string]*inode
	pending []entry // changes of directories that are not synced, oldest first
	locked  map[string]bool
	off     bool
	left    int   // operations until the power goes; negative is never
	limit   int64 // bytes of all files; 0 is none

	// fault may fail an operation ("write", "datasync", "sync", "allocate",
	// "rename", "syncdir") on a file. It is called without lock and may block.
	fault func(op, path string) error
}

type inode struct {
	path  string       // its newest
	data  []byte       // what a reader sees
	disk  []byte       // what is durable
	dirty map[int]bool // sectors of data not in disk
	size  int          // durable size
}

type entry struct {
	dir  string
	kind string
	from string
	to   string
	file *inode
}

func newMemFS(seed uint64) *memFS {
	return &memFS{
		rng:  rand.New(rand.NewPCG(seed, 2)),
		live: map[string]*inode{}, durable: map[string]*inode{}, locked: map[string]bool{},
		left: -1,
	}
}

// step counts an operation. The lock is held.
func (m *memFS) step() error {
	if m.left == 0 {
		m.off = true
	}
	if m.off {
		return errPower
	}
	if m.left > 0 {
		m.left--
	}
	return nil
}

func (m *memFS) begin(op, path string) error {
	m.mu.Lock()
	fault := m.fault
	m.mu.Unlock()
	if fault != nil {
		return fault(op, path)
	}
	return nil
}

func (m *memFS) isOff() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.off
}

func (m *memFS) cutAfter(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left = n
}

// crash returns the file system of the next start. With power only the process
// died; without, each sector and each directory change that was not synced is
// kept or lost by chance.
func (m *memFS) crash(power bool) *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.off = true
	n := newMemFS(m.rng.Uint64())
	copies := map[*inode]*inode{}
	unit := []int{1, 8}[m.rng.IntN(2)]
	keep := []float64{0, 0.5, 0.9, 1}[m.rng.IntN(4)]
	clone := func(f *inode) *inode {
		if c := copies[f]; c != nil {
			return c
		}
		c := &inode{path: f.path, disk: slices.Clone(f.disk), size: f.size, dirty: maps.Clone(f.dirty), data: slices.Clone(f.data)}
		copies[f] = c
		if power {
			return c
		}
		c.dirty = map[int]bool{}
		if f.size != len(f.data) && m.rng.Float64() < keep {
			c.size = len(f.data)
		}
		c.data = make([]byte, c.size)
		copy(c.data, f.disk)
		units := map[int]bool{}
		for i := range f.dirty {
			if _, ok := units[i/unit]; !ok {
				units[i/unit] = m.rng.Float64() < keep
			}
			if units[i/unit] && i*sector < len(c.data) {
				copy(c.data[i*sector:min((i+1)*sector, len(c.data))], f.data[i*sector:])
			}
		}
		c.disk = slices.Clone(c.data)
		return c
	}
	for path, f := range m.durable {
		n.durable[path] = clone(f)
	}
	for _, e := range m.pending {
		if e.file != nil {
			e.file = clone(e.file)
		}
		if power {
			n.pending = append(n.pending, e)
		} else if m.rng.Float64() < keep {
			e.apply(n.durable)
		}
	}
	n.live = maps.Clone(n.durable)
	for _, e := range n.pending {
		e.apply(n.live)
	}
	return n
}

func (e entry) apply(to map[string]*inode) {
	switch e.kind {
	case "create":
		to[e.to] = e.file
	case "remove":
		delete(to, e.from)
	case "rename":
		if to[e.from] == e.file {
			delete(to, e.from)
		}
		to[e.to] = e.file
	}
}

func (m *memFS) change(e entry) {
	e.dir = filepath.Dir(e.to)
	if e.to == "" {
		e.dir = filepath.Dir(e.from)
	}
	e.apply(m.live)
	m.pending = append(m.pending, e)
}

func (m *memFS) MkdirAll(string) error { return nil }

type memLock struct {
	m    *memFS
	path string
}

func (l memLock) Close() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	delete(l.m.locked, l.path)
	return nil
}

func (m *memFS) Lock(path string) (io.Closer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.locked[path] {
		return nil, spool.ErrLocked
	}
	m.locked[path] = true
	return memLock{m, path}, nil
}

func (m *memFS) ReadDir(dir string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for path := range m.live {
		if filepath.Dir(path) == dir {
			names = append(names, filepath.Base(path))
		}
	}
	return names, nil
}

func (m *memFS) Create(path string) (spool.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step(); err != nil {
		return nil, err
	}
	if m.live[path] != nil {
		return nil, fs.ErrExist
	}
	f := &inode{path: path, dirty: map[int]bool{}}
	m.change(entry{kind: "create", to: path, file: f})
	return &memFile{m, f}, nil
}

func (m *memFS) Open(path string) (spool.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.live[path]; f != nil {
		return &memFile{m, f}, nil
	}
	return nil, fs.ErrNotExist
}

func (m *memFS) Rename(from, to string) error {
	if err := m.begin("rename", from); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step(); err != nil {
		return err
	}
	f := m.live[from]
	if f == nil {
		return fs.ErrNotExist
	}
	f.path = to
	m.change(entry{kind: "rename", from: from, to: to, file: f})
	return nil
}

func (m *memFS) Remove(path string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step(); err != nil {
		return err
	}
	if m.live[path] == nil {
		return fs.ErrNotExist
	}
	m.change(entry{kind: "remove", from: path})
	return nil
}

func (m *memFS) SyncDir(dir string) error {
	if err := m.begin("syncdir", dir); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.step(); err != nil {
		return err
	}
	m.pending = slices.DeleteFunc(m.pending, func(e entry) bool {
		if e.dir != dir {
			return false
		}
		e.apply(m.durable)
		return true
	})
	return nil
}

// count returns how many files have a suffix.
func (m *memFS) count(suffix string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for path := range m.live {
		if strings.HasSuffix(path, suffix) {
			n++
		}
	}
	return n
}

type memFile struct {
	m *memFS
	f *inode
}

func (h *memFile) begin(op string) error {
	h.m.mu.Lock()
	path := h.f.path
	h.m.mu.Unlock()
	return h.m.begin(op, path)
}

func (h *memFile) Size() (int64, error) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	return int64(len(h.f.data)), nil
}

func (h *memFile) ReadAt(b []byte, off int64) (int, error) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if off >= int64(len(h.f.data)) {
		return 0, io.EOF
	}
	n := copy(b, h.f.data[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// resize grows the file. The lock is held.
func (h *memFile) resize(size int) error {
	if size <= len(h.f.data) {
		return nil
	}
	if h.m.limit > 0 {
		used := int64(size - len(h.f.data))
		for _, f := range h.m.live {
			used += int64(len(f.data))
		}
		if used > h.m.limit {
			return syscall.ENOSPC
		}
	}
	h.f.data = append(h.f.data, make([]byte, size-len(h.f.data))...)
	return nil
}

func (h *memFile) WriteAt(b []byte, off int64) (int, error) {
	if err := h.begin("write"); err != nil {
		return 0, err
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	err := h.m.step()
	if err != nil {
		// The write during which the power goes is torn.
		b = b[:h.m.rng.IntN(len(b)+1)]
		if h.m.left != 0 {
			return 0, err
		}
		h.m.left = -1
	}
	if err := h.resize(int(off) + len(b)); err != nil {
		return 0, err
	}
	copy(h.f.data[off:], b)
	for i := int(off) / sector; i*sector < int(off)+len(b); i++ {
		h.f.dirty[i] = true
		if h.m.rng.IntN(16) == 0 {
			h.flush(i) // the kernel writes back when it likes
		}
	}
	return len(b), err
}

// flush makes one sector durable. The lock is held.
func (h *memFile) flush(i int) {
	end := min((i+1)*sector, len(h.f.data))
	if len(h.f.disk) < end {
		h.f.disk = append(h.f.disk, make([]byte, end-len(h.f.disk))...)
	}
	copy(h.f.disk[i*sector:end], h.f.data[i*sector:end])
	delete(h.f.dirty, i)
}

func (h *memFile) sync(op string) error {
	if err := h.begin(op); err != nil {
		return err
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.m.step(); err != nil {
		return err
	}
	for i := range h.f.dirty {
		h.flush(i)
	}
	h.f.size = len(h.f.data)
	return nil
}

func (h *memFile) Datasync() error { return h.sync("datasync") }
func (h *memFile) Sync() error     { return h.sync("sync") }

func (h *memFile) Allocate(size int64) error {
	if err := h.begin("allocate"); err != nil {
		return err
	}
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if err := h.m.step(); err != nil {
		return err
	}
	return h.resize(int(size))
}

func (h *memFile) Close() error { return nil }
