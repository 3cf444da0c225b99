package exchange

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

type harReader struct {
	dec    *json.Decoder
	number int
	state  int // before the entries, in them, after the end
}

const (
	harBefore = iota
	harInside
	harAfter
)

// NewHARReader reads an HTTP archive, one entry at a time. It takes what HAR 1.2
// says and what tools do beyond it: a byte order mark, base64 in postData by
// encoding or _encoding, form parameters without a text, pseudo-fields of HTTP/2,
// which are passed over. Answers are not read.
//
// An entry is refused when its body is not there, or has another length than its
// Content-Length or bodySize: browsers leave out files and change bytes that are
// not text.
func NewHARReader(r io.Reader) Reader { return &harReader{dec: json.NewDecoder(skipBOM(r))} }

func skipBOM(r io.Reader) io.Reader {
	var first [3]byte
	n, err := io.ReadFull(r, first[:])
	if n == 3 && first == [3]byte{0xef, 0xbb, 0xbf} {
		return r
	}
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return io.MultiReader(bytes.NewReader(first[:n]), failing{err})
	}
	return io.MultiReader(bytes.NewReader(first[:n]), r)
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

func (h *harReader) Next() (Entry, error) {
	if h.state == harBefore {
		if err := h.begin(); err != nil {
			return Entry{}, fmt.Errorf("it is no HAR file: %w", err)
		}
		h.state = harInside
	}
	if h.state == harAfter {
		return Entry{}, io.EOF
	}
	if !h.dec.More() {
		h.state = harAfter
		return Entry{}, h.end()
	}
	h.number++
	var raw json.RawMessage
	if err := h.dec.Decode(&raw); err != nil {
		return Entry{}, fmt.Errorf("it breaks off in item %d: %w", h.number, noEOF(err))
	}
	e, reason := entryOf(raw)
	if reason != "" {
		return Entry{}, &ItemError{Number: h.number, Reason: reason}
	}
	e.Number = h.number
	return e, nil
}

// begin reads up to the first entry.
func (h *harReader) begin() error {
	if err := h.expect('{'); err != nil {
		return err
	}
	if err := h.find("log"); err != nil {
		return err
	}
	if err := h.expect('{'); err != nil {
		return err
	}
	if err := h.find("entries"); err != nil {
		return err
	}
	return h.expect('[')
}

func (h *harReader) expect(want json.Delim) error {
	t, err := h.dec.Token()
	if err != nil {
		return noEOF(err)
	}
	if t != want {
		return fmt.Errorf("%v where %v was expected", t, want)
	}
	return nil
}

// find passes over names and values up to the value of the name.
func (h *harReader) find(name string) error {
	for h.dec.More() {
		t, err := h.dec.Token()
		if err != nil {
			return noEOF(err)
		}
		if t == name {
			return nil
		}
		var passed json.RawMessage
		if err := h.dec.Decode(&passed); err != nil {
			return noEOF(err)
		}
	}
	return fmt.Errorf("it has no %s", name)
}

// end reads what follows the entries: a file that breaks off there is not whole.
func (h *harReader) end() error {
	for depth := 3; depth > 0; {
		t, err := h.dec.Token()
		if err != nil {
			return fmt.Errorf("it breaks off after item %d: %w", h.number, noEOF(err))
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			depth++
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
	return io.EOF
}

// noEOF keeps an early end from being taken for the end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

type harEntry struct {
	Started string `json:"startedDateTime"`
	Request *struct {
		Method   string       `json:"method"`
		URL      string       `json:"url"`
		Headers  []harPair    `json:"headers"`
		BodySize *float64     `json:"bodySize"`
		PostData *harPostData `json:"postData"`
		Target   string       `json:"_target"`
		Trailers []harPair    `json:"_trailers"`
	} `json:"request"`
	Holdfast *struct {
		ID      string `json:"id"`
		Payload string `json:"payload"`
		Digest  string `json:"digest"`
	} `json:"_holdfast"`
}

type harPostData struct {
	MimeType string  `json:"mimeType"`
	Text     *string `json:"text"`
	Params   []struct {
		Name     string `json:"name"`
		Value    string `json:"value"`
		FileName string `json:"fileName"`
	} `json:"params"`
	Encoding  string `json:"encoding"`
	Encoding2 string `json:"_encoding"`
}

// entryOf reads an entry, or says why it cannot be taken.
func entryOf(raw []byte) (e Entry, reason string) {
	if !utf8.Valid(raw) {
		return e, "it holds bytes that are not UTF-8"
	}
	var in harEntry
	if err := json.Unmarshal(raw, &in); err != nil {
		return e, "it is no entry of a HAR file: " + err.Error()
	}
	if in.Request == nil {
		return e, "it has no request"
	}
	if in.Holdfast != nil {
		if p := in.Holdfast.Payload; p != "" && p != "whole" {
			return e, "it was not whole when it was exported: " + p
		}
		e.ID, _ = uuid.Parse(in.Holdfast.ID) // one that cannot be read is none
		e.Digest = in.Holdfast.Digest
	}
	var ok bool
	if e.At, ok = timeOf(in.Started); !ok {
		return e, "its startedDateTime is not a time"
	}
	q := in.Request
	e.Method = q.Method
	if e.Host, e.Target, reason = splitURL(q.URL); reason != "" {
		return e, reason
	}
	if q.Target != "" {
		if e.Target, ok = bytesOf(q.Target); !ok {
			return e, "its _target has characters that are no bytes"
		}
	}
	if e.Fields, reason = fieldsOf(q.Headers); reason != "" {
		return e, reason
	}
	if e.Trailer, reason = fieldsOf(q.Trailers); reason != "" {
		return e, reason
	}
	announced := int64(-1)
	if q.BodySize != nil && *q.BodySize > 0 {
		announced = int64(*q.BodySize)
	}
	if text := e.Fields.Get("Content-Length"); text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			return e, "its Content-Length is not a number"
		}
		announced = n
	}
	e.Framed = e.Fields.Has("Content-Length") || e.Fields.Has("Transfer-Encoding")
	if e.Body, reason = bodyOf(q.PostData, announced); reason != "" {
		return e, reason
	}
	return e, ""
}

func timeOf(s string) (time.Time, bool) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999Z0700"} {
		if at, err := time.Parse(layout, s); err == nil {
			return at, true
		}
	}
	return time.Time{}, false
}

// splitURL takes scheme, authority and fragment off, and leaves the rest as it is.
func splitURL(s string) (host, target, reason string) {
	scheme, rest, ok := strings.Cut(s, "://")
	switch {
	case ok && (wire.Equal(scheme, "ws") || wire.Equal(scheme, "wss")):
		return "", "", "it is a WebSocket"
	case !ok || !wire.Equal(scheme, "http") && !wire.Equal(scheme, "https"):
		return "", "", "its URL is not an http URL"
	}
	rest, _, _ = strings.Cut(rest, "#")
	i := strings.IndexAny(rest, "/?")
	if i < 0 {
		i = len(rest)
	}
	host, target = rest[:i], rest[i:]
	host = host[strings.LastIndexByte(host, '@')+1:]
	if !strings.HasPrefix(target, "/") {
		target = "/" + target
	}
	return host, target, ""
}

func fieldsOf(pairs []harPair) (fields wire.Fields, reason string) {
	for _, p := range pairs {
		if strings.HasPrefix(p.Name, ":") {
			continue // HTTP/2's words for method, target and host
		}
		value, ok := p.Value, true
		if p.Encoding == "latin1" {
			value, ok = bytesOf(value)
		}
		switch {
		case !wire.IsToken(p.Name):
			return nil, fmt.Sprintf("%q is not the name of a field", p.Name)
		case !ok || p.Encoding != "" && p.Encoding != "latin1":
			return nil, "the _encoding of its field " + p.Name + " is not known"
		case !wire.IsValue(value):
			return nil, "its field " + p.Name + " holds a line break or another control character"
		}
		fields = fields.Add(p.Name, strings.Trim(value, " \t"))
	}
	return fields, ""
}

// bodyOf gives the body. announced is its length, -1 where nobody tells it.
func bodyOf(p *harPostData, announced int64) (body []byte, reason string) {
	switch {
	case p == nil:
	case p.Text == nil || *p.Text == "" && len(p.Params) > 0:
		if body, reason = formOf(p); reason != "" {
			return nil, reason
		}
	case p.Encoding == "base64" || p.Encoding2 == "base64":
		var err error
		if body, err = base64.StdEncoding.DecodeString(*p.Text); err != nil {
			return nil, "its body is not base64: " + err.Error()
		}
	case p.Encoding != "" || p.Encoding2 != "":
		return nil, "the encoding of its body is not known; base64 is"
	default:
		body = []byte(*p.Text)
	}
	switch {
	case announced > 0 && len(body) == 0:
		return nil, fmt.Sprintf("its body of %d bytes is not in the file", announced)
	case announced >= 0 && int64(len(body)) != announced:
		return nil, fmt.Sprintf("its body has %d bytes, and had %d: it was cut, or changed by what wrote the file", len(body), announced)
	case announced < 0 && bytes.Contains(body, []byte("\uFFFD")):
		return nil, "its body holds the mark of bytes that were lost (U+FFFD), and nothing tells its length"
	}
	return body, ""
}

// formOf makes the body of a form whose text was left out.
func formOf(p *harPostData) (body []byte, reason string) {
	if len(p.Params) == 0 {
		return nil, ""
	}
	if mime, _, _ := strings.Cut(p.MimeType, ";"); !strings.EqualFold(strings.TrimSpace(mime), "application/x-www-form-urlencoded") {
		return nil, "its body is not in the file: only its parameters are"
	}
	for i, one := range p.Params {
		if one.FileName != "" {
			return nil, "its body is not in the file: only the name of a file is"
		}
		if i > 0 {
			body = append(body, '&')
		}
		body = append(body, url.QueryEscape(one.Name)+"="+url.QueryEscape(one.Value)...)
	}
	return body, ""
}
