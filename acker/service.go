package acker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// Store is the part of the ledger that the acker uses.
type Store interface {
	ledger.Completer
	SetAside(ctx context.Context, messages []ledger.Aside) error
	Ping(ctx context.Context) error
}

// Options are what a Service is made of. All are required but API.
type Options struct {
	Store Store
	// Conn is the connection to NATS; the caller closes it after Stop.
	Conn *nats.Conn
	// Streams says how the streams must be made.
	Streams stream.Streams
	// Addr is where completions are taken over HTTP; API says who may send them.
	Addr service.Addr
	API  service.API

	Registry prometheus.Registerer
	Ready    *service.Readiness
	Logger   *slog.Logger
}

const (
	// pingEvery is how often readiness looks at the ledger; a ping waits for
	// nothing but the store itself.
	pingEvery, pingTimeout = 2 * time.Second, 2 * time.Second
	// stopTimeout bounds the stop that follows a failure of one part; the stop of
	// the process is bounded by whoever calls Stop.
	stopTimeout = 20 * time.Second
)

// Service is the acker, a component of a process: see service.Component.
type Service struct {
	o        Options
	js       jetstream.JetStream
	consumer *stream.Consumer
	words    *stream.Words
	server   *service.Server
	parts    *service.Group
}

// New checks the options and binds the address. Nothing is consumed or served
// before Run.
func New(o Options) (*Service, error) {
	if o.Store == nil || o.Conn == nil || o.Registry == nil || o.Ready == nil || o.Logger == nil {
		return nil, errors.New("acker: Store, Conn, Registry, Ready and Logger are required")
	}
	if problems := service.RequireAuth("ACKER_ADDR", o.Addr, o.API); len(problems) > 0 {
		return nil, &service.SettingsError{Problems: problems}
	}
	s := &Service{o: o, words: stream.NewWords(o.Conn)}
	var err error
	if s.js, err = jetstream.New(o.Conn); err != nil {
		return nil, fmt.Errorf("acker: %w", err)
	}
	metrics, err := stream.NewMetrics(o.Registry)
	if err != nil {
		return nil, fmt.Errorf("acker: register metrics: %w", err)
	}
	s.consumer, err = stream.NewConsumer(stream.ConsumerOptions{
		Conn: o.Conn, Stream: capture.CompletionsStream, Durable: capture.AckerDurable, Service: "acker",
		Metrics: metrics, Logger: o.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("acker: %w", err)
	}
	trimmer, err := stream.NewTrimmer(stream.TrimOptions{
		JS: s.js, Stream: capture.CompletionsStream, Durable: capture.AckerDurable, Metrics: metrics, Logger: o.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("acker: %w", err)
	}
	authorize, err := service.RequireToken(o.API.APITokenFile, o.Logger)
	if err != nil {
		return nil, fmt.Errorf("acker: %w", err)
	}
	committer := newCommitter(o.Store, o.Logger)
	api := &api{committer: committer}
	s.server, err = service.Listen("acker", o.Addr, authorize(api.handler()), o.Logger)
	if err != nil {
		return nil, fmt.Errorf("acker: %w", err)
	}
	// HTTP bodies are small; a slow one must not hold memory for a minute.
	s.server.HTTP.ReadTimeout = 30 * time.Second

	ledgerReady := o.Ready.Flag("acker ledger", "not looked at yet")
	o.Ready.Check("acker stream", s.consumer.Ready)

	// Last in, first out: no new HTTP requests, then what waits of them, then the
	// stream.
	s.parts = service.NewGroup(o.Logger, stopTimeout)
	s.parts.Add("ping", service.NewLoop(func(ctx context.Context) error { return s.ping(ctx, ledgerReady) }))
	s.parts.Add("trim", service.NewLoop(trimmer.Run))
	s.parts.Add("consume", service.NewLoop(s.consume))
	s.parts.Add("commit", service.NewLoop(committer.run))
	s.parts.Add("http", s.server)
	return s, nil
}

// Run works until Stop is called, ctx is done, or a part fails.
func (s *Service) Run(ctx context.Context) error { return s.parts.Run(ctx) }

// Stop takes no new requests and messages, and commits, acknowledges and
// answers what has come. It needs the store and the connection until it returns.
func (s *Service) Stop(ctx context.Context) error { return s.parts.Stop(ctx) }

// URL is where completions are taken.
func (s *Service) URL() string { return s.server.URL() }

func (s *Service) consume(ctx context.Context) error {
	var report sync.WaitGroup
	report.Go(func() { stream.Report(ctx, s.js, s.o.Streams, s.o.Logger, capture.CompletionsStream) })
	defer report.Wait()
	return s.consumer.Run(ctx, s.commit)
}

// ping keeps the flag, because a readiness probe must not wait for a store.
func (s *Service) ping(ctx context.Context, flag *service.Flag) error {
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		bounded, cancel := context.WithTimeout(ctx, pingTimeout)
		err := s.o.Store.Ping(bounded)
		cancel()
		if err != nil {
			flag.NotReady(err.Error())
		} else {
			flag.Ready()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}
