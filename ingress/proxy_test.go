package ingress

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// echo is an API that keeps the bytes of each request.
func echo(t *testing.T, answers ...string) (url string, got chan []byte) {
	got = make(chan []byte, 16)
	text := "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	if len(answers) > 0 {
		text = answers[0]
	}
	return rawAPI(t, func(c net.Conn, br *bufio.Reader) {
		for {
			raw, err := readRequest(br)
			if err != nil {
				return
			}
			got <- raw
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	}), got
}

// exchange sends raw text and reads the answer.
func (g *gateway) exchange(text string) answer {
	g.t.Helper()
	_, br := g.raw(text)
	resp, err := http.ReadResponse(br, nil)
	require.NoError(g.t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(g.t, err)
	return answer{resp, body, err}
}

// TestSameBytes: what the API got, what the stream holds and what the ledger's
// codec decodes are the same.
func TestSameBytes(t *testing.T) {
	api, got := echo(t)
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) {
		s.OrderBy, s.CaptureMethods = "header:X-Client-Id", []string{"*"}
	})))
	const inline = 256 << 10
	seen := 0
	for _, size := range []int{0, 1, inline - 1, inline, inline + 1, 2 * chunkBytes, 2*chunkBytes + 1, 4 << 20} {
		for _, chunked := range []bool{false, true} {
			body := pattern(size)
			text := head("ODD-one //a/%2F?q=\xff HTTP/1.1", "Host: api.example.com:81", "X-Client-Id: \xe4 k", "Cookie: a=b", "Cookie: c=d",
				"Idempotency-Key: i", "Traceparent: 00-1", fmt.Sprintf("Content-Length: %d", size)) + string(body)
			if chunked {
				text = strings.Replace(text, fmt.Sprintf("Content-Length: %d", size), "Transfer-Encoding: chunked\r\nTrailer: X-Request-Uuid", 1)
				text = text[:len(text)-size]
				if size > 0 {
					text += fmt.Sprintf("%x;ext=1\r\n%s\r\n", size, body)
				}
				text += "0\r\nX-Request-Uuid: forged\r\n\r\n"
			}
			a := g.exchange(text)
			require.Equal(t, 200, a.StatusCode)
			require.Equal(t, "ok", string(a.body))
			raw := <-got
			wire, sent, err := capture.SplitHead(raw)
			require.NoError(t, err)
			require.True(t, bytes.Equal(body, sent))
			require.NotContains(t, string(wire), "forged")
			tag := "X-Request-UUID: " + a.id(t).String() + "\r\n"
			require.Equal(t, 1, strings.Count(strings.ToLower(string(wire)), "x-request-uuid"))
			wire = bytes.Replace(wire, []byte(tag), nil, 1)
			require.True(t, strings.HasPrefix(string(wire), "ODD-one //a/%2F?q=\xff HTTP/1.1\r\nHost: api.example.com:81\r\n"), "%q", wire)
			require.Contains(t, string(wire), fmt.Sprintf("\r\nContent-Length: %d\r\n", size))
			require.Contains(t, string(wire), "\r\nX-Client-Id: \xe4 k\r\n")
			require.Contains(t, string(wire), "\r\nCookie: a=b\r\nCookie: c=d\r\n")

			chunks := 0
			if size > inline {
				chunks = (size + chunkBytes - 1) / chunkBytes
			}
			list := b.eventually(capture.RequestsStream, seen+chunks+1)[seen:]
			require.Len(t, list, chunks+1)
			seen += len(list)
			r := list[chunks].request
			require.NotNil(t, r)
			require.Equal(t, "holdfast.requests.default.OTHER", list[chunks].subject)
			require.Equal(t, a.id(t), r.ID)
			require.Equal(t, "\xe4 k", r.OrderKey)
			require.Equal(t, wire, r.Head)
			require.EqualValues(t, size, r.Size)
			require.Equal(t, chunks, r.Chunks)
			require.Equal(t, capture.DefaultPolicy().By, r.Policy.By)
			var stored []byte
			for i, m := range list[:chunks] {
				require.Equal(t, i, m.chunk.Number)
				stored = append(stored, m.chunk.Data...)
			}
			if chunks > 0 {
				sum := sha256.Sum256(body)
				require.Equal(t, hex.EncodeToString(sum[:]), r.SHA256)
			} else {
				stored = append(slices.Clone(r.Body), stored...)
			}
			require.True(t, bytes.Equal(body, stored))
			for _, m := range list {
				require.Len(t, m.header, 3, "no header of a client's becomes a NATS header")
			}
		}
	}
}

func TestOwnHeaders(t *testing.T) {
	api, got := echo(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Request-Stored, A\r\n"+
		"x-request-UUID: forged\r\nX_Request_Stored: forged\r\nx-REQUEST_replay: forged\r\nA: 1\r\n\r\n"+
		"2\r\nok\r\n0\r\nX-Request-Stored: forged\r\nB: 2\r\n\r\n")
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect()))
	for _, method := range []string{"POST", "GET"} {
		a := g.exchange(head(method+" / HTTP/1.1", "Host: x", "Content-Length: 0", "X-Request-UUID: forged", "x-request-uuid: forged", "X_REQUEST_UUID: forged",
			"X-Request_Stored: forged", "X-Request-Attempt: forged", "x_request-replay: forged", "X-Request-Received-At: forged",
			"Connection: X-Request-UUID, close"))
		require.NotContains(t, strings.ToLower(string(<-got)), "forged")
		for name, values := range a.Header {
			require.NotContains(t, values, "forged", name)
		}
		require.Len(t, a.Header.Values("A"), 1)
		require.NotContains(t, a.Trailer, "X-Request-Stored")
		require.Equal(t, "2", a.Trailer.Get("B"))
		a.id(t)
		if method == "POST" {
			require.Equal(t, []string{"synced"}, a.Header.Values(capture.HTTPHeaderStored))
		} else {
			require.Empty(t, a.Header.Values(capture.HTTPHeaderStored), "not captured")
		}
	}
	for _, m := range b.eventually(capture.RequestsStream, 1) {
		require.NotContains(t, string(m.data), "forged")
		require.NotContains(t, strings.ToLower(string(m.data)), "x-request-uuid")
	}
}

func TestHopByHop(t *testing.T) {
	api, got := echo(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: A-Hop\r\nA-Hop: gone\r\nKeep-Alive: gone\r\n"+
		"Proxy-Authenticate: gone\r\nUpgrade: gone\r\nVia: 1.0 other\r\nStay: here\r\n\r\nok")
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect()))
	for _, method := range []string{"POST", "GET"} {
		a := g.exchange(head(method+" / HTTP/1.1", "Host: x", "Content-Length: 0", "Connection: My-Hop, keep-alive", "Connection: other",
			"My-Hop: gone", "Other: gone", "TE: trailers, gone", "Upgrade: gone", "Proxy-Connection: gone", "Proxy-Authorization: gone",
			"Keep-Alive: gone", "Transfer_Encoding: gone", "Via: 1.0 mine", "Stay: here"))
		raw := string(<-got)
		require.NotContains(t, raw, "gone")
		require.Contains(t, raw, "\r\nStay: here\r\n")
		require.Contains(t, raw, "\r\nVia: 1.0 mine\r\n")
		require.Contains(t, raw, "\r\nVia: 1.1 holdfast\r\n")
		require.Equal(t, "here", a.Header.Get("Stay"))
		require.Equal(t, []string{"1.0 other", "1.1 holdfast"}, a.Header.Values("Via"))
		for name, values := range a.Header {
			require.NotContains(t, values, "gone", name)
		}
		require.NotContains(t, a.Header, "Content-Type", "none is guessed")
	}
}

func TestForwardingHeaders(t *testing.T) {
	for _, trusted := range []bool{false, true} {
		api, got := echo(t)
		b := newBroker(t, stream.Streams{})
		g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) {
			if trusted {
				s.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
			}
		})))
		g.exchange(head("POST / HTTP/1.1", "Host: front", "Content-Length: 0", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Host: theirs",
			"X-Forwarded-Proto: https", "X-Real-IP: 1.2.3.4", "Forwarded: for=1.2.3.4", "X_Forwarded_For: 6.6.6.6"))
		raw := string(<-got)
		require.NotContains(t, raw, "6.6.6.6")
		if trusted {
			require.Contains(t, raw, "\r\nX-Forwarded-For: 1.2.3.4, 127.0.0.1\r\n")
			require.Contains(t, raw, "\r\nX-Forwarded-Host: theirs\r\n")
			require.Contains(t, raw, "\r\nX-Forwarded-Proto: https\r\n")
			require.Contains(t, raw, "\r\nForwarded: for=1.2.3.4\r\n")
		} else {
			require.NotContains(t, raw, "1.2.3.4")
			require.Contains(t, raw, "\r\nX-Forwarded-For: 127.0.0.1\r\n")
			require.Contains(t, raw, "\r\nX-Forwarded-Host: front\r\n")
			require.Contains(t, raw, "\r\nX-Forwarded-Proto: http\r\n")
		}
	}
}

func TestHost(t *testing.T) {
	for _, preserve := range []bool{true, false} {
		api, got := echo(t)
		own := strings.TrimPrefix(api, "http://")
		b := newBroker(t, stream.Streams{})
		g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) { s.PreserveHost = preserve })))
		want := own
		if preserve {
			want = "front:99"
		}
		g.exchange(head("POST / HTTP/1.1", "Host: front:99", "Content-Length: 0"))
		require.Contains(t, string(<-got), "\r\nHost: "+want+"\r\n")
		// The absolute form names the host; HTTP/1.0 may have none.
		g.exchange(head("POST http://front:99/a?b HTTP/1.1", "Host: front:99", "Content-Length: 0"))
		raw := string(<-got)
		require.True(t, strings.HasPrefix(raw, "POST /a?b HTTP/1.1\r\nHost: "+want+"\r\n"), raw)
		g.exchange(head("POST / HTTP/1.0", "Content-Length: 0"))
		require.Contains(t, string(<-got), "\r\nHost: "+own+"\r\n")
	}
}

func TestTargets(t *testing.T) {
	api, got := echo(t)
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) { s.CaptureMethods = []string{"*"} })))
	for _, target := range []string{"/?", "//x//", "/%2e%2E/", "/a;b?c=d?e", "/\xe4", "/|"} {
		require.Equal(t, 200, g.exchange(head("GET "+target+" HTTP/1.1", "Host: x")).StatusCode, target)
		require.True(t, strings.HasPrefix(string(<-got), "GET "+target+" HTTP/1.1\r\n"), target)
	}
	require.Equal(t, 200, g.exchange(head("OPTIONS * HTTP/1.1", "Host: x")).StatusCode)
	require.True(t, strings.HasPrefix(string(<-got), "OPTIONS * HTTP/1.1\r\n"))
	for _, line := range []string{"CONNECT x:80", "GET mailto:a", "GET /#a"} {
		require.Equal(t, 400, g.exchange(head(line+" HTTP/1.1", "Host: x")).StatusCode, line)
	}
	require.Equal(t, 431, g.exchange(head("GET / HTTP/1.1", "Host: x", "A: "+strings.Repeat("a", 70<<10))).StatusCode)
	require.Empty(t, got)
}

func TestPipelining(t *testing.T) {
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	})
	one := func(s string) string {
		return head("POST / HTTP/1.1", "Host: x", fmt.Sprintf("Content-Length: %d", len(s))) + s
	}
	_, br := g.raw(one("a") + one("bb") + one("ccc") + head("GET / HTTP/1.1", "Host: x"))
	for _, want := range []string{"a", "bb", "ccc", ""} {
		resp, err := http.ReadResponse(br, nil)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.Equal(t, want, string(body))
	}
	require.Len(t, b.eventually(capture.RequestsStream, 3), 3)
}

func TestUncaptured(t *testing.T) {
	for _, mode := range []string{"required", "off"} {
		g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			_, _ = w.Write(body)
		}, set(func(s *Settings) { s.Capture = mode }))
		method := "GET"
		if mode == "off" {
			method = "POST"
		}
		for _, body := range [][]byte{nil, pattern(10), pattern(1 << 20)} {
			for _, r := range []io.Reader{bytes.NewReader(body), unsized(body)} {
				a := g.must(method, "/", r)
				require.Equal(t, 200, a.StatusCode)
				require.True(t, bytes.Equal(body, a.body))
				require.NotContains(t, a.Header, capture.HTTPHeaderStored)
				a.id(t)
			}
		}
		require.Empty(t, g.spooled())
		require.Empty(t, b.read(capture.RequestsStream))
	}
}

func TestTLSForClients(t *testing.T) {
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	api, got := echo(t)
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) { s.TLSCertFile, s.TLSKeyFile = certFile, keyFile })))
	roots := x509.NewCertPool()
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots.AddCert(cert)
	for _, h2 := range []bool{true, false} {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: h2}
		resp, err := (&http.Client{Transport: tr, Timeout: patience}).Post("https://"+g.Addr().String()+"/", "text/plain", unsized(pattern(600<<10)))
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		tr.CloseIdleConnections()
		require.Equal(t, 200, resp.StatusCode)
		require.Equal(t, "synced", resp.Header.Get(capture.HTTPHeaderStored))
		raw := string(<-got)
		require.Contains(t, raw, "\r\nX-Forwarded-Proto: https\r\n")
		require.Contains(t, raw, fmt.Sprintf("\r\nVia: %s holdfast\r\n", strings.TrimPrefix(resp.Proto, "HTTP/")))
		require.True(t, strings.HasSuffix(raw, string(pattern(600<<10))))
	}
	_, err = New(newOptions(t, api, b.connect(), set(func(s *Settings) { s.TLSCertFile, s.TLSKeyFile = keyFile, keyFile })))
	require.ErrorContains(t, err, "HOLDFAST_TLS_CERT_FILE")
}

func TestNewRefuses(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	for want, f := range map[string]func(*Settings){
		"HOLDFAST_STORE":            func(s *Settings) { s.Store = "replicated" },
		"HOLDFAST_INGRESS_ID":       func(s *Settings) { s.IngressID = "a.b" },
		"HOLDFAST_ROUTES_FILE":      func(s *Settings) { s.RoutesFile = "x" },
		"HOLDFAST_UPSTREAM_URL":     func(s *Settings) { s.UpstreamURL.Path = "/base" },
		"HOLDFAST_UPSTREAM_CA_FILE": func(s *Settings) { s.UpstreamCAFile = "/nowhere" },
		"listen":                    func(s *Settings) { s.IngressAddr = "256.0.0.1:1" },
	} {
		_, err := New(newOptions(t, "http://127.0.0.1:1", b.connect(), set(f)))
		require.ErrorContains(t, err, want)
	}
}
