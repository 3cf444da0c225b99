// Command acker commits what became of requests.
package main

import (
	"context"
	"os"

	"github.com/holdfast-io/holdfast/acker"
	"github.com/holdfast-io/holdfast/pkg/ledger/open"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func main() {
	var s acker.Settings
	os.Exit(service.Main(service.App{
		Name:     "acker",
		Summary:  "commits outcomes and completion events to the ledger, from the stream and over HTTP",
		Settings: &s,
		Build: func(ctx context.Context, p *service.Process) error {
			store, err := open.Open(ctx, open.Options{URL: s.LedgerURL.Raw(), Logger: p.Logger})
			if err != nil {
				return err
			}
			p.OnStop("ledger", func(context.Context) error { return store.Close() })
			conn, err := stream.Connect(stream.ConnectOptions{
				URL: s.NatsURL.Raw(), CredsFile: s.NatsCredsFile, CAFile: s.NatsCAFile, Name: "acker",
				Logger: p.Logger, Registry: p.Registry,
			})
			if err != nil {
				return err
			}
			p.OnStop("NATS connection", stream.Drain(conn))
			service, err := acker.New(acker.Options{
				Store: store, Conn: conn, Addr: s.AckerAddr, API: s.API,
				Streams:  stream.Streams{Replicas: s.StreamReplicas, MaxBytes: int64(s.StreamMaxBytes)},
				Registry: p.Registry, Ready: p.Ready, Logger: p.Logger,
			})
			if err != nil {
				return err
			}
			p.Add("acker", service)
			return nil
		},
	}))
}
