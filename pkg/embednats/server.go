package embednats

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Options say how the server is run.
type Options struct {
	// StoreDir is the directory that the server owns. Required.
	StoreDir string
	// Addr is where it listens, so that the nats command can look in: a loopback
	// address, because the server knows no users. Port 0 takes any free port.
	// Required.
	Addr string
	// MaxStoreBytes is what all streams together may reserve. Required.
	MaxStoreBytes int64
	// SyncInterval is how often the store is fsynced. 0 means 1 s: see the
	// package's word on durability.
	SyncInterval time.Duration
	// ReadyTimeout bounds a start, which reads what the streams hold. 0 means 1 min.
	ReadyTimeout time.Duration
	// Logger is required.
	Logger *slog.Logger
}

const (
	// maxMemory bounds memory streams, of which Holdfast has none.
	maxMemory = 64 << 20
	// watchEvery is how often Run looks at the server's health. A look reads two
	// small directories. Until a frozen stream is found publishers wait, and
	// their spools hold what they have.
	watchEvery = time.Second
	// Restarts of a server that does not become healthy, most often because the
	// disk is still full, are spaced out: each reads the streams anew and breaks
	// all connections.
	restartBackoff, maxRestartBackoff = time.Second, 30 * time.Second
)

// Server is a nats-server in this process. Its methods are safe for concurrent
// use.
type Server struct {
	opts   Options
	lock   *flock.Flock
	logger *slog.Logger
	host   string

	restart sync.Mutex // one restart or shutdown at a time

	stopping chan struct{} // closed when Shutdown begins
	stopOnce sync.Once

	mu   sync.Mutex
	port int // the same over restarts
	nats *server.Server
}

// Start takes the directory and runs the server. It returns when clients can
// connect and everything that stands in the directory was read; when it returns
// an error, nothing runs and the directory is free. Errors that say which
// directory and what to do: [ErrLocked], [ErrNewerVersion], [ErrDamaged].
func Start(o Options) (*Server, error) {
	host, port, err := loopback(o.Addr)
	if err != nil {
		return nil, err
	}
	if o.StoreDir == "" || o.MaxStoreBytes <= 0 || o.Logger == nil {
		return nil, errors.New("embedded nats-server: StoreDir, MaxStoreBytes and Logger are required")
	}
	if o.SyncInterval == 0 {
		o.SyncInterval = time.Second
	}
	if o.ReadyTimeout == 0 {
		o.ReadyTimeout = time.Minute
	}
	lock, err := claim(o.StoreDir)
	if err != nil {
		return nil, err
	}
	s := &Server{opts: o, lock: lock, logger: o.Logger, host: host, port: port, stopping: make(chan struct{})}
	if err := s.start(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return s, nil
}

func loopback(addr string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil {
		return "", 0, fmt.Errorf("embedded nats-server: address %q is not host:port", addr)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", 0, fmt.Errorf("embedded nats-server: address %q is not a loopback address; it knows no users, so whoever reaches it can read and delete every request", addr)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// start runs a new nats-server on the directory. Callers hold restart, or are
// the only ones to know of s.
func (s *Server) start() error {
	deadline := time.Now().Add(s.opts.ReadyTimeout)
	ns, err := server.NewServer(&server.Options{
		ServerName: "holdfast",
		Host:       s.host,
		Port:       s.port,
		NoSigs:     true, // signals are main's

		JetStream:              true,
		StoreDir:               s.opts.StoreDir,
		JetStreamMaxStore:      s.opts.MaxStoreBytes,
		JetStreamMaxMemory:     maxMemory,
		SyncInterval:           s.opts.SyncInterval,
		DisableJetStreamBanner: true,
	})
	if err != nil {
		return fmt.Errorf("embedded nats-server: %w", err)
	}
	lines := &logs{logger: s.logger}
	ns.SetLoggerV2(lines, false, false, false)

	started := make(chan struct{})
	go func() {
		defer close(started)
		ns.Start()
	}()
	ready := time.NewTimer(s.opts.ReadyTimeout)
	defer ready.Stop()
	select {
	case <-started:
	case <-ready.C:
	}
	err = startError(ns, lines, time.Until(deadline), s.opts)
	if err != nil {
		// Start cannot be interrupted; Shutdown makes it end.
		ns.Shutdown()
		<-started
		ns.WaitForShutdown()
		return err
	}
	addr, ok := ns.Addr().(*net.TCPAddr)
	if !ok {
		ns.Shutdown()
		ns.WaitForShutdown()
		return errors.New("embedded nats-server: listener has no TCP address")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nats, s.port = ns, addr.Port
	return nil
}

// startError says why the server did not come up whole.
func startError(ns *server.Server, lines *logs, left time.Duration, o Options) error {
	if fatal := lines.fatalLine(); fatal != "" {
		return fmt.Errorf("embedded nats-server cannot start on %s with %s: %s; mend that, or move the directory away and start anew: what the spool has not released is published again",
			o.Addr, o.StoreDir, fatal)
	}
	if !ns.ReadyForConnections(max(left, time.Millisecond)) {
		return fmt.Errorf("embedded nats-server on %s is not ready after %s", o.StoreDir, o.ReadyTimeout)
	}
	// nats-server starts without the streams that it cannot read, and would let
	// new ones be made over them.
	if h := ns.Healthz(&server.HealthzOptions{}); h.Error != "" {
		return fmt.Errorf("stream directory %s: %w: %s; restore it from a backup, or move it away and start anew: what the spool has not released is published again",
			o.StoreDir, ErrDamaged, h.Error)
	}
	return nil
}

// InProcess is the option by which a client of this process connects without a
// socket. It follows the server over restarts.
func (s *Server) InProcess() nats.Option { return nats.InProcessServer(s) }

// InProcessConn implements [nats.InProcessConnProvider].
func (s *Server) InProcessConn() (net.Conn, error) {
	ns := s.current()
	if ns == nil || !ns.Running() {
		return nil, ErrStopped
	}
	return ns.InProcessConn()
}

// current is the running server, nil while there is none.
func (s *Server) current() *server.Server {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nats
}

func (s *Server) stopped() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// ClientURL is the listener's address as a nats:// URL. It stays the same over
// restarts.
func (s *Server) ClientURL() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return "nats://" + net.JoinHostPort(s.host, strconv.Itoa(s.port))
}

// Healthy reports whether JetStream is enabled, holds every stream that stands
// in the directory, and no write has failed. It reads two directories and
// waits for nothing. Errors: [ErrUnhealthy], [ErrStopped].
func (s *Server) Healthy() error {
	if s.stopped() {
		return ErrStopped
	}
	ns := s.current()
	if ns == nil {
		return fmt.Errorf("%w: nats-server is being restarted", ErrUnhealthy)
	}
	if h := ns.Healthz(&server.HealthzOptions{}); h.Error != "" {
		return fmt.Errorf("%w: %s", ErrUnhealthy, h.Error)
	}
	return nil
}

// Run watches over the server until ctx is done or the server is shut down, and
// then returns nil: as long as it is not healthy, it is restarted in place, at growing intervals of 1 to
// 30 s. Running it is optional; without it a full disk needs a restart of the
// process.
func (s *Server) Run(ctx context.Context) error {
	backoff := restartBackoff
	timer := time.NewTimer(watchEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.stopping:
			return nil
		case <-timer.C:
		}
		wait := watchEvery
		switch err := s.Healthy(); {
		case errors.Is(err, ErrStopped):
			return nil
		case err != nil:
			s.logger.Error("restart the embedded nats-server, it does not store", "err", err)
			if err := s.Restart(ctx); err != nil && !errors.Is(err, ErrStopped) && ctx.Err() == nil {
				s.logger.Error("the embedded nats-server did not restart", "err", err)
			}
			wait, backoff = backoff, min(2*backoff, maxRestartBackoff)
		default:
			backoff = restartBackoff
		}
		timer.Reset(wait)
	}
}

// Restart shuts nats-server down and starts it again on the same directory and
// port. Clients reconnect. When the new one does not start, Healthy says so and
// Restart may be called again. Errors: [ErrStopped] after Shutdown.
func (s *Server) Restart(ctx context.Context) error {
	s.restart.Lock()
	defer s.restart.Unlock()
	if s.stopped() {
		return ErrStopped
	}
	s.end()
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.start()
}

// Shutdown stops the server and frees the directory. Stop its clients first:
// what they have not been acknowledged is not stored. It is idempotent, and
// returns ctx's error when the server needs longer; it then goes on stopping,
// and the directory is freed when it is done.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stopOnce.Do(func() { close(s.stopping) })
	done := make(chan error, 1)
	go func() {
		s.restart.Lock()
		defer s.restart.Unlock()
		s.end()
		done <- s.lock.Close()
	}()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("unlock stream directory: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shut embedded nats-server down: %w", ctx.Err())
	}
}

// Stop is Shutdown: with Run it makes the server a component of a process.
func (s *Server) Stop(ctx context.Context) error { return s.Shutdown(ctx) }

// end stops the running server, if there is one. Callers hold restart.
func (s *Server) end() {
	s.mu.Lock()
	ns := s.nats
	s.nats = nil
	s.mu.Unlock()
	if ns != nil {
		ns.Shutdown()
		ns.WaitForShutdown()
	}
}
