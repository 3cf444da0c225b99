package exchange

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// gorEnd is the line that ends an item.
const gorEnd = "🐵🙈🙉\n"

type gorReader struct {
	r      *bufio.Reader
	limit  int
	number int
}

// NewGorReader reads what goreplay writes with --output-file: items of a line
// "type id time-in-nanoseconds", an HTTP message, a line break, and a line of
// three monkeys. Requests are type 1; answers (2 and 3) are passed over, and
// count in the numbers. limit bounds an item in bytes.
//
// A message is refused that its framing does not end where the item ends:
// goreplay may have lost packets, or its body holds the line that ends an item,
// which the format cannot tell.
func NewGorReader(r io.Reader, limit int) Reader {
	return &gorReader{r: bufio.NewReaderSize(r, 64<<10), limit: limit}
}

func (g *gorReader) Next() (Entry, error) {
	for {
		item, err := g.item()
		if err != nil {
			return Entry{}, err
		}
		refuse := func(format string, args ...any) (Entry, error) {
			return Entry{}, &ItemError{Number: g.number, Reason: fmt.Sprintf(format, args...)}
		}
		if item == nil {
			return refuse("it has more than %d bytes", g.limit)
		}
		line, message, ok := bytes.Cut(item, []byte("\n"))
		meta := bytes.Fields(line)
		if !ok || len(meta) < 3 || len(meta[0]) != 1 || meta[0][0] < '1' || meta[0][0] > '3' {
			return refuse("it does not begin with type, id and time: no item of goreplay, or a body that held the end of one")
		}
		if meta[0][0] != '1' {
			continue
		}
		ns, err := strconv.ParseInt(string(meta[2]), 10, 64)
		if err != nil || ns <= 0 {
			return refuse("its time is not a number of nanoseconds")
		}
		e, err := readMessage(message)
		if err != nil {
			return refuse("%s", err)
		}
		e.Number, e.At, e.Mark = g.number, time.Unix(0, ns), string(meta[1])
		return e, nil
	}
}

// item reads one item without its end, nil when it is too large.
func (g *gorReader) item() ([]byte, error) {
	var item []byte
	size, begin := 0, true // whether a line begins
	for {
		part, err := g.r.ReadSlice('\n')
		if begin && string(part) == gorEnd {
			g.number++
			if size > g.limit {
				return nil, nil
			}
			return bytes.TrimSuffix(append([]byte{}, item...), []byte("\n")), nil
		}
		begin = len(part) > 0 && part[len(part)-1] == '\n'
		if size += len(part); size <= g.limit {
			item = append(item, part...)
		}
		switch {
		case err == nil, errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(bytes.TrimSpace(item)) == 0 && size <= g.limit:
			return nil, io.EOF
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("it breaks off in item %d: %w", g.number+1, io.ErrUnexpectedEOF)
		default:
			return nil, err
		}
	}
}

// readMessage reads a request and its body, which has to end where data end.
func readMessage(data []byte) (Entry, error) {
	var req wire.Request
	var body wire.Body
	r := wire.NewReader(bytes.NewReader(data))
	if err := wire.ReadRequest(r, &req, maxHead, maxFields); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return Entry{}, errors.New("its head is cut")
		}
		return Entry{}, err
	}
	body.Reset(r, req.Length, maxHead, maxFields, false)
	whole, err := io.ReadAll(&body)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF) && req.Length >= 0:
		return Entry{}, fmt.Errorf("its body is cut: %d of %d bytes are there", len(whole), req.Length)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return Entry{}, errors.New("its body is cut: the last chunk is not there")
	case err != nil:
		return Entry{}, err
	}
	if rest, err := io.Copy(io.Discard, r); err != nil || rest > 0 {
		return Entry{}, fmt.Errorf("%d bytes follow its body", rest)
	}
	return Entry{
		Method: req.Method, Target: req.Target, Host: req.Host, Fields: req.Fields,
		Framed: req.Fields.Has("Content-Length") || req.Length == wire.Chunked, Body: whole, Trailer: body.Trailer,
	}, nil
}
