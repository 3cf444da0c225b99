package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
)

// ConnectOptions say how to reach the broker.
type ConnectOptions struct {
	// URL is one server's URL, or several separated by commas. Not used with
	// InProcess.
	URL string
	// CredsFile is the NATS user's credentials, CAFile the certificates that the
	// server's is checked against. Both may be empty.
	CredsFile, CAFile string
	// InProcess, where it is set, connects without a socket: see
	// embednats.Server.InProcess.
	InProcess nats.Option
	// Name is shown by the server, and labels holdfast_nats_connected. Required.
	Name string
	// Logger is required.
	Logger *slog.Logger
	// Registry gets the connection's gauge; nil for none.
	Registry prometheus.Registerer
}

// Connect opens a connection that mends itself for ever. It does not wait for
// the server: when that is down now, the connection comes up once it is there,
// and [Connected] says so. Nothing is buffered while it is down: a publish fails
// at once, because those who publish have a journal of their own, and words and
// heartbeats of before are worth nothing afterwards. The error is about the
// options alone. The caller closes the connection.
func Connect(o ConnectOptions) (*nats.Conn, error) {
	if o.Name == "" || o.Logger == nil {
		return nil, errors.New("connect to NATS: Name and Logger are required")
	}
	logger := o.Logger
	opts := []nats.Option{
		nats.Name(o.Name),
		nats.Timeout(5 * time.Second), // of one attempt: a few round trips, with TLS, to another zone
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),
		// A user that is being made, or whose credentials are being swapped, is
		// refused for a while.
		nats.IgnoreAuthErrorAbort(),
		// Soon, and not all clients of a restarted server at the same moment.
		nats.ReconnectWait(250 * time.Millisecond),
		nats.ReconnectJitter(250*time.Millisecond, 250*time.Millisecond),
		nats.ReconnectBufSize(-1),
		// A server that went without a word is noticed after 10 to 15 s; the
		// default of 2 min would hold captures back for 4 to 6.
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.DrainTimeout(5 * time.Second),
		nats.ConnectHandler(func(nc *nats.Conn) {
			logger.Info("connected to NATS", "server", nc.ConnectedUrlRedacted())
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil { // nil: we closed it
				logger.Warn("disconnected from NATS", "err", err)
			}
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			logger.Info("connected to NATS again", "server", nc.ConnectedUrlRedacted())
		}),
		// A denied publish shows nowhere else.
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			var subject string
			if sub != nil {
				subject = sub.Subject
			}
			logger.Error("NATS reports an error", "subject", subject, "err", err)
		}),
	}
	if o.CredsFile != "" {
		opts = append(opts, nats.UserCredentials(o.CredsFile))
	}
	if o.CAFile != "" {
		opts = append(opts, nats.RootCAs(o.CAFile))
	}
	url := o.URL
	if o.InProcess != nil {
		opts, url = append(opts, o.InProcess), ""
	}
	nc, err := nats.Connect(url, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	if o.Registry != nil {
		gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "holdfast_nats_connected", Help: "Whether the connection to NATS is up.",
			ConstLabels: prometheus.Labels{"connection": o.Name},
		}, func() float64 {
			if nc.IsConnected() {
				return 1
			}
			return 0
		})
		if err := o.Registry.Register(gauge); err != nil {
			nc.Close()
			return nil, fmt.Errorf("connect to NATS: register gauge: %w", err)
		}
	}
	return nc, nil
}

// Connected gives nil while the connection is up, else [ErrDisconnected]: a
// condition of readiness.
func Connected(nc *nats.Conn) error {
	if nc.IsConnected() {
		return nil
	}
	return ErrDisconnected
}

// Drain makes the clean-up of a connection: what was published last, words and
// acknowledgements, is sent before it closes, as long as the clean-up's context
// allows.
func Drain(nc *nats.Conn) func(context.Context) error {
	return func(ctx context.Context) error {
		defer nc.Close()
		if !nc.IsConnected() {
			return nil // nothing is buffered
		}
		// A flush needs a deadline.
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if err := nc.FlushWithContext(ctx); err != nil {
			return fmt.Errorf("flush NATS connection: %w", err)
		}
		return nil
	}
}
