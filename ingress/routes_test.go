package ingress

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// TestRoutesByFile: each request goes to the API of its route, and is captured,
// bounded and judged as that route says.
func TestRoutesByFile(t *testing.T) {
	named := func(name string, status int) string {
		return serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, name+" "+r.RequestURI)
		})
	}
	file := filepath.Join(t.TempDir(), "routes.yaml")
	require.NoError(t, os.WriteFile(file, []byte(`
routes:
- name: calls
  match: {path: {prefix: /v1/calls}}
  upstream: {url: "`+named("calls", 500)+`", timeout: 5s}
  capture: {max_body: 1KiB}
  on_failure: accept
- name: quiet
  match: {path: {exact: /quiet}, methods: [POST]}
  upstream: {url: "`+named("quiet", 200)+`"}
  capture: {mode: "off"}
- name: admin
  match: {hosts: [admin.example.com]}
  upstream: {url: "`+named("admin", 404)+`"}
  capture: {methods: ["*"]}
  completion: {processed: [404]}
  order_by: "header:X-Client"
  grace: 2m
`), 0o600))
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, "http://unused.invalid", b.connect(), set(func(s *Settings) { s.RoutesFile = file })))
	do := func(method, target, host string, body int) answer {
		req, err := http.NewRequest(method, g.url+target, bytes.NewReader(pattern(body)))
		require.NoError(t, err)
		if host != "" {
			req.Host = host
		}
		req.Header.Set("X-Client", "c1")
		resp, err := client(t).Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		return answer{resp, data, err}
	}

	require.Equal(t, 202, do("POST", "/v1/calls/7?x=%2F", "", 1<<10).StatusCode, "on_failure: accept")
	require.Equal(t, 413, do("POST", "/v1/calls", "", 1<<10+1).StatusCode, "the route's own limit")
	require.Equal(t, 500, do("GET", "/v1/calls", "", 0).StatusCode, "not captured, so not accepted")

	a := do("POST", "/quiet", "", 10)
	require.Equal(t, "quiet /quiet", string(a.body))
	require.Empty(t, a.Header.Get("X-Request-Stored"))

	a = do("GET", "/any//thing", "admin.example.com:80", 0)
	require.Equal(t, "admin /any//thing", string(a.body))
	require.Equal(t, "synced", a.Header.Get("X-Request-Stored"), "the route captures every method")

	for _, none := range [][2]string{{"POST", "/v1/callsx"}, {"GET", "/quiet"}, {"POST", "/v1/calls/../other"}} {
		a = do(none[0], none[1], "", 0)
		require.Equal(t, 404, a.StatusCode, none)
		require.Equal(t, "holdfast; error=destination_not_found", a.Header.Get("Proxy-Status"))
		require.Equal(t, "application/problem+json", a.Header.Get("Content-Type"))
	}

	var got []string
	for _, m := range b.eventually(capture.RequestsStream, 2) {
		got = append(got, m.subject)
		if m.request.Route == "admin" {
			require.Equal(t, "c1", m.request.OrderKey)
			require.Equal(t, 2*time.Minute, m.request.Policy.Grace)
		}
	}
	require.ElementsMatch(t, []string{"holdfast.requests.calls.POST", "holdfast.requests.admin.GET"}, got)
	outcomes := map[string]capture.Verdict{}
	for _, m := range b.eventually(capture.CompletionsStream, 2) {
		outcomes[strings.Split(m.subject, ".")[2]] = m.outcome.Attempt.Verdict
	}
	require.Equal(t, map[string]capture.Verdict{"calls": capture.Failed, "admin": capture.Processed}, outcomes)
}
