package ingress

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/stream"
)

// TestAClientThatHasSaidAll closes its side and still gets the whole of its
// answer, in however many parts it comes.
func TestAClientThatHasSaidAll(t *testing.T) {
	next := make(chan struct{})
	api := rawAPI(t, func(c net.Conn, br *bufio.Reader) {
		if _, err := readRequest(br); err != nil {
			return
		}
		for _, part := range []string{"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\na\r\n", "1\r\nb\r\n", "0\r\n\r\n"} {
			<-next
			_, _ = io.WriteString(c, part)
		}
	})
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect()))
	for _, method := range []string{"POST", "GET"} {
		c, br := g.raw(head(method+" / HTTP/1.1", "Host: x", "Content-Length: 0"))
		require.NoError(t, c.(*net.TCPConn).CloseWrite())
		go func() {
			for range 4 {
				next <- struct{}{}
			}
		}()
		resp, err := http.ReadResponse(br, nil)
		require.NoError(t, err, method)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err, method)
		require.Equal(t, "ab", string(body))
	}
}
