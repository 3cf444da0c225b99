package e2e_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/proc"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// api is the API behind the gateway. It does with a request what the scenario
// says, and keeps a record of everything that arrives.
type api struct {
	t    *testing.T
	addr string

	mu       sync.Mutex
	server   *http.Server // nil while it is down
	served   chan struct{}
	behave   behaviour
	arrivals []arrival
	working  map[string]bool // ids that are being worked on
	overlaps []string        // ids that arrived while they were being worked on
	changed  chan struct{}   // closed and replaced at each arrival
}

// arrival is one request as the API got it.
type arrival struct {
	ID      string
	Attempt int
	Replay  string
	Method  string
	Target  string
	SHA256  string // of the body, in hex
	Header  http.Header
}

// behaviour answers a request that has arrived.
type behaviour func(w http.ResponseWriter, r *http.Request, a arrival)

// answers gives every request this status.
func answers(status int) behaviour {
	return func(w http.ResponseWriter, _ *http.Request, a arrival) {
		w.WriteHeader(status)
		if status != http.StatusNoContent {
			_, _ = fmt.Fprintf(w, "the API says %d to %s\n", status, a.ID)
		}
	}
}

var (
	works   = answers(http.StatusCreated)
	broken  = answers(http.StatusInternalServerError)
	refuses = answers(http.StatusUnprocessableEntity)
)

// resets breaks the connection without an answer.
func resets(w http.ResponseWriter, _ *http.Request, _ arrival) {
	conn := hijack(w)
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// sends writes bytes as they are, and closes the connection.
func sends(raw string) behaviour {
	return func(w http.ResponseWriter, _ *http.Request, _ arrival) {
		conn := hijack(w)
		_, _ = io.WriteString(conn, raw)
		_ = conn.Close()
	}
}

func hijack(w http.ResponseWriter) net.Conn {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	return conn
}

// hangs answers nothing until the gateway gives up, or the test lets go.
func hangs(letGo <-chan struct{}) behaviour {
	return func(w http.ResponseWriter, r *http.Request, a arrival) {
		select {
		case <-r.Context().Done():
		case <-letGo:
			works(w, r, a)
		}
	}
}

// newAPI starts an API that works.
func newAPI(t *testing.T) *api {
	addr, err := proc.FreeAddr()
	require.NoError(t, err)
	a := &api{t: t, addr: addr, behave: works, working: map[string]bool{}, changed: make(chan struct{})}
	a.up()
	t.Cleanup(a.down)
	return a
}

func (a *api) url() string { return "http://" + a.addr }

// up listens, always on the same address.
func (a *api) up() {
	l, err := net.Listen("tcp", a.addr)
	require.NoError(a.t, err)
	server := &http.Server{Handler: a}
	served := make(chan struct{})
	a.mu.Lock()
	a.server, a.served = server, served
	a.mu.Unlock()
	go func() {
		defer close(served)
		_ = server.Serve(l)
	}()
}

// down closes the listener and all connections.
func (a *api) down() {
	a.mu.Lock()
	server, served := a.server, a.served
	a.server = nil
	a.mu.Unlock()
	if server != nil {
		_ = server.Close()
		<-served
	}
}

// now changes what the API does from now on.
func (a *api) now(b behaviour) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.behave = b
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	hash := sha256.New()
	if _, err := io.Copy(hash, r.Body); err != nil {
		return // a request that did not come whole is none
	}
	got := arrival{
		ID: r.Header.Get(capture.HTTPHeaderID), Attempt: 1, Replay: r.Header.Get(capture.HTTPHeaderReplay),
		Method: r.Method, Target: r.RequestURI, SHA256: hex.EncodeToString(hash.Sum(nil)), Header: r.Header,
	}
	if n, err := strconv.Atoi(r.Header.Get(capture.HTTPHeaderAttempt)); err == nil {
		got.Attempt = n
	}
	a.mu.Lock()
	a.arrivals = append(a.arrivals, got)
	if a.working[got.ID] {
		a.overlaps = append(a.overlaps, got.ID)
	}
	a.working[got.ID] = true
	behave := a.behave
	close(a.changed)
	a.changed = make(chan struct{})
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.working, got.ID)
	}()
	behave(w, r, got)
}

// of gives the arrivals of one request, in their order.
func (a *api) of(id string) []arrival {
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []arrival
	for _, got := range a.arrivals {
		if got.ID == id {
			all = append(all, got)
		}
	}
	return all
}

// overlapping gives the ids that arrived while they were being worked on.
func (a *api) overlapping() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.overlaps)
}

// count is how many requests have arrived, repeats included.
func (a *api) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.arrivals)
}

// ids gives the different ids that have arrived.
func (a *api) ids() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	set := map[string]bool{}
	for _, got := range a.arrivals {
		set[got.ID] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// await waits until so many requests have arrived.
func (a *api) await(n int) {
	a.t.Helper()
	deadline := bound(a.t)
	for {
		a.mu.Lock()
		have, changed := len(a.arrivals), a.changed
		a.mu.Unlock()
		if have >= n {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			require.FailNow(a.t, "requests did not arrive", "%d of %d", have, n)
		}
	}
}
