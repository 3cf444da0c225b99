package ingress

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/upstream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// destination is a route with the way to its API. Routes with one API share the
// connections to it.
type destination struct {
	*route.Route
	ownHost bool // the API sees its own host, not the client's
	pool    *upstream.Pool
	// answerRoom is how many bytes what is kept of an answer adds to an outcome.
	answerRoom int64
	http2      *http.Transport // for what cannot go as HTTP/1.1
}

// orderKey is the request's ordering key, empty where there is none.
func (d *destination) orderKey(fields wire.Fields) string {
	if d.OrderBy == "" {
		return ""
	}
	key := strings.Join(fields.Values(d.OrderBy), ",")
	if len(key) > maxOrderKey {
		sum := sha256.Sum256([]byte(key))
		return "sha256:" + hex.EncodeToString(sum[:])
	}
	return key
}

// maxOrderKey bounds an ordering key: what is longer travels as its digest, for
// a client must not be able to make a message that no broker takes. Only
// equality counts.
const maxOrderKey = 256

// destinations finds the destination of a request.
type destinations struct {
	table *route.Table
	all   map[*route.Route]*destination
	only  *destination // where one route takes everything
	pools map[string]*upstream.Pool
}

// newDestinations makes the destinations of the settings. It connects to none.
func newDestinations(s *Settings) (_ *destinations, err error) {
	table, err := route.Load(s.Routes, int64(s.MaxBodyBytes))
	if file := (*route.FileError)(nil); errors.As(err, &file) {
		return nil, fmt.Errorf("HOLDFAST_ROUTES_FILE: %w", err)
	}
	if err != nil {
		return nil, err
	}
	cfg, err := clientTLS(s.UpstreamCAFile)
	if err != nil {
		return nil, err
	}
	ds := &destinations{table: table, all: make(map[*route.Route]*destination), pools: make(map[string]*upstream.Pool)}
	defer func() {
		if err != nil {
			ds.close()
		}
	}()
	for _, r := range table.Routes() {
		key := r.Upstream.String()
		if ds.pools[key] == nil {
			if ds.pools[key], err = upstream.New(upstream.Options{URL: r.Upstream, TLS: cfg}); err != nil {
				return nil, err
			}
		}
		ds.all[r] = &destination{
			Route: r, ownHost: !s.PreserveHost, pool: ds.pools[key], answerRoom: int64(capture.AnswerRoom(r.KeepAnswers)), http2: newHTTP2Transport(cfg, r.Policy.Timeout),
		}
		if s.RoutesFile == "" {
			ds.only = ds.all[r]
		}
	}
	return ds, nil
}

// match gives the destination of a request, nil when no route takes it.
func (ds *destinations) match(req *wire.Request) *destination {
	if ds.only != nil {
		return ds.only
	}
	return ds.all[ds.table.Match(req.Host, req.Target, req.Method)]
}

// conns is how many connections to APIs are open.
func (ds *destinations) conns() float64 {
	n := int64(0)
	for _, p := range ds.pools {
		n += p.Conns()
	}
	return float64(n)
}

// keeps is the most that any route keeps of an answer.
func (ds *destinations) keeps() int {
	most := 0
	for r := range ds.all {
		most = max(most, r.KeepAnswers)
	}
	return most
}

// required reports whether some route refuses what cannot be stored.
func (ds *destinations) required() bool {
	for r := range ds.all {
		if r.Mode == route.Required {
			return true
		}
	}
	return false
}

func (ds *destinations) close() {
	for _, p := range ds.pools {
		p.Close()
	}
	for _, d := range ds.all {
		d.http2.CloseIdleConnections()
	}
}

// clientTLS trusts the certificates of caFile, or the system's without one.
func clientTLS(caFile string) (*tls.Config, error) {
	if caFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("HOLDFAST_UPSTREAM_CA_FILE: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("HOLDFAST_UPSTREAM_CA_FILE: %s holds no PEM certificate", caFile)
	}
	return &tls.Config{RootCAs: pool}, nil
}
