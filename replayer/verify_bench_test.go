package replayer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/replayer"
)

// BenchmarkVerify reconciles 100,000 requests of 1 KiB, each in an access log, a
// spool, both streams and the ledger, by the command, and reports the most memory
// that its process took.
func BenchmarkVerify(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) { benchmarkVerify(b, n) })
	}
}

func benchmarkVerify(b *testing.B, n int) {
	streams := stream.Streams{Replicas: 1, MaxBytes: 1 << 30}
	server, err := embednats.Start(embednats.Options{
		StoreDir: b.TempDir(), Addr: "127.0.0.1:0", MaxStoreBytes: streams.StoreBytes(), Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(b, err)
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), bound)
		defer cancel()
		require.NoError(b, server.Shutdown(ctx))
	}()
	conn, err := nats.Connect(server.ClientURL())
	require.NoError(b, err)
	defer conn.Close()
	js, err := jetstream.New(conn)
	require.NoError(b, err)
	require.NoError(b, stream.Provision(b.Context(), js, streams))
	books := newBooks(b)
	dir := filepath.Join(b.TempDir(), "spool")
	sp, err := spool.Open(spool.Options{Dir: dir})
	require.NoError(b, err)
	defer func() { require.NoError(b, sp.Close()) }()
	logFile := filepath.Join(b.TempDir(), "access.log")
	log, err := os.Create(logFile)
	require.NoError(b, err)
	access := slog.New(slog.NewJSONHandler(log, nil))

	const batch = 500
	body := make([]byte, 1024)
	for done := 0; done < n; done += batch {
		var items []ledger.Item
		var facts []ledger.Fact
		for range batch {
			id := uuid.Must(uuid.NewV7())
			now := time.Now()
			r := &capture.Request{
				ID: id, Route: capture.DefaultRoute, Ingress: "gw", ReceivedAt: now, Policy: newPolicy(), Size: int64(len(body)), Body: body,
				Head: []byte("POST /things HTTP/1.1\r\nHost: api.example\r\nContent-Length: 1024\r\n\r\n"),
			}
			o := &capture.Outcome{ID: id, Ingress: "gw", Attempt: capture.Attempt{
				Number: capture.FirstAttempt, StartedAt: now, EndedAt: now, Status: 200, Verdict: capture.Processed,
			}}
			msg, data := r.Message(), append(append([]byte{}, r.Head...), body...)
			said := capture.Message{Subject: capture.OutcomeSubject(r.Route)}
			res, err := sp.Reserve(2, int64(len(data))+2048)
			require.NoError(b, err)
			_, err = res.Append(msg.AppendEnvelope(nil), data)
			require.NoError(b, err)
			_, err = res.Append(o.AppendJSON(said.AppendEnvelope(nil)))
			require.NoError(b, err)
			res.Release()
			_, err = js.PublishMsgAsync(&nats.Msg{Subject: msg.Subject, Data: data, Header: nats.Header{
				capture.HeaderID: {msg.ID}, capture.HeaderCapture: {msg.Capture},
			}})
			require.NoError(b, err)
			_, err = js.PublishMsgAsync(&nats.Msg{Subject: said.Subject, Data: o.AppendJSON(nil)})
			require.NoError(b, err)
			items = append(items, ledger.Item{Captured: capture.Captured{Request: r}})
			facts = append(facts, ledger.Fact{Outcome: o})
			access.Info("request", "request_id", id.String(), "code", 200, "stored", "synced")
		}
		_, err := books.Record(b.Context(), items)
		require.NoError(b, err)
		_, err = books.Complete(b.Context(), facts)
		require.NoError(b, err)
		<-js.PublishAsyncComplete()
	}
	require.NoError(b, log.Close())
	for name, durable := range map[string]string{capture.RequestsStream: capture.RecorderDurable, capture.CompletionsStream: capture.AckerDurable} {
		c, err := js.Consumer(b.Context(), name, durable)
		require.NoError(b, err)
		for left := n; left > 0; {
			got, err := c.FetchNoWait(1000)
			require.NoError(b, err)
			for m := range got.Messages() {
				require.NoError(b, m.Ack())
				left--
			}
		}
	}
	require.NoError(b, conn.Flush())

	for b.Loop() {
		cmd := exec.CommandContext(b.Context(), binary, "verify", "--output", "json", "--spool-dir", dir, "--answered", logFile)
		cmd.Env = []string{"HOLDFAST_LEDGER_URL=sqlite://" + books.path, "HOLDFAST_NATS_URL=" + server.ClientURL()}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		stdout, err := cmd.Output()
		require.NoError(b, err, "%s\n%s", stdout, stderr.String())
		var out replayer.Verification
		require.NoError(b, json.Unmarshal(stdout, &out))
		require.True(b, out.Holds)
		for _, row := range out.Rows {
			require.Equal(b, int64(n), row.States[capture.StateProcessed], row.Source)
		}
		require.Equal(b, int64(n), out.Payloads)
		usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
		require.True(b, ok)
		b.ReportMetric(float64(usage.Maxrss)/1024, "RSS-MiB") // Linux gives KiB
	}
}
