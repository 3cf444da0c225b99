package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// version of the forms in this file. A reader refuses a newer one.
const version = 1

// Header is a NATS message's header block: values by name.
type Header = map[string][]string

// Message is what travels in a stream, without the technology that carries it.
type Message struct {
	Subject string
	ID      string // value of HeaderID, empty on completions
	Capture string // value of HeaderCapture, empty on completions
	Data    []byte
}

// AppendEnvelope appends the message without its data to dst: a spool record
// is the envelope followed by the data, which may so be handed over in parts.
func (m Message) AppendEnvelope(dst []byte) []byte {
	dst = append(dst, version)
	for _, s := range [...]string{m.Subject, m.ID, m.Capture} {
		dst = binary.AppendUvarint(dst, uint64(len(s)))
		dst = append(dst, s...)
	}
	return dst
}

// ParseRecord takes a spool record apart. Data of the result aliases record.
func ParseRecord(record []byte) (Message, error) {
	if len(record) == 0 {
		return Message{}, fmt.Errorf("spool record: %w: empty", ErrMalformed)
	}
	if record[0] > version {
		return Message{}, fmt.Errorf("spool record: %w: %d, known is %d", ErrNewerVersion, record[0], version)
	}
	rest := record[1:]
	var fields [3]string
	for i := range fields {
		n, used := binary.Uvarint(rest)
		if used <= 0 || n > uint64(len(rest)-used) {
			return Message{}, fmt.Errorf("spool record: %w: envelope is cut short", ErrMalformed)
		}
		fields[i] = string(rest[used : used+int(n)])
		rest = rest[used+int(n):]
	}
	return Message{Subject: fields[0], ID: fields[1], Capture: fields[2], Data: rest}, nil
}

// Request is a capture: one request as a client sent it, and what its route
// had decided about it.
type Request struct {
	ID         uuid.UUID
	Route      string
	Ingress    string
	ReceivedAt time.Time // when the body had come whole, by the ingress's clock
	Policy     Policy
	OrderKey   string // empty: no order asked for

	// Head is the request's head as HTTP/1.1: request line with the target in
	// origin form, header fields, empty line. Framing is that of Body: Content-Length,
	// or none for a request without body that had none; or Transfer-Encoding:
	// chunked for a request with a trailer section.
	Head []byte
	// Body is the whole body as it follows the head, or nil when it travels as
	// Chunks. With Transfer-Encoding: chunked it is in that coding, trailer section
	// included.
	Body []byte
	// Size is the body's length in bytes, in both cases.
	Size int64
	// Chunks is how many chunks the body came in, 0 when it is inline; SHA256
	// is then the hex digest of the whole body.
	Chunks int
	SHA256 string
}

// Method and Target are read from the head's request line.
func (r *Request) Method() string { m, _, _ := requestLine(r.Head); return m }

// Target is the request target in origin form, as the client sent it. It may
// hold any byte but space, CR and LF.
func (r *Request) Target() string { _, t, _ := requestLine(r.Head); return t }

// Chunk is a part of a body above the inline limit.
type Chunk struct {
	ID      uuid.UUID
	Route   string
	Ingress string
	Number  int // from 0, in the order of the body
	Data    []byte
}

// Abandon says that no head will come for the chunks of this id: the client
// broke off, or the ingress was killed before it had read the body.
type Abandon struct {
	ID      uuid.UUID
	Route   string
	Ingress string
}

// Captured is one message of the requests stream: exactly one field is set.
type Captured struct {
	Request *Request
	Chunk   *Chunk
	Abandon *Abandon
}

// ID is the id of the request that the message belongs to.
func (c Captured) ID() uuid.UUID {
	switch {
	case c.Request != nil:
		return c.Request.ID
	case c.Chunk != nil:
		return c.Chunk.ID
	case c.Abandon != nil:
		return c.Abandon.ID
	}
	return uuid.Nil
}

const (
	kindRequest = "request"
	kindChunk   = "chunk"
	kindAbandon = "abandon"
)

// Message is the request's capture without its data, which is Head followed by
// Body.
func (r *Request) Message() Message {
	b := make([]byte, 0, 256)
	b = append(b, "v=1; kind=request; at="...)
	b = r.ReceivedAt.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, "; ingress="...)
	b = append(b, r.Ingress...)
	b = append(b, "; size="...)
	b = strconv.AppendInt(b, r.Size, 10)
	if r.Chunks > 0 {
		b = append(b, "; chunks="...)
		b = strconv.AppendInt(b, int64(r.Chunks), 10)
		b = append(b, "; sha256="...)
		b = append(b, r.SHA256...)
	}
	if r.OrderKey != "" {
		b = append(b, "; key="...)
		b = append(b, url.QueryEscape(r.OrderKey)...)
	}
	b = append(b, "; "...)
	b = r.Policy.appendTo(b)
	return Message{Subject: RequestSubject(r.Route, r.Method()), ID: r.ID.String(), Capture: string(b)}
}

// Message is the chunk without its data. method is the request's.
func (c *Chunk) Message(method string) Message {
	return Message{
		Subject: RequestSubject(c.Route, method),
		ID:      c.ID.String(),
		Capture: "v=1; kind=chunk; ingress=" + c.Ingress + "; n=" + strconv.Itoa(c.Number),
	}
}

// Message is the whole abandon record; it has no data.
func (a *Abandon) Message(method string) Message {
	return Message{
		Subject: RequestSubject(a.Route, method),
		ID:      a.ID.String(),
		Capture: "v=1; kind=abandon; ingress=" + a.Ingress,
	}
}

// Decoder decodes messages of the requests stream. It remembers the policies
// it has met, of which there are as many as routes and releases. It is not safe
// for concurrent use.
type Decoder struct {
	policies map[string]Policy
}

// maxPolicies bounds the decoder's memory against a sender of ever new ones.
const maxPolicies = 1024

// Decode reads one message of the requests stream. Slices of the result alias
// data. Errors wrap [ErrMalformed] or [ErrNewerVersion].
func (d *Decoder) Decode(subject string, header Header, data []byte) (Captured, error) {
	c, err := d.decode(subject, header, data)
	if err != nil {
		return Captured{}, fmt.Errorf("decode capture: %w", err)
	}
	return c, nil
}

func (d *Decoder) decode(subject string, header Header, data []byte) (Captured, error) {
	id, err := uuid.Parse(first(header, HeaderID))
	if err != nil {
		return Captured{}, fmt.Errorf("%w: %s: %w", ErrMalformed, HeaderID, err)
	}
	route := RouteOfSubject(subject)
	if !ValidRoute(route) {
		return Captured{}, fmt.Errorf("%w: no route in subject %q", ErrMalformed, subject)
	}
	p, err := parseParams(first(header, HeaderCapture))
	if err != nil {
		return Captured{}, err
	}
	if !ValidIngress(p.ingress) {
		return Captured{}, fmt.Errorf("%w: ingress %q", ErrMalformed, p.ingress)
	}
	switch p.kind {
	case kindChunk:
		if p.number < 0 || len(data) == 0 {
			return Captured{}, fmt.Errorf("%w: chunk %d of %d bytes", ErrMalformed, p.number, len(data))
		}
		return Captured{Chunk: &Chunk{ID: id, Route: route, Ingress: p.ingress, Number: p.number, Data: data}}, nil
	case kindAbandon:
		return Captured{Abandon: &Abandon{ID: id, Route: route, Ingress: p.ingress}}, nil
	case kindRequest:
		r, err := d.request(p, data)
		if err != nil {
			return Captured{}, err
		}
		r.ID, r.Route = id, route
		return Captured{Request: r}, nil
	default:
		return Captured{}, fmt.Errorf("%w: kind %q is not one of request, chunk, abandon", ErrMalformed, p.kind)
	}
}

func (d *Decoder) request(p params, data []byte) (*Request, error) {
	policy, err := d.policy(p.policy)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if p.at.IsZero() {
		return nil, fmt.Errorf("%w: no time of receipt", ErrMalformed)
	}
	head, body, err := SplitHead(data)
	if err != nil {
		return nil, err
	}
	r := &Request{
		Ingress: p.ingress, ReceivedAt: p.at, Policy: policy, OrderKey: p.key,
		Head: head, Size: p.size, Chunks: p.chunks, SHA256: p.sha256,
	}
	switch {
	case r.Chunks == 0 && int64(len(body)) != r.Size:
		return nil, fmt.Errorf("%w: body has %d bytes, %d announced", ErrMalformed, len(body), r.Size)
	case r.Chunks == 0:
		r.Body = body
	case r.Chunks < 0 || len(body) != 0 || len(r.SHA256) != 64:
		return nil, fmt.Errorf("%w: %d chunks, sha256 %q, and %d bytes of body beside them", ErrMalformed, r.Chunks, r.SHA256, len(body))
	}
	return r, nil
}

func (d *Decoder) policy(s string) (Policy, error) {
	if p, ok := d.policies[s]; ok {
		return p, nil
	}
	p, err := ParsePolicy(s)
	if err != nil {
		return Policy{}, err
	}
	if d.policies == nil || len(d.policies) >= maxPolicies {
		d.policies = make(map[string]Policy)
	}
	d.policies[s] = p
	return p, nil
}

// params is what stands in HeaderCapture.
type params struct {
	kind, ingress, key, sha256, policy string
	at                                 time.Time
	size                               int64
	chunks, number                     int
}

func parseParams(s string) (params, error) {
	p := params{number: -1}
	v := 0
	var bad error
	eachParam(s, func(name, value string) {
		var err error
		switch name {
		case "v":
			v, err = strconv.Atoi(value)
		case "kind":
			p.kind = value
		case "ingress":
			p.ingress = value
		case "at":
			p.at, err = time.Parse(time.RFC3339Nano, value)
		case "size":
			p.size, err = strconv.ParseInt(value, 10, 64)
		case "chunks":
			p.chunks, err = strconv.Atoi(value)
		case "n":
			p.number, err = strconv.Atoi(value)
		case "sha256":
			p.sha256 = value
		case "key":
			p.key, err = url.QueryUnescape(value)
		}
		if err != nil && bad == nil {
			bad = fmt.Errorf("%w: %s: %s=%q", ErrMalformed, HeaderCapture, name, value)
		}
	})
	switch {
	case bad != nil:
		return params{}, bad
	case v > version:
		return params{}, fmt.Errorf("%w: %d, known is %d", ErrNewerVersion, v, version)
	case v < 1:
		return params{}, fmt.Errorf("%w: %s has no version", ErrMalformed, HeaderCapture)
	case p.size < 0:
		return params{}, fmt.Errorf("%w: size %d", ErrMalformed, p.size)
	}
	// The policy's parameters come last, so that they can be remembered whole.
	if i := strings.Index(s, "; by="); i >= 0 {
		p.policy = s[i+2:]
	}
	return p, nil
}

// SplitHead splits an HTTP/1.1 request message into its head, empty line
// included, and the rest. It checks the request line only: what a client sent
// was checked when it was captured. Both results alias data.
func SplitHead(data []byte) (head, body []byte, err error) {
	if _, _, ok := requestLine(data); !ok {
		return nil, nil, fmt.Errorf("%w: no HTTP/1.1 request line", ErrMalformed)
	}
	// Lines end in CRLF (RFC 9112 section 2.2); the head ends at the first
	// empty one.
	for at := 0; ; {
		i := indexCRLF(data[at:])
		if i < 0 {
			return nil, nil, fmt.Errorf("%w: head has no end", ErrMalformed)
		}
		if i == 0 {
			return data[: at+2 : at+2], data[at+2:], nil
		}
		at += i + 2
	}
}

func indexCRLF(b []byte) int { return bytes.Index(b, []byte("\r\n")) }

// requestLine parses "METHOD SP target SP HTTP/1.1 CRLF".
func requestLine(head []byte) (method, target string, ok bool) {
	end := indexCRLF(head)
	if end < 0 {
		return "", "", false
	}
	line, ok := strings.CutSuffix(string(head[:end]), " HTTP/1.1")
	if !ok {
		return "", "", false
	}
	method, target, ok = strings.Cut(line, " ")
	if !ok || method == "" || target == "" || strings.Contains(target, " ") {
		return "", "", false
	}
	return method, target, true
}

func first(h Header, name string) string {
	if values := h[name]; len(values) > 0 {
		return values[0]
	}
	return ""
}
