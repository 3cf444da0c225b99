package completion_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

const token = "a-token"

// acker enforces the contract of POST /v1/completions: bearer token, an array
// of well-formed events, all or nothing, 400 that names the item, 413. What it
// took stands in durable, in order.
type acker struct {
	*httptest.Server
	mu      sync.Mutex
	changed chan struct{} // closed and renewed at every request
	durable []completion.Event
	posts   [][]completion.Event // every body that was well-formed JSON, refused or not
	times   []time.Time          // when each of the posts came
	// answer, when set, is asked first, with the number of the request from 1;
	// true says that it has answered.
	answer   func(n int, w http.ResponseWriter, events []completion.Event) bool
	maxBytes int
	poison   map[string]bool // ids that are refused although well-formed
	nameless bool            // 400 does not name the item
	token    string
}

func newAcker(t testing.TB) *acker {
	a := &acker{changed: make(chan struct{}), maxBytes: 1 << 20, token: token}
	a.Server = httptest.NewServer(a)
	t.Cleanup(a.Close)
	return a
}

func (a *acker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	a.mu.Lock()
	defer a.mu.Unlock()
	defer func() { close(a.changed); a.changed = make(chan struct{}) }()
	switch {
	case err != nil:
		return
	case r.Method != http.MethodPost || r.URL.Path != "/v1/completions":
		problem(w, http.StatusNotFound, "no such resource", nil)
		return
	case r.Header.Get("Content-Type") != "application/json":
		problem(w, http.StatusUnsupportedMediaType, "not JSON", nil)
		return
	case r.Header.Get("Authorization") != "Bearer "+a.token:
		problem(w, http.StatusUnauthorized, "wrong token", nil)
		return
	}
	var events []completion.Event
	if err := json.Unmarshal(body, &events); err != nil {
		problem(w, http.StatusBadRequest, err.Error(), nil)
		return
	}
	a.posts = append(a.posts, events)
	a.times = append(a.times, time.Now())
	if a.answer != nil && a.answer(len(a.posts), w, events) {
		return
	}
	if len(body) > a.maxBytes {
		problem(w, http.StatusRequestEntityTooLarge, "too large", nil)
		return
	}
	for i, e := range events {
		if reason := malformed(e); reason != "" || a.poison[e.ID] {
			index := &i
			if a.nameless {
				index = nil
			}
			problem(w, http.StatusBadRequest, fmt.Sprintf("event %d: %s", i, reason), index)
			return
		}
	}
	a.durable = append(a.durable, events...)
	w.WriteHeader(http.StatusAccepted)
}

func malformed(e completion.Event) string {
	switch {
	case len(e.ID) != 36:
		return "id"
	case e.Outcome != "processed" && e.Outcome != "failed":
		return "outcome"
	case e.Attempt < 1:
		return "attempt"
	case len(e.Detail) > 8<<10:
		return "detail"
	}
	return ""
}

func problem(w http.ResponseWriter, status int, detail string, index *int) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"status": status, "detail": detail, "item": index})
}

// wait returns when ok is true of the acker's state, which it may read.
func (a *acker) wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second) // far above what any test needs
	for {
		a.mu.Lock()
		met, changed := ok(), a.changed
		a.mu.Unlock()
		if met {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

// held returns a copy of what is durable.
func (a *acker) held() []completion.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]completion.Event(nil), a.durable...)
}

// id returns the nth UUID.
func id(n int) string { return fmt.Sprintf("01890000-0000-7000-8000-%012d", n) }

func processed(n int) completion.Event {
	return completion.Event{ID: id(n), Outcome: completion.Processed, Attempt: 1}
}

// TestMain fails when a goroutine of the client outlives the tests.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		deadline := time.Now().Add(5 * time.Second)
		for stack := leaked(); stack != ""; stack = leaked() {
			if time.Now().After(deadline) {
				fmt.Fprintf(os.Stderr, "goroutines are left:\n%s\n", stack)
				code = 1
				break
			}
			runtime.Gosched()
		}
	}
	os.Exit(code)
}

// leaked returns the stacks of goroutines that the client started: its own,
// and the ones of its connections.
func leaked() string {
	buf := make([]byte, 1<<20)
	stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	var left []string
	for _, s := range stacks {
		if strings.Contains(s, "completion.(*Client)") || strings.Contains(s, "net/http.(*persistConn)") {
			left = append(left, s)
		}
	}
	return strings.Join(left, "\n\n")
}
