package replayer

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// lister lists requests.
type lister interface {
	List(ctx context.Context, f ledger.Filter, cursor string, limit int) (ledger.Page, error)
}

// each calls f for every request that the filter selects, in the order of ids.
func each(ctx context.Context, l lister, filter ledger.Filter, f func(ledger.Request)) error {
	cursor := ""
	for {
		page, err := l.List(ctx, filter, cursor, 1000)
		if err != nil {
			return fmt.Errorf("list requests: %w", err)
		}
		for _, q := range page.Requests {
			f(q)
		}
		if cursor = page.Next; cursor == "" {
			return nil
		}
	}
}

// Plan is what a run would send, as it stands now.
type Plan struct {
	Filter   ledger.Filter           `json:"filter"`
	Limit    int                     `json:"limit,omitempty"`
	Requests int64                   `json:"requests"` // would be sent
	Bytes    int64                   `json:"bytes"`    // of their bodies
	Routes   map[string]int64        `json:"routes"`
	States   map[capture.State]int64 `json:"states"`
	Statuses map[string]int64        `json:"statuses"` // "none" where there was no answer
	Oldest   time.Time               `json:"oldest,omitzero"`
	Newest   time.Time               `json:"newest,omitzero"`
	// What matches and would not be sent.
	Waiting        int64 `json:"waiting"` // in their grace
	Quarantined    int64 `json:"quarantined"`
	PayloadExpired int64 `json:"payload_expired"`
	// Unrouted counts those whose route is gone, by route.
	Unrouted map[string]int64 `json:"unrouted,omitempty"`
	// Blocked are those of Requests that wait for one of their key which a run
	// would not send.
	Blocked *Blocked `json:"blocked,omitempty"`
	// Seconds is how long it takes at the given rate, 0 without one.
	Seconds float64  `json:"estimate_seconds,omitempty"`
	Sample  []Sample `json:"sample"` // the first ones
}

// Sample is one request of a plan.
type Sample struct {
	ID         uuid.UUID     `json:"id"`
	ReceivedAt time.Time     `json:"received_at"`
	Method     string        `json:"method"`
	Target     string        `json:"target"` // what is not printable ASCII is percent-encoded
	State      capture.State `json:"state"`
	Status     int           `json:"status,omitempty"`
	Error      string        `json:"error,omitempty"`
	Attempts   int           `json:"attempts"`
}

// sampleSize is how many requests a plan shows.
const sampleSize = 10

// PlanOptions say how a run would send. The zero value is its default.
type PlanOptions struct {
	Known       func(route string) bool // whether there is such a route; nil: all are known
	Limit       int
	Rate        float64
	OrderBy     string // as Options.OrderBy
	PastBlocked bool
	OtherTarget bool // where nothing is known of what is open
}

// planLedger is what a plan reads.
type planLedger interface {
	lister
	payloads
	getter
}

// MakePlan counts what a run with this filter would send. It reads only, and
// walks all that is open or asked for; what is open twice where there are
// ordering keys.
func MakePlan(ctx context.Context, l planLedger, filter ledger.Filter, o PlanOptions) (Plan, error) {
	p := Plan{
		Filter: filter, Limit: o.Limit,
		Routes: make(map[string]int64), States: make(map[capture.State]int64), Statuses: make(map[string]int64),
		Sample: []Sample{}, Unrouted: make(map[string]int64),
	}
	by := order(o.OrderBy)
	sends := (*ledger.Filter).Sendable
	if o.OtherTarget {
		sends = (*ledger.Filter).Testable
	}
	var ordered []planned
	var failed error
	// What waits and what is quarantined matches all but the state. The listing
	// decides about statuses, for it knows more of them than it gives.
	wide, narrow := filter, filter
	wide.Replayable, narrow.Statuses = false, ""
	wide.States = []capture.State{capture.StateReceived, capture.StateFailed, capture.StateQuarantined}
	switch {
	case len(filter.States) > 0:
		wide.States = append(slices.Clone(filter.States), capture.StateQuarantined)
	case !filter.Replayable:
		wide.States = append(wide.States, capture.StateRejected)
		narrow.States = sendable
	}
	err := each(ctx, l, wide, func(q ledger.Request) {
		then := q
		then.Replayable, then.PayloadExpired = true, false
		switch {
		case q.State == capture.StateQuarantined:
			p.Quarantined++
		case !sends(&narrow, &then, 0):
		case q.PayloadExpired:
			p.PayloadExpired++
		case !sends(&narrow, &q, 0):
			p.Waiting++
		case o.Known != nil && !o.Known(q.Route):
			p.Unrouted[q.Route]++
		case o.Limit > 0 && p.Requests >= int64(o.Limit):
		default:
			p.add(q)
			value, err := by.keyOf(ctx, l, &q)
			if failed = cmp.Or(failed, err); value != "" {
				ordered = append(ordered, planned{id: q.ID, key: orderKey{route: q.Route, value: value}})
			}
		}
	})
	if err = cmp.Or(err, failed); err != nil {
		return Plan{}, err
	}
	if len(ordered) > 0 && !o.PastBlocked && !o.OtherTarget {
		if err := p.block(ctx, l, by, ordered); err != nil {
			return Plan{}, err
		}
	}
	if o.Rate > 0 {
		p.Seconds = float64(p.Requests) / o.Rate
	}
	return p, nil
}

// planned is a request with a key that would be sent.
type planned struct {
	id  uuid.UUID
	key orderKey
}

// block finds out what would not go on.
func (p *Plan) block(ctx context.Context, l planLedger, by order, ordered []planned) error {
	blocks := make(map[orderKey]*block)
	for _, one := range ordered {
		blocks[one.key] = nil
	}
	open := newHolder(l, p.Filter)
	for _, one := range ordered {
		earlier, err := open.upTo(ctx, one.id)
		if err != nil {
			return err
		}
		for i := range earlier {
			q := &earlier[i]
			if q.ID == one.id {
				continue
			}
			value, err := by.keyOf(ctx, l, q)
			if err != nil {
				return err
			}
			key := orderKey{route: q.Route, value: value}
			if b, asked := blocks[key]; asked && b == nil {
				blocks[key] = &block{head: q.ID}
			}
		}
		if b := blocks[one.key]; b != nil {
			b.behind++
		}
	}
	maps.DeleteFunc(blocks, func(_ orderKey, b *block) bool { return b == nil })
	var err error
	p.Blocked, err = describeBlocks(ctx, l, blocks)
	return err
}

func (p *Plan) add(q ledger.Request) {
	p.Requests++
	p.Bytes += q.Size
	p.Routes[q.Route]++
	p.States[q.State]++
	p.Statuses[statusName(q.Status)]++
	if p.Oldest.IsZero() || q.ReceivedAt.Before(p.Oldest) {
		p.Oldest = q.ReceivedAt
	}
	if q.ReceivedAt.After(p.Newest) {
		p.Newest = q.ReceivedAt
	}
	if len(p.Sample) < sampleSize {
		p.Sample = append(p.Sample, Sample{
			ID: q.ID, ReceivedAt: q.ReceivedAt, Method: q.Method, Target: printable(q.Target),
			State: q.State, Status: q.Status, Error: q.Error, Attempts: q.Attempts,
		})
	}
}

func statusName(status int) string {
	if status == 0 {
		return "none"
	}
	return fmt.Sprint(status)
}

// WriteText writes the plan for people.
func (p *Plan) WriteText(w io.Writer, concurrency int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "selection  %s\n", describe(p.Filter))
	fmt.Fprintf(&b, "to send    %d requests, %s of bodies\n", p.Requests, humanize.IBytes(uint64(max(p.Bytes, 0))))
	if p.Limit > 0 {
		fmt.Fprintf(&b, "limit      %d\n", p.Limit)
	}
	if p.Requests > 0 {
		fmt.Fprintf(&b, "received   %s to %s\n", stamp(p.Oldest), stamp(p.Newest))
		fmt.Fprintf(&b, "routes     %s\n", counts(p.Routes))
		fmt.Fprintf(&b, "states     %s\n", counts(p.States))
		fmt.Fprintf(&b, "statuses   %s\n", counts(p.Statuses))
		if p.Seconds > 0 {
			fmt.Fprintf(&b, "takes      %s at the given rate\n", time.Duration(p.Seconds*float64(time.Second)).Round(time.Second))
		} else {
			fmt.Fprintf(&b, "takes      as long as the API needs, %d at a time (no --rate)\n", concurrency)
		}
	}
	fmt.Fprintf(&b, "not sent   waiting %d, quarantined %d, payload gone %d\n", p.Waiting, p.Quarantined, p.PayloadExpired)
	b.WriteString(p.Blocked.lines())
	if len(p.Unrouted) > 0 {
		fmt.Fprintf(&b, "no route   %s (would be left alone)\n", printable(counts(p.Unrouted)))
	}
	if len(p.Sample) > 0 {
		b.WriteString("\n")
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "ID\tRECEIVED\tMETHOD\tTARGET\tSTATE\tSTATUS\tATTEMPTS")
		for _, s := range p.Sample {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", s.ID, stamp(s.ReceivedAt), printable(s.Method), s.Target, s.State, statusName(s.Status), s.Attempts)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// counts writes "a 3, b 1", the most frequent first.
func counts[K ~string](m map[K]int64) string {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b K) int {
		if m[a] != m[b] {
			return int(m[b] - m[a])
		}
		return strings.Compare(string(a), string(b))
	})
	parts := make([]string, len(keys))
	for i, k := range keys {
		parts[i] = fmt.Sprintf("%s %d", k, m[k])
	}
	return strings.Join(parts, ", ")
}
