// Command recorder takes captured requests from the stream into the ledger, and
// serves the read API.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/ledger/open"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/recorder"
)

type settings struct {
	service.Common
	service.NATS
	service.Streams
	service.Ledger
	recorder.Settings
}

// Validate is that of the recorder's own settings.
func (s *settings) Validate() []service.SettingError { return s.Settings.Validate() }

func (s *settings) streams() stream.Streams {
	return stream.Streams{Replicas: s.StreamReplicas, MaxBytes: int64(s.StreamMaxBytes)}
}

func (s *settings) connect(p *service.Process) (*nats.Conn, error) {
	conn, err := stream.Connect(stream.ConnectOptions{
		URL: s.NatsURL.Raw(), CredsFile: s.NatsCredsFile, CAFile: s.NatsCAFile, Name: "recorder",
		Logger: p.Logger, Registry: p.Registry,
	})
	if err != nil {
		return nil, err
	}
	p.OnStop("NATS connection", func(context.Context) error { conn.Close(); return nil })
	return conn, nil
}

func (s *settings) build(ctx context.Context, p *service.Process) error {
	conn, err := s.connect(p)
	if err != nil {
		return err
	}
	store, err := open.Open(ctx, open.Options{URL: s.LedgerURL.Raw(), Retention: s.Retention, Logger: p.Logger})
	if err != nil {
		return err
	}
	p.OnStop("ledger", func(context.Context) error { return store.Close() })
	rec, err := recorder.New(recorder.Options{
		Settings: &s.Settings, Store: store, Conn: conn, Streams: s.streams(),
		Logger: p.Logger, Registry: p.Registry, Ready: p.Ready,
	})
	if err != nil {
		return err
	}
	p.Add("recorder", rec)
	return nil
}

func (s *settings) provision(ctx context.Context, p *service.Process) error {
	conn, err := s.connect(p)
	if err != nil {
		return err
	}
	if err := recorder.Provision(ctx, conn, s.streams()); err != nil {
		return err
	}
	_, err = fmt.Fprintln(p.Out, "streams and consumers are in order")
	return err
}

func main() {
	s := &settings{}
	os.Exit(service.Main(service.App{
		Name:     "recorder",
		Summary:  "takes captured requests from the stream into the ledger, and serves the read API",
		Settings: s,
		Build:    s.build,
		Commands: []service.Command{{
			Name:    "provision",
			Summary: "makes the streams and their consumers, or changes them to what they must be; takes a NATS user that may create streams",
			Run:     s.provision,
		}},
	}))
}
