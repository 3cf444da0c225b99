package wire

import (
	"bytes"
	"io"
)

// BufferBytes is how large the buffer of a Reader is at first: heads mostly fit.
const BufferBytes = 4 << 10

// Reader buffers a connection. Unlike a bufio.Reader it gives its buffer away
// while nothing is in it, so that idle connections cost none, and it grows to
// hold a whole head.
type Reader struct {
	// Grow is asked before the buffer grows by n bytes, and may refuse with the
	// error that the read then gives. nil allows it.
	Grow func(n int) error

	src  io.Reader
	buf  []byte
	r, w int
}

// NewReader makes a reader without buffer; it gets one when it first needs it. An
// error of src must come back with its next read.
func NewReader(src io.Reader) *Reader { return &Reader{src: src} }

// Buffered gives what was read and not yet used. It is valid until the next call.
func (r *Reader) Buffered() []byte { return r.buf[r.r:r.w] }

// Fill makes buf the buffer, of which the first n bytes were just read from the
// source. Nothing may be buffered.
func (r *Reader) Fill(buf []byte, n int) { r.buf, r.r, r.w = buf, 0, n }

// Take gives the buffer away, nil when something is still in it.
func (r *Reader) Take() []byte {
	if r.r != r.w {
		return nil
	}
	buf := r.buf
	r.buf, r.r, r.w = nil, 0, 0
	return buf
}

// more reads once from the source. The buffer has room for at least a byte
// afterwards, up to limit bytes.
func (r *Reader) more(limit int) error {
	switch {
	case r.buf == nil:
		r.buf = make([]byte, BufferBytes)
	case r.r == r.w:
		r.r, r.w = 0, 0
	case r.w == len(r.buf) && r.r > 0:
		r.w = copy(r.buf, r.buf[r.r:r.w])
		r.r = 0
	case r.w == len(r.buf):
		if r.w >= limit {
			return ErrHeadTooLarge
		}
		size := min(2*r.w, max(limit, r.w+1))
		if r.Grow != nil {
			if err := r.Grow(size - r.w); err != nil {
				return err
			}
		}
		grown := make([]byte, size)
		r.w = copy(grown, r.buf[:r.w])
		r.buf = grown
	}
	n, err := r.src.Read(r.buf[r.w:])
	r.w += n
	if n > 0 {
		return nil // an error comes back with the next read
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// Read reads what is buffered, or once from the source. It never gives bytes and
// an error at once: whoever counts bytes would take the end of the source, which a
// TLS connection gives with the last ones, for the end of what it counts.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.r == r.w {
		if len(p) >= BufferBytes {
			n, err := r.src.Read(p)
			switch {
			case n > 0:
				err = nil // it comes back with the next read
			case err == nil:
				err = io.ErrNoProgress
			}
			return n, err
		}
		if err := r.more(BufferBytes); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.buf[r.r:r.w])
	r.r += n
	return n, nil
}

// Head reads up to and including the first empty line, of at most limit bytes:
// a head, or a trailer section. What it gives is valid until the next call.
// The error is io.EOF when the source ended before the first byte, and
// io.ErrUnexpectedEOF when it ended in the middle.
func (r *Reader) Head(limit int) ([]byte, error) {
	line, scan := 0, 0 // begin of the line, and of what was not looked at yet
	for {
		b := r.buf[r.r:r.w]
		for {
			i := bytes.IndexByte(b[scan:], '\n')
			if i < 0 {
				scan = len(b)
				break
			}
			end := scan + i
			scan = end + 1
			if scan > limit {
				return nil, ErrHeadTooLarge
			}
			if end == line || end == line+1 && b[line] == '\r' {
				r.r += scan
				return b[:scan], nil
			}
			line = scan
		}
		if len(b) >= limit {
			return nil, ErrHeadTooLarge
		}
		if err := r.more(limit); err != nil {
			if err == io.EOF && len(b) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// line reads a line of at most limit bytes, without its end. What it gives is
// valid until the next call.
func (r *Reader) line(limit int, lenient bool) ([]byte, error) {
	scan := 0
	for {
		b := r.buf[r.r:r.w]
		if i := bytes.IndexByte(b[scan:], '\n'); i >= 0 {
			i += scan
			r.r += i + 1
			switch {
			case i > limit:
				return nil, bad("a line of the chunked coding is too long")
			case i > 0 && b[i-1] == '\r':
				return b[:i-1], nil
			case lenient:
				return b[:i], nil
			}
			return nil, bad("a line of the chunked coding ends in LF without CR")
		}
		if scan = len(b); scan > limit {
			return nil, bad("a line of the chunked coding is too long")
		}
		if err := r.more(limit + 2); err != nil {
			if err == ErrHeadTooLarge {
				err = bad("a line of the chunked coding is too long")
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// HasHead reports whether a whole head is buffered.
func (r *Reader) HasHead() bool {
	b := r.Buffered()
	return bytes.Contains(b, crlfcrlf)
}

var crlfcrlf = []byte("\r\n\r\n")
