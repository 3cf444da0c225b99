// Package standalone is all of Holdfast in one process: ingress, recorder and
// acker, with an embedded nats-server and SQLite. It is the default for a
// laptop, a demo, and a small site. The replayer is a process of its own here
// too; it shares the ledger's file.
//
// The parts are those of the other binaries, put together in one stack: what
// clients talk to is stopped first, the broker last. It is safe against power
// loss with one copy of everything: nothing leaves the spool before the ledger
// has committed it, so what the embedded streams lose is published again.
package standalone

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/acker"
	"github.com/holdfast-io/holdfast/ingress"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger/open"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/recorder"
)

// Settings are all there are, but for those that reach a broker elsewhere.
type Settings struct {
	service.Common
	service.EmbeddedNATS
	service.Streams
	service.Ledger
	service.API
	ingress.Settings
	service.Acker
	service.Recorder
}

// Validate refuses what one process cannot give.
func (s *Settings) Validate() []service.SettingError {
	var problems []service.SettingError
	if s.Store == "replicated" {
		problems = append(problems, service.Invalid("STORE", "replicated needs a cluster of brokers; standalone has one of its own: use synced"))
	}
	if s.StreamReplicas != 1 {
		problems = append(problems, service.Invalid("STREAM_REPLICAS", "%d is not allowed; standalone has one broker: use 1", s.StreamReplicas))
	}
	problems = append(problems, service.RequireStop(s.DrainDelay, s.ShutdownTimeout)...)
	problems = append(problems, service.RequireAuth("ACKER_ADDR", s.AckerAddr, s.API)...)
	return append(problems, service.RequireAuth("RECORDER_ADDR", s.RecorderAddr, s.API)...)
}

// provisionWait bounds making the streams: they are local.
const provisionWait = 30 * time.Second

// Build puts the parts together on the process's stack.
func Build(ctx context.Context, p *service.Process, s *Settings) error {
	streams := stream.Streams{Replicas: s.StreamReplicas, MaxBytes: int64(s.StreamMaxBytes)}
	broker, err := embednats.Start(embednats.Options{
		StoreDir: s.Path("nats"), Addr: string(s.NatsAddr), MaxStoreBytes: streams.StoreBytes(), Logger: p.LoggerFor("nats"),
	})
	if err != nil {
		return err
	}
	p.Add("nats", broker)
	store, err := open.Open(ctx, open.Options{URL: s.LedgerURL.Raw(), Retention: s.Retention, Logger: p.LoggerFor("ledger")})
	if err != nil {
		return err
	}
	p.OnStop("ledger", func(context.Context) error { return store.Close() })

	// A connection for each, so that none waits behind another's traffic.
	connect := func(name string) (*nats.Conn, error) {
		nc, err := stream.Connect(stream.ConnectOptions{
			InProcess: broker.InProcess(), Name: name, Logger: p.LoggerFor(name), Registry: p.Registry,
		})
		if err == nil {
			p.OnStop(name+" connection", func(context.Context) error { nc.Close(); return nil })
		}
		return nc, err
	}
	ackerConn, err := connect("acker")
	if err != nil {
		return err
	}
	if err := provision(ctx, ackerConn, streams); err != nil {
		return err
	}
	ack, err := acker.New(acker.Options{
		Store: store, Conn: ackerConn, Streams: streams, Addr: s.AckerAddr, API: s.API,
		Logger: p.LoggerFor("acker"), Registry: p.Registry, Ready: p.Ready,
	})
	if err != nil {
		return fmt.Errorf("acker: %w", err)
	}
	p.Add("acker", ack)

	recorderConn, err := connect("recorder")
	if err != nil {
		return err
	}
	rec, err := recorder.New(recorder.Options{
		Settings: &recorder.Settings{API: s.API, Recorder: s.Recorder}, Store: store, Conn: recorderConn, Streams: streams,
		Logger: p.LoggerFor("recorder"), Registry: p.Registry, Ready: p.Ready,
	})
	if err != nil {
		return fmt.Errorf("recorder: %w", err)
	}
	p.Add("recorder", rec)

	ingressConn, err := connect("ingress")
	if err != nil {
		return err
	}
	in, err := ingress.New(ingress.Options{
		Settings: &s.Settings, DataDir: s.DataDir, Conn: ingressConn,
		Logger: p.LoggerFor("ingress"), Registry: p.Registry, Ready: p.Ready,
	})
	if err != nil {
		return fmt.Errorf("ingress: %w", err)
	}
	p.Add("ingress", in)
	return nil
}

func provision(ctx context.Context, nc *nats.Conn, streams stream.Streams) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("provision: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, provisionWait)
	defer cancel()
	return stream.Provision(ctx, js, streams)
}
