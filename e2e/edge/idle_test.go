package edge_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/e2e/harness"
)

// TestIdleConnections keeps many connections that have done a request each. They
// cost a goroutine and little memory, others are served meanwhile, each of them
// can go on, and nothing is left of them afterwards.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		n    int
		each float64 // bytes at most, of memory
		tls  bool
	}{{"plain", 500, 32 << 10, false}, {"TLS", 200, 128 << 10, true}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			require.NoError(t, edge.EnoughFiles(c.n))
			p := newPKI(t)
			settings, scheme := []string{}, "http"
			var config *tls.Config
			if c.tls {
				settings, config, scheme = p.settings(), p.config("http/1.1"), "https"
			}
			s := startSystem(t, startAPI(t, http.HandlerFunc(echo)), settings...)
			other := newWay(t, c.name, scheme+"://"+ingressAddr(s), config)
			ask := func() {
				t.Helper()
				for range 20 {
					require.Equal(t, 200, other.do(t, other.request(t.Context(), t, "POST", "/", nil)).status)
				}
			}
			ask()
			before, err := readVitals(t.Context(), s)
			require.NoError(t, err)
			conns, err := edge.Idle(t.Context(), ingressAddr(s), c.n, config)
			t.Cleanup(func() {
				for _, nc := range conns {
					_ = nc.Close()
				}
			})
			require.NoError(t, err)
			ask()
			with, err := readVitals(t.Context(), s)
			require.NoError(t, err)
			require.Equal(t, float64(c.n), with.connections-before.connections)
			require.LessOrEqual(t, with.goroutines, before.goroutines+float64(c.n)+100)
			require.Less(t, with.rss, before.rss+float64(c.n)*c.each+48<<20)
			for _, nc := range conns[:10] {
				require.NoError(t, nc.SetDeadline(time.Now().Add(patience)))
				_, err := fmt.Fprintf(nc, "POST / HTTP/1.1\r\nHost: %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", ingressAddr(s))
				require.NoError(t, err)
				text, err := io.ReadAll(nc)
				require.NoError(t, err)
				require.Contains(t, string(text), "HTTP/1.1 200 OK")
			}
			for _, nc := range conns {
				_ = nc.Close()
			}
			require.Eventually(t, func() bool {
				v, err := readVitals(t.Context(), s)
				return err == nil && v.connections <= before.connections && v.goroutines <= before.goroutines+100
			}, patience, 20*time.Millisecond)
			t.Logf("before %+v, with %+v", before, with)
		})
	}
}

// TestMaxConnections holds the limits on connections: the one too many is told
// 503 and counted, and when another has gone there is room again.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	const most = 5
	url := startAPI(t, http.HandlerFunc(echo))
	for limit, settings := range map[string][]string{
		"connections":            {"MAX_CONNECTIONS=5"},
		"connections_per_client": {"MAX_CONNECTIONS_PER_CLIENT=5", "TRUSTED_PROXIES=127.0.0.3/32"},
	} {
		t.Run(limit, func(t *testing.T) {
			t.Parallel()
			s := startSystem(t, url, settings...)
			addr := ingressAddr(s)
			count := func() float64 {
				n, err := s.Metric(t.Context(), harness.Ingress, fmt.Sprintf("holdfast_connections_refused_total{limit=%q}", limit))
				if err != nil {
					return 0 // it is there from the first one on
				}
				return n
			}
			from := func(ip byte) *keptAlive {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, ip)}}
				nc, err := d.DialContext(t.Context(), "tcp", addr)
				require.NoError(t, err)
				c := keeping(addr, nc)
				t.Cleanup(c.close)
				return c
			}
			var conns []*keptAlive
			for range most {
				c := from(1)
				a, err := c.post(t.Context(), "/", "x")
				require.NoError(t, err)
				require.Equal(t, 200, a.Status)
				conns = append(conns, c)
			}
			require.Zero(t, count())
			tooMany := func(ip byte) {
				t.Helper()
				before := count()
				c := from(ip)
				require.NoError(t, c.nc.SetDeadline(time.Now().Add(patience)))
				a, err := edge.ReadAnswer(c.br, "GET") // before anything is sent
				require.NoError(t, err)
				require.Equal(t, 503, a.Status)
				require.Empty(t, a.Anomalies)
				require.Equal(t, []string{"close"}, a.Fields.Values("Connection"))
				require.Equal(t, []string{"application/problem+json"}, a.Fields.Values("Content-Type"))
				require.Len(t, a.Fields.Values("Retry-After"), 1)
				_, err = c.br.ReadByte()
				require.ErrorIs(t, err, io.EOF)
				require.Equal(t, before+1, count())
			}
			tooMany(1)
			others := []byte{2, 3}
			if limit == "connections" {
				for _, ip := range others {
					tooMany(ip)
				}
			} else {
				for _, ip := range others { // another client, and one that is exempt
					for range most {
						a, err := from(ip).post(t.Context(), "/", "x")
						require.NoError(t, err)
						require.Equal(t, 200, a.Status)
					}
				}
				tooMany(2)
				a, err := from(3).post(t.Context(), "/", "x")
				require.NoError(t, err)
				require.Equal(t, 200, a.Status)
			}
			// Those that were let in go on, and one that goes makes room.
			a, err := conns[1].post(t.Context(), "/", "x")
			require.NoError(t, err)
			require.Equal(t, 200, a.Status)
			conns[0].close()
			require.Eventually(t, func() bool {
				a, err := from(1).post(context.WithoutCancel(t.Context()), "/", "x")
				return err == nil && a.Status == 200
			}, patience, 10*time.Millisecond)
		})
	}
}
