package replayer_test

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

// keyedBy gives n requests whose keys go round.
func keyedBy(n int, keys ...string) []request {
	list := make([]request, n)
	for i := range list {
		list[i].key = keys[i%len(keys)]
		list[i].headers = "x-client: " + list[i].key + "\r\n"
	}
	return list
}

// watcher keeps an eye on how requests of each key come in.
type watcher struct {
	keyOf map[string]string // by id
	mu    sync.Mutex
	now   map[string]int      // in flight, by key
	most  map[string]int      // at the same time
	order map[string][]string // ids as they arrived, by key
}

func newWatcher(ids []uuid.UUID, requests []request) *watcher {
	w := &watcher{keyOf: make(map[string]string), now: make(map[string]int), most: make(map[string]int), order: make(map[string][]string)}
	for i, id := range ids {
		w.keyOf[id.String()] = requests[i].key
	}
	return w
}

// watch wraps an API's answer.
func (w *watcher) watch(answer func(http.ResponseWriter, *http.Request, int)) func(http.ResponseWriter, *http.Request, int) {
	return func(rw http.ResponseWriter, r *http.Request, nth int) {
		id := r.Header.Get(capture.HTTPHeaderID)
		key := w.keyOf[id]
		w.mu.Lock()
		w.now[key]++
		w.most[key] = max(w.most[key], w.now[key])
		w.order[key] = append(w.order[key], id)
		w.mu.Unlock()
		if answer != nil {
			answer(rw, r, nth)
		}
		w.mu.Lock()
		w.now[key]--
		w.mu.Unlock()
	}
}

func of(ids []uuid.UUID, requests []request, key string) []string {
	var s []string
	for i, id := range ids {
		if requests[i].key == key {
			s = append(s, id.String())
		}
	}
	return s
}

func TestWithinAKeyOneAtATimeInTheOrderOfIDs(t *testing.T) {
	for name, orderBy := range map[string]string{"captured": "", "by a header": "header:X-Client"} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			requests := keyedBy(300, "a", "b", "c", "")
			if orderBy != "" {
				for i := range requests {
					requests[i].key, requests[i].headers = "", "X-CLIENT:  "+requests[i].key+"\t\r\n"
				}
			}
			ids := b.capture(t, requests...)
			requests = keyedBy(300, "a", "b", "c", "")
			w := newWatcher(ids, requests)
			a := newAPI(t, w.watch(nil))
			o := options(t, b, a.URL)
			o.Concurrency, o.OrderBy = 16, orderBy
			report := mustRun(t, o)
			require.Equal(t, ledger.RunCounts{Sent: 300, Processed: 300}, report.RunCounts)
			require.Nil(t, report.Blocked)
			for _, key := range []string{"a", "b", "c"} {
				require.Equal(t, of(ids, requests, key), w.order[key], key)
				require.Equal(t, 1, w.most[key], key)
			}
			require.Empty(t, o.Clock.(*clock).slept(), "one pass was enough")
		})
	}
}

// TestASlowKeyHoldsUpNothingElse, over several pages: its first request is
// answered when everything else has been.
func TestASlowKeyHoldsUpNothingElse(t *testing.T) {
	b := newBooks(t)
	requests := append(many(20), request{key: "slow"}) // by then more than one is in flight
	requests = append(requests, keyedBy(700, "a", "", "b", "slow")...)
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	rest := make(chan struct{})
	var mu sync.Mutex
	left := 20 + 3*175
	a := newAPI(t, w.watch(func(_ http.ResponseWriter, r *http.Request, _ int) {
		if w.keyOf[r.Header.Get(capture.HTTPHeaderID)] == "slow" {
			<-rest
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if left--; left == 0 {
			close(rest)
		}
	}))
	o := options(t, b, a.URL)
	report := mustRun(t, o)
	require.Equal(t, int64(len(ids)), report.Processed)
	require.True(t, slices.Equal(of(ids, requests, "slow"), w.order["slow"]))
}

// TestAsManyKeysAtATimeAsThereArePlaces waits until all places are taken.
func TestAsManyKeysAtATimeAsThereArePlaces(t *testing.T) {
	const places = 48
	b := newBooks(t)
	var requests []request
	for i := range 400 {
		requests = append(requests, request{key: fmt.Sprint(i)})
	}
	b.capture(t, requests...)
	var mu sync.Mutex
	now, arrived := 0, 0
	full := make(chan struct{})
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		mu.Lock()
		now++
		arrived++
		if now == places {
			close(full)
		}
		wait := arrived > 100
		mu.Unlock()
		if wait { // the window is wide by then
			<-full
		}
		mu.Lock()
		now--
		mu.Unlock()
	})
	o := options(t, b, a.URL)
	o.Concurrency = places
	report := mustRun(t, o)
	require.Equal(t, int64(400), report.Processed)
	require.Equal(t, replayer.Pace{Concurrency: places, Reached: places}, report.Pace)
}

// TestAKeyWithMoreThanAPassHolds is gone through all the same, in its order.
func TestAKeyWithMoreThanAPassHolds(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(1300, "long")
	requests = append(requests, keyedBy(10, "", "short")...)
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(nil))
	o := options(t, b, a.URL)
	report := mustRun(t, o)
	require.Equal(t, int64(1310), report.Processed)
	require.True(t, slices.Equal(of(ids, requests, "long"), w.order["long"]))
	require.Equal(t, of(ids, requests, "short"), w.order["short"])
	require.Empty(t, o.Clock.(*clock).slept())
}

// failing answers 500 to certain requests as long as it is told to.
func failing(ids ...uuid.UUID) func(http.ResponseWriter, *http.Request, int) {
	return func(w http.ResponseWriter, r *http.Request, _ int) {
		for _, id := range ids {
			if r.Header.Get(capture.HTTPHeaderID) == id.String() {
				w.WriteHeader(http.StatusInternalServerError)
			}
		}
	}
}

func TestAKeyStopsAtItsFirstOpenHead(t *testing.T) {
	for name, orderBy := range map[string]string{"captured": "", "by a header": "header:x-client"} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			requests := keyedBy(60, "a", "b", "")
			ids := b.capture(t, requests...)
			head, held := ids[3], ids[31] // the second of a, the eleventh of b
			require.NoError(t, b.Quarantine(t.Context(), held, capture.QuarantineKiller, "it is one"))
			w := newWatcher(ids, requests)
			a := newAPI(t, w.watch(failing(head)))
			o := options(t, b, a.URL)
			o.OrderBy = orderBy
			report := mustRun(t, o)
			require.Equal(t, replayer.ExitReplayable, report.ExitCode)
			require.Equal(t, ledger.RunCounts{Sent: 34, Processed: 31, Failed: 3}, report.RunCounts)
			require.Equal(t, &replayer.Blocked{Requests: 27, Keys: 2, Heads: []replayer.BlockedKey{
				{Route: "default", Key: "a", Head: head, State: capture.StateFailed, Reason: "status 500", Behind: 18},
				{Route: "default", Key: "b", Head: held, State: capture.StateQuarantined, Reason: "killer: it is one", Behind: 9},
			}}, report.Blocked)
			require.Equal(t, of(ids, requests, "b")[:10], w.order["b"])
			require.Equal(t, append(of(ids, requests, "a")[:2], head.String(), head.String()), w.order["a"])
			require.Len(t, w.order[""], 20)
			var text strings.Builder
			require.NoError(t, report.WriteText(&text))
			require.Contains(t, text.String(), "blocked    27 requests behind 2 keys\n  a of route default: 18 behind "+head.String()+"  failed  status 500\n")
			require.Contains(t, text.String(), "discard --id")

			// The plan of another run tells what would be blocked: b alone, for a's
			// head would be sent.
			by := replayer.PlanOptions{OrderBy: orderBy}
			plan, err := replayer.MakePlan(t.Context(), b, o.Selection.Filter, by)
			require.NoError(t, err)
			require.Equal(t, int64(28), plan.Requests)
			require.Equal(t, &replayer.Blocked{Requests: 9, Keys: 1, Heads: report.Blocked.Heads[1:]}, plan.Blocked)
			by.PastBlocked = true
			plan, err = replayer.MakePlan(t.Context(), b, o.Selection.Filter, by)
			require.NoError(t, err)
			require.Nil(t, plan.Blocked)

			// An operator gives the first head up.
			_, err = b.Discard(t.Context(), ledger.Filter{IDs: []uuid.UUID{head}}, "broken", 1)
			require.NoError(t, err)
			report = mustRun(t, o)
			require.Equal(t, int64(18), report.Processed)
			require.Equal(t, int64(1), report.Blocked.Keys)
			// And goes past the other.
			o.PastBlocked = true
			report = mustRun(t, o)
			require.Equal(t, int64(9), report.Processed)
			require.Nil(t, report.Blocked)
			require.Equal(t, replayer.ExitHeld, report.ExitCode)
			require.Equal(t, 1, w.most["a"])
			require.Equal(t, 1, w.most["b"])
		})
	}
}

func TestPastBlockedGoesOnInOrder(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(40, "a")
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(failing(ids[5], ids[20])))
	o := options(t, b, a.URL)
	o.PastBlocked, o.MaxAttempts = true, 1
	report := mustRun(t, o)
	require.Equal(t, ledger.RunCounts{Sent: 40, Processed: 38, Failed: 2}, report.RunCounts)
	require.Equal(t, of(ids, requests, "a"), w.order["a"])
	require.Equal(t, 1, w.most["a"])
}

func TestOrderNone(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(4, "a")
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(failing(ids[0])))
	o := options(t, b, a.URL)
	o.OrderBy, o.MaxAttempts = replayer.OrderNone, 1
	report := mustRun(t, o)
	require.Equal(t, ledger.RunCounts{Sent: 4, Processed: 3, Failed: 1}, report.RunCounts)
	require.Nil(t, report.Blocked)
}

func TestAHeadThatComesThroughLaterLetsItsKeyGoOn(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(20, "a", "")
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(func(rw http.ResponseWriter, r *http.Request, nth int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[4].String() && nth == 1 {
			rw.WriteHeader(http.StatusInternalServerError)
		}
	}))
	o := options(t, b, a.URL)
	report := mustRun(t, o)
	require.Equal(t, ledger.RunCounts{Sent: 21, Processed: 20, Failed: 1}, report.RunCounts)
	want := of(ids, requests, "a")
	require.Equal(t, append(append([]string{}, want[:3]...), want[2:]...), w.order["a"])
	require.Equal(t, []time.Duration{time.Second}, o.Clock.(*clock).slept())
}

// TestAKeyWaitsForTheCompletionEvent of each of its requests.
func TestAKeyWaitsForTheCompletionEvent(t *testing.T) {
	event := newPolicy()
	event.By, event.Grace = capture.ByEvent, time.Hour
	b := newBooks(t)
	requests := keyedBy(6, "a")
	for i := range requests {
		requests[i].policy, requests[i].status = event, 500
	}
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(nil))
	o := options(t, b, a.URL)
	report := mustRun(t, o)
	require.Equal(t, int64(1), report.Sent)
	require.Equal(t, int64(5), report.Blocked.Requests)
	require.Equal(t, capture.StateReceived, report.Blocked.Heads[0].State)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)

	c := newClock()
	completed := 0
	c.each = func(time.Duration) {
		// The events come while the run waits.
		arrived := a.seen()
		if completed < len(arrived) {
			one := arrived[completed]
			completed++
			_, err := b.Complete(context.Background(), []ledger.Fact{{Event: &capture.Event{
				ID: uuid.MustParse(one.id), Outcome: capture.Processed, Attempt: 2,
			}}})
			must(err)
		}
	}
	o.Clock, o.Wait = c, time.Minute
	report = mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, texts(ids), w.order["a"])
	require.Equal(t, map[capture.State]int64{capture.StateProcessed: 6}, b.states(t))
}

// TestOrderHoldsOverTwoRuns that have different ways to select the same.
func TestOrderHoldsOverTwoRuns(t *testing.T) {
	for name, orderBy := range map[string]string{"captured": "", "by a header": "header:X-Client"} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			other := openBooks(t, b.path)
			requests := keyedBy(200, "a", "b", "c", "d", "")
			ids := b.capture(t, requests...)
			w := newWatcher(ids, requests)
			a := newAPI(t, w.watch(nil))
			one := options(t, b, a.URL)
			two := options(t, other, a.URL)
			two.Selection.Filter = ledger.Filter{States: []capture.State{capture.StateFailed, capture.StateReceived}}
			var both sync.WaitGroup
			for _, o := range []replayer.Options{one, two} {
				o.OrderBy, o.Wait, o.Clock = orderBy, time.Minute, replayer.SystemClock{}
				both.Go(func() {
					_, err := replayer.Run(t.Context(), o)
					must(err)
				})
			}
			both.Wait()
			require.Equal(t, map[capture.State]int64{capture.StateProcessed: 200}, b.states(t))
			for id, n := range a.times() {
				require.Equal(t, 1, n, id)
			}
			for _, key := range []string{"a", "b", "c", "d"} {
				require.Equal(t, 1, w.most[key], key)
				require.Equal(t, of(ids, requests, key), w.order[key], key)
			}
		})
	}
}

// TestOrderAtAnotherTarget: what is processed there is nobody's to know but the
// run's, and a head that fails there keeps its key closed.
func TestOrderAtAnotherTarget(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(30, "a", "b", "")
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(failing(ids[3])))
	o := options(t, b, a.URL)
	o.Target = a.URL
	report := mustRun(t, o)
	require.Equal(t, ledger.RunCounts{Sent: 24, Processed: 21, Failed: 3}, report.RunCounts)
	require.Equal(t, of(ids, requests, "b"), w.order["b"])
	require.Equal(t, of(ids, requests, "a")[:2], w.order["a"][:2])
	require.Equal(t, int64(8), report.Blocked.Requests)
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 30}, b.states(t))
}

func TestALimitCountsRequestsOfKeys(t *testing.T) {
	b := newBooks(t)
	requests := keyedBy(100, "a", "b")
	ids := b.capture(t, requests...)
	w := newWatcher(ids, requests)
	a := newAPI(t, w.watch(nil))
	o := options(t, b, a.URL)
	o.Limit = 9
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, int64(9), report.Processed)
	for _, key := range []string{"a", "b"} {
		require.Equal(t, of(ids, requests, key)[:len(w.order[key])], w.order[key])
	}
}
