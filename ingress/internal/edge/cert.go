package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Certificate is the server's certificate, read again when its files change.
// They are looked at by content, because Kubernetes changes them by exchanging
// a symbolic link of a directory above.
type Certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	failures          prometheus.Counter
	every             time.Duration // lookEvery, but for tests

	failing   atomic.Bool // the last look found files that cannot be used
	current   atomic.Pointer[tls.Certificate]
	cert, key []byte // what current was made of
}

// LoadCertificate reads the certificate for the first time.
func LoadCertificate(certFile, keyFile string, log *slog.Logger, reg prometheus.Registerer) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log, every: lookEvery}
	if _, err := c.reload(); err != nil {
		return nil, err
	}
	c.failures = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "holdfast_tls_certificate_reload_failures_total", Help: "Times that changed certificate files could not be used; the certificate before them stays.",
	})
	reg.MustRegister(c.failures, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "holdfast_tls_certificate_expiry_timestamp_seconds", Help: "When the certificate in use expires.",
	}, func() float64 { return float64(c.current.Load().Leaf.NotAfter.Unix()) }))
	return c, nil
}

// Config is for a server with this certificate: TLS 1.2 and up, HTTP/2 before
// HTTP/1.1.
func (c *Certificate) Config() *tls.Config {
	return &tls.Config{
		NextProtos:     []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
	}
}

// lookEvery is how often the files are read: certificates are renewed days
// before they expire, and seconds after that nobody waits.
const lookEvery = 5 * time.Second

// Run looks at the files until ctx is done. Files that cannot be used change
// nothing, and are reported once.
func (c *Certificate) Run(ctx context.Context) error {
	tick := time.NewTicker(c.every)
	defer tick.Stop()
	failed := ""
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		changed, err := c.reload()
		switch {
		case err != nil:
			if err.Error() != failed {
				c.failures.Inc()
				c.log.Error("the changed certificate cannot be used; the one before it stays", "err", err)
			}
			failed = err.Error()
			c.failing.Store(true)
			continue
		case changed:
			leaf := c.current.Load().Leaf
			c.log.Info("certificate changed", "serial", leaf.SerialNumber.String(), "not_after", leaf.NotAfter)
		}
		failed = ""
		c.failing.Store(false)
	}
}

// reload reads the files, and reports whether they hold another certificate.
func (c *Certificate) reload() (changed bool, err error) {
	cert, err := os.ReadFile(c.certFile)
	if err != nil {
		return false, fmt.Errorf("HOLDFAST_TLS_CERT_FILE: %w", err)
	}
	key, err := os.ReadFile(c.keyFile)
	if err != nil {
		return false, fmt.Errorf("HOLDFAST_TLS_KEY_FILE: %w", err)
	}
	if bytes.Equal(cert, c.cert) && bytes.Equal(key, c.key) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return false, fmt.Errorf("HOLDFAST_TLS_CERT_FILE and HOLDFAST_TLS_KEY_FILE: %w", err)
	}
	c.cert, c.key = cert, key
	c.current.Store(&pair)
	return true, nil
}
