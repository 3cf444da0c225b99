package stream_test

import (
	"context"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// BenchmarkConsume takes 1 KiB messages from a server in the same process, with
// a handler that does nothing. cpu-ns/op is server and loop together.
func BenchmarkConsume(b *testing.B) {
	broker, _, js := provisioned(b)
	nc, err := stream.Connect(stream.ConnectOptions{InProcess: broker.InProcess(), Name: "bench", Logger: silent})
	require.NoError(b, err)
	b.Cleanup(nc.Close)
	large := streams
	large.MaxBytes = 128 << 20
	require.NoError(b, stream.Provision(b.Context(), js, large))
	body := make([]byte, 1024)
	n := min(b.N, 100_000)
	for range n {
		_, err := js.PublishMsgAsync(&nats.Msg{
			Subject: capture.RequestSubject("default", "POST"), Data: body,
			Header: nats.Header{capture.HeaderID: {"0198c5e4-0000-7000-8000-000000000000"}, capture.HeaderSpool: {"host/0123456789abcdef/123456"}},
		})
		require.NoError(b, err)
	}
	<-js.PublishAsyncComplete()

	c := newConsumer(b, nc)
	ctx, cancel := context.WithCancel(b.Context())
	seen, batches := 0, 0
	before := cpu(b)
	b.ResetTimer()
	require.NoError(b, c.Run(ctx, func(_ context.Context, batch []stream.Msg) error {
		seen += len(batch)
		batches++
		if seen >= n {
			cancel()
		}
		return nil
	}))
	b.StopTimer()
	b.ReportMetric(float64(cpu(b)-before)/float64(n), "cpu-ns/msg")
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "msg/s")
	b.ReportMetric(float64(seen)/float64(batches), "msg/batch")
}

func cpu(b *testing.B) time.Duration {
	var r syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
