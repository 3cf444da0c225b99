// Command ingress is the gateway that clients talk to.
package main

import (
	"context"
	"os"

	"github.com/holdfast-io/holdfast/ingress"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

type settings struct {
	service.Common
	service.NATS
	ingress.Settings
}

// Validate checks what the groups cannot know of each other.
func (s *settings) Validate() []service.SettingError {
	return service.RequireStop(s.DrainDelay, s.ShutdownTimeout)
}

func main() {
	var s settings
	os.Exit(service.Main(service.App{
		Name:     "ingress",
		Summary:  "gives each request a UUID, makes it durable, and proxies it to the API",
		Settings: &s,
		Build: func(_ context.Context, p *service.Process) error {
			conn, err := stream.Connect(stream.ConnectOptions{
				URL: s.NatsURL.Raw(), CredsFile: s.NatsCredsFile, CAFile: s.NatsCAFile, Name: "ingress",
				Logger: p.Logger, Registry: p.Registry,
			})
			if err != nil {
				return err
			}
			p.OnStop("NATS connection", func(context.Context) error { conn.Close(); return nil })
			in, err := ingress.New(ingress.Options{
				Settings: &s.Settings, DataDir: s.DataDir, Conn: conn,
				Logger: p.Logger, Registry: p.Registry, Ready: p.Ready,
			})
			if err != nil {
				return err
			}
			p.Add("ingress", in)
			return nil
		},
	}))
}
