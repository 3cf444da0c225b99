package ingress

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
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
}

// Service is the ingress. It is a [service.Component].
type Service struct {
	group  *service.Group
	server *service.Server
}

// drainWait bounds how long a stop waits for the spool to be released, within
// the time that the stop has: words come within milliseconds where recorder and
// acker are there, and where they are not the spool keeps everything.
const drainWait = 5 * time.Second

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
	group := service.NewGroup(o.Logger, drainWait)
	defer func() {
		if err != nil {
			_ = group.Stop(context.Background())
		}
	}()
	routes, err := newRoutes(s)
	if err != nil {
		return nil, err
	}
	group.OnStop("connections to the API", func(context.Context) error { routes.close(); return nil })
	dir := s.SpoolDir
	sp, err := spool.Open(spool.Options{
		Dir: filepath.Join(dir), MaxBytes: int64(s.SpoolMaxBytes), Salvage: s.SpoolSalvage, Logger: o.Logger,
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
	pub := newPublisher(o.Conn, sp, s.IngressID, o.Logger)
	m := newMetrics(o.Registry, sp, inflight, func() float64 { return float64(routes.def.pool.Conns()) }, pub.window.pending)
	pub.m = m
	w := &words{nc: o.Conn, spool: sp, ingress: s.IngressID, log: o.Logger, heard: pub.window.heard}
	h := &handler{
		routes: routes, head: headWriter{trusted: s.TrustedProxies}, spool: sp, ingress: s.IngressID,
		inline: int64(s.InlineBytes), bodyDir: bodies, inflight: inflight,
		retryAfter: s.RetryAfter, accessLog: s.AccessLog, log: o.Logger, m: m,
	}
	server, err := service.Listen("ingress", s.IngressAddr, h, o.Logger)
	if err != nil {
		return nil, err
	}
	// Answers may be streamed for as long as the API takes, which its own
	// timeout bounds; bodies as long as a slow line needs.
	server.HTTP.ReadTimeout, server.HTTP.WriteTimeout = 0, 0
	// One message to the broker holds head and inline body: 1 MiB at most.
	server.HTTP.MaxHeaderBytes = 64 << 10

	// The stack: clients first, then what the spool still holds goes out, then
	// the publisher, and the spool last.
	group.Add("words", service.NewLoop(w.run))
	group.Add("publisher", service.NewLoop(pub.run))
	group.OnStop("drain", func(ctx context.Context) error { drain(ctx, sp, w); return nil })
	group.Add("http", server)
	ready := o.Ready.Flag("ingress", "not started")
	group.Add("readiness", service.NewLoop(func(ctx context.Context) error {
		ready.Ready()
		<-ctx.Done()
		ready.NotReady("stopping")
		return nil
	}))
	o.Ready.Check("spool", func() error { return spoolReady(sp) })
	return &Service{group: group, server: server}, nil
}

// spoolReady refuses traffic for a spool that cannot take any.
func spoolReady(sp *spool.Spool) error {
	res, err := sp.Reserve(1, 1)
	if err != nil {
		return err
	}
	res.Release()
	return nil
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

// drain waits, for a bounded time, until everything in the spool is released,
// and says goodbye.
func drain(ctx context.Context, sp *spool.Spool, w *words) {
	ctx, cancel := context.WithTimeout(ctx, drainWait)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for sp.Stats().Unreleased > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			w.log.Info("stopping with records in the spool; the next start publishes them", "unreleased", sp.Stats().Unreleased)
			return
		}
	}
	w.beat(true)
	_ = w.nc.FlushTimeout(time.Second) // a goodbye that is lost costs a replay a question
}

// Addr is where clients are served.
func (s *Service) Addr() net.Addr { return s.server.Addr() }

// Run serves until Stop, or until ctx is done.
func (s *Service) Run(ctx context.Context) error { return s.group.Run(ctx) }

// Stop takes no new requests, finishes those under way, waits a little for the
// spool to be released, and closes it.
func (s *Service) Stop(ctx context.Context) error { return s.group.Stop(ctx) }

var _ service.Component = (*Service)(nil)
