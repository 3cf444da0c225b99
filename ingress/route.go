package ingress

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/upstream"
)

// captureMode says what happens to a request that cannot be stored.
type captureMode string

const (
	captureRequired   captureMode = "required"    // it is refused
	captureBestEffort captureMode = "best_effort" // it is passed on all the same
	captureOff        captureMode = "off"         // none is stored
)

// route is what is decided about the requests that match it.
type route struct {
	name    string
	mode    captureMode
	methods service.Methods
	policy  capture.Policy
	accept  bool   // on_failure: accept
	orderBy string // name of the header that holds the ordering key, empty: none
	maxBody int64
	host    string // what the API sees as Host, empty: the client's
	pool    *upstream.Pool
}

// captures reports whether requests of this method are captured.
func (rt *route) captures(method string) bool {
	return rt.mode != captureOff && rt.methods.Has(method)
}

// orderKey is the request's ordering key, empty where there is none.
func (rt *route) orderKey(h http.Header) string {
	if rt.orderBy == "" {
		return ""
	}
	return strings.Join(h[rt.orderBy], ",")
}

// routes finds the route of a request.
type routes struct {
	def *route
}

func (rs *routes) match(*http.Request) *route { return rs.def }

func (rs *routes) close() { rs.def.pool.Close() }

// newRoutes makes the default route of the settings.
func newRoutes(s *Settings) (*routes, error) {
	if s.RoutesFile != "" {
		return nil, fmt.Errorf("HOLDFAST_ROUTES_FILE: routes by file are not supported by this version; set HOLDFAST_UPSTREAM_URL")
	}
	cfg, err := clientTLS(s.UpstreamCAFile)
	if err != nil {
		return nil, err
	}
	pool, err := upstream.New(upstream.Options{URL: &s.UpstreamURL.URL, TLS: cfg})
	if err != nil {
		return nil, err
	}
	policy := capture.DefaultPolicy()
	policy.By = capture.CompletionBy(s.Completion)
	policy.Timeout, policy.Grace = s.UpstreamTimeout, s.Grace
	rt := &route{
		name:    capture.DefaultRoute,
		mode:    captureMode(s.Capture),
		methods: s.CaptureMethods,
		policy:  policy,
		accept:  s.OnFailure == "accept",
		orderBy: http.CanonicalHeaderKey(strings.TrimPrefix(s.OrderBy, "header:")),
		maxBody: int64(s.MaxBodyBytes),
		pool:    pool,
	}
	if !s.PreserveHost {
		rt.host = s.UpstreamURL.Host
	}
	return &routes{def: rt}, nil
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
