package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/bits"
)

// The format. All numbers are little-endian.
//
// A segment is a header block, records, and in its last block a copy of the
// header:
//
//	 0  magic    8 bytes
//	 8  version  u32, then u32 zero
//	16  start    16 bytes, the process start that wrote the segment
//	32  sequence u64, the order of segments over all starts
//	40  salt     u64, random
//	48  size     i64, of the file
//	56  crc32c   u32 of the above
//
// A record starts at a multiple of 8:
//
//	 0  salt     u64, the segment's
//	 8  length   u32, of the payload
//	12  kind     u32
//	16  index    u64
//	24  time     i64, Unix nanoseconds
//	32  synced   u64, the watermark: sequence<<32 | offset
//	40  crc32c   u32 of the above
//	44  crc32c   u32 of the payload
//	48  payload, then zeros up to a multiple of 8
//
// The header has a checksum of its own so that a torn payload costs exactly one
// record, and so that a scan over foreign bytes never has to sum megabytes to
// reject one candidate.
const (
	version      = 1
	block        = 4096
	headerBytes  = 60
	recordHeader = 48
	// recordOverhead is what a record takes beside its payload, at most.
	recordOverhead = recordHeader + 7
	// markEvery is how many records share one entry of a segment's index in memory.
	markEvery = 32
	// scanBuffer is how much is read from a segment at once.
	scanBuffer = 256 << 10

	kindData = 1
	// kindSeal ends a segment. It is durable before a watermark moves past the
	// segment, so a segment below a watermark without its seal has lost bytes.
	kindSeal = 2
)

func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

var (
	errHeader   = errors.New("invalid segment header")
	errNotExist = fs.ErrNotExist
)

const magic = "HFSPOOL\n"

type header struct {
	start StartID
	seq   uint64
	salt  uint64
	size  int64
}

func (h header) encode() []byte {
	b := make([]byte, block)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	copy(b[16:], h.start[:])
	binary.LittleEndian.PutUint64(b[32:], h.seq)
	binary.LittleEndian.PutUint64(b[40:], h.salt)
	binary.LittleEndian.PutUint64(b[48:], uint64(h.size))
	binary.LittleEndian.PutUint32(b[56:], crc32.Checksum(b[:56], castagnoli()))
	return b
}

func decodeHeader(b []byte) (header, error) {
	if len(b) < headerBytes || string(b[:8]) != magic {
		return header{}, errHeader
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v > version {
		return header{}, fmt.Errorf("%w: format %d, this one reads up to %d", ErrNewer, v, version)
	}
	if crc32.Checksum(b[:56], castagnoli()) != binary.LittleEndian.Uint32(b[56:]) {
		return header{}, errHeader
	}
	h := header{
		seq:  binary.LittleEndian.Uint64(b[32:]),
		salt: binary.LittleEndian.Uint64(b[40:]),
		size: int64(binary.LittleEndian.Uint64(b[48:])),
	}
	copy(h.start[:], b[16:])
	return h, nil
}

// readHeader returns the header of a segment file. Where only one of the two
// copies is valid it returns that one together with an error, which is
// errHeader for damage and ErrNewer for a newer format.
func readHeader(f File) (header, error) {
	size, err := f.Size()
	if err != nil {
		return header{}, fmt.Errorf("size of segment: %w", err)
	}
	head, front := readHeaderAt(f, 0)
	if front == nil {
		return head, nil
	}
	tail, back := readHeaderAt(f, max(0, size-block))
	if back == nil {
		return tail, errHeader
	}
	if errors.Is(front, ErrNewer) {
		return header{}, front
	}
	return header{}, errHeader
}

func readHeaderAt(f File, off int64) (header, error) {
	b := make([]byte, headerBytes)
	if _, err := f.ReadAt(b, off); err != nil {
		return header{}, errHeader
	}
	return decodeHeader(b)
}

func recordSize(payload int) int64 { return (recordHeader + int64(payload) + 7) &^ 7 }

// putRecord appends one record to b.
func putRecord(b []byte, salt uint64, kind uint32, index uint64, at int64, synced uint64, sum uint32, length int, parts [][]byte) []byte {
	var h [recordHeader]byte
	binary.LittleEndian.PutUint64(h[0:], salt)
	binary.LittleEndian.PutUint32(h[8:], uint32(length))
	binary.LittleEndian.PutUint32(h[12:], kind)
	binary.LittleEndian.PutUint64(h[16:], index)
	binary.LittleEndian.PutUint64(h[24:], uint64(at))
	binary.LittleEndian.PutUint64(h[32:], synced)
	binary.LittleEndian.PutUint32(h[40:], crc32.Checksum(h[:40], castagnoli()))
	binary.LittleEndian.PutUint32(h[44:], sum)
	b = append(b, h[:]...)
	for _, p := range parts {
		b = append(b, p...)
	}
	var pad [8]byte
	return append(b, pad[:-length&7]...)
}

type mark struct {
	index uint64
	off   int64
	at    int64
}

// segment is one file. Its identity is immutable; everything else is guarded by
// Spool.mu.
type segment struct {
	header
	file File
	name string

	first uint64 // index of the first record
	count uint64 // indexes from first on, those of lost records included
	live  uint64 // records not released
	bits  []uint64
	marks []mark

	tail         int64 // where the next record goes
	written      int64 // below it everything has been written
	synced       int64 // below it everything has been fsynced
	writtenIndex uint64
	syncedIndex  uint64

	sealed  bool // takes no more records
	suspect bool // a write or an fsync failed
	freed   bool
	refs    int // while not zero the file stays open and as it is
}

func (g *segment) limit() int64 { return g.size - block }

// note enters the next record into the index in memory. Indexes between it and
// the one before count as released: their records are lost.
func (g *segment) note(index uint64, off, at int64) {
	if g.count == 0 {
		g.first = index
	}
	if gap := index - (g.first + g.count); gap > 0 {
		g.set(g.first+g.count, index-1)
	}
	if n := len(g.marks); n == 0 || index >= g.marks[n-1].index+markEvery {
		g.marks = append(g.marks, mark{index, off, at})
	}
	g.count = index - g.first + 1
	g.live++
}

// last is the index of the last record; it is first-1 where there is none.
func (g *segment) last() uint64 { return g.first + g.count - 1 }

func (g *segment) holds(index uint64) bool {
	return index >= g.first && index-g.first < g.count
}

// word returns 64 release bits from first+64*n on.
func (g *segment) word(n uint64) uint64 {
	if n < uint64(len(g.bits)) {
		return g.bits[n]
	}
	return 0
}

func (g *segment) released(index uint64) bool {
	i := index - g.first
	return g.word(i/64)&(1<<(i%64)) != 0
}

// set marks the indexes from lo to hi and returns how many were not marked.
func (g *segment) set(lo, hi uint64) (n uint64) {
	lo, hi = lo-g.first, hi-g.first
	for uint64(len(g.bits)) <= hi/64 {
		g.bits = append(g.bits, 0)
	}
	for w := lo / 64; w <= hi/64; w++ {
		mask := ^uint64(0)
		if w == lo/64 {
			mask <<= lo % 64
		}
		if w == hi/64 {
			mask &= ^uint64(0) >> (63 - hi%64)
		}
		n += uint64(bits.OnesCount64(mask &^ g.bits[w]))
		g.bits[w] |= mask
	}
	return n
}

// oldest returns the first index that is not released; live must not be zero.
func (g *segment) oldest() uint64 {
	for w := uint64(0); ; w++ {
		if free := ^g.word(w); free != 0 {
			return g.first + w*64 + uint64(bits.TrailingZeros64(free))
		}
	}
}

// before returns the last mark at or below index.
func (g *segment) before(index uint64) mark {
	lo, hi := 0, len(g.marks)
	for lo < hi {
		mid := (lo + hi) / 2
		if g.marks[mid].index <= index {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return mark{index: g.first, off: block}
	}
	return g.marks[lo-1]
}

// scanner finds the valid records between two offsets of a segment.
type scanner struct {
	file io.ReaderAt
	salt uint64
	off  int64
	end  int64

	buf    []byte
	bufOff int64
	bufLen int
}

type scanned struct {
	off    int64
	kind   uint32
	index  uint64
	at     int64
	synced uint64
	data   []byte // in the scanner's buffer
	// hole is where invalid bytes before the record begin, or -1.
	hole int64
}

// view returns n bytes from off on. They are valid until the next call.
func (c *scanner) view(off int64, n int) ([]byte, error) {
	if off >= c.bufOff && off+int64(n) <= c.bufOff+int64(c.bufLen) {
		return c.buf[off-c.bufOff:][:n], nil
	}
	if want := max(n, scanBuffer); len(c.buf) < want {
		c.buf = make([]byte, want)
	}
	c.bufOff, c.bufLen = off, 0
	m, err := c.file.ReadAt(c.buf[:min(int64(len(c.buf)), c.end-off)], off)
	c.bufLen = m
	if m >= n {
		return c.buf[:n], nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("read segment: %w", err)
}

// next returns the next valid record and moves behind it. At the end it returns
// io.EOF, with hole set where invalid bytes come before the end.
func (c *scanner) next() (scanned, error) {
	hole := int64(-1)
	for c.end-c.off >= recordHeader {
		h, err := c.view(c.off, recordHeader)
		if err != nil {
			return scanned{hole: c.off}, err
		}
		rec := scanned{
			off:    c.off,
			kind:   binary.LittleEndian.Uint32(h[12:]),
			index:  binary.LittleEndian.Uint64(h[16:]),
			at:     int64(binary.LittleEndian.Uint64(h[24:])),
			synced: binary.LittleEndian.Uint64(h[32:]),
		}
		length := int64(binary.LittleEndian.Uint32(h[8:]))
		sum := binary.LittleEndian.Uint32(h[44:])
		valid := binary.LittleEndian.Uint64(h) == c.salt &&
			(rec.kind == kindData || rec.kind == kindSeal) &&
			crc32.Checksum(h[:40], castagnoli()) == binary.LittleEndian.Uint32(h[40:]) &&
			c.end-c.off >= recordHeader+length
		if !valid {
			if hole < 0 {
				hole = c.off
			}
			if err := c.skip(); err != nil {
				return scanned{hole: hole}, err
			}
			continue
		}
		whole, err := c.view(c.off, recordHeader+int(length))
		if err != nil {
			return scanned{hole: c.off}, err
		}
		rec.data = whole[recordHeader:]
		if crc32.Checksum(rec.data, castagnoli()) != sum {
			if hole < 0 {
				hole = c.off
			}
			c.off += recordSize(int(length))
			continue
		}
		c.off += recordSize(int(length))
		rec.hole = hole
		return rec, nil
	}
	if hole < 0 && c.off < c.end {
		hole = c.off
	}
	return scanned{hole: hole}, io.EOF
}

// skip moves to the next place that starts with the salt, or to the end.
func (c *scanner) skip() error {
	c.off += 8
	for c.end-c.off >= recordHeader {
		n := min(c.end-c.off, scanBuffer) &^ 7
		b, err := c.view(c.off, int(n))
		if err != nil {
			return err
		}
		for i := 0; i < len(b); i += 8 {
			if binary.LittleEndian.Uint64(b[i:]) == c.salt {
				c.off += int64(i)
				return nil
			}
		}
		c.off += n
	}
	c.off = max(c.off, c.end&^7)
	return nil
}
