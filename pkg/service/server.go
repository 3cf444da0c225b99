package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// NewHTTPServer makes a server with every bound set, fit for the project's own
// APIs. The caller may change what its traffic needs, before it serves.
func NewHTTPServer(handler http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler: handler,
		// A client sends its head at once; ten seconds let a lost packet be sent
		// again a few times, and no one holds a connection with half a head.
		ReadHeaderTimeout: 10 * time.Second,
		// The largest thing the APIs take is a batch of completions of some MiB:
		// a minute asks for no more than a slow line gives.
		ReadTimeout: time.Minute,
		// The largest thing they give is one stored message, 32 MiB by default,
		// which two minutes allow to a client with 2.5 Mbit/s.
		WriteTimeout: 2 * time.Minute,
		// Longer than the minute after which the common balancers close an idle
		// connection, so that it is they who close and no request meets a
		// connection that has just gone.
		IdleTimeout: 90 * time.Second,
		// Heads of these APIs are a token and a cursor; 32 KiB leave room for
		// what proxies add, and cap what a thousand connections can pin.
		MaxHeaderBytes: 32 << 10,
		ErrorLog:       ErrorLog(logger, "http server"),
	}
}

// Server is an HTTP server on a listener that is bound already. It is a Component.
type Server struct {
	// HTTP may be changed until Run, but for TLSConfig, which net/http sets itself.
	HTTP *http.Server
	// TLS may be set until Run, and makes the server speak TLS and HTTP/2. It
	// must hold or get a certificate.
	TLS *tls.Config

	name     string
	listener net.Listener
	logger   *slog.Logger
}

// Listen binds the address and makes a server for it, by NewHTTPServer. Nothing
// is served until Run; connections wait in the kernel until then. Run logs the
// line "listening" with the name as listener and the bound address as addr.
func Listen(name string, addr Addr, handler http.Handler, logger *slog.Logger) (*Server, error) {
	listener, err := net.Listen("tcp", string(addr))
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", name, err)
	}
	return &Server{HTTP: NewHTTPServer(handler, logger), name: name, listener: listener, logger: logger}, nil
}

// Addr is the bound address, with the real port where :0 was asked for.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// URL is how a client on this machine reaches the server: the scheme and the
// bound address, loopback where all addresses are bound.
func (s *Server) URL() string {
	scheme := "http"
	if s.TLS != nil {
		scheme = "https"
	}
	host, port, _ := net.SplitHostPort(s.Addr().String())
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// Run serves until Stop, or closes all connections at once when ctx is done.
func (s *Server) Run(ctx context.Context) error {
	release := context.AfterFunc(ctx, func() { s.HTTP.Close() })
	defer release()
	s.logger.Info("listening", "listener", s.name, "addr", s.Addr().String())
	var err error
	if s.TLS != nil {
		s.HTTP.TLSConfig = s.TLS
		err = s.HTTP.ServeTLS(s.listener, "", "")
	} else {
		err = s.HTTP.Serve(s.listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve: %w", err)
}

// Stop takes no new connections, waits for the requests under way, and when ctx
// is done closes what is left. Connections that were hijacked are not waited for.
func (s *Server) Stop(ctx context.Context) error {
	err := s.HTTP.Shutdown(ctx)
	// A server that never ran does not know its listener; closing twice is harmless.
	_ = s.listener.Close()
	if err != nil {
		_ = s.HTTP.Close()
		return fmt.Errorf("shut down: %w", err)
	}
	return nil
}
