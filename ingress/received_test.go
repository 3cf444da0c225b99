package ingress

import (
	"io"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// TestReceivedWhenTheBodyIsWhole: the API begins after the body has come, and
// the grace counts from the time of receipt. With that of the head a client that
// sent for longer than the timeout had its request sent again while the API
// worked on it.
func TestReceivedWhenTheBodyIsWhole(t *testing.T) {
	g, b := run(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	inline := int(g.handler.inline)
	for _, n := range []int{10, inline, inline + 1, 2*inline + chunkBytes} {
		c, br := g.raw(head("POST / HTTP/1.1", "Host: x", "Expect: 100-continue", "Content-Length: "+strconv.Itoa(n)))
		resp, err := http.ReadResponse(br, nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusContinue, resp.StatusCode) // the handler reads the body
		began := time.Now()
		_, err = c.Write(pattern(n))
		require.NoError(t, err)
		resp, err = http.ReadResponse(br, nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		id := answer{Response: resp}.id(t)
		var received time.Time
		require.Eventually(t, func() bool {
			for _, m := range b.read(capture.RequestsStream) {
				if m.request != nil && m.request.ID == id {
					received = m.request.ReceivedAt
				}
			}
			return !received.IsZero()
		}, 20*time.Second, 10*time.Millisecond)
		require.WithinRange(t, received, began, time.Now(), "%d bytes", n)
	}
}
