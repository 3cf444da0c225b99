package ingress

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// TestTrailersOfARequest: they reach the API and the capture, whether the body
// fits into a message, goes through a file, or is not captured. Our own names and
// framing do not.
func TestTrailersOfARequest(t *testing.T) {
	api, got := echo(t)
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect()))
	for _, method := range []string{"POST", "GET"} {
		for _, size := range []int{0, 1, 600 << 10} {
			chunk := ""
			if size > 0 {
				chunk = fmt.Sprintf("%x\r\n%s\r\n", size, pattern(size))
			}
			a := g.exchange(head(method+" / HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", "Trailer: Sum, X-Request-UUID") +
				fmt.Sprintf("%s0\r\nSum: a\r\nsum: b\r\nX_Request-UUID: mine\r\nContent-Length: 3\r\n\r\n", chunk))
			require.Equal(t, 200, a.StatusCode)
			raw := string(<-got)
			sent, coded, _ := strings.Cut(raw, "\r\n\r\n")
			require.Contains(t, sent, "\r\nTransfer-Encoding: chunked")
			require.NotContains(t, sent, "Content-Length")
			require.True(t, strings.HasSuffix(coded, "0\r\nSum: a\r\nsum: b\r\n\r\n"), "%.200q", coded)
			if method == "GET" {
				continue
			}
			require.Equal(t, chunk+"0\r\nSum: a\r\nsum: b\r\n\r\n", coded)
			// What is stored is what was sent.
			var stored strings.Builder
			for _, m := range g.spooled() {
				if m.chunk != nil {
					stored.Write(m.chunk.Data)
				}
				if m.request != nil && m.request.Size == int64(len(coded)) {
					require.Contains(t, string(m.request.Head), "\r\nTransfer-Encoding: chunked\r\n")
					stored.Write(m.request.Body)
				}
			}
			require.Equal(t, coded, stored.String())
		}
	}
	require.Len(t, b.eventually(capture.CompletionsStream, 3), 3)
}

// TestInterimAnswers: those of the API pass, but for its word that it is ready,
// and not to a client that knows none.
func TestInterimAnswers(t *testing.T) {
	api := rawAPI(t, func(c net.Conn, br *bufio.Reader) {
		for {
			if _, err := readRequest(br); err != nil {
				return
			}
			_, _ = io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\nConnection: close\r\n\r\n"+
				"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect()))
	for _, method := range []string{"POST", "GET"} {
		_, br := g.raw(head(method+" / HTTP/1.1", "Host: x", "Content-Length: 0"))
		line, err := br.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "HTTP/1.1 103 Early Hints\r\n", line)
		line, err = br.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "Link: </a>\r\n", line)
		line, err = br.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "\r\n", line)
		resp, err := http.ReadResponse(br, nil)
		require.NoError(t, err)
		require.Equal(t, "200 Fine", resp.Status)

		require.Equal(t, 200, g.exchange(head(method+" / HTTP/1.0", "Content-Length: 0")).StatusCode)
	}
}
