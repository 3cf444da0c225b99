package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Source is what is read of the ledger.
type Source interface {
	List(ctx context.Context, f ledger.Filter, cursor string, limit int) (ledger.Page, error)
	Get(ctx context.Context, id uuid.UUID) (ledger.Detail, error)
	Payload(ctx context.Context, id uuid.UUID) (head []byte, body io.ReadCloser, err error)
}

// Item is one request on its way out. It belongs to [Export], and is valid until
// the [Writer] returns.
type Item struct {
	ID         uuid.UUID
	Route      string
	State      capture.State
	ReceivedAt time.Time
	Attempts   int
	Last       capture.Attempt // that was answered, or ended without an answer; zero where none has ended
	// Base is scheme and host of the API that it is for, without a slash at the
	// end; empty where nobody knows.
	Base string
	// Missing says why head and body are not there; empty where they are.
	Missing string
	// Size is the length of the body as the ledger knows it, whether it is there
	// or not. That of one that was captured with trailers counts their coding.
	Size     int64
	Body     *Body // without the chunked coding; empty where Missing is not
	Redacted []string

	request
}

// Result is what became of one item.
type Result struct {
	Kind   ResultKind
	Reason string // of all but whole ones
}

// ResultKind is one of three.
type ResultKind int

const (
	// Whole: the tool that reads it sends what was captured.
	Whole ResultKind = iota
	// Marked: it is in the output, and says there what is not.
	Marked
	// LeftOut: it is not in the output, or as a comment only.
	LeftOut
)

// Writer writes items in one format. It is used by one goroutine.
type Writer interface {
	// Write writes one item. An error is one of writing; the output is useless
	// then.
	Write(ctx context.Context, item *Item) (Result, error)
	// Close writes what ends the output. It is called once, after the last item.
	Close() error
}

// ExportOptions say what is exported.
type ExportOptions struct {
	Source Source
	Filter ledger.Filter
	Limit  int // 0: all
	// Base gives scheme and host of a route's API, empty where it has none.
	Base func(route string) string
	// OwnHost puts the host of Base in the place of the captured Host field.
	OwnHost bool
	Secrets bool // keep the values of Authorization and Cookie
	Writer  Writer
	// Remark is called for each item that is not whole; it may be nil.
	Remark func(id uuid.UUID, r Result)
}

// Summary counts what was exported.
type Summary struct {
	Requests, Whole, Marked, LeftOut int
	// Redacted counts those of which a value was replaced. They count as whole.
	Redacted int
}

// pageSize is how many requests are listed at a time.
const pageSize = 500

// Export writes what the filter selects, in the order of ids. With an error the
// output is incomplete in an unknown way. Requests that come to match meanwhile
// may be in it or not.
func Export(ctx context.Context, o ExportOptions) (s Summary, err error) {
	body := NewBody()
	defer func() {
		if closed := body.Close(); err == nil && closed != nil {
			err = fmt.Errorf("close a temporary file: %w", closed)
		}
	}()
	cursor := ""
	for {
		page, err := o.Source.List(ctx, o.Filter, cursor, pageSize)
		if err != nil {
			return s, fmt.Errorf("list requests: %w", err)
		}
		for i := range page.Requests {
			if o.Limit > 0 && s.Requests == o.Limit {
				return s, o.Writer.Close()
			}
			if err := o.one(ctx, &page.Requests[i], body, &s); err != nil {
				return s, fmt.Errorf("export %s: %w", page.Requests[i].ID, err)
			}
		}
		if cursor = page.Next; cursor == "" {
			return s, o.Writer.Close()
		}
	}
}

func (o *ExportOptions) one(ctx context.Context, q *ledger.Request, body *Body, s *Summary) error {
	item, err := o.item(ctx, q, body)
	if err != nil {
		return err
	}
	r, err := o.Writer.Write(ctx, item)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	s.Requests++
	switch r.Kind {
	case Whole:
		s.Whole++
	case Marked:
		s.Marked++
	case LeftOut:
		s.LeftOut++
	}
	if len(item.Redacted) > 0 && r.Kind != LeftOut {
		s.Redacted++
	}
	if r.Kind != Whole && o.Remark != nil {
		o.Remark(q.ID, r)
	}
	return nil
}

func (o *ExportOptions) item(ctx context.Context, q *ledger.Request, body *Body) (*Item, error) {
	if err := body.reset(); err != nil {
		return nil, err
	}
	item := &Item{
		ID: q.ID, Route: q.Route, State: q.State, ReceivedAt: q.ReceivedAt, Attempts: q.Attempts,
		Base: o.Base(q.Route), Size: q.Size, Body: body,
		request: request{method: q.Method, target: q.Target, length: noFraming},
	}
	switch detail, err := o.Source.Get(ctx, q.ID); {
	case errors.Is(err, ledger.ErrNotFound): // it expired after it was listed
	case err != nil:
		return nil, err
	default:
		for _, a := range detail.Facts.Attempts {
			if !a.EndedAt.IsZero() {
				item.Last = a
			}
		}
		// Of several results of an attempt the ledger knows which one counts.
		item.Last.Status, item.Last.Error = detail.Status, detail.Error
	}
	head, stored, err := o.Source.Payload(ctx, q.ID)
	if errors.Is(err, ledger.ErrNotFound) {
		item.Missing = "its payload has expired"
		return item, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = stored.Close() }() // it was read only
	if err := item.read(head, stored); err != nil {
		damage, ok := damageOf(err)
		if !ok {
			return nil, fmt.Errorf("read payload: %w", err)
		}
		item.Missing = "its payload is cut: " + damage
		return item, body.reset()
	}
	if _, host, ok := strings.Cut(item.Base, "://"); ok && o.OwnHost {
		item.host = host
	}
	if !o.Secrets {
		item.redact()
	}
	return item, nil
}

// damageOf tells a payload that is not whole from a ledger that cannot be read.
func damageOf(err error) (string, bool) {
	var syntax *wire.SyntaxError
	switch {
	case errors.As(err, &syntax), errors.Is(err, wire.ErrHeadTooLarge):
		return err.Error(), true
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return "it ends too early", true
	case errors.Is(err, ledger.ErrNotFound):
		return "a part of its body is gone", true
	}
	return "", false
}

// read reads head and body as they were captured.
func (item *Item) read(head []byte, stored io.Reader) error {
	var req wire.Request
	var body wire.Body
	r := wire.NewReader(io.MultiReader(bytes.NewReader(head), stored))
	if err := wire.ReadRequest(r, &req, maxHead, maxFields); err != nil {
		return err
	}
	length, framed := req.Length, req.Fields.Has("Content-Length")
	if !framed && length == 0 && item.Size > 0 {
		length, framed = item.Size, true // by whom else than the gateway it was captured
	}
	body.Reset(r, length, maxHead, maxFields, false)
	if _, err := io.Copy(item.Body, &body); err != nil {
		return err
	}
	item.length = length
	if length == 0 && !framed {
		item.length = noFraming
	}
	item.method, item.target, item.host = req.Method, req.Target, req.Host
	item.trailer = body.Trailer
	item.fields = nil
	for _, f := range req.Fields {
		switch f.Kind {
		case wire.Host, wire.ContentLength, wire.TransferEncoding:
		default:
			item.fields = append(item.fields, f)
		}
	}
	return nil
}

func (item *Item) redact() {
	for _, list := range []wire.Fields{item.fields, item.trailer} {
		for i := range list {
			if secret(list[i].Name) {
				list[i].Value = Redacted
				item.Redacted = append(item.Redacted, list[i].Name)
			}
		}
	}
}

// uuidField is the field by which an API knows the request.
func (item *Item) uuidField() wire.Field {
	return wire.Field{Name: capture.HTTPHeaderID, Value: item.ID.String()}
}

// all gives every field in order, framing and UUID included.
func (item *Item) all() wire.Fields {
	all := wire.Fields{{Name: "Host", Value: item.host, Kind: wire.Host}}
	all = append(append(all, item.fields...), item.uuidField())
	if f, ok := item.framing(); ok {
		all = append(all, f)
	}
	return all
}
