package replayer

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"syscall"
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
	At       time.Time               `json:"at"` // by the ledger's clock
	Filter   ledger.Filter           `json:"filter"`
	Limit    int                     `json:"limit,omitempty"`
	Beyond   int64                   `json:"beyond,omitempty"` // match, and are more than the limit
	Requests int64                   `json:"requests"`         // would be sent
	Bytes    int64                   `json:"bytes"`            // of their bodies
	Routes   map[string]int64        `json:"routes"`
	States   map[capture.State]int64 `json:"states"`
	Statuses map[string]int64        `json:"statuses"` // "none" where there was no answer
	Keys     int64                   `json:"keys"`     // ordering keys among Requests
	Keyed    int64                   `json:"keyed"`    // of Requests that have one
	Oldest   time.Time               `json:"oldest,omitzero"`
	Newest   time.Time               `json:"newest,omitzero"`
	// What matches and would not be sent.
	Waiting        int64     `json:"waiting"`                // without verdict, in their grace
	WaitingUntil   time.Time `json:"waiting_until,omitzero"` // when the last grace is over
	Quarantined    int64     `json:"quarantined"`
	PayloadExpired int64     `json:"payload_expired"`
	// Unrouted counts those whose route is gone, by route.
	Unrouted map[string]int64 `json:"unrouted,omitempty"`
	// Blocked are those of Requests that wait for one of their key which a run
	// would not send.
	Blocked *Blocked `json:"blocked,omitempty"`
	// Suspects are those of Requests that may have killed the API.
	Suspects *Suspects `json:"suspects,omitempty"`
	// Seconds is how long it takes to send what is not blocked, at what EstimateBy
	// says: [ByRate] or [ByPace]. It is 0 where neither is known.
	Seconds    float64 `json:"estimate_seconds,omitempty"`
	EstimateBy string  `json:"estimate_by,omitempty"`
	// PastPace is how fast the last runs went, nil where there are none to go by.
	PastPace *PastPace `json:"past_pace,omitempty"`
	Sample   []Sample  `json:"sample"` // the first ones

	keys map[orderKey]struct{}
}

// What an estimate goes by.
const (
	ByRate = "rate" // the rate that was asked for
	ByPace = "pace" // that of the last runs
)

// PastPace is how fast the last runs went, whatever rate, concurrency and API
// they had.
type PastPace struct {
	PerSecond float64  `json:"per_second"` // attempts, over all of the time that the runs took
	Runs      []string `json:"runs"`       // their ids, the newest first, at most 3
}

// Suspects are requests whose last attempt looks as if the API had died of it:
// the connection broke, or the answer was 502, 503 or 504. Most of them died in
// the company of others, or of an API that was away; a run finds out which are to
// blame.
type Suspects struct {
	Requests int64 `json:"requests"`
	// First are those with the most attempts, at most [MaxHeads].
	First []Suspect `json:"first"`
}

// Suspect is a request that may have killed the API.
type Suspect struct {
	ID       uuid.UUID `json:"id"`
	Attempts int       `json:"attempts"`
	Deaths   int       `json:"deaths"` // how many of them look like one
	Status   int       `json:"status,omitempty"`
	Error    string    `json:"error,omitempty"`
}

// Sample is one request of a plan.
type Sample struct {
	ID         uuid.UUID     `json:"id"`
	ReceivedAt time.Time     `json:"received_at"`
	Method     string        `json:"method"`
	Target     string        `json:"target"` // what is not printable ASCII is percent-encoded
	Route      string        `json:"route"`
	Key        string        `json:"key,omitempty"` // as Target
	Bytes      int64         `json:"bytes"`         // of the body
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
	Now(ctx context.Context) (time.Time, error)
	Runs(ctx context.Context, cursor string, limit int) ([]ledger.Run, string, error)
}

// MakePlan counts what a run with this filter would send. It reads only, and
// walks all that is open or asked for; what is open twice where there are
// ordering keys.
func MakePlan(ctx context.Context, l planLedger, filter ledger.Filter, o PlanOptions) (Plan, error) {
	p := Plan{
		Filter: filter, Limit: o.Limit,
		Routes: make(map[string]int64), States: make(map[capture.State]int64), Statuses: make(map[string]int64),
		Sample: []Sample{}, Unrouted: make(map[string]int64), keys: make(map[orderKey]struct{}),
	}
	var err error
	if p.At, err = l.Now(ctx); err != nil {
		return Plan{}, err
	}
	suspects := &Suspects{}
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
	err = each(ctx, l, wide, func(q ledger.Request) {
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
			if q.GraceEnd.After(p.WaitingUntil) {
				p.WaitingUntil = q.GraceEnd
			}
		case o.Known != nil && !o.Known(q.Route):
			p.Unrouted[q.Route]++
		case o.Limit > 0 && p.Requests >= int64(o.Limit):
			p.Beyond++
		default:
			value, err := by.keyOf(ctx, l, &q)
			failed = cmp.Or(failed, err)
			key := orderKey{route: q.Route, value: value}
			p.add(q, key)
			if !key.none() {
				ordered = append(ordered, planned{id: q.ID, key: key})
			}
			if looksDead(q.Status, q.Error) {
				suspects.add(q)
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
	if suspects.Requests > 0 {
		if err := suspects.count(ctx, l); err != nil {
			return Plan{}, err
		}
		p.Suspects = suspects
	}
	if p.PastPace, err = pastPace(ctx, l, o.OtherTarget); err != nil {
		return Plan{}, err
	}
	p.estimate(o.Rate)
	return p, nil
}

// estimate says how long it takes.
func (p *Plan) estimate(rate float64) {
	p.EstimateBy = ByRate
	if rate == 0 && p.PastPace != nil {
		rate, p.EstimateBy = p.PastPace.PerSecond, ByPace
	}
	sent := p.Requests
	if p.Blocked != nil {
		sent -= p.Blocked.Requests
	}
	if rate == 0 || sent == 0 {
		p.EstimateBy = ""
		return
	}
	p.Seconds = float64(sent) / rate
}

// Numbers of a past pace.
const (
	// paceRuns is how many runs it is taken of, and paceLook among how many they
	// are looked for.
	paceRuns, paceLook = 3, 100
	// paceLeast is how many requests a run must have sent: a canary is over before
	// it is fast.
	paceLeast = 50
)

// pastPace gives the pace of the last runs to the APIs, or to another target.
func pastPace(ctx context.Context, l planLedger, elsewhere bool) (*PastPace, error) {
	runs, _, err := l.Runs(ctx, "", paceLook)
	if err != nil {
		return nil, fmt.Errorf("list runs: %w", err)
	}
	past := &PastPace{}
	sent, seconds := int64(0), 0.0
	for _, run := range runs {
		var r struct { // of its report
			Sent    int64   `json:"sent"`
			Seconds float64 `json:"duration_seconds"`
		}
		if (run.Target != "") != elsewhere || len(past.Runs) == paceRuns {
			continue
		}
		// One that has not ended has no report.
		if json.Unmarshal(run.Report, &r) != nil || r.Sent < paceLeast || r.Seconds <= 0 {
			continue
		}
		past.Runs = append(past.Runs, run.ID)
		sent, seconds = sent+r.Sent, seconds+r.Seconds
	}
	if len(past.Runs) == 0 {
		return nil, nil
	}
	past.PerSecond = float64(sent) / seconds
	return past, nil
}

// looksDead reports whether an attempt ended as if the API had died, going by
// what is kept of it.
func looksDead(status int, failure string) bool {
	switch status {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	if strings.HasPrefix(failure, "upstream: connect: ") {
		return false // it saw nothing
	}
	// What the errors say of which [fates] makes a broken connection.
	for _, one := range []error{io.EOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED} {
		if strings.HasSuffix(failure, one.Error()) {
			return true
		}
	}
	return false
}

func (s *Suspects) add(q ledger.Request) {
	s.Requests++
	s.First = append(s.First, Suspect{ID: q.ID, Attempts: q.Attempts, Status: q.Status, Error: q.Error})
	// They come in the order of ids, which a stable sort keeps.
	slices.SortStableFunc(s.First, func(a, b Suspect) int { return b.Attempts - a.Attempts })
	s.First = s.First[:min(len(s.First), MaxHeads)]
}

// count counts deaths.
func (s *Suspects) count(ctx context.Context, l getter) error {
	for i := range s.First {
		one := &s.First[i]
		d, err := l.Get(ctx, one.ID)
		if err != nil && !errors.Is(err, ledger.ErrNotFound) {
			return fmt.Errorf("read suspect: %w", err)
		}
		for _, a := range d.Facts.Attempts {
			if looksDead(a.Status, a.Error) {
				one.Deaths++
			}
		}
	}
	return nil
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

func (p *Plan) add(q ledger.Request, key orderKey) {
	p.Requests++
	p.Bytes += q.Size
	p.Routes[q.Route]++
	p.States[q.State]++
	p.Statuses[statusName(q.Status)]++
	if !key.none() {
		p.Keyed++
		p.keys[key] = struct{}{}
		p.Keys = int64(len(p.keys))
	}
	if p.Oldest.IsZero() || q.ReceivedAt.Before(p.Oldest) {
		p.Oldest = q.ReceivedAt
	}
	if q.ReceivedAt.After(p.Newest) {
		p.Newest = q.ReceivedAt
	}
	if len(p.Sample) < sampleSize {
		p.Sample = append(p.Sample, Sample{
			ID: q.ID, ReceivedAt: q.ReceivedAt, Method: q.Method, Target: printable(q.Target),
			Route: q.Route, Key: printable(key.value), Bytes: q.Size, State: q.State, Status: q.Status, Error: q.Error, Attempts: q.Attempts,
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
	fmt.Fprintf(&b, "to send    %s requests, %s of bodies\n", comma(p.Requests), humanize.IBytes(uint64(max(p.Bytes, 0))))
	if p.Limit > 0 {
		fmt.Fprintf(&b, "limit      %s, beyond which %s more match\n", comma(int64(p.Limit)), comma(p.Beyond))
	}
	if p.Requests > 0 {
		fmt.Fprintf(&b, "oldest     %s, %s\n", stamp(p.Oldest), humanize.RelTime(p.Oldest, p.At, "ago", "ahead"))
		fmt.Fprintf(&b, "newest     %s, %s\n", stamp(p.Newest), humanize.RelTime(p.Newest, p.At, "ago", "ahead"))
		fmt.Fprintf(&b, "routes     %s\n", counts(p.Routes))
		fmt.Fprintf(&b, "states     %s\n", counts(p.States))
		fmt.Fprintf(&b, "statuses   %s\n", counts(p.Statuses))
		fmt.Fprintf(&b, "keys       %s\n", p.keyLine())
		fmt.Fprintf(&b, "takes      %s\n", p.takes(concurrency))
	}
	fmt.Fprintf(&b, "not sent   waiting %s, quarantined %s, payload gone %s\n", comma(p.Waiting), comma(p.Quarantined), comma(p.PayloadExpired))
	if p.Waiting > 0 {
		fmt.Fprintf(&b, "           those that wait have no verdict yet, and are in their grace until %s at the latest\n", stamp(p.WaitingUntil))
	}
	b.WriteString(p.Blocked.lines())
	if len(p.Unrouted) > 0 {
		fmt.Fprintf(&b, "no route   %s (would be left alone)\n", printable(counts(p.Unrouted)))
	}
	if err := p.Suspects.write(&b); err != nil {
		return err
	}
	if len(p.Sample) > 0 {
		b.WriteString("\n")
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "ID\tRECEIVED\tMETHOD\tTARGET\tKEY\tBYTES\tSTATE\tSTATUS\tATTEMPTS")
		for _, s := range p.Sample {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%d\n", s.ID, stamp(s.ReceivedAt), printable(s.Method),
				clip(s.Target), clip(cmp.Or(s.Key, "-")), s.Bytes, s.State, statusName(s.Status), s.Attempts)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (p *Plan) keyLine() string {
	if p.Keyed == 0 {
		return "none: no order is kept"
	}
	return fmt.Sprintf("%s, of %s requests, which keep their order", comma(p.Keys), comma(p.Keyed))
}

// takes says how long it takes, and how that is known.
func (p *Plan) takes(concurrency int) string {
	past := ""
	if p.PastPace != nil {
		past = fmt.Sprintf("%.1f/s, the pace of the last runs (%s)", p.PastPace.PerSecond, strings.Join(p.PastPace.Runs, ", "))
	}
	took := "less than a second"
	if p.Seconds >= 1 {
		took = time.Duration(p.Seconds * float64(time.Second)).Round(time.Second).String()
	}
	switch {
	case p.EstimateBy == ByPace:
		return fmt.Sprintf("%s at %s", took, past)
	case p.EstimateBy == ByRate && past != "":
		return fmt.Sprintf("%s at the given rate, if the API can; compare %s", took, past)
	case p.EstimateBy == ByRate:
		return took + " at the given rate, if the API can"
	case p.Blocked != nil && p.Blocked.Requests == p.Requests:
		return "no time: all of them are blocked"
	}
	return fmt.Sprintf("as long as the API needs, %d at a time (no --rate, and no earlier run to go by)", concurrency)
}

// write writes suspects for people.
func (s *Suspects) write(w io.Writer) error {
	if s == nil {
		return nil
	}
	fmt.Fprintf(w, "suspects   %s whose last attempt may have killed the API (the connection broke, or 502, 503, 504)\n", comma(s.Requests))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, one := range s.First {
		fmt.Fprintf(t, "  %s\t%d of %d attempts\t%s\n", one.ID, one.Deaths, one.Attempts, reason(one.Status, one.Error))
	}
	return t.Flush()
}

// comma writes a number so that it can be read at a glance.
func comma(n int64) string { return humanize.Comma(n) }

// clip keeps a table as wide as a terminal.
func clip(s string) string {
	const most = 40
	if len(s) <= most {
		return s
	}
	return s[:most-3] + "..."
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
