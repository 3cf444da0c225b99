package recorder_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// BenchmarkRecorder measures the way from a stream that is full of requests of
// 1 KiB to the words for all of them. The CPU is that of broker, recorder and
// ledger together.
func BenchmarkRecorder(b *testing.B) {
	w := newWorld(b)
	one := newRequest("POST", "/v1/calls/12345?x=y", strings.Repeat("x", 1024), "Authorization: Bearer abcdefghijklmnop", "Content-Type: application/json")
	for i := range b.N {
		one.ID = newID()
		m := one.Message()
		msg := &nats.Msg{Subject: m.Subject, Data: append(append([]byte{}, one.Head...), one.Body...), Header: nats.Header{
			capture.HeaderID: {m.ID}, capture.HeaderCapture: {m.Capture},
			capture.HeaderSpool: {capture.SpoolRef{Ingress: "gw1", Start: "00ff", Index: uint64(i + 1)}.String()},
		}}
		_, err := w.js.PublishMsgAsync(msg)
		require.NoError(b, err)
		if i%1000 == 999 {
			<-w.js.PublishAsyncComplete()
		}
	}
	<-w.js.PublishAsyncComplete()
	heard := w.listen()
	before := cpu(b)
	b.ResetTimer()
	w.start(nil)
	heard.await(capture.SpoolRef{Ingress: "gw1", Start: "00ff", Index: uint64(b.N)})
	b.StopTimer()
	b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "req/s")
}

// cpu is what the process has used so far.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
