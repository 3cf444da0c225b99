package wire

import (
	"bytes"
	"io"
	"strconv"
)

// Lengths of bodies that are not numbers of bytes.
const (
	Chunked    int64 = -1 // the chunked coding tells the end
	UntilClose int64 = -2 // the end of the connection is the end of the body
)

// Bounds of the chunked coding: what nobody needs more of.
const (
	maxChunkLine  = 4 << 10  // one size with its extensions
	maxExtensions = 64 << 10 // all extensions of a body
)

// Body reads a body by its framing. The zero value is an empty body. It never
// reads beyond its end.
type Body struct {
	// Trailer holds the fields after a chunked body, once Read has given io.EOF.
	Trailer Fields

	r       *Reader
	length  int64 // as announced
	left    int64 // of the body, or of the chunk
	limit   int   // bytes of the trailer section
	most    int   // fields in it
	ext     int   // bytes of extensions so far
	place   place
	lenient bool
	err     error // what ended the body
}

// Reset makes b the body that comes next in r. A trailer section may have so
// many bytes and fields.
func (b *Body) Reset(r *Reader, length int64, limit, fields int, lenient bool) {
	*b = Body{r: r, length: length, left: max(length, 0), limit: limit, most: fields, lenient: lenient}
	if length == 0 {
		b.err = io.EOF
	}
}

// Done reports whether the body was read to its end.
func (b *Body) Done() bool { return b.r == nil || b.err == io.EOF }

// Err gives what ended the body: io.EOF when it came whole, nil before its end.
func (b *Body) Err() error { return b.err }

// Left is how many bytes of a body with known length are to come, -1 when
// nobody knows.
func (b *Body) Left() int64 {
	switch {
	case b.Done():
		return 0
	case b.length < 0:
		return -1
	}
	return b.left
}

// Read reads. With the last bytes of a body of known length, and of one whose
// end is buffered, it gives io.EOF at once. A body that ends early gives
// io.ErrUnexpectedEOF, one that is not framed as it must be a *SyntaxError.
func (b *Body) Read(p []byte) (n int, err error) {
	if b.r == nil {
		return 0, io.EOF
	}
	if b.err != nil || len(p) == 0 {
		return 0, b.err
	}
	switch {
	case b.length >= 0:
		n, err = b.counted(p)
		if b.left == 0 && err == nil {
			err = io.EOF
		}
	case b.length == Chunked:
		n, err = b.chunked(p)
	default:
		n, err = b.r.Read(p)
	}
	b.err = err
	return n, err
}

// counted reads of the bytes that are left.
func (b *Body) counted(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	if err == io.EOF && b.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// place is where a chunked body is being read.
type place uint8

const (
	atSize    place = iota // before the first chunk's size
	inChunk                // in the data of a chunk
	atEnd                  // before the end of a chunk's data, and the next one's size
	atTrailer              // after the last chunk
)

// chunked reads of the chunk, or of the next ones, as far as that costs no wait
// once there is something to give.
func (b *Body) chunked(p []byte) (n int, err error) {
	for n < len(p) {
		if b.place == inChunk {
			if n > 0 && len(b.r.Buffered()) == 0 {
				return n, nil
			}
			m, err := b.counted(p[n:])
			n += m
			if b.left == 0 {
				b.place = atEnd
			}
			if err != nil {
				return n, err
			}
			continue
		}
		if n > 0 && !b.nextBuffered() {
			return n, nil
		}
		if b.place == atTrailer {
			return n, b.readTrailer()
		}
		if err := b.nextChunk(); err != nil {
			return n, err
		}
	}
	return n, nil
}

// nextBuffered reports whether what comes next is here already: the next size,
// after the end of a chunk's data where that is to come, or all trailers.
func (b *Body) nextBuffered() bool {
	buf := b.r.Buffered()
	switch b.place {
	case atTrailer:
		return bytes.HasPrefix(buf, crlfcrlf[:2]) || bytes.Contains(buf, crlfcrlf)
	case atEnd:
		buf = buf[min(len("\r\n"), len(buf)):]
	}
	return bytes.IndexByte(buf, '\n') >= 0
}

// nextChunk reads the end of the last chunk and the size of the next one.
func (b *Body) nextChunk() error {
	if b.place == atEnd {
		line, err := b.r.line(2, b.lenient)
		if err != nil {
			return err
		}
		if len(line) != 0 {
			return bad("a chunk is longer than it says")
		}
		b.place = atSize
	}
	line, err := b.r.line(maxChunkLine, b.lenient)
	if err != nil {
		return err
	}
	size, ext, err := parseChunkSize(line, b.lenient)
	if err != nil {
		return err
	}
	if b.ext += ext; b.ext > maxExtensions {
		return bad("the chunked coding has too many extensions")
	}
	b.left, b.place = size, inChunk
	if size == 0 {
		b.place = atTrailer
	}
	return nil
}

// parseChunkSize reads a size and its extensions, of which it gives the length.
func parseChunkSize(line []byte, lenient bool) (size int64, ext int, err error) {
	digits := 0
digits:
	for ; digits < len(line); digits++ {
		c := line[digits]
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			break digits
		}
		if digits == 16 || size > (1<<63-1)>>4 {
			return 0, 0, bad("a chunk size is too large")
		}
		size = size<<4 | int64(c)
	}
	rest := line[digits:]
	if lenient {
		rest = bytes.TrimLeft(rest, " \t")
	}
	if digits == 0 || len(rest) > 0 && rest[0] != ';' {
		return 0, 0, bad("a chunk size is not a hexadecimal number")
	}
	for _, c := range rest {
		if classes[c]&valueByte == 0 {
			return 0, 0, bad("a chunk extension holds a control character")
		}
	}
	return size, len(rest), nil
}

func (b *Body) readTrailer() error {
	section, err := b.r.Head(b.limit)
	if err != nil {
		switch err {
		case io.EOF:
			err = io.ErrUnexpectedEOF
		case ErrHeadTooLarge:
			err = &SyntaxError{Status: 431, Reason: "the trailer section has more than the " + strconv.Itoa(b.limit) + " bytes that are allowed"}
		}
		return err
	}
	if b.Trailer, err = parseFields(nil, string(section), b.most, b.lenient); err != nil {
		return err
	}
	return io.EOF
}

// AppendChunk appends a chunk; data must not be empty, for an empty chunk is the
// last one.
func AppendChunk(dst, data []byte) []byte {
	dst = AppendChunkSize(dst, int64(len(data)))
	dst = append(dst, data...)
	return append(dst, "\r\n"...)
}

// AppendChunkSize appends the line before a chunk's data.
func AppendChunkSize(dst []byte, size int64) []byte {
	return append(strconv.AppendInt(dst, size, 16), "\r\n"...)
}

// AppendLastChunk appends the last chunk and the trailer section.
func AppendLastChunk(dst []byte, trailer Fields) []byte {
	dst = append(dst, "0\r\n"...)
	for _, f := range trailer {
		dst = AppendField(dst, f.Name, f.Value)
	}
	return append(dst, "\r\n"...)
}
