// Command standalone is all of Holdfast in one process.
package main

import (
	"context"
	"os"

	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/standalone"
)

func main() {
	var s standalone.Settings
	os.Exit(service.Main(service.App{
		Name:     "standalone",
		Summary:  "is all of Holdfast in one process: ingress, recorder, acker, an embedded nats-server and SQLite",
		Settings: &s,
		Local:    true,
		Build:    func(ctx context.Context, p *service.Process) error { return standalone.Build(ctx, p, &s) },
	}))
}
