package recorder

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/holdfast-io/holdfast/pkg/stream"
)

// connectTimeout bounds the wait for a connection: a broker that is being
// started beside the command, or its leader election, takes some seconds.
const connectTimeout = 30 * time.Second

// Provision makes or changes both streams and their consumers, and returns when
// they are as they must be. It waits for the connection for at most 30 s. The
// connection's user may create streams.
func Provision(ctx context.Context, nc *nats.Conn, s stream.Streams) error {
	if err := connected(ctx, nc); err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("use JetStream: %w", err)
	}
	return stream.Provision(ctx, js, s)
}

func connected(ctx context.Context, nc *nats.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	changes := nc.StatusChanged(nats.CONNECTED)
	defer nc.RemoveStatusListener(changes)
	for !nc.IsConnected() {
		select {
		case <-changes:
		case <-ctx.Done():
			if err := nc.LastError(); err != nil {
				return fmt.Errorf("%w: %w", stream.ErrDisconnected, err)
			}
			return stream.ErrDisconnected
		}
	}
	return nil
}
