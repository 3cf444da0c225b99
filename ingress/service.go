package ingress

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// Settings are the ingress's own; its binary adds those that reach NATS.
type Settings struct {
	service.Routes
	service.Upstream
	service.Ingress
}

// Options are what a Service is made of.
type Options struct {
	Settings *Settings
	DataDir  string     // for what has no directory of its own
	Conn     *nats.Conn // not closed by the Service
	Logger   *slog.Logger
	Registry prometheus.Registerer
	Ready    *service.Readiness

	fs    spool.FS // the operating system's by default
	times *timings // defaultTimings by default
}

// Service is the ingress. It is a [service.Component].
type Service struct {
	group   *service.Group
	server  *service.Server
	handler *handler
	ran     atomic.Bool
}

// stopWait bounds a stop that follows a failure: what a drain may take, and as
// long for requests under way.
const stopWait = 10 * time.Second

// readyEvery is how often the spool is asked whether it takes requests: a probe
// that is older misleads no balancer, which asks every few seconds.
const readyEvery = time.Second

// New opens the spool and binds the address. After an error nothing is left
// open. A Service that is not run must be stopped.
func New(o Options) (_ *Service, err error) {
	s := o.Settings
	if s.Store != "synced" {
		return nil, fmt.Errorf("HOLDFAST_STORE=%s is not supported by this version; synced is", s.Store)
	}
	if !capture.ValidIngress(s.IngressID) {
		return nil, fmt.Errorf("HOLDFAST_INGRESS_ID %q: letters, digits, - and _, at most 64", s.IngressID)
	}
	times := defaultTimings()
	if o.times != nil {
		times = *o.times
	}
	group := service.NewGroup(o.Logger, stopWait)
	defer func() {
		if err != nil {
			_ = group.Stop(context.Background())
		}
	}()
	cert, err := serverTLS(s.TLSCertFile, s.TLSKeyFile)
	if err != nil {
		return nil, err
	}
	routes, err := newRoutes(s)
	if err != nil {
		return nil, err
	}
	group.OnStop("connections to the API", func(context.Context) error { routes.close(); return nil })
	sp, err := spool.Open(spool.Options{
		Dir: s.SpoolDir, MaxBytes: int64(s.SpoolMaxBytes), Salvage: s.SpoolSalvage, Logger: o.Logger, FS: o.fs,
	})
	if err != nil {
		return nil, fmt.Errorf("open the spool: %w", err)
	}
	group.OnStop("spool", func(context.Context) error { return sp.Close() })
	bodies, err := bodyDir(o.DataDir)
	if err != nil {
		return nil, err
	}

	inflight := &limiter{max: int64(s.MaxInflightBytes)}
	pub := newPublisher(o.Conn, sp, s.IngressID, o.Logger, times)
	m := newMetrics(o.Registry, sp, inflight, func() float64 { return float64(routes.def.pool.Conns()) }, pub.window.pending)
	pub.m = m
	w := &words{nc: o.Conn, spool: sp, ingress: s.IngressID, log: o.Logger, heard: pub.window.heard}
	h := &handler{
		routes: routes, head: headWriter{trusted: s.TrustedProxies}, spool: sp, ingress: s.IngressID,
		inline: int64(s.InlineBytes), bodyDir: bodies, inflight: inflight,
		times: times, retryAfter: s.RetryAfter, accessLog: s.AccessLog, log: o.Logger, m: m,
	}
	server, err := service.Listen("ingress", s.IngressAddr, h, o.Logger)
	if err != nil {
		return nil, err
	}
	// A head and a body that fits into one message come at once, or the client
	// holds room for nothing; for larger bodies each part has this time. Answers
	// may be streamed for as long as the API takes, which its own timeout bounds.
	server.HTTP.ReadTimeout, server.HTTP.WriteTimeout = times.stalled, 0
	// One message to the broker holds head and inline body: 1 MiB at most.
	server.HTTP.MaxHeaderBytes = maxHead
	// OPTIONS * is the API's, like every other target.
	server.HTTP.DisableGeneralOptionsHandler = true
	server.TLS = cert
	svc := &Service{group: group, server: server, handler: h}

	// The stack: clients first, then what the spool still holds goes out, then
	// the publisher, then the last heartbeat, and the spool last.
	group.OnStop("goodbye", func(context.Context) error {
		w.beat(true)
		_ = o.Conn.FlushTimeout(time.Second) // a goodbye that is lost costs a replay a question
		return nil
	})
	group.Add("words", service.NewLoop(w.run))
	group.Add("publisher", service.NewLoop(pub.run))
	group.OnStop("drain", func(ctx context.Context) error {
		if svc.ran.Load() {
			drain(ctx, sp, o.Logger, times.drain)
		}
		return nil
	})
	group.Add("http", server)
	started := o.Ready.Flag("ingress", "not started")
	room := o.Ready.Flag("spool", "not started")
	group.Add("readiness", service.NewLoop(func(ctx context.Context) error {
		defer started.NotReady("stopping")
		started.Ready()
		tick := time.NewTicker(readyEvery)
		defer tick.Stop()
		for {
			if err := h.ready(); err != nil {
				room.NotReady(err.Error())
			} else {
				room.Ready()
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
		}
	}))
	return svc, nil
}

// maxHead bounds a request's head. One message to the broker holds head and
// inline body: 1 MiB at most, with room for what the gateway adds.
const maxHead = 64 << 10

// ready refuses traffic for a spool that has no room for a plain request, where
// requests must be stored.
func (h *handler) ready() error {
	if h.routes.def.mode != captureRequired {
		return nil
	}
	res, err := h.spool.Reserve(2, h.inline+maxHead)
	if err != nil {
		return err
	}
	res.Release()
	return nil
}

// serverTLS is the certificate that clients see, nil for plain HTTP.
func serverTLS(certFile, keyFile string) (*tls.Config, error) {
	if certFile == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("HOLDFAST_TLS_CERT_FILE and HOLDFAST_TLS_KEY_FILE: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}}, nil
}

// bodyDir is where bodies of unknown length are kept while they are read.
// Whatever a killed process left there is gone: the files have no names.
func bodyDir(dataDir string) (string, error) {
	dir := filepath.Join(dataDir, "bodies")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the directory for bodies: %w", err)
	}
	return dir, nil
}

// drain waits, for a bounded time, until everything in the spool is released.
func drain(ctx context.Context, sp *spool.Spool, log *slog.Logger, most time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for sp.Stats().Unreleased > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			log.Info("stopping with records in the spool; the next start publishes them", "unreleased", sp.Stats().Unreleased)
			return
		}
	}
}

// Addr is where clients are served.
func (s *Service) Addr() net.Addr { return s.server.Addr() }

// Run serves until Stop, or until ctx is done.
func (s *Service) Run(ctx context.Context) error {
	s.ran.Store(true)
	return s.group.Run(ctx)
}

// Stop takes no new requests, finishes those under way, waits a little for the
// spool to be released, and closes it.
func (s *Service) Stop(ctx context.Context) error { return s.group.Stop(ctx) }

var _ service.Component = (*Service)(nil)
