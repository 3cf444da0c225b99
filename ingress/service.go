package ingress

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/ingress/internal/edge"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// Settings are the ingress's own; its binary adds those that reach NATS.
type Settings struct {
	service.Routes
	service.Upstream
	service.Ingress
}

// Validate checks the routes, and what must go together with them.
func (s *Settings) Validate() []service.SettingError {
	problems := route.Check(s.Routes, int64(s.MaxBodyBytes))
	if s.RoutesFile == "" || len(problems) > 0 {
		return problems
	}
	table, err := route.Load(s.Routes, int64(s.MaxBodyBytes))
	if err != nil {
		return nil // it has just been checked
	}
	for _, r := range table.Routes() {
		if r.MaxBody >= int64(s.SpoolMaxBytes) {
			problems = append(problems, service.Invalid("SPOOL_MAX_BYTES", "%s cannot hold one body of route %s (%s); make it larger",
				s.SpoolMaxBytes, r.Name, service.ByteSize(r.MaxBody)))
		}
	}
	return problems
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
	server  *edge.Server
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
	var cert *edge.Certificate
	var cfg *tls.Config
	if s.TLSCertFile != "" {
		if cert, err = edge.LoadCertificate(s.TLSCertFile, s.TLSKeyFile, o.Logger, o.Registry); err != nil {
			return nil, err
		}
		cfg = cert.Config()
	}
	routes, err := newDestinations(s)
	if err != nil {
		return nil, err
	}
	if err := fits(o.Conn, s, routes.keeps()); err != nil {
		routes.close()
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
	m := newMetrics(o.Registry, sp, inflight, routes.conns, pub.window.pending)
	pub.m = m
	h := &handler{
		routes: routes, head: headWriter{trusted: s.TrustedProxies}, spool: sp, ingress: s.IngressID,
		inline: int64(s.InlineBytes), maxHead: int64(s.MaxHeaderBytes), bodyDir: bodies, inflight: inflight,
		times: times, retryAfter: s.RetryAfter, accessLog: s.AccessLog, log: o.Logger, m: m,
	}
	w := &words{nc: o.Conn, spool: sp, ingress: s.IngressID, log: o.Logger, heard: pub.window.heard, captured: &h.stored}
	server, err := edge.New(edge.Options{
		Addr: string(s.IngressAddr), TLS: cfg, Handler: h,
		HeadTimeout: s.ReadHeaderTimeout, BodyTimeout: s.ReadBodyTimeout, WriteTimeout: s.WriteTimeout, IdleTimeout: s.IdleTimeout,
		HeadBytes: int(s.MaxHeaderBytes), HeadFields: s.MaxHeaderFields,
		Conns: s.MaxConnections, ConnsPerClient: s.MaxConnectionsPerClient, Exempt: s.TrustedProxies.Contains,
		DrainDelay: s.DrainDelay, Logger: o.Logger, Registry: o.Registry,
	})
	if err != nil {
		return nil, err
	}
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
	if cert != nil {
		group.Add("certificate", service.NewLoop(cert.Run))
	}
	started := o.Ready.Flag("ingress", "not started")
	room := o.Ready.Flag("spool", "not started")
	group.Add("readiness", service.NewLoop(func(ctx context.Context) error {
		defer started.NotReady("stopping")
		started.Ready()
		tick := time.NewTicker(readyEvery)
		defer tick.Stop()
		for {
			if err := errors.Join(fits(o.Conn, s, routes.keeps()), h.ready()); err != nil {
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

// outcomeBytes is the most that an outcome takes in a message.
func outcomeBytes(answer int) int64 {
	return maxEnvelope + maxOutcome + int64(capture.AnswerRoom(answer))
}

// maxAdded bounds what the gateway adds to a head: a host twice, addresses, itself.
const maxAdded = 1 << 10

// fits reports whether the broker, where it is known, takes the largest message:
// an envelope with a head and a body that is not split, or with a chunk, or an
// outcome with so many bytes of an answer.
func fits(nc *nats.Conn, s *Settings, answer int) error {
	if most := nc.MaxPayload(); nc.IsConnected() && outcomeBytes(answer) > most {
		return fmt.Errorf("the broker takes messages of %s at most (max_payload), and an outcome with %s of an answer (HOLDFAST_KEEP_ANSWERS, keep_answers of a route) needs %s",
			service.ByteSize(most), service.ByteSize(answer), service.ByteSize(outcomeBytes(answer)))
	}
	need := int64(maxEnvelope) + max(int64(s.InlineBytes)+int64(s.MaxHeaderBytes)+maxAdded, chunkBytes)
	if most := nc.MaxPayload(); nc.IsConnected() && need > most {
		return fmt.Errorf("the broker takes messages of %s at most (max_payload), and HOLDFAST_INLINE_BYTES (%s) with HOLDFAST_MAX_HEADER_BYTES (%s) need %s",
			service.ByteSize(most), s.InlineBytes, s.MaxHeaderBytes, service.ByteSize(need))
	}
	return nil
}

// ready refuses traffic for a spool that has no room for a plain request, where
// requests must be stored.
func (h *handler) ready() error {
	if !h.routes.required() {
		return nil
	}
	res, err := h.spool.Reserve(2, h.inline+h.maxHead)
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
