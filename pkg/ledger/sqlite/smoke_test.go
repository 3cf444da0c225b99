package sqlite_test

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
)

func newID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

func request(id uuid.UUID, body int) ledger.Item {
	return ledger.Item{
		Captured: capture.Captured{Request: &capture.Request{
			ID: id, Route: "default", Ingress: "a", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
			Head: []byte("POST /v1/calls/12345?x=y HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 1024\r\n\r\n"),
			Body: make([]byte, body), Size: int64(body),
		}},
		Ref: capture.SpoolRef{Ingress: "a", Start: "00ff", Index: 7},
	}
}

func TestSmoke(t *testing.T) {
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Options{Path: filepath.Join(t.TempDir(), "ledger.db")})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.Ping(ctx))
	a, b := newID(), newID()
	res, err := s.Record(ctx, []ledger.Item{request(a, 1024), request(b, 0), request(a, 1024)})
	require.NoError(t, err)
	require.True(t, res[0].New)
	require.False(t, res[2].New)
	out := func(id uuid.UUID, v capture.Verdict, st int) ledger.Fact {
		return ledger.Fact{Outcome: &capture.Outcome{ID: id, Attempt: capture.Attempt{Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: st, Verdict: v}}}
	}
	errs, err := s.Complete(ctx, []ledger.Fact{out(a, capture.Processed, 200), out(b, capture.Failed, 503), out(newID(), capture.Failed, 500)})
	require.NoError(t, err)
	require.Equal(t, []error{nil, nil, nil}, errs)
	st, err := s.Stats(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 1, st.Requests[capture.StateProcessed])
	require.EqualValues(t, 1, st.Requests[capture.StateFailed])
	require.EqualValues(t, 1, st.Early)
	page, err := s.List(ctx, ledger.Filter{Replayable: true}, "", 10)
	require.NoError(t, err)
	require.Len(t, page.Requests, 1)
	run, l, picked, err := s.OpenRun(ctx, ledger.Filter{}, "", "me", time.Minute)
	require.NoError(t, err)
	require.False(t, picked)
	c, err := s.Select(ctx, l, 3, uuid.Nil, 10)
	require.NoError(t, err)
	require.Len(t, c, 1)
	bg, err := s.Begin(ctx, l, []uuid.UUID{b, a}, ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 3})
	require.NoError(t, err)
	require.Equal(t, 2, bg[0].Attempt)
	require.Equal(t, ledger.SkipState, bg[1].Skip)
	left, err := s.Left(ctx, l)
	require.NoError(t, err)
	require.Equal(t, ledger.Left{Waiting: 1}, left)
	errs, err = s.End(ctx, l, []ledger.Ended{{ID: b, Token: bg[0].Token, Attempt: capture.Attempt{Number: 2, Run: run.ID, StartedAt: time.Now(), EndedAt: time.Now(), Status: 200, Verdict: capture.Processed}}})
	require.NoError(t, err)
	require.NoError(t, errs[0])
	d, err := s.Get(ctx, b)
	require.NoError(t, err)
	require.Equal(t, capture.StateProcessed, d.State)
	require.Len(t, d.Facts.Attempts, 2)
	n, more, err := s.Expire(ctx, ledger.Retention{KeepProcessed: time.Nanosecond, Retention: time.Hour}, 10)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	require.False(t, more)
	require.NoError(t, s.EndRun(ctx, l, []byte("{}")))
}

func BenchmarkRecordComplete(b *testing.B) {
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Options{Path: filepath.Join(b.TempDir(), "ledger.db")})
	require.NoError(b, err)
	defer s.Close()
	var tr, tc time.Duration
	for b.Loop() {
		items := make([]ledger.Item, 500)
		facts := make([]ledger.Fact, 500)
		for i := range items {
			id := newID()
			items[i] = request(id, 1024)
			facts[i] = ledger.Fact{Outcome: &capture.Outcome{ID: id, Ingress: "a", Attempt: capture.Attempt{Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: 200, Verdict: capture.Processed}}}
		}
		t0 := time.Now()
		_, err := s.Record(ctx, items)
		require.NoError(b, err)
		t1 := time.Now()
		_, err = s.Complete(ctx, facts)
		require.NoError(b, err)
		tr += t1.Sub(t0)
		tc += time.Since(t1)
	}
	b.ReportMetric(float64(tr.Nanoseconds())/float64(b.N)/500, "ns/record")
	b.ReportMetric(float64(tc.Nanoseconds())/float64(b.N)/500, "ns/complete")
}
