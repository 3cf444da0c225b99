package edge

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// maxLine bounds a line; nothing that a test sends is longer.
const maxLine = 1 << 20

// Field is one header or trailer field as it stood on the wire, but for the
// white space around its value.
type Field struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Fields are in the order of the wire.
type Fields []Field

// Values are the values of a name, in any spelling, in their order.
func (f Fields) Values(name string) (values []string) {
	for _, one := range f {
		if strings.EqualFold(one.Name, name) {
			values = append(values, one.Value)
		}
	}
	return values
}

// Has reports whether a field of that name lists the token, in any case.
func (f Fields) Has(name, token string) bool {
	for _, value := range f.Values(name) {
		for one := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(strings.TrimSpace(one), token) {
				return true
			}
		}
	}
	return false
}

// The framings of a body.
const (
	None     = "none"
	Length   = "length"
	Chunked  = "chunked"
	UntilEOF = "until EOF" // answers only
)

// Message is a request or an answer as it stood on the wire.
type Message struct {
	// Start is the first line without its end.
	Start    string
	Fields   Fields
	Framing  string
	Body     []byte
	Trailers Fields
	// Anomalies are all ways in which it breaks the grammar of RFC 9112.
	Anomalies []string
	// Raw is all of it.
	Raw []byte
}

// Answer is a message that begins with a status line.
type Answer struct {
	Message
	Version string
	Status  int
	Reason  string
}

// tape reads messages leniently, and remembers what it read and what was wrong.
type tape struct {
	br        *bufio.Reader
	raw       bytes.Buffer
	anomalies []string
}

func (t *tape) odd(format string, args ...any) {
	t.anomalies = append(t.anomalies, fmt.Sprintf(format, args...))
}

// line reads up to a line feed and gives the line without its end.
func (t *tape) line() (string, error) {
	var line []byte
	for {
		part, err := t.br.ReadSlice('\n')
		t.raw.Write(part)
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) || len(line) > maxLine {
			if len(line) > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return "", err
		}
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	} else {
		t.odd("a line ends with a bare LF: %.60q", line)
	}
	if i := bytes.IndexFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }); i >= 0 {
		t.odd("a control byte %#02x in %.60q", line[i], line)
	}
	return string(line), nil
}

// fields reads up to an empty line.
func (t *tape) fields() (list Fields, err error) {
	list = Fields{}
	for {
		line, err := t.line()
		if err != nil {
			return list, unexpected(err)
		}
		if line == "" {
			return list, nil
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			t.odd("no colon: %.60q", line)
		}
		if !isToken(name) {
			t.odd("not a name: %.60q", name)
		}
		list = append(list, Field{name, strings.Trim(value, " \t")})
	}
}

// data reads n bytes.
func (t *tape) data(n uint64) ([]byte, error) {
	var b bytes.Buffer
	if n > 1<<30 {
		return nil, fmt.Errorf("a body of %d bytes", n)
	}
	_, err := io.CopyN(&b, t.br, int64(n))
	t.raw.Write(b.Bytes())
	return b.Bytes(), unexpected(err)
}

// chunks reads a chunked body and its trailers.
func (t *tape) chunks() (body []byte, trailers Fields, err error) {
	for {
		line, err := t.line()
		if err != nil {
			return body, nil, unexpected(err)
		}
		size, _, _ := strings.Cut(line, ";")
		n, err := strconv.ParseUint(strings.TrimPrefix(strings.TrimSpace(size), "0x"), 16, 64)
		if err != nil {
			return body, nil, fmt.Errorf("read a chunk's size: %w", err)
		}
		if strings.Trim(size, "0123456789abcdefABCDEF") != "" {
			t.odd("not a chunk size: %.60q", size)
		}
		if n == 0 {
			trailers, err = t.fields()
			return body, trailers, err
		}
		part, err := t.data(n)
		body = append(body, part...)
		if err != nil {
			return body, nil, err
		}
		rest, err := t.line()
		if err != nil {
			return body, nil, unexpected(err)
		}
		if rest != "" {
			t.odd("after a chunk's data comes %.60q", rest)
		}
	}
}

// message reads what follows the first line. The framing is a function of the
// fields, which have been read when it is called.
func (t *tape) message(m *Message, framing func() (string, uint64)) (err error) {
	defer func() { m.Anomalies, m.Raw = t.anomalies, bytes.Clone(t.raw.Bytes()) }()
	if m.Fields == nil {
		if m.Fields, err = t.fields(); err != nil {
			return err
		}
	}
	var n uint64
	switch m.Framing, n = framing(); m.Framing {
	case Chunked:
		m.Body, m.Trailers, err = t.chunks()
	case Length:
		m.Body, err = t.data(n)
	case UntilEOF:
		m.Body, err = io.ReadAll(t.br)
		t.raw.Write(m.Body)
	}
	return err
}

// ReadAnswer reads an answer to a request with the method given. It reports
// io.EOF when there is none. An answer whose body is cut short is given with
// an error.
func ReadAnswer(br *bufio.Reader, method string) (Answer, error) {
	t := &tape{br: br}
	var a Answer
	line, err := t.line()
	if err != nil {
		return a, err
	}
	a.Start = line
	version, rest, _ := strings.Cut(line, " ")
	status, reason, ok := strings.Cut(rest, " ")
	a.Version, a.Reason = version, reason
	a.Status, err = strconv.Atoi(status)
	if err != nil || !ok || len(status) != 3 || version != "HTTP/1.1" && version != "HTTP/1.0" {
		return a, fmt.Errorf("not a status line: %.60q", line)
	}
	return a, t.message(&a.Message, func() (string, uint64) {
		lengths := a.Fields.Values("Content-Length")
		switch {
		case method == "HEAD" || a.Status < 200 || a.Status == 204 || a.Status == 304:
			return None, 0
		case a.Fields.Has("Transfer-Encoding", "chunked"):
			if len(lengths) > 0 {
				t.odd("both lengths")
			}
			return Chunked, 0
		case len(lengths) > 0:
			n, err := strconv.ParseUint(lengths[0], 10, 63)
			if err != nil || len(lengths) > 1 {
				t.odd("Content-Length: %.60q", lengths)
			}
			return Length, n
		default:
			return UntilEOF, 0
		}
	})
}

// unexpected is err, where an end was not expected.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// lower is s in lower case, as HTTP knows it: of ASCII letters alone.
func lower(s string) string {
	return string(bytes.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			r += 'a' - 'A'
		}
		return r
	}, []byte(s)))
}

// isToken reports whether s is a token of RFC 9110 section 5.6.2.
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}
