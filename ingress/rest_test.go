package ingress

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestARefusalIsSeenByWhoIsStillSending: a client that closes its connections
// after each request, as proxies with HTTP/1.0 do, gets the answer and no broken
// connection.
func TestARefusalIsSeenByWhoIsStillSending(t *testing.T) {
	g, _ := run(t, ok, set(func(s *Settings) { s.SpoolMaxBytes, s.MaxBodyBytes = 16<<20, 2<<20 }))
	refused := 0
	for range 60 {
		req, err := http.NewRequest("POST", g.url, bytes.NewReader(pattern(1<<20)))
		require.NoError(t, err)
		req.Close = true
		resp, err := client(t).Do(req)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		if resp.StatusCode == http.StatusServiceUnavailable {
			refused++
		}
	}
	require.Greater(t, refused, 30)
}
