package ingress

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
)

func keep(n int) change { return set(func(s *Settings) { s.KeepAnswers = service.ByteSize(n) }) }

// keptOf gives the outcome of a request as it stands in the spool.
func (g *gateway) keptOf(id uuid.UUID) *capture.Outcome {
	g.t.Helper()
	for _, m := range g.spooled() {
		if m.outcome != nil && m.outcome.ID == id {
			return m.outcome
		}
	}
	g.t.Fatal("there is no outcome")
	return nil
}

func TestAnswersAreKeptUpToWhatTheRouteSays(t *testing.T) {
	binary := pattern(100 << 10)
	bodies := map[string][]byte{
		"/none": {}, "/small": []byte(`{"a":1}`), "/exact": binary[:64<<10], "/over": binary[:64<<10+1], "/large": binary, "/streamed": binary,
	}
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "x/y")
		w.Header().Set("Content-Encoding", "br")
		body := bodies[r.URL.Path]
		if r.URL.Path == "/streamed" {
			for part := range bytes.Lines(bytes.ReplaceAll(body, []byte{7}, []byte{'\n'})) {
				_, _ = w.Write(part)
				_ = http.NewResponseController(w).Flush()
			}
			return
		}
		_, _ = w.Write(body)
	}, keep(64<<10))
	for path, body := range bodies {
		if path == "/streamed" {
			body = bytes.ReplaceAll(body, []byte{7}, []byte{'\n'})
		}
		a := g.must("POST", path, strings.NewReader("x"))
		require.Equal(t, body, append([]byte{}, a.body...), path)
		got := g.keptOf(a.id(t))
		require.Equal(t, capture.Processed, got.Attempt.Verdict)
		require.Equal(t, &capture.Answer{
			Type: "x/y", Encoding: "br", Cut: len(body) > 64<<10, Body: append([]byte{}, body[:min(len(body), 64<<10)]...),
		}, got.Answer, path)
	}
	g.settled()

	// They reach the stream, whole.
	sizes := 0
	for _, m := range b.eventually("HOLDFAST_COMPLETIONS", len(bodies)) {
		if m.outcome != nil && m.outcome.Answer != nil {
			sizes++
		}
	}
	require.Equal(t, len(bodies), sizes)
}

// TestWithoutKeepAnswersNothingIsKept, nor reserved.
func TestWithoutKeepAnswersNothingIsKept(t *testing.T) {
	g, _ := run(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("hello")) })
	a := g.must("POST", "/", strings.NewReader("x"))
	require.Nil(t, g.keptOf(a.id(t)).Answer)
	require.Zero(t, g.h.routes.only.answerRoom)
	require.Zero(t, g.h.routes.keeps())
}

// TestAnswersThatBreakOffAreCut, and there is none where there was none.
func TestAnswersThatBreakOffAreCut(t *testing.T) {
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/gone" {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Length", "100000")
		_, _ = w.Write(pattern(50000))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}, keep(64<<10))
	a, err := g.do("POST", "/", strings.NewReader("x"))
	require.NoError(t, err)
	require.Error(t, a.err)
	got := g.keptOf(a.id(t))
	require.Equal(t, capture.Failed, got.Attempt.Verdict)
	require.True(t, got.Answer.Cut)
	require.Equal(t, pattern(50000)[:len(got.Answer.Body)], got.Answer.Body)
	a = g.must("POST", "/gone", strings.NewReader("x"))
	require.Equal(t, http.StatusBadGateway, a.StatusCode)
	require.Nil(t, g.keptOf(a.id(t)).Answer, "there was no answer")
	g.settled()
}

// TestKeepingAnswersTakesNoMoreMemoryThanThereIs: where the bytes in flight are
// taken, answers are cut, and clients have them whole.
func TestKeepingAnswersTakesNoMoreMemoryThanThereIs(t *testing.T) {
	body := pattern(300 << 10)
	hold, held := make(chan struct{}), make(chan struct{})
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/hold" {
			close(held)
			<-hold
		}
		_, _ = w.Write(body)
	}, keep(512<<10), set(func(s *Settings) { s.MaxInflightBytes = 300 << 10 }))
	done := make(chan struct{})
	go func() {
		defer close(done)
		g.must("POST", "/hold", bytes.NewReader(pattern(200<<10)))
	}()
	<-held
	a := g.must("POST", "/", strings.NewReader("x"))
	require.Equal(t, body, a.body)
	got := g.keptOf(a.id(t))
	require.True(t, got.Answer.Cut)
	require.Less(t, len(got.Answer.Body), 100<<10)
	require.Equal(t, body[:len(got.Answer.Body)], got.Answer.Body)
	close(hold)
	<-done
	g.settled()
}

// TestRoomIsReservedForAnswers: an outcome with the largest answer always has a
// place.
func TestRoomIsReservedForAnswers(t *testing.T) {
	body := bytes.Repeat([]byte{0xff}, capture.MaxAnswer)
	g, _ := run(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", strings.Repeat("<", 3000))
		_, _ = w.Write(body)
	}, keep(capture.MaxAnswer), set(func(s *Settings) { s.SpoolMaxBytes, s.MaxBodyBytes = 16<<20, 1<<20 }))
	for range 100 {
		a := g.must("POST", "/", strings.NewReader("x"))
		if a.StatusCode == http.StatusServiceUnavailable {
			require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
			return
		}
		require.Len(t, g.keptOf(a.id(t)).Answer.Body, capture.MaxAnswer)
	}
	t.Fatal("the spool does not fill")
}

func BenchmarkOutcome(b *testing.B) {
	o := capture.Outcome{ID: uuid.Must(uuid.NewV7()), Ingress: "gw", Attempt: capture.Attempt{Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: 200, Verdict: capture.Processed}}
	for name, size := range map[string]int{"off": -1, "1KiB": 1 << 10, "64KiB": 64 << 10} {
		b.Run(name, func(b *testing.B) {
			o.Answer = nil
			if size >= 0 {
				o.Answer = &capture.Answer{Body: make([]byte, size)}
			}
			buf := make([]byte, 0, 1<<20)
			b.ReportAllocs()
			for b.Loop() {
				buf = o.AppendJSON(buf[:0])
			}
		})
	}
}
