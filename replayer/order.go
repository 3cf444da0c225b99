package replayer

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// OrderNone is the value of Options.OrderBy that switches order off.
const OrderNone = "none"

const orderHeader = "header:"

// order says by which key requests keep their order, as [Options.OrderBy] does.
type order string

func (o order) header() string { return strings.TrimPrefix(string(o), orderHeader) }

func (o order) given() bool { return strings.HasPrefix(string(o), orderHeader) }

func (o order) ledger() ledger.Order {
	switch {
	case o == OrderNone:
		return ledger.OrderNone
	case o.given():
		return ledger.OrderGiven
	}
	return ledger.OrderCaptured
}

// keyOf gives the value of a request's key, empty where it has none.
func (o order) keyOf(ctx context.Context, source payloads, q *ledger.Request) (string, error) {
	switch {
	case o == OrderNone:
		return "", nil
	case !o.given():
		return q.OrderKey, nil
	}
	head, body, err := source.Payload(ctx, q.ID)
	if errors.Is(err, ledger.ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read ordering key: %w", err)
	}
	_ = body.Close() // nothing of it was read
	return headerKey(head, o.header()), nil
}

// maxKey is how long a key may be; what is longer counts by its digest, so that
// a page of keys has a bound.
const maxKey = 256

// headerKey gives the values of a header in a stored head, as the ingress joins
// those of the key that it captures.
func headerKey(head []byte, name string) string {
	var values []string
	_, rest, _ := bytes.Cut(head, []byte("\r\n"))
	for len(rest) > 0 {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		if field, value, ok := bytes.Cut(line, []byte(":")); ok && strings.EqualFold(string(field), name) {
			values = append(values, strings.Trim(string(value), " \t"))
		}
	}
	key := strings.Join(values, ",")
	if len(key) > maxKey {
		sum := sha256.Sum256([]byte(key))
		return "sha256:" + hex.EncodeToString(sum[:])
	}
	return key
}

// orderKey names a key: its route is part of it.
type orderKey struct{ route, value string }

func (k orderKey) none() bool { return k.value == "" }

// keyOf gives the key of a request.
func (r *runner) keyOf(ctx context.Context, q *ledger.Request) (orderKey, error) {
	var value string
	err := retry(ctx, r.Clock, func() (err error) {
		value, err = r.order.keyOf(ctx, r.Ledger, q)
		return err
	})
	return orderKey{route: q.Route, value: value}, err
}

// unbounded is given to Select as the number of attempts where requests that
// have none left are to be seen: they keep their key closed.
const unbounded = math.MaxInt32

// selected is how many attempts a request may have had to be selected. Of a run
// to another target nobody but the run knows what is open there.
func (r *runner) selectable() int {
	if r.Target != "" && r.order != OrderNone {
		return unbounded
	}
	return r.MaxAttempts + r.spare
}

// block is a key that goes no further in this pass.
type block struct {
	head   uuid.UUID
	behind int64
}

// keyed is a key of which a request is about to be sent, in flight, or sent and
// not yet judged.
type keyed struct {
	waiting []*item // in order
	// wall is what comes after waiting and cannot be sent; all that follows is
	// behind it.
	wall *block
}

// holder goes through what is open beside a run, in the order of ids: by keys
// that are read from the requests nobody but the run can say what is behind
// what.
type holder struct {
	l      lister
	filter ledger.Filter
	page   []ledger.Request
	cursor string
	begun  bool
}

func newHolder(l lister, f ledger.Filter) *holder {
	return &holder{l: l, filter: ledger.Filter{
		Routes: f.Routes, States: []capture.State{capture.StateReceived, capture.StateFailed, capture.StateQuarantined},
	}}
}

// upTo gives what is open up to the given id, or all that is left with uuid.Max.
func (h *holder) upTo(ctx context.Context, last uuid.UUID) ([]ledger.Request, error) {
	var found []ledger.Request
	for {
		for i, q := range h.page {
			if bytes.Compare(q.ID[:], last[:]) > 0 {
				h.page = h.page[i:]
				return found, nil
			}
			found = append(found, q)
		}
		h.page = nil
		if h.begun && h.cursor == "" {
			return found, nil
		}
		page, err := h.l.List(ctx, h.filter, h.cursor, 1000)
		if err != nil {
			return nil, fmt.Errorf("list what is open: %w", err)
		}
		h.page, h.cursor, h.begun = page.Requests, page.Next, true
	}
}

// Blocked says what does not go on because an earlier request of its key is open.
type Blocked struct {
	Requests int64 `json:"requests"` // behind
	Keys     int64 `json:"keys"`
	// Heads are the first of those keys, by the ids of what they wait for, at most
	// [MaxHeads].
	Heads []BlockedKey `json:"heads,omitempty"`
}

// BlockedKey is a key that does not go on.
type BlockedKey struct {
	Route  string        `json:"route"`
	Key    string        `json:"key"`    // what is not printable ASCII is percent-encoded
	Head   uuid.UUID     `json:"head"`   // the request that the others wait for
	State  capture.State `json:"state"`  // of the head
	Reason string        `json:"reason"` // of its state
	Behind int64         `json:"behind"` // requests that wait for it
}

// MaxHeads bounds [Blocked.Heads].
const MaxHeads = 10

// getter reads one request.
type getter interface {
	Get(ctx context.Context, id uuid.UUID) (ledger.Detail, error)
}

// describeBlocks makes the report of blocked keys. A head that was closed
// meanwhile is shown as it is now.
func describeBlocks(ctx context.Context, l getter, blocks map[orderKey]*block) (*Blocked, error) {
	b := &Blocked{}
	var keys []orderKey
	for k, one := range blocks {
		if one.behind > 0 {
			b.Requests += one.behind
			keys = append(keys, k)
		}
	}
	if b.Keys = int64(len(keys)); b.Keys == 0 {
		return nil, nil
	}
	slices.SortFunc(keys, func(x, y orderKey) int {
		hx, hy := blocks[x].head, blocks[y].head
		return cmp.Or(bytes.Compare(hx[:], hy[:]), cmp.Compare(x.value, y.value))
	})
	for _, k := range keys[:min(len(keys), MaxHeads)] {
		head := BlockedKey{Route: k.route, Key: printable(k.value), Head: blocks[k].head, Behind: blocks[k].behind}
		d, err := l.Get(ctx, head.Head)
		if err != nil && !errors.Is(err, ledger.ErrNotFound) {
			return nil, fmt.Errorf("read head: %w", err)
		}
		head.State, head.Reason = d.State, whyOpen(&d)
		b.Heads = append(b.Heads, head)
	}
	return b, nil
}

// whyOpen says why a request is not closed, for people.
func whyOpen(d *ledger.Detail) string {
	switch d.State {
	case capture.StateQuarantined:
		for _, q := range slices.Backward(d.Facts.Quarantines) {
			if q.ReleasedAt.IsZero() {
				return printable(q.Reason + ": " + q.Detail)
			}
		}
	case capture.StateReceived:
		if !d.Replayable {
			return "no verdict yet; it may be sent after " + stamp(d.GraceEnd)
		}
	}
	if d.Status == 0 && d.Error == "" {
		return ""
	}
	return reason(d.Status, d.Error)
}

// lines writes blocked keys for people.
func (b *Blocked) lines() string {
	if b == nil {
		return ""
	}
	var text strings.Builder
	fmt.Fprintf(&text, "blocked    %d requests behind %d keys\n", b.Requests, b.Keys)
	for _, h := range b.Heads {
		fmt.Fprintf(&text, "  %s of route %s: %d behind %s  %s  %s\n", h.Key, printable(h.Route), h.Behind, h.Head, h.State, h.Reason)
	}
	return text.String()
}
