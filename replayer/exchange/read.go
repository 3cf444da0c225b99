package exchange

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Entry is one request as a file tells it. It is framed and cleaned by [Import].
type Entry struct {
	Number int       // in the file, from 1
	At     time.Time // when the client sent it
	Method string
	Target string // in origin form
	Host   string // of its URL, for a request without a Host field
	Fields wire.Fields
	// Framed is true for a request that told the length of its body, were it 0.
	Framed  bool
	Body    []byte // without the chunked coding
	Trailer wire.Fields
	// Mark is what the file calls it; empty where it has no names.
	Mark string
	// ID and Digest are those that an export of ours has given it; zero in other
	// files.
	ID     uuid.UUID
	Digest string
}

// Reader reads a file of requests.
type Reader interface {
	// Next gives the next request, io.EOF at the end, an [*ItemError] for one
	// that cannot be taken, after which reading goes on, and another error where
	// nothing more can be read.
	Next() (Entry, error)
}

// Plain undoes gzip where the data begin like it.
func Plain(r io.Reader) (io.Reader, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(2)
	if err != nil || !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return b, nil // an error comes back with the first read
	}
	z, err := gzip.NewReader(b)
	if err != nil {
		return nil, fmt.Errorf("read gzip: %w", err)
	}
	return bufio.NewReaderSize(z, 64<<10), nil
}

// content gives the request as it would have been captured: its body is in the
// chunked coding where it has trailers. fallback is the host of one that names
// none. digest tells its content.
func (e *Entry) content(fallback string) (q request, body []byte, digest string, redacted bool, err error) {
	kept, host, redacted := forwarded(e.Fields)
	for _, alternative := range []string{e.Host, fallback} {
		if host == "" {
			host = alternative
		}
	}
	q = request{method: e.Method, target: e.Target, host: host, fields: kept, trailer: trailing(e.Trailer), length: int64(len(e.Body))}
	body = e.Body
	switch {
	case len(q.trailer) > 0:
		q.length = wire.Chunked
	case len(e.Body) == 0 && !e.Framed:
		q.length = noFraming
	}
	// By the gateway's own reader: what it would refuse, an API may understand in
	// two ways.
	var read wire.Request
	if err := wire.ReadRequest(wire.NewReader(bytes.NewReader(q.appendHead(nil))), &read, maxHead, maxFields); err != nil {
		return q, nil, "", false, err
	}
	if read.Target != e.Target || len(read.Fields) < len(kept) {
		return q, nil, "", false, fmt.Errorf("the target is not in origin form")
	}
	digest = q.digest(sha256.Sum256(body))
	if q.length == wire.Chunked {
		var coded []byte
		if len(body) > 0 {
			coded = wire.AppendChunk(make([]byte, 0, len(body)+256), body)
		}
		body = wire.AppendLastChunk(coded, q.trailer)
	}
	return q, body, digest, redacted, nil
}
