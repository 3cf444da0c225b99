package ingress

import (
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/pkg/spool"
)

// durationBuckets reach from an fsync on a fast disk to the longest timeouts.
var durationBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}

type metrics struct {
	requests *prometheus.CounterVec
	// counters remembers the counters by their labels: looking one up in the
	// vector costs more than a whole spool record.
	counters sync.Map

	captureDuration  prometheus.Histogram
	upstreamDuration prometheus.Histogram

	published    prometheus.Counter
	republished  prometheus.Counter
	publishError *prometheus.CounterVec
	lostOutcomes prometheus.Counter
	upgraded     prometheus.Gauge
}

type requestLabels struct {
	route, method string
	code          int
	stored        stored
}

func newMetrics(reg prometheus.Registerer, sp *spool.Spool, inflight *limiter, conns func() float64, pending func() float64) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_requests_total",
			Help: "Requests answered, by route, method, status (0: the connection was reset) and where they were stored (empty: not captured).",
		}, []string{"route", "method", "code", "stored"}),
		captureDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "holdfast_capture_duration_seconds", Buckets: durationBuckets,
			Help: "From the append of a capture to the knowledge that it is durable.",
		}),
		upstreamDuration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "holdfast_upstream_duration_seconds", Buckets: durationBuckets,
			Help: "From the begin of forwarding to the head of the API's answer.",
		}),
		published: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_published_total", Help: "Spool records acknowledged by a stream, repeats included.",
		}),
		republished: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_republish_total", Help: "Times that the publisher went back in the spool, after a disconnect or because records stayed unreleased for too long.",
		}),
		publishError: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_publish_errors_total", Help: "Refusals by the broker: retry (for the moment) or aside (for good).",
		}, []string{"kind"}),
		lostOutcomes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_outcomes_unwritten_total", Help: "Outcomes that could not be written to the spool: their requests are replayed.",
		}),
		upgraded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "holdfast_upgraded_connections", Help: "Connections of clients that carry another protocol, WebSocket for instance.",
		}),
	}
	stat := func(name, help string, f func(spool.Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return f(sp.Stats()) })
	}
	reg.MustRegister(m.requests, m.captureDuration, m.upstreamDuration, m.published, m.republished, m.publishError, m.lostOutcomes, m.upgraded,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_inflight_bytes", Help: "Bytes of requests held in memory or temporary files; HOLDFAST_MAX_INFLIGHT_BYTES is the limit.",
		}, func() float64 { return float64(inflight.used.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_inflight_max_bytes", Help: "HOLDFAST_MAX_INFLIGHT_BYTES.",
		}, func() float64 { return float64(inflight.max) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_upstream_connections", Help: "Connections open to the API.",
		}, conns),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_publish_pending", Help: "Spool records published and not yet acknowledged by a stream.",
		}, pending),
		stat("holdfast_spool_bytes", "Bytes the spool takes on disk.", func(s spool.Stats) float64 { return float64(s.Bytes) }),
		stat("holdfast_spool_max_bytes", "HOLDFAST_SPOOL_MAX_BYTES.", func(s spool.Stats) float64 { return float64(s.MaxBytes) }),
		stat("holdfast_spool_unreleased", "Spool records that nobody has made durable elsewhere yet.", func(s spool.Stats) float64 { return float64(s.Unreleased) }),
		stat("holdfast_spool_oldest_unreleased_timestamp_seconds", "Time of the oldest such record, 0 without one.", func(s spool.Stats) float64 {
			if s.OldestUnreleased.IsZero() {
				return 0
			}
			return float64(s.OldestUnreleased.UnixMilli()) / 1000
		}),
		stat("holdfast_spool_failures_total", "Segments given up after a write or fsync error.", func(s spool.Stats) float64 { return float64(s.Failures) }),
		stat("holdfast_spool_aside", "Spool records that the broker refused for good, kept aside in files.", func(s spool.Stats) float64 { return float64(s.Aside) }),
	)
	return m
}

// knownMethods bounds the label: any client may invent methods.
func methodLabel(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions, http.MethodTrace:
		return method
	}
	return "OTHER"
}

func (m *metrics) count(route, method string, code int, st stored) {
	key := requestLabels{route, method, code, st}
	c, ok := m.counters.Load(key)
	if !ok {
		counter := m.requests.WithLabelValues(route, methodLabel(method), strconv.Itoa(code), string(st))
		if methodLabel(method) != method {
			counter.Inc()
			return
		}
		c, _ = m.counters.LoadOrStore(key, counter)
	}
	c.(prometheus.Counter).Inc()
}

func since(t time.Time) float64 { return time.Since(t).Seconds() }
