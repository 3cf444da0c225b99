package recorder

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// Settings are the recorder's own; its binary adds those that reach NATS and the
// ledger.
type Settings struct {
	service.API
	service.Recorder
}

// Validate asks for a token, or the word that there is none, off loopback.
func (s *Settings) Validate() []service.SettingError {
	return service.RequireAuth("RECORDER_ADDR", s.RecorderAddr, s.API)
}

// Store is the part of the ledger that the recorder uses.
type Store interface {
	ledger.Recorder
	ledger.Reader
	ledger.Keeper
	Ping(ctx context.Context) error
}

// Options are what a Service is made of. All but Streams are required.
type Options struct {
	Settings *Settings
	Store    Store      // not closed by the Service
	Conn     *nats.Conn // not closed by the Service; best used by it alone
	Logger   *slog.Logger
	Registry prometheus.Registerer
	Ready    *service.Readiness
	// Streams, where it is set, is how the requests stream must be made: what
	// differs is logged at the start.
	Streams stream.Streams
}

// Service is the recorder. It is a [service.Component].
type Service struct {
	group  *service.Group
	server *service.Server
}

const (
	// stopTimeout bounds the stop after a part has failed: the consumer's drain of
	// 10 s and the API's requests.
	stopTimeout = 20 * time.Second
	// flushTimeout bounds the last flush, of acknowledgements and words: a round
	// trip. What is lost with them comes again and is known by then.
	flushTimeout = 2 * time.Second
)

// New checks the options and binds the address. After an error nothing is left
// open. A Service that is not run must be stopped.
func New(o Options) (*Service, error) {
	if o.Settings == nil || o.Store == nil || o.Conn == nil || o.Logger == nil || o.Registry == nil || o.Ready == nil {
		return nil, errors.New("recorder: Settings, Store, Conn, Logger, Registry and Ready are required")
	}
	if problems := o.Settings.Validate(); len(problems) > 0 {
		return nil, &service.SettingsError{Problems: problems}
	}
	js, err := jetstream.New(o.Conn)
	if err != nil {
		return nil, fmt.Errorf("use JetStream: %w", err)
	}
	shared, err := stream.NewMetrics(o.Registry)
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	consumer, err := stream.NewConsumer(stream.ConsumerOptions{
		Conn: o.Conn, Stream: capture.RequestsStream, Durable: capture.RecorderDurable, Service: "recorder",
		Metrics: shared, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	trimmer, err := stream.NewTrimmer(stream.TrimOptions{
		JS: js, Stream: capture.RequestsStream, Durable: capture.RecorderDurable, Metrics: shared, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	m := &metrics{}
	if err := o.Registry.Register(m); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	handler, err := newAPI(o.Store, o.Settings.APITokenFile, o.Logger)
	if err != nil {
		return nil, err
	}
	server, err := service.Listen("recorder", o.Settings.RecorderAddr, handler, o.Logger)
	if err != nil {
		return nil, err
	}

	w := &writer{store: o.Store, words: stream.NewWords(o.Conn), metrics: m, log: o.Logger}
	beats := newHeartbeats(o.Conn, o.Store, o.Logger)
	watch := &watcher{store: o.Store, metrics: m, ledger: o.Ready.Flag("recorder ledger", "not asked yet"), log: o.Logger}
	expire := &expirer{store: o.Store, log: o.Logger, keep: ledger.Retention{
		// 0 keeps none; to a store it is no bound at all.
		KeepProcessed:      max(o.Settings.KeepProcessed, 1),
		KeepProcessedBytes: max(int64(o.Settings.KeepProcessedBytes), 1),
		Retention:          o.Settings.Retention,
	}}
	o.Ready.Check("recorder consumer", consumer.Ready)

	// The stack: readers first, then the consumer, which commits and acknowledges
	// what it has taken, then housekeeping; the last word out is the flush.
	group := service.NewGroup(o.Logger, stopTimeout)
	group.OnStop("flush", func(context.Context) error { return flush(o.Conn) })
	group.Add("ledger watch", service.NewLoop(watch.run))
	group.Add("expiry", service.NewLoop(expire.run))
	group.Add("trimmer", service.NewLoop(trimmer.Run))
	group.Add("heartbeats", service.NewLoop(beats.run))
	if o.Streams != (stream.Streams{}) {
		group.Add("streams check", service.NewLoop(func(ctx context.Context) error {
			stream.Report(ctx, js, o.Streams, o.Logger, capture.RequestsStream)
			<-ctx.Done()
			return nil
		}))
	}
	group.Add("consumer", service.NewLoop(func(ctx context.Context) error { return consumer.Run(ctx, w.commit) }))
	group.Add("http", server)
	return &Service{group: group, server: server}, nil
}

// flush sends what was published, unless there is nobody to take it.
func flush(nc *nats.Conn) error {
	if !nc.IsConnected() {
		return nil
	}
	if err := nc.FlushTimeout(flushTimeout); err != nil && nc.IsConnected() {
		return fmt.Errorf("flush acknowledgements: %w", err)
	}
	return nil
}

// Addr is where the read API is served.
func (s *Service) Addr() net.Addr { return s.server.Addr() }

// Run records and serves until Stop, or until ctx is done.
func (s *Service) Run(ctx context.Context) error { return s.group.Run(ctx) }

// Stop answers the requests under way, commits and acknowledges what was taken
// from the stream, and ends. It is bounded by ctx, idempotent, and may be called
// before Run.
func (s *Service) Stop(ctx context.Context) error { return s.group.Stop(ctx) }

var _ service.Component = (*Service)(nil)
