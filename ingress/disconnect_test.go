package ingress

import (
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// lossyLink stands between a client and a server of NATS. While it swallows,
// what the client sends never arrives.
type lossyLink struct {
	net.Listener
	server    string
	swallows  atomic.Bool
	swallowed atomic.Int64 // bytes

	mu    sync.Mutex
	conns []net.Conn
	wg    sync.WaitGroup
}

func newLossyLink(t *testing.T, server string) *lossyLink {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l := &lossyLink{Listener: listener, server: server}
	l.wg.Go(l.serve)
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		l.cut()
		l.wg.Wait()
	})
	return l
}

func (l *lossyLink) serve() {
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", l.server)
		if err != nil {
			client.Close()
			continue
		}
		l.mu.Lock()
		l.conns = append(l.conns, client, server)
		l.mu.Unlock()
		l.wg.Go(func() { _, _ = io.Copy(client, server) })
		l.wg.Go(func() {
			defer server.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := client.Read(buf)
				if l.swallows.Load() {
					l.swallowed.Add(int64(n))
				} else if _, werr := server.Write(buf[:n]); werr != nil {
					return
				}
				if err != nil {
					return
				}
			}
		})
	}
}

// cut closes all connections.
func (l *lossyLink) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.Close()
	}
	l.conns = nil
}

// TestWhatWasUnderWayIsPublishedAgain: what was published into a connection that
// broke before it arrived is published again as soon as there is another one,
// without a wait for its acknowledgement or for words.
func TestWhatWasUnderWayIsPublishedAgain(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	link := newLossyLink(t, strings.TrimPrefix(b.server.ClientURL(), "nats://"))
	nc, err := nats.Connect("nats://"+link.Addr().String(), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1),
		nats.ReconnectWait(5*time.Millisecond), nats.ReconnectJitter(0, 0))
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	g := startGateway(t, newOptions(t, serveAPI(t, ok), nc, func(o *Options) {
		o.times.ackWait, o.times.wordLost, o.times.republishMin = time.Hour, time.Hour, time.Hour
	}))
	g.must("POST", "/", nil)
	b.eventually(capture.CompletionsStream, 1)

	link.swallows.Store(true)
	const n, size = 20, 1000
	for range n {
		require.Equal(t, 200, g.must("POST", "/", strings.NewReader(strings.Repeat("x", size))).StatusCode)
	}
	require.Eventually(t, func() bool { return link.swallowed.Load() > n*size }, patience, time.Millisecond)
	require.Len(t, b.read(capture.RequestsStream), 1)
	link.swallows.Store(false)
	link.cut()
	require.Len(t, uniqueRefs(b.eventually(capture.RequestsStream, n+1)), n+1)
	require.Len(t, uniqueRefs(b.eventually(capture.CompletionsStream, n+1)), n+1)
}
