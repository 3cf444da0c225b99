package exchange

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
)

// memoryBytes is how large a body may be to be held in memory.
const memoryBytes = 1 << 20

// Body holds one body while it is written out: in memory where it is small, else
// in a temporary file that has no name. It is used again for the next one, by one
// goroutine.
type Body struct {
	mem  []byte
	file *os.File
	size int64
	sum  hash.Hash
}

// NewBody holds nothing yet.
func NewBody() *Body { return &Body{sum: sha256.New()} }

// Write appends.
func (b *Body) Write(p []byte) (int, error) {
	if b.size+int64(len(p)) <= memoryBytes {
		b.mem = append(b.mem, p...)
	} else if err := b.spill(p); err != nil {
		return 0, err
	}
	b.sum.Write(p)
	b.size += int64(len(p))
	return len(p), nil
}

func (b *Body) spill(p []byte) error {
	if b.file == nil {
		f, err := os.CreateTemp("", "holdfast-export-")
		if err != nil {
			return fmt.Errorf("hold a large body: %w", err)
		}
		b.file = f
		if err := os.Remove(f.Name()); err != nil {
			return fmt.Errorf("hold a large body: %w", err)
		}
	}
	if b.size <= memoryBytes { // the first part above it
		if _, err := b.file.WriteAt(b.mem, 0); err != nil {
			return fmt.Errorf("hold a large body: %w", err)
		}
	}
	if _, err := b.file.WriteAt(p, b.size); err != nil {
		return fmt.Errorf("hold a large body: %w", err)
	}
	return nil
}

// Size is the length in bytes.
func (b *Body) Size() int64 { return b.size }

// Bytes gives the whole body where it is held in memory. It is valid until the
// body is used again.
func (b *Body) Bytes() (data []byte, ok bool) { return b.mem, b.size == int64(len(b.mem)) }

// Reader reads the body from its begin.
func (b *Body) Reader() io.Reader {
	if data, ok := b.Bytes(); ok {
		return bytes.NewReader(data)
	}
	return io.NewSectionReader(b.file, 0, b.size)
}

// digest is the SHA-256 of the body.
func (b *Body) digest() (sum [sha256.Size]byte) {
	b.sum.Sum(sum[:0])
	return sum
}

// reset empties the body. What a large one took on the disk is given back.
func (b *Body) reset() error {
	b.mem, b.size = b.mem[:0], 0
	b.sum.Reset()
	if b.file == nil {
		return nil
	}
	if err := b.file.Truncate(0); err != nil {
		return fmt.Errorf("empty a temporary file: %w", err)
	}
	return nil
}

// Close gives up the temporary file.
func (b *Body) Close() error {
	if b.file == nil {
		return nil
	}
	err := b.file.Close()
	b.file = nil
	return err
}
