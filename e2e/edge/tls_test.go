package edge_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// TestTLSReload changes the certificate under a running ingress: new connections
// get the new one, those that exist go on, and files that cannot be used change
// nothing.
func TestTLSReload(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	s := startTLS(t, p, startAPI(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.URL.Path) // the client checks what it gets
	})))
	addr := ingressAddr(s)
	handshake := func() (*tls.Conn, int64) {
		t.Helper()
		conn, err := tls.Dial("tcp", addr, p.config("http/1.1"))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() }) // it may be closed
		return conn, conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	metric := func(name string) float64 {
		v, err := s.Metric(t.Context(), harness.Ingress, name)
		if err != nil {
			return -1
		}
		return v
	}
	old, serial := handshake()
	require.Equal(t, p.issued, serial)
	oldReader := bufio.NewReader(old)
	get := func(path string) {
		t.Helper()
		require.NoError(t, old.SetDeadline(time.Now().Add(patience)))
		_, err := fmt.Fprintf(old, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", path)
		require.NoError(t, err)
		resp, err := http.ReadResponse(oldReader, nil)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, path, string(body))
	}
	get("/before")
	http1, http2 := p.ways(addr)
	for _, w := range []way{http1, http2} {
		require.Equal(t, http.StatusOK, w.do(t, w.request(t.Context(), t, http.MethodGet, "/before", nil)).status)
	}

	// A key that is not the certificate's, as between two writes that are not atomic.
	const failures = "holdfast_tls_certificate_reload_failures_total"
	require.Zero(t, metric(failures))
	cert, _, _ := p.issue()
	_, key, _ := p.issue()
	p.install(cert, key)
	require.Eventually(t, func() bool { return metric(failures) == 1 }, patience, 20*time.Millisecond)
	require.Contains(t, s.Process(harness.Ingress).Tail(8<<10), "the changed certificate cannot be used")
	_, still := handshake()
	require.Equal(t, serial, still)

	cert, key, next := p.issue()
	p.install(cert, key)
	require.Eventually(t, func() bool {
		conn, got := handshake()
		require.NoError(t, conn.Close())
		return got == next
	}, patience, 50*time.Millisecond)

	// What was there goes on, and session tickets of the old one do no harm.
	get("/after")
	for _, w := range []way{http1, http2} {
		require.Equal(t, http.StatusOK, w.do(t, w.request(t.Context(), t, http.MethodGet, "/after", nil)).status)
	}
}

// TestTLSProtocols negotiates: what is too old, or not spoken here, is refused.
func TestTLSProtocols(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	s := startTLS(t, p, startAPI(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	addr := ingressAddr(s)
	negotiated := func(config *tls.Config) (string, error) {
		conn, err := tls.Dial("tcp", addr, config)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return conn.ConnectionState().NegotiatedProtocol, nil
	}
	for want, offered := range map[string][]string{"h2": {"http/1.1", "h2"}, "http/1.1": {"http/1.1"}, "": nil} {
		got, err := negotiated(p.config(offered...))
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := negotiated(p.config("spdy/3"))
	require.ErrorContains(t, err, "no application protocol")
	old := p.config()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	_, err = negotiated(old)
	require.ErrorContains(t, err, "protocol version")

	// Plain HTTP to the TLS port gets no answer that could be taken for one, and
	// the next client is served.
	plain := newWay(t, "plain", "http://"+addr, nil)
	resp, err := plain.client.Do(plain.request(t.Context(), t, http.MethodGet, "/", nil))
	if err == nil {
		require.Equal(t, http.StatusBadRequest, resp.StatusCode)
		require.NoError(t, resp.Body.Close())
	}
	_, http2 := p.ways(addr)
	require.Equal(t, http.StatusOK, http2.do(t, http2.request(t.Context(), t, http.MethodGet, "/", nil)).status)
}

// TestTLSAtStart refuses to start with files that cannot be used.
func TestTLSAtStart(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	cert, _, _ := p.issue()
	_, key, _ := p.issue()
	p.install(cert, key)
	o := harness.Options{Topology: harness.Standalone, Bin: bin, Dir: t.TempDir(), Upstream: "http://127.0.0.1:1", Settings: map[string]string{
		"TLS_CERT_FILE": filepath.Join(p.dir, "tls.crt"), "TLS_KEY_FILE": filepath.Join(p.dir, "tls.key"),
	}}
	s, err := harness.New(o)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	require.ErrorContains(t, s.Start(t.Context()), "HOLDFAST_TLS_CERT_FILE")
}
