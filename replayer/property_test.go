package replayer_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/replayer"
)

// mortal is a ledger as a process sees it that dies at a certain step: from then
// on no call goes through. The step itself may have, unseen.
type mortal struct {
	*books
	mu    sync.Mutex
	left  int  // steps; negative: for ever
	after bool // it dies when the step is done
}

var errDead = errors.New("the process is dead")

func (m *mortal) step(do func() error) error {
	m.mu.Lock()
	if m.left == 0 {
		m.mu.Unlock()
		return errDead
	}
	m.left--
	dying := m.left == 0
	m.mu.Unlock()
	if dying && !m.after {
		return errDead
	}
	err := do()
	if dying {
		return errDead
	}
	return err
}

func (m *mortal) OpenRun(ctx context.Context, f ledger.Filter, target, owner string, lease time.Duration) (r ledger.Run, l ledger.RunLease, picked bool, err error) {
	err = m.step(func() (err error) { r, l, picked, err = m.books.OpenRun(ctx, f, target, owner, lease); return err })
	return r, l, picked, err
}

func (m *mortal) EndRun(ctx context.Context, l ledger.RunLease, report []byte) error {
	return m.step(func() error { return m.books.EndRun(ctx, l, report) })
}

func (m *mortal) LeaveRun(ctx context.Context, l ledger.RunLease) error {
	return m.step(func() error { return m.books.LeaveRun(ctx, l) })
}

func (m *mortal) Select(ctx context.Context, l ledger.RunLease, most int, after uuid.UUID, limit int) (list []ledger.Candidate, err error) {
	err = m.step(func() (err error) { list, err = m.books.Select(ctx, l, most, after, limit); return err })
	return list, err
}

func (m *mortal) Begin(ctx context.Context, l ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) (list []ledger.Begun, err error) {
	err = m.step(func() (err error) { list, err = m.books.Begin(ctx, l, ids, o); return err })
	return list, err
}

func (m *mortal) End(ctx context.Context, l ledger.RunLease, results []ledger.Ended) (errs []error, err error) {
	err = m.step(func() (err error) { errs, err = m.books.End(ctx, l, results); return err })
	return errs, err
}

func (m *mortal) Quarantine(ctx context.Context, id uuid.UUID, reason, detail string) error {
	return m.step(func() error { return m.books.Quarantine(ctx, id, reason, detail) })
}

// TestOrderAndCompletionsWhateverHappens: with random keys and answers, two runs
// at once, and processes that die at any step, the API sees of each key one
// request at a time, and none while an earlier one is open; it never sees a
// request again whose completion the ledger had; and nothing without a key is
// left because of one with a key.
func TestOrderAndCompletionsWhateverHappens(t *testing.T) {
	checks := flag.Lookup("rapid.checks")
	before := checks.Value.String()
	require.NoError(t, checks.Value.Set("15")) // each opens two ledgers and makes a dozen runs
	defer func() { require.NoError(t, checks.Value.Set(before)) }()
	rapid.Check(t, func(rt *rapid.T) {
		dir := t.TempDir()
		open := func(name string) *books {
			b := &books{path: filepath.Join(dir, "ledger.db")}
			store, err := sqlite.Open(context.Background(), sqlite.Options{
				Path: b.path, Now: func() time.Time { return time.Now().Add(time.Duration(b.ahead.Load())) },
			})
			must(err)
			b.Store = store
			return b
		}
		b, other := open("one"), open("two")
		defer func() { must(errors.Join(b.Close(), other.Close())) }()

		event := newPolicy()
		event.By, event.Grace = capture.ByEvent, 30*time.Minute
		requests := make([]request, rapid.IntRange(2, 14).Draw(rt, "requests"))
		answers := make([][]int, len(requests))
		for i := range requests {
			q := &requests[i]
			q.key = rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(rt, "key")
			q.headers = "X-Client: " + q.key + "\r\n"
			q.status = 500
			if rapid.IntRange(0, 2).Draw(rt, "by event") == 0 {
				q.policy = event
				if rapid.Bool().Draw(rt, "in its grace") {
					q.status = -1
				}
			}
			// What the first attempts meet; all that follow meet 200. 0 is death, and
			// no event follows a 202.
			answers[i] = rapid.SliceOfN(rapid.SampledFrom([]int{200, 202, 500, 422, 429, 0}), 0, 3).Draw(rt, "answers")
		}
		ids := b.capture(t, requests...)
		number := make(map[string]int)
		for i, id := range ids {
			number[id.String()] = i
		}
		orderBy := rapid.SampledFrom([]string{"", "header:X-Client"}).Draw(rt, "order by")

		var mu sync.Mutex
		var broken []string
		arrived := make([]int, len(ids))
		flying := make(map[string]int)
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx := context.Background()
			i, ok := number[r.Header.Get(capture.HTTPHeaderID)]
			if !ok {
				return
			}
			key := requests[i].key
			mu.Lock()
			nth := arrived[i]
			arrived[i]++
			if flying[key]++; key != "" && flying[key] > 1 {
				broken = append(broken, fmt.Sprintf("two of key %s at a time, the second is %d", key, i))
			}
			mu.Unlock()
			for j, id := range ids {
				d, err := b.Get(ctx, id)
				must(err)
				mu.Lock()
				if i == j && d.State != capture.StateReceived {
					broken = append(broken, fmt.Sprintf("%d arrives, and is %s", i, d.State))
				}
				if key != "" && requests[j].key == key && bytes.Compare(id[:], ids[i][:]) < 0 && d.State.Open() {
					broken = append(broken, fmt.Sprintf("%d of key %s arrives while %d is %s", i, key, j, d.State))
				}
				mu.Unlock()
			}
			status := http.StatusOK
			if nth < len(answers[i]) {
				status = answers[i][nth]
			}
			if status == http.StatusOK && requests[i].policy == event {
				_, err := other.Complete(ctx, []ledger.Fact{{Event: &capture.Event{ID: ids[i], Outcome: capture.Processed, Attempt: nth + 2}}})
				must(err)
			}
			mu.Lock()
			flying[key]--
			mu.Unlock()
			if status == 0 {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(status)
		}))
		defer server.Close()
		start := func(b *books, owner string, steps int, after bool, filter ledger.Filter) replayer.Report {
			up := upstreamTo(t, server.URL)
			defer up.Close()
			report, err := replayer.Run(context.Background(), replayer.Options{
				Ledger: &mortal{books: b, left: steps, after: after}, Fence: passing{}, Upstreams: up, Owner: owner, Clock: newClock(),
				Selection: replayer.Selection{Filter: filter}, OrderBy: orderBy, MaxAttempts: 9,
			})
			if err != nil && !errors.Is(err, errDead) {
				must(err)
			}
			return report
		}
		for range rapid.IntRange(0, 4).Draw(rt, "deaths") {
			steps, after := rapid.IntRange(1, 25).Draw(rt, "steps"), rapid.Bool().Draw(rt, "after")
			two := rapid.Bool().Draw(rt, "two at once")
			otherSteps := rapid.IntRange(-1, 25).Draw(rt, "steps of the other")
			var both sync.WaitGroup
			both.Go(func() { start(b, "one", steps, after, ledger.Filter{Replayable: true}) })
			if two {
				both.Go(func() {
					start(other, "two", otherSteps, !after, ledger.Filter{States: []capture.State{capture.StateReceived, capture.StateFailed}})
				})
			}
			both.Wait()
			b.later(time.Hour) // leases and graces of the dead are over
			other.later(time.Hour)
		}
		var report replayer.Report
		for range 6 { // the first may go on with what a dead one has left, others wait for events
			report = start(b, "the last", -1, false, ledger.Filter{Replayable: true})
			b.later(time.Hour)
			other.later(time.Hour)
		}
		mu.Lock()
		defer mu.Unlock()
		require.Empty(rt, broken)
		closed := make(map[string]bool)
		for i, id := range ids {
			d, err := b.Get(context.Background(), id)
			must(err)
			key := requests[i].key
			switch {
			case d.State == capture.StateQuarantined:
				closed[key] = key != ""
			case closed[key]:
				require.Equal(rt, capture.StateFailed, d.State, "%d is behind a quarantined one", i)
			default:
				require.Contains(rt, []capture.State{capture.StateProcessed, capture.StateRejected}, d.State, "%d is left: %+v", i, report)
			}
		}
	})
}
