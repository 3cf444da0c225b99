package spool

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
)

// FS is what a spool needs of a file system. It exists for layers that inject
// faults; paths are those of the operating system. Implementations are safe for
// concurrent use.
type FS interface {
	// MkdirAll makes a directory, for its owner alone, where it is missing.
	MkdirAll(dir string) error
	// Lock takes an exclusive lock until the result is closed, or returns
	// ErrLocked at once.
	Lock(path string) (io.Closer, error)
	// ReadDir returns the names in a directory, in no particular order.
	ReadDir(dir string) ([]string, error)
	// Create makes a new file, for its owner alone, that must not exist.
	Create(path string) (File, error)
	// Open opens a file for reading and writing.
	Open(path string) (File, error)
	// Rename replaces newPath atomically.
	Rename(oldPath, newPath string) error
	Remove(path string) error
	// SyncDir makes the entries of a directory durable.
	SyncDir(dir string) error
}

// File is one open file. ReadAt and WriteAt may run at the same time, and while
// Datasync runs.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Size is in bytes.
	Size() (int64, error)
	// Allocate makes the file size bytes long, with a block behind each byte.
	Allocate(size int64) error
	// Datasync makes the content durable.
	Datasync() error
	// Sync makes content and size durable.
	Sync() error
}

type osFS struct{}

// MkdirAll also makes the entries durable of those directories that it has made.
func (o osFS) MkdirAll(dir string) error {
	var parents []string
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); !errors.Is(err, os.ErrNotExist) {
			break
		}
		parents = append(parents, filepath.Dir(d))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, d := range parents {
		if err := o.SyncDir(d); err != nil {
			return err
		}
	}
	return nil
}

func (osFS) Lock(path string) (io.Closer, error) {
	lock := flock.New(path, flock.SetFlag(os.O_CREATE|os.O_RDWR), flock.SetPermissions(0o600))
	held, err := lock.TryLock()
	if err != nil {
		return nil, err
	}
	if !held {
		return nil, ErrLocked
	}
	return lock, nil
}

func (osFS) ReadDir(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	return names, errors.Join(err, d.Close())
}

func (osFS) Create(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Open(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) Rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }
func (osFS) Remove(path string) error             { return os.Remove(path) }

func (osFS) SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// fillZeros allocates by writing, for file systems that cannot do it otherwise.
// What the file already has is left alone.
func (f osFile) fillZeros(size int64) error {
	have, err := f.Size()
	if err != nil {
		return err
	}
	zeros := make([]byte, min(1<<20, max(0, size-have)))
	for have < size {
		n := min(int64(len(zeros)), size-have)
		if _, err := f.WriteAt(zeros[:n], have); err != nil {
			return fmt.Errorf("fill with zeros: %w", err)
		}
		have += n
	}
	return nil
}
