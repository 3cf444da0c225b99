package ingress

import (
	"bytes"
	"io"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// TestNoRoomForALargeBody: a body that travels in chunks is refused like any
// other when the spool has no room, before the API sees a byte of it.
func TestNoRoomForALargeBody(t *testing.T) {
	var arrived atomic.Int32
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		arrived.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		ok(w, r)
	}, set(func(s *Settings) { s.SpoolMaxBytes, s.MaxBodyBytes, s.InlineBytes = 16<<20, 1<<20, 64<<10 }))
	for range 200 {
		before := arrived.Load()
		// Above the inline limit, and little enough to be read by the server all
		// the same: else it closes the connection under the client's hands, which
		// may then miss the answer.
		a := g.must("POST", "/", bytes.NewReader(pattern(200<<10)))
		if a.StatusCode == http.StatusOK {
			continue
		}
		require.Equal(t, http.StatusServiceUnavailable, a.StatusCode)
		require.NotEmpty(t, a.Header.Get("Retry-After"))
		require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
		require.Equal(t, before, arrived.Load(), "the API must not see a byte")
		require.Positive(t, before)
		return
	}
	t.Fatal("the spool does not fill")
}
