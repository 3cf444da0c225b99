package verify_test

import (
	"compress/gzip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// TestASystemInUseHolds verifies again and again while clients send.
func TestASystemInUseHolds(t *testing.T) {
	t.Parallel()
	for _, topology := range []harness.Topology{harness.Standalone, harness.Distributed} {
		t.Run(string(topology), func(t *testing.T) {
			t.Parallel()
			w := start(t, topology)
			stop := make(chan struct{})
			var clients sync.WaitGroup
			var sent atomic.Int64
			var failed atomic.Pointer[error]
			for c := range 4 {
				clients.Go(func() {
					for n := c; ; n++ {
						select {
						case <-stop:
							return
						default:
						}
						size := 100
						if n%50 == 0 {
							size = 700 << 10 // in chunks
						}
						if _, err := w.try([]int{200, 201, 404, 502}[n%4], size); err != nil {
							failed.Store(&err)
							return
						}
						sent.Add(1)
					}
				})
			}
			w.send(200, 10) // so that the log has a line
			for range 3 {
				before := sent.Load()
				r := w.holds("--answered", w.accessLog())
				require.True(t, r.Settled, "%+v", r.Waits)
				require.GreaterOrEqual(t, r.Rows[0].Seen, before)
			}
			close(stop)
			clients.Wait()
			if err := failed.Load(); err != nil {
				require.NoError(t, *err)
			}
			w.holds() // when it returns, all outcomes are in the ledger
			r := w.holds("--answered", w.accessLog())
			all := sent.Load() + 1
			require.Greater(t, all, int64(100))
			for _, row := range r.Rows {
				if row.Source == "spools" {
					continue // what is left of it
				}
				require.Equal(t, all, row.Seen, row.Source)
				require.Equal(t, all, row.States["processed"]+row.States["failed"]+row.States["rejected"], row.Source)
				require.NotZero(t, row.States["failed"])
			}
			code, text, err := w.Replay(t.Context(), "verify")
			require.NoError(t, err)
			require.Zero(t, code, text)
			require.Contains(t, text, "holds: everything is accounted for")
			require.Contains(t, text, "what clients were told: no access log was given")
			consumers := 0
			for _, name := range []string{capture.RequestsStream, capture.CompletionsStream} {
				s, err := w.streams().Stream(t.Context(), name)
				require.NoError(t, err)
				for info := range s.ListConsumers(t.Context()).Info() {
					require.Condition(t, func() bool { return info.Config.Durable == info.Name || info.Config.Durable == "" })
					if info.Config.Durable != "" {
						consumers++
					}
				}
			}
			require.Equal(t, 2, consumers, "the durables of recorder and acker, and no other")
		})
	}
}

// TestEveryKindOfDamageIsNamed damages one system more and more. Each step must
// add its gaps, and no others.
func TestEveryKindOfDamageIsNamed(t *testing.T) {
	t.Parallel()
	w := start(t, harness.Distributed)
	var ids []string
	for range 20 {
		ids = append(ids, w.send(200, 50))
	}
	failed := w.send(502, 50)
	large := w.send(200, 700<<10)
	w.holds("--answered", w.accessLog())
	var gaps []string
	add := func(more ...string) { gaps = append(gaps, more...) }

	// An answer that nobody knows of.
	forged := uuid.Must(uuid.NewV7()).String()
	r := w.gaps(missing(forged), "--answered", w.file(ids[0], forged))
	require.Equal(t, []string{"answered"}, r.Gaps[0].SeenIn)
	require.Equal(t, int64(2), r.Rows[0].Seen)
	require.Equal(t, int64(1), r.Rows[0].Missing)
	zipped := filepath.Join(t.TempDir(), "access.log.gz")
	text, err := os.ReadFile(w.file(ids[0], forged))
	require.NoError(t, err)
	file, err := os.Create(zipped)
	require.NoError(t, err)
	zip := gzip.NewWriter(file)
	_, err = zip.Write(text)
	require.NoError(t, err)
	require.NoError(t, zip.Close())
	require.NoError(t, file.Close())
	w.gaps(missing(forged), "--answered", zipped)
	w.holds("--answered", zipped, "--since", "2099-01-01T00:00:00Z")
	code, _ := w.verify("--answered", filepath.Join(w.dir, "recorder.log"))
	require.Equal(t, 1, code, "a log without access lines proves nothing")

	// A row that is gone.
	w.sql("DELETE FROM requests WHERE id = " + blob(ids[1]))
	add("missing "+ids[1], "count")
	r = w.gaps(gaps, "--answered", w.accessLog())
	for _, g := range r.Gaps {
		if g.ID != "" {
			require.Subset(t, g.SeenIn, []string{"answered", "requests", "outcomes"})
		}
	}

	// A fact that is gone.
	w.sql(
		"UPDATE requests SET facts = 0, state = 0, kept = 0, attempts = 0, started = NULL, ended = NULL, status = NULL, error = NULL, verdict = NULL WHERE id = "+blob(ids[2]),
		"UPDATE counters SET n = n - 1 WHERE name = 'requests:processed'",
		"INSERT INTO counters (name, n) VALUES ('requests:received', 1) ON CONFLICT (name) DO UPDATE SET n = n + 1")
	add("outcome " + ids[2])
	w.gaps(gaps)

	// The same of a request of which something else is known.
	w.sql(
		"UPDATE requests SET facts = 2, attempts = 0, status = NULL WHERE id = "+blob(failed),
		"INSERT INTO events (id, number, verdict, attempt, detail, known) VALUES ("+blob(failed)+", 1, 2, 1, 'forged', 0)")
	add("outcome " + failed)
	w.gaps(gaps)

	// Payloads: a part of a body, a body cut short, and none.
	w.sql("DELETE FROM chunks WHERE number = 1 AND id = " + blob(large))
	add("payload " + large)
	w.gaps(gaps)
	w.sql("UPDATE payloads SET body = substr(body, 2) WHERE seq = (SELECT seq FROM requests WHERE id = " + blob(ids[3]) + ")")
	add("payload " + ids[3])
	w.gaps(gaps)
	w.sql("DELETE FROM payloads WHERE seq = (SELECT seq FROM requests WHERE id = " + blob(ids[4]) + ")")
	add("payload " + ids[4])
	w.gaps(gaps)

	// An event of the API that was acknowledged and is gone.
	js := w.streams()
	event := []byte(`{"id":"` + ids[5] + `","outcome":"failed","attempt":7,"detail":"late"}`)
	_, err = js.Publish(t.Context(), capture.EventSubject("default"), event)
	require.NoError(t, err)
	w.gaps(gaps)
	w.sql("DELETE FROM events WHERE id = " + blob(ids[5]))
	add("event " + ids[5])
	w.gaps(gaps)

	// Messages that nobody can read are set aside, which is no gap, and are one
	// when that is gone, too.
	_, err = js.Publish(t.Context(), capture.EventSubject("default"), []byte("{"))
	require.NoError(t, err)
	_, err = js.PublishMsg(t.Context(), &nats.Msg{Subject: capture.RequestSubject("default", "POST"), Data: []byte("what?")})
	require.NoError(t, err)
	w.gaps(gaps)
	w.sql("DELETE FROM asides")
	add("unreadable", "unreadable", "count", "count")
	w.gaps(gaps)

	// A head whose chunks nobody has.
	half := &capture.Request{
		ID: uuid.Must(uuid.NewV7()), Route: "default", Ingress: "ingress-1", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte("POST /200 HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"), Size: 10, Chunks: 2, SHA256: strings.Repeat("0", 64),
	}
	msg := half.Message()
	_, err = js.PublishMsg(t.Context(), &nats.Msg{Subject: msg.Subject, Data: half.Head, Header: nats.Header{
		capture.HeaderID: {msg.ID}, capture.HeaderCapture: {msg.Capture},
	}})
	require.NoError(t, err)
	add("incomplete " + msg.ID)
	r = w.gaps(gaps)
	require.Equal(t, "requests", r.Rows[1].Source)
	require.Equal(t, int64(1), r.Rows[1].SetAside)
}

// TestASpoolThatIsLost loses what an ingress has answered and could not publish.
// Only the counts at both ends, and an access log, can tell.
func TestASpoolThatIsLost(t *testing.T) {
	t.Parallel()
	w := start(t, harness.Distributed)
	kept := w.send(200, 50)
	w.holds()

	// Without their stream captures stay in the spool, while heartbeats go on.
	js := w.streams()
	require.NoError(t, js.DeleteStream(t.Context(), capture.RequestsStream))
	var lost []string
	for range 3 {
		lost = append(lost, w.send(200, 50))
	}
	lost = append(lost, w.send(200, 700<<10))
	w.awaitCaptured(5)
	w.Kill(harness.Ingress)
	code, out, err := w.Run(t.Context(), "recorder", "provision")
	require.NoError(t, err)
	require.Zero(t, code, out)

	// The spool is there: all of it is on its way, as far as verify can read it.
	r := w.holds("--answered", w.accessLog(), "--fence-timeout", "1s")
	require.False(t, r.Settled)
	require.Equal(t, int64(4), r.Rows[0].InFlight)
	require.Equal(t, int64(1), r.Rows[0].States["processed"])
	// It cannot be read: nobody knows.
	code, r = w.verify("--answered", w.accessLog(), "--fence-timeout", "1s", "--spool-dir", t.TempDir())
	require.Equal(t, 1, code, "%+v", r)
	require.False(t, r.Holds)
	require.Empty(t, r.Gaps)
	require.Equal(t, int64(4), r.Rows[0].Undecided)

	require.NoError(t, os.RemoveAll(w.SpoolDir()))
	require.NoError(t, w.Start(t.Context(), harness.Ingress))
	r = w.gaps(append(missing(lost...), "captured"), "--answered", w.accessLog(), "--fence-timeout", patience.String())
	require.True(t, r.Settled, "%+v", r.Waits)
	for _, g := range r.Gaps {
		if g.Kind == "captured" {
			require.Contains(t, g.Detail, "4 are missing")
		}
	}
	// Counts have no time.
	w.gaps([]string{"captured"}, "--answered", w.file(kept), "--until", "2000-01-01T00:00:00Z")
}

// TestAStreamThatIsPurged loses captures that the recorder has not seen, together
// with the spool. The outcomes name them.
func TestAStreamThatIsPurged(t *testing.T) {
	t.Parallel()
	w := start(t, harness.Distributed)
	w.send(200, 50)
	w.holds()
	require.NoError(t, w.Stop(harness.Recorder))
	js := w.streams()
	s, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	var lost []string
	for range 3 {
		lost = append(lost, w.send(200, 50))
	}
	w.send(200, 50)
	require.Eventually(t, func() bool {
		info, err := s.Info(t.Context())
		return err == nil && info.State.LastSeq == 5
	}, patience, pollEvery, "all are published")
	r := w.holds("--answered", w.accessLog(), "--fence-timeout", "1s")
	require.Equal(t, int64(4), r.Rows[0].InFlight, "%+v", r)
	w.Kill(harness.Ingress)
	require.NoError(t, os.RemoveAll(w.SpoolDir()))
	require.NoError(t, s.Purge(t.Context(), jetstream.WithPurgeSequence(5)))
	require.NoError(t, w.Start(t.Context(), harness.Recorder, harness.Ingress))
	r = w.gaps(missing(lost...), "--fence-timeout", patience.String())
	for _, g := range r.Gaps {
		require.Equal(t, []string{"outcomes"}, g.SeenIn)
	}
}
