package spool_test

import (
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/stretchr/testify/require"
)

// bench runs do in 64 goroutines beside a publisher that reads everything and a
// ledger that releases it.
func bench(b *testing.B, records int, do func(s *spool.Spool) error) {
	s, err := spool.Open(spool.Options{Dir: b.TempDir(), MaxBytes: 1 << 30})
	require.NoError(b, err)
	published := make(chan struct{})
	go func() {
		defer close(published)
		r := s.NewReader()
		for {
			rec, err := r.Next(b.Context())
			if err != nil {
				return
			}
			if i := rec.Position.Index; i%256 == 0 {
				s.Release(rec.Position.Start, spool.Range{First: i - 255, Last: i})
			}
		}
	}()
	var failed atomic.Pointer[error]
	b.SetParallelism(32) // times two cores
	b.ReportAllocs()
	before := cpu(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := do(s); err != nil {
				failed.Store(&err)
				return
			}
		}
	})
	b.StopTimer()
	require.Nil(b, failed.Load())
	total := float64(b.N * records)
	b.ReportMetric(total/b.Elapsed().Seconds(), "records/s")
	b.ReportMetric((cpu(b)-before)/total, "cpu-µs/record")
	b.ReportMetric(total/float64(s.Stats().Commits), "records/fsync")
	require.NoError(b, s.Close())
	<-published
}

func cpu(b *testing.B) (us float64) {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3
}

func BenchmarkAppendSynced(b *testing.B) {
	data := make([]byte, 1<<10)
	bench(b, 1, func(s *spool.Spool) error {
		r, err := s.Reserve(1, 1<<10)
		if err != nil {
			return err
		}
		defer r.Release()
		p, err := r.Append(data)
		if err != nil {
			return err
		}
		return s.WaitSynced(b.Context(), p)
	})
}

// BenchmarkCaptureAndOutcome does what a request does.
func BenchmarkCaptureAndOutcome(b *testing.B) {
	data := make([]byte, 1<<10)
	bench(b, 2, func(s *spool.Spool) error {
		r, err := s.Reserve(2, 1<<10+200)
		if err != nil {
			return err
		}
		defer r.Release()
		p, err := r.Append(data)
		if err != nil {
			return err
		}
		if err := s.WaitSynced(b.Context(), p); err != nil {
			return err
		}
		_, err = r.AppendWritten(data[:200])
		return err
	})
}
