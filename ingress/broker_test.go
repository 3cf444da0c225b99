package ingress

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// smallBroker is a nats-server that takes messages up to limit bytes.
func smallBroker(t *testing.T, addr string, limit int) (*server.Server, *nats.Conn) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "nats.conf")
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, "listen: %q\nmax_payload: %d\n", addr, limit), 0o600))
	opts, err := server.ProcessConfigFile(conf)
	require.NoError(t, err)
	opts.NoSigs, opts.NoLog = true, true
	s, err := server.NewServer(opts)
	require.NoError(t, err)
	s.Start()
	require.True(t, s.ReadyForConnections(patience))
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	nc, err := nats.Connect(s.ClientURL())
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	return s, nc
}

// TestTheBrokerTakesTheLargestMessage, or the ingress does not start; a broker
// that comes back smaller makes it unready.
func TestTheBrokerTakesTheLargestMessage(t *testing.T) {
	_, small := smallBroker(t, "127.0.0.1:-1", 128<<10)
	_, err := New(newOptions(t, "http://127.0.0.1:1", small))
	require.ErrorContains(t, err, "max_payload")
	require.ErrorContains(t, err, "HOLDFAST_INLINE_BYTES (256KiB)")

	b := newBroker(t, stream.Streams{})
	o := newOptions(t, "http://127.0.0.1:1", b.connect())
	s := *o.Settings
	require.NoError(t, fits(b.connect(), &s, 0))
	require.ErrorContains(t, fits(small, &s, 0), "128KiB at most")
	s.InlineBytes, s.MaxHeaderBytes = 4<<10, 4<<10
	require.ErrorContains(t, fits(small, &s, 0), "max_payload", "a chunk does not fit either")
	require.NoError(t, fits(b.connect(), &s, capture.MaxAnswer))
	_, medium := smallBroker(t, "127.0.0.1:-1", 600<<10)
	require.NoError(t, fits(medium, &s, 256<<10))
	require.ErrorContains(t, fits(medium, &s, capture.MaxAnswer), "HOLDFAST_KEEP_ANSWERS")
	small.Close()
	require.NoError(t, fits(small, &s, 0), "one that is away says nothing")
}
