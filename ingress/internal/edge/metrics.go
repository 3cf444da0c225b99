package edge

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	refused    *prometheus.CounterVec
	handshakes prometheus.Counter
	panics     prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Server) *metrics {
	m := &metrics{
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "holdfast_connections_refused_total", Help: "Connections of clients that were refused, by the limit that they exceeded.",
		}, []string{"limit"}),
		handshakes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_tls_handshake_failures_total", Help: "TLS handshakes of clients that failed.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "holdfast_panics_total", Help: "Panics while a request was handled. Each is a fault of the program, and is logged.",
		}),
	}
	reg.MustRegister(m.refused, m.handshakes, m.panics,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_connections", Help: "Connections of clients that are open.",
		}, func() float64 { return float64(s.open()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_head_bytes", Help: "Bytes that heads of requests take above 4 KiB each; above 64 MiB in all, further ones are answered 503.",
		}, func() float64 { return float64(s.headBytes.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_connections_max", Help: "HOLDFAST_MAX_CONNECTIONS.",
		}, func() float64 { return float64(s.o.Conns) }),
	)
	return m
}
