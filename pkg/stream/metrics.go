package stream

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what loops and trimmers count. Services that share a registry
// share the metrics; their labels tell them apart.
type Metrics struct {
	pending      *prometheus.GaugeVec     // by stream
	batchSize    *prometheus.HistogramVec // by service
	lastCommit   *prometheus.GaugeVec     // by service
	commitErrors *prometheus.CounterVec   // by service
	redelivered  *prometheus.CounterVec   // by stream
	terminated   *prometheus.CounterVec   // by stream
	trimmed      *prometheus.CounterVec   // by stream
}

// NewMetrics registers the metrics, or finds those that another service of the
// process has registered.
func NewMetrics(registry prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		pending: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "holdfast_consumer_pending", Help: "Messages of the stream that are not committed yet, as of the last look some seconds ago.",
		}, []string{"stream"}),
		batchSize: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "holdfast_batch_size", Help: "Messages in one commit.",
			Buckets: []float64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000},
		}, []string{"service"}),
		lastCommit: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "holdfast_last_commit_timestamp_seconds", Help: "When the last batch was committed.",
		}, []string{"service"}),
		commitErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_commit_errors_total", Help: "Commits that failed and were tried again.",
		}, []string{"service"}),
		redelivered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_redelivered_total", Help: "Messages of the stream that came again.",
		}, []string{"stream"}),
		terminated: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_terminated_total", Help: "Messages of the stream that were set aside.",
		}, []string{"stream"}),
		trimmed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_trimmed_total", Help: "Committed messages that were purged from the stream.",
		}, []string{"stream"}),
	}
	return m, errors.Join(
		register(registry, &m.pending), register(registry, &m.batchSize), register(registry, &m.lastCommit),
		register(registry, &m.commitErrors), register(registry, &m.redelivered), register(registry, &m.terminated),
		register(registry, &m.trimmed),
	)
}

// register registers the collector, or puts the one that is there in its place.
func register[C prometheus.Collector](registry prometheus.Registerer, c *C) error {
	err := registry.Register(*c)
	if there, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if same, ok := there.ExistingCollector.(C); ok {
			*c = same
			return nil
		}
	}
	return err
}
