package replayer_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

// BenchmarkRun sends 1 KiB requests to an API that answers at once; each commit
// is durable.
func BenchmarkRun(bench *testing.B) {
	for _, c := range []struct{ concurrency, keys int }{{1, 0}, {4, 0}, {16, 0}, {64, 0}, {4, 10_000}, {64, 10_000}, {64, 10}} {
		bench.Run(fmt.Sprintf("concurrency %d, %d keys", c.concurrency, c.keys), func(bench *testing.B) {
			b := newBooks(bench)
			body := make([]byte, 1<<10)
			for n := 0; n < bench.N; n += 500 {
				batch := make([]request, min(500, bench.N-n))
				for i := range batch {
					batch[i].body = body
					if c.keys > 0 {
						batch[i].key = fmt.Sprint((n + i) % c.keys)
					}
				}
				b.capture(bench, batch...)
			}
			a := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
			defer a.Close()
			o := options(bench, b, a.URL)
			o.Clock, o.Concurrency = replayer.SystemClock{}, c.concurrency
			bench.ResetTimer()
			began := time.Now()
			report, err := replayer.Run(bench.Context(), o)
			bench.ReportMetric(float64(bench.N)/time.Since(began).Seconds(), "requests/s")
			require.NoError(bench, err)
			require.Equal(bench, ledger.RunCounts{Sent: int64(bench.N), Processed: int64(bench.N)}, report.RunCounts)
			require.Equal(bench, int64(bench.N), b.states(bench)[capture.StateProcessed])
		})
	}
}
