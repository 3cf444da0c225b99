package exchange

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// The parts of HAR 1.2 that are written, and those of them that are read. Names
// that begin with an underscore are extensions, as HAR wants them.

type harPair struct {
	Name     string `json:"name"`
	Value    string `json:"value"`
	Encoding string `json:"_encoding,omitempty"` // latin1: each character of the value is a byte
}

type harRequest struct {
	Method      string    `json:"method"`
	URL         string    `json:"url"`
	HTTPVersion string    `json:"httpVersion"`
	Cookies     []harPair `json:"cookies"`
	Headers     []harPair `json:"headers"`
	QueryString []harPair `json:"queryString"`
	HeadersSize int       `json:"headersSize"`
	BodySize    int64     `json:"bodySize"`
	Target      string    `json:"_target,omitempty"`   // where the URL cannot hold it; each character is a byte
	Trailers    []harPair `json:"_trailers,omitempty"` // of the chunked coding
}

type harResponse struct {
	Status      int        `json:"status"`
	StatusText  string     `json:"statusText"`
	HTTPVersion string     `json:"httpVersion"`
	Cookies     []harPair  `json:"cookies"`
	Headers     []harPair  `json:"headers"`
	Content     harContent `json:"content"`
	RedirectURL string     `json:"redirectURL"`
	HeadersSize int        `json:"headersSize"`
	BodySize    int        `json:"bodySize"`
	Error       string     `json:"_error,omitempty"`
}

type harContent struct {
	Size     int    `json:"size"`
	MimeType string `json:"mimeType"`
}

type harTimings struct {
	Send    float64 `json:"send"`
	Wait    float64 `json:"wait"`
	Receive float64 `json:"receive"`
}

// harHoldfast is what only the ledger knows of an entry.
type harHoldfast struct {
	ID       uuid.UUID     `json:"id"`
	Route    string        `json:"route"`
	State    capture.State `json:"state"`
	Attempts int           `json:"attempts"`
	// Payload is "whole", or why it is not there.
	Payload  string   `json:"payload"`
	Redacted []string `json:"redacted,omitempty"`
	// Digest is that of the content as it stands in the file. An entry that nobody
	// has changed keeps its id when it is imported.
	Digest string `json:"digest,omitempty"`
}

type har struct {
	w     *bufio.Writer
	begun bool
}

// NewHAR writes an HTTP archive, version 1.2. version is that of the program.
//
// A body that is not UTF-8, or is large, is in postData.text in base64, and
// postData._encoding says so: HAR 1.2 has no place for it. A value or target that
// is not UTF-8 has a character for each byte, and _encoding latin1. Trailers are
// in _trailers. What is missing is said in the entry's comment and in
// _holdfast.payload. The answer is the status of the last attempt; a status of 0
// with _error means that there was none.
func NewHAR(w io.Writer, version string) (Writer, error) {
	h := &har{w: bufio.NewWriterSize(w, 64<<10)}
	_, err := h.w.WriteString(`{"log":{"version":"1.2","creator":{"name":"holdfast replayer","version":` + string(encode(version)) +
		`},"comment":"requests as they were captured; of answers only the status is known","entries":[`)
	return h, err
}

func (h *har) Write(_ context.Context, item *Item) (Result, error) {
	r := Result{}
	about := harHoldfast{
		ID: item.ID, Route: item.Route, State: item.State, Attempts: item.Attempts, Payload: "whole", Redacted: item.Redacted,
	}
	if item.Missing != "" {
		r, about.Payload = Result{Marked, item.Missing}, item.Missing
	} else {
		kept, host, _ := forwarded(item.all())
		content := item.request
		content.fields, content.host = kept, host
		about.Digest = content.digest(item.Body.digest())
	}
	if h.begun {
		_ = h.w.WriteByte(',') // an error comes back with the flush, here and below
	}
	h.begun = true
	took := 0.0
	if a := item.Last; !a.EndedAt.IsZero() {
		took = max(float64(a.EndedAt.Sub(a.StartedAt).Microseconds())/1000, 0)
	}
	h.put("\n"+`{"startedDateTime":`, item.ReceivedAt.UTC().Format(time.RFC3339Nano), `,"time":`, took, `,"request":`)
	if err := h.request(item); err != nil {
		return Result{}, err
	}
	h.put(`,"response":`, responseOf(item.Last), `,"cache":{},"timings":`, harTimings{Wait: took}, `,"comment":`, r.Reason, `,"_holdfast":`, about)
	_, err := h.w.WriteString("}")
	return r, err
}

func (h *har) Close() error {
	_, err := h.w.WriteString("\n]}}\n")
	return errors.Join(err, h.w.Flush())
}

// put writes text and, at every odd place, a value as JSON.
func (h *har) put(parts ...any) { vegeta{h.w}.put(parts...) }

func (h *har) request(item *Item) error {
	base := item.Base
	if base == "" {
		base = "http://" + item.host
	}
	q := harRequest{
		Method: item.method, URL: base + item.target, HTTPVersion: "HTTP/1.1",
		Cookies: []harPair{}, Headers: []harPair{}, QueryString: queryOf(item.target), HeadersSize: -1, BodySize: item.Size,
	}
	if !keeps(base, item.target) {
		q.URL, q.Target = base+escape(item.target), latin1(item.target)
	}
	body := item.Body.Size() > 0
	mime := ""
	if item.Missing == "" {
		q.BodySize = item.Body.Size()
		for _, f := range item.all() {
			q.Headers = append(q.Headers, pair(f.Name, f.Value))
			switch {
			case strings.EqualFold(f.Name, "Content-Type"):
				mime = f.Value
			case strings.EqualFold(f.Name, "Cookie") && f.Value != Redacted:
				q.Cookies = append(q.Cookies, cookiesOf(f.Value)...)
			}
		}
		for _, f := range item.trailer {
			q.Trailers = append(q.Trailers, pair(f.Name, f.Value))
		}
	}
	data := encode(q)
	if !body {
		_, err := h.w.Write(data)
		return err
	}
	_, _ = h.w.Write(bytes.TrimSuffix(data, []byte("}")))
	if text, ok := item.Body.Bytes(); ok && utf8.Valid(text) {
		h.put(`,"postData":{"mimeType":`, strings.ToValidUTF8(mime, "\uFFFD"), `,"params":[],"text":`, string(text), `}}`)
		return nil
	}
	h.put(`,"postData":{"mimeType":`, strings.ToValidUTF8(mime, "\uFFFD"), `,"params":[],"_encoding":"base64","text":"`)
	if err := base64To(h.w, item.Body.Reader()); err != nil {
		return err
	}
	_, err := h.w.WriteString(`"}}`)
	return err
}

func responseOf(a capture.Attempt) harResponse {
	r := harResponse{
		Status: a.Status, StatusText: http.StatusText(a.Status), HTTPVersion: "HTTP/1.1",
		Cookies: []harPair{}, Headers: []harPair{}, Content: harContent{MimeType: "x-unknown"}, HeadersSize: -1, BodySize: -1,
		Error: a.Error,
	}
	if a.Status == 0 && a.Error == "" {
		r.Error = "no answer is known"
	}
	return r
}

func pair(name, value string) harPair {
	if utf8.ValidString(value) {
		return harPair{Name: name, Value: value}
	}
	return harPair{Name: name, Value: latin1(value), Encoding: "latin1"}
}

// latin1 makes a character of each byte.
func latin1(s string) string {
	runes := make([]rune, len(s))
	for i := range len(s) {
		runes[i] = rune(s[i])
	}
	return string(runes)
}

// bytesOf is the inverse of latin1; ok is false where a character is no byte.
func bytesOf(s string) (_ string, ok bool) {
	b := make([]byte, 0, len(s))
	for _, r := range s {
		if r > 0xff {
			return "", false
		}
		b = append(b, byte(r))
	}
	return string(b), true
}

const hexDigits = "0123456789ABCDEF"

// escape makes a path and query that every reader of URLs takes.
func escape(target string) string {
	if target == "*" {
		return "/"
	}
	var b strings.Builder
	for i := range len(target) {
		switch c := target[i]; {
		case c == '%' && (i+2 >= len(target) || !isHex(target[i+1]) || !isHex(target[i+2])), c <= 0x20, c >= 0x7f, strings.IndexByte("\"<>\\^`{|}#[]", c) >= 0:
			b.WriteString(string([]byte{'%', hexDigits[c>>4], hexDigits[c&15]}))
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f'
}

func queryOf(target string) []harPair {
	list := []harPair{}
	_, query, _ := strings.Cut(target, "?")
	for one := range strings.SplitSeq(query, "&") {
		if one == "" {
			continue
		}
		name, value, _ := strings.Cut(one, "=")
		list = append(list, harPair{Name: decoded(name), Value: decoded(value)})
	}
	return list
}

func decoded(s string) string {
	if plain, err := url.QueryUnescape(s); err == nil {
		s = plain
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

func cookiesOf(value string) []harPair {
	var list []harPair
	for one := range strings.SplitSeq(value, ";") {
		if name, v, ok := strings.Cut(strings.TrimSpace(one), "="); ok {
			list = append(list, pair(strings.ToValidUTF8(name, "\uFFFD"), v))
		}
	}
	return list
}
