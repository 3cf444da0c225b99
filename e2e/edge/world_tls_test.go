package edge_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
)

// serverName is what the certificates of these tests are made for.
const serverName = "api.example.com"

// pki is a certificate authority, and the directory where the ingress finds its
// files, laid out as Kubernetes does: the files are symbolic links through a
// directory that is replaced as a whole.
type pki struct {
	t      *testing.T
	key    *ecdsa.PrivateKey
	ca     *x509.Certificate
	pool   *x509.CertPool
	dir    string
	issued int64
}

func newPKI(t *testing.T) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	ca, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	p := &pki{t: t, key: key, ca: ca, pool: x509.NewCertPool(), dir: t.TempDir(), issued: 100}
	p.pool.AddCert(ca)
	cert, certKey, _ := p.issue()
	p.install(cert, certKey)
	for _, name := range []string{"tls.crt", "tls.key"} {
		require.NoError(t, os.Symlink(filepath.Join("..data", name), filepath.Join(p.dir, name)))
	}
	return p
}

// issue makes a certificate with its key, both PEM, and tells its serial number.
func (p *pki) issue() (cert, key []byte, serial int64) {
	p.t.Helper()
	p.issued++
	leaf, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(p.t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(p.issued), Subject: pkix.Name{CommonName: serverName},
		DNSNames: []string{serverName, "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, &leaf.PublicKey, p.key)
	require.NoError(p.t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(leaf)
	require.NoError(p.t, err)
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	return cert, key, p.issued
}

// install puts both files in place at once, as the kubelet does: a new directory,
// and a symbolic link that is renamed over the old one.
func (p *pki) install(cert, key []byte) {
	p.t.Helper()
	data, err := os.MkdirTemp(p.dir, "..data-")
	require.NoError(p.t, err)
	require.NoError(p.t, os.WriteFile(filepath.Join(data, "tls.crt"), cert, 0o600))
	require.NoError(p.t, os.WriteFile(filepath.Join(data, "tls.key"), key, 0o600))
	tmp := filepath.Join(p.dir, "..data_tmp")
	require.NoError(p.t, os.Symlink(filepath.Base(data), tmp))
	require.NoError(p.t, os.Rename(tmp, filepath.Join(p.dir, "..data")))
}

// settings make an ingress use the files.
func (p *pki) settings() []string {
	return []string{"TLS_CERT_FILE=" + filepath.Join(p.dir, "tls.crt"), "TLS_KEY_FILE=" + filepath.Join(p.dir, "tls.key")}
}

// config is a client's. protocols are offered by ALPN.
func (p *pki) config(protocols ...string) *tls.Config {
	return &tls.Config{RootCAs: p.pool, ServerName: serverName, NextProtos: protocols}
}

// serverCert is a certificate for a server of the test's own.
func (p *pki) serverCert() tls.Certificate {
	p.t.Helper()
	cert, key, _ := p.issue()
	pair, err := tls.X509KeyPair(cert, key)
	require.NoError(p.t, err)
	return pair
}

// caFile is the authority's certificate as a file.
func (p *pki) caFile() string {
	p.t.Helper()
	path := filepath.Join(p.t.TempDir(), "ca.pem")
	require.NoError(p.t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.ca.Raw}), 0o600))
	return path
}

// way is how a client speaks to the ingress, or to the API itself.
type way struct {
	name string
	url  string // scheme and authority
	// proto is the HTTP version that must be spoken.
	proto  string
	client *http.Client
}

// newWay makes a client that follows no redirects, asks for no compression, and
// gives everything up at the end of the test.
func newWay(t *testing.T, name, url string, config *tls.Config, protocols ...func(*http.Protocols)) way {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config, DisableCompression: true, Protocols: new(http.Protocols)}
	w := way{name: name, url: url, proto: "HTTP/1.1"}
	if len(protocols) == 0 {
		transport.Protocols.SetHTTP1(true)
	} else {
		w.proto = "HTTP/2.0"
	}
	for _, set := range protocols {
		set(transport.Protocols)
	}
	w.client = &http.Client{
		Transport: transport, Timeout: patience,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	t.Cleanup(transport.CloseIdleConnections)
	return w
}

func http2Only(p *http.Protocols) { p.SetHTTP2(true) }

// tlsWays are HTTP/1.1 and HTTP/2 to the ingress at addr.
func (p *pki) ways(addr string) (http1, http2 way) {
	p.t.Helper()
	return newWay(p.t, "HTTP/1.1 over TLS", "https://"+addr, p.config()),
		newWay(p.t, "HTTP/2", "https://"+addr, p.config(), http2Only)
}

// ingressAddr is where a system's clients dial.
func ingressAddr(s *harness.System) string { return strings.TrimPrefix(s.IngressURL(), "http://") }

// startTLS starts standalone with TLS in front of the API.
func startTLS(t *testing.T, p *pki, apiURL string, settings ...string) *harness.System {
	t.Helper()
	return startSystem(t, apiURL, append(p.settings(), settings...)...)
}

// startAPI serves the handler on a real listener until the test ends.
func startAPI(t *testing.T, h http.Handler) (url string) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// answer is a whole answer to a request.
type answer struct {
	interim []int // statuses of informational answers before it
	status  int
	header  http.Header
	trailer http.Header
	body    []byte
	length  int64 // as declared, -1 for none
}

// do sends a request and reads the whole answer.
func (w way) do(t *testing.T, r *http.Request) answer {
	t.Helper()
	var interim []int
	trace := &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		interim = append(interim, code)
		return nil
	}}
	resp, err := w.client.Do(r.WithContext(httptrace.WithClientTrace(r.Context(), trace)))
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, w.proto, resp.Proto)
	return answer{interim, resp.StatusCode, resp.Header, resp.Trailer, body, resp.ContentLength}
}

// request makes a request on this way. header is name, value, name, value.
func (w way) request(ctx context.Context, t *testing.T, method, target string, body io.Reader, header ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, w.url+target, body)
	require.NoError(t, err)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	return r
}

// captured lists what the ledger holds, once the request with the id is in it:
// the ledger gets requests in the order of the spool, so whatever was captured
// before that one is in the list too.
func captured(t *testing.T, s *harness.System, id string) []harness.Request {
	t.Helper()
	require.Len(t, id, 36)
	var all []harness.Request
	require.Eventually(t, func() bool {
		var err error
		if all, err = s.Requests(t.Context(), ""); err != nil {
			return false
		}
		for _, r := range all {
			if r.ID == id {
				return true
			}
		}
		return false
	}, patience, 10*time.Millisecond, "request %s is in the ledger", id)
	return all
}

// problem checks that an answer is the ingress's own refusal.
func problem(t *testing.T, a answer, status int) {
	t.Helper()
	require.Equal(t, status, a.status, string(a.body))
	require.Equal(t, "application/problem+json", a.header.Get("Content-Type"))
	require.Contains(t, a.header.Get("Proxy-Status"), "holdfast; error=")
	require.Contains(t, string(a.body), fmt.Sprintf(`"status":%d`, status))
}

// receive waits for what comes on the channel.
func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case v := <-c:
		return v
	case <-timer.C:
		require.FailNow(t, "nothing comes")
		panic("not reached")
	}
}
