package service

import (
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Condition is one thing that readiness depends on and that does not hold.
type Condition struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// Readiness is what /readyz answers from: named conditions, all of which must
// hold. It is safe for concurrent use. Names of a service begin with its own
// where several share a process; the same name twice makes two conditions.
type Readiness struct {
	mu     sync.Mutex
	checks []condition
}

type condition struct {
	name string
	fn   func() error
}

// NewReadiness makes one without conditions, which is ready.
func NewReadiness() *Readiness { return &Readiness{} }

// Check adds a condition that holds while fn returns nil. It is called at each
// probe, concurrently with itself, and must be quick: no I/O, no long lock. Its
// error is shown to whoever asks.
func (r *Readiness) Check(name string, fn func() error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checks = append(r.checks, condition{name, fn})
}

// Flag adds a condition that its owner sets. It begins as not ready for the
// reason given, or as ready when there is none.
func (r *Readiness) Flag(name, reason string) *Flag {
	f := &Flag{}
	if reason != "" {
		f.NotReady(reason)
	}
	r.Check(name, f.err)
	return f
}

// Failing gives the conditions that do not hold, in the order they were added.
func (r *Readiness) Failing() []Condition {
	r.mu.Lock()
	checks := r.checks[:len(r.checks):len(r.checks)]
	r.mu.Unlock()
	failing := []Condition{}
	for _, c := range checks {
		if err := c.fn(); err != nil {
			failing = append(failing, Condition{c.name, err.Error()})
		}
	}
	return failing
}

// Flag is a condition that its owner sets. It is safe for concurrent use.
type Flag struct {
	reason atomic.Pointer[notReady]
}

type notReady string

func (n *notReady) Error() string { return string(*n) }

// Ready says that the condition holds.
func (f *Flag) Ready() { f.reason.Store(nil) }

// NotReady says that it does not, and why.
func (f *Flag) NotReady(reason string) {
	n := notReady(reason)
	f.reason.Store(&n)
}

func (f *Flag) err() error {
	if n := f.reason.Load(); n != nil {
		return n
	}
	return nil
}

// NewRegistry makes a registry with the collectors of the Go runtime and of the
// process, and holdfast_build_info for the named binary.
func NewRegistry(name string) *prometheus.Registry {
	registry := prometheus.NewRegistry()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "holdfast_build_info",
		Help:        "What is running; the value is always 1.",
		ConstLabels: prometheus.Labels{"version": Version(), "go_version": runtime.Version(), "service": name},
	})
	build.Set(1)
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		build,
	)
	return registry
}

// NewOps binds the ops listener:
//
//	/livez         200 as long as the process can answer; it asks nothing else
//	/readyz        200, or 503 with the conditions that fail, as
//	               {"ready":false,"failing":[{"name":"…","reason":"…"}]}
//	/metrics       the registry, for Prometheus
//	/debug/pprof/  only where the bound address is loopback: profiles show
//	               memory, and a trace slows the process down
func NewOps(addr Addr, registry *prometheus.Registry, ready *Readiness, logger *slog.Logger) (*Server, error) {
	mux := http.NewServeMux()
	server, err := Listen("ops", addr, mux, logger)
	if err != nil {
		return nil, err
	}
	// A profile or trace takes as long as its reader asks, and pprof refuses one
	// that is longer than this.
	server.HTTP.WriteTimeout = 5 * time.Minute
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /readyz", ready)
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: ErrorLog(logger, "metrics"),
		// One broken collector must not hide the others.
		ErrorHandling: promhttp.ContinueOnError,
		// A few Prometheus servers, not a crowd; more are answered 503.
		MaxRequestsInFlight: 8,
		// Prometheus gives up after 10 seconds unless told otherwise.
		Timeout: 10 * time.Second,
	}))
	if bound, ok := server.Addr().(*net.TCPAddr); ok && bound.IP.IsLoopback() {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return server, nil
}

// ServeHTTP answers a readiness probe.
func (r *Readiness) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	failing := r.Failing()
	status := http.StatusOK
	if len(failing) > 0 {
		status = http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	// A probe that has gone is all that can fail here.
	_ = json.NewEncoder(w).Encode(struct {
		Ready   bool        `json:"ready"`
		Failing []Condition `json:"failing"`
	}{len(failing) == 0, failing})
}
