package edge_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/e2e/harness"
)

// echoOrLarge answers a large body where one is asked for, and an echo otherwise.
func echoOrLarge(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == edge.Large {
		part := make([]byte, 64<<10)
		for range edge.LargeBytes / len(part) {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
		return
	}
	echo(w, r)
}

// echo answers with the body of the request.
func echo(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }

// vitals are a process's own figures.
type vitals struct{ goroutines, rss, connections, inflight float64 }

func readVitals(ctx context.Context, s *harness.System) (v vitals, err error) {
	for name, into := range map[string]*float64{
		"go_goroutines": &v.goroutines, "process_resident_memory_bytes": &v.rss,
		"holdfast_connections": &v.connections, "holdfast_inflight_bytes": &v.inflight,
	} {
		if *into, err = s.Metric(ctx, harness.Ingress, name); err != nil {
			return v, err
		}
	}
	return v, nil
}

// steady posts on one connection until ctx is done, and gives the number of
// requests that were answered 200.
func steady(ctx context.Context, addr string) (n int, err error) {
	c := &keptAlive{addr: addr}
	defer c.close()
	for ; ctx.Err() == nil; n++ {
		a, err := c.post(context.WithoutCancel(ctx), "/", "steady")
		if err != nil || a.Status != 200 {
			return n, fmt.Errorf("request %d: %s: %w", n, a.Start, err)
		}
	}
	if c.dials > 1 {
		return n, fmt.Errorf("%d connections for %d requests", c.dials, n)
	}
	return n, nil
}

// TestSlowClients has many clients that are slow in every way, all at once. Each
// is gone when its time is over; they hold next to nothing meanwhile, and others
// are served as ever. Afterwards the process is as it was.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	const each = 25
	url := startAPI(t, http.HandlerFunc(echoOrLarge))
	s := startSystem(t, url, "READ_HEADER_TIMEOUT=3s", "READ_BODY_TIMEOUT=3s", "WRITE_TIMEOUT=3s", "IDLE_TIMEOUT=3s")
	addr := ingressAddr(s)
	a, err := (&keptAlive{addr: addr}).post(t.Context(), "/", strings.Repeat("w", 1000))
	require.NoError(t, err)
	require.Equal(t, 200, a.Status)
	before, err := readVitals(t.Context(), s)
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var slow sync.WaitGroup
	t.Cleanup(slow.Wait)
	errs := make(chan error, each*len(edge.Burdens))
	for _, kind := range edge.Burdens {
		for range each {
			slow.Go(func() {
				lasted, err := edge.Burden(ctx, kind, addr)
				if err == nil && lasted < 500*time.Millisecond {
					err = fmt.Errorf("%s: ended after %s already", kind, lasted)
				}
				errs <- err
			})
		}
	}
	gone := make(chan struct{})
	go func() { slow.Wait(); close(gone) }()

	serving, stop := context.WithCancel(ctx)
	t.Cleanup(stop)
	type served struct {
		n   int
		err error
	}
	done := make(chan served, 1)
	go func() {
		n, err := steady(serving, addr)
		done <- served{n, err}
	}()
	var most vitals
	for all := false; !all; {
		v, err := readVitals(t.Context(), s)
		require.NoError(t, err)
		most = vitals{max(most.goroutines, v.goroutines), max(most.rss, v.rss), max(most.connections, v.connections), max(most.inflight, v.inflight)}
		timer := time.NewTimer(20 * time.Millisecond)
		select {
		case <-timer.C:
		case <-gone:
			all = true
		}
		timer.Stop()
	}
	stop()
	r := receive(t, done)
	require.NoError(t, r.err)
	require.Positive(t, r.n)
	for range cap(errs) {
		require.NoError(t, <-errs)
	}
	require.GreaterOrEqual(t, most.connections, float64(3*each), "they were there together")
	// The body that each announces is 200 KiB; what counts is what has come of it.
	require.Less(t, most.inflight, float64(each*100+10_000))
	require.Less(t, most.goroutines, before.goroutines+2*4*each)
	require.Less(t, most.rss, before.rss+128<<20)
	require.Eventually(t, func() bool {
		v, err := readVitals(t.Context(), s)
		return err == nil && v.connections == 0 && v.inflight == 0 && v.goroutines <= before.goroutines+10
	}, patience, 20*time.Millisecond, "all is as before: %+v", before)
	conns, err := s.Metric(t.Context(), harness.Ingress, "holdfast_upstream_connections")
	require.NoError(t, err)
	require.Less(t, conns, float64(10), "connections to the API that nobody reads from are given up")
	t.Logf("%d requests meanwhile; before %+v, at most %+v", r.n, before, most)
}
