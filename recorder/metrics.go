package recorder

import (
	"errors"
	"maps"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// metrics shows the ledger's counts as of the last look, and nothing when that
// failed; and whether commits go through. It is safe for concurrent use.
type metrics struct {
	stats  atomic.Pointer[ledger.Stats]
	commit atomic.Pointer[error] // nil until the first; points to nil after a good one
}

// committed notes how a commit went.
func (m *metrics) committed(err error) { m.commit.Store(&err) }

var (
	descRequests = prometheus.NewDesc("holdfast_ledger_requests", "Requests in the ledger.", []string{"state"}, nil)
	descAside    = prometheus.NewDesc("holdfast_aside", "Messages that nobody could take, and incomplete bodies, kept in the ledger.", []string{"kind"}, nil)
	descReplays  = prometheus.NewDesc("holdfast_replay_requests_total", "Attempts of replay runs that have ended.", []string{"result"}, nil)
	descOldest   = prometheus.NewDesc("holdfast_oldest_replayable_timestamp_seconds",
		"When the oldest replayable request was received; absent when nothing is replayable.", nil, nil)
	descEarly   = prometheus.NewDesc("holdfast_ledger_early", "Facts about requests whose capture has not come.", nil, nil)
	descDropped = prometheus.NewDesc("holdfast_ledger_early_dropped_total", "Completion events for unknown requests that were dropped for want of room.", nil, nil)
	descExpired = prometheus.NewDesc("holdfast_ledger_expired_total", "Closed requests deleted after the retention.", nil, nil)
	descPayload = prometheus.NewDesc("holdfast_ledger_payload_bytes", "Payloads of processed requests.", nil, nil)
	descFree    = prometheus.NewDesc("holdfast_ledger_free_bytes", "Room left on the ledger's disk; absent when that is not known.", nil, nil)
	descFull    = prometheus.NewDesc("holdfast_ledger_full", "Whether the last batch was refused for want of room.", nil, nil)
	descFailing = prometheus.NewDesc("holdfast_ledger_unavailable", "Whether the last batch could not be committed for another reason.", nil, nil)
)

// Describe implements [prometheus.Collector].
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descRequests, descAside, descReplays, descOldest, descEarly, descDropped, descExpired, descPayload, descFree, descFull, descFailing,
	} {
		out <- d
	}
}

// Collect implements [prometheus.Collector].
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	show := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	if err := m.commit.Load(); err != nil {
		full := errors.Is(*err, ledger.ErrFull)
		show(descFull, prometheus.GaugeValue, one(full))
		show(descFailing, prometheus.GaugeValue, one(*err != nil && !full))
	}
	s := m.stats.Load()
	if s == nil {
		return
	}
	for state, n := range s.Requests {
		show(descRequests, prometheus.GaugeValue, float64(n), string(state))
	}
	for kind, n := range withZeros(s.Aside, kindCapture, "completion", "incomplete") {
		show(descAside, prometheus.GaugeValue, float64(n), kind)
	}
	for result, n := range withZeros(s.Replays, "processed", "failed", "rejected", "unknown") {
		show(descReplays, prometheus.CounterValue, float64(n), result)
	}
	if !s.OldestReplayable.IsZero() {
		show(descOldest, prometheus.GaugeValue, float64(s.OldestReplayable.UnixNano())/float64(time.Second))
	}
	show(descEarly, prometheus.GaugeValue, float64(s.Early))
	show(descDropped, prometheus.CounterValue, float64(s.EarlyDropped))
	show(descExpired, prometheus.CounterValue, float64(s.Expired))
	show(descPayload, prometheus.GaugeValue, float64(s.PayloadBytes))
	if s.FreeBytes >= 0 {
		show(descFree, prometheus.GaugeValue, float64(s.FreeBytes))
	}
}

// withZeros gives the counts and a 0 for each label that has none yet: a rate
// over a counter that appears with its first event does not see that one.
func withZeros(counts map[string]int64, labels ...string) map[string]int64 {
	all := make(map[string]int64, len(counts)+len(labels))
	for _, label := range labels {
		all[label] = 0
	}
	maps.Copy(all, counts)
	return all
}

func one(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
