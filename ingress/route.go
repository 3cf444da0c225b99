package ingress

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
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
	host    bool   // the API sees its own Host, not the client's
	ownHost string // the API's own
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
	key := strings.Join(h[rt.orderBy], ",")
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
	if p := s.UpstreamURL.Path; p != "" && p != "/" {
		return nil, fmt.Errorf("HOLDFAST_UPSTREAM_URL: the path %s is not allowed, requests keep the path that the client sent", p)
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
		host:    !s.PreserveHost,
		ownHost: s.UpstreamURL.Host,
		pool:    pool,
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
