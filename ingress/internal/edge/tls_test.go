package edge

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// pair is a certificate that signs itself, in files.
type pair struct {
	certFile, keyFile string
	pool              *x509.CertPool
	serial            int64
}

func newPair(t *testing.T, dir string, serial int64) *pair {
	t.Helper()
	p := &pair{certFile: filepath.Join(dir, "tls.crt"), keyFile: filepath.Join(dir, "tls.key"), pool: x509.NewCertPool(), serial: serial}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	require.NoError(t, err)
	coded, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	p.pool.AddCert(leaf)
	require.NoError(t, os.WriteFile(p.certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	require.NoError(t, os.WriteFile(p.keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: coded}), 0o600))
	return p
}

// withTLS makes a server speak TLS.
func withTLS(t *testing.T, p *pair) func(o *Options) {
	t.Helper()
	cert, err := LoadCertificate(p.certFile, p.keyFile, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	require.NoError(t, err)
	return func(o *Options) { o.TLS = cert.Config() }
}

// http2Client speaks HTTP/2 over one connection.
func http2Client(t *testing.T, p *pair) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.pool, ServerName: "localhost"}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func TestTLSSpeaksHTTP11(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, func(x *Exchange) {
		if !x.TLS || x.Request.Major != 1 {
			x.Abort()
			return
		}
		if x.Request.Target == "/watched" {
			stop := x.Watch(func() { t.Error("the client is there") })
			_ = x.Interim(103, "Early Hints", nil)
			stop()
		}
		echo(x)
	}, withTLS(t, p))
	c := s.dialTLS(p, "http/1.1")
	text, want := pipelined()
	for range 2 {
		c.send(text)
		for _, w := range want {
			require.Equal(t, w, c.receive().text)
		}
		c.send(get("/watched"))
		require.Equal(t, 103, c.receive().StatusCode)
		require.Equal(t, "/watched ", c.receive().text)
	}
}

// corked keeps what is written until it is told to send it, in one piece.
type corked struct {
	net.Conn
	kept []byte
	cork bool
}

func (c *corked) Write(b []byte) (int, error) {
	if c.cork {
		c.kept = append(c.kept, b...)
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// A connection of TLS 1.2 whose end is here already gives it with the last bytes.
// A body that was cut there is not whole.
func TestTLSEndIsNoEndOfABody(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	type reading struct {
		n   int
		err error
	}
	readings := make(chan reading, 1)
	s := start(t, func(x *Exchange) {
		var r reading
		buf := make([]byte, 32<<10)
		for r.err == nil {
			var n int
			n, r.err = x.Read(buf)
			r.n += n
		}
		readings <- r
		x.Abort()
	}, withTLS(t, p))
	for _, size := range []int{1, 4096, 8192} {
		c := s.dial()
		cork := &corked{Conn: c.Conn}
		tc := tls.Client(cork, &tls.Config{RootCAs: p.pool, ServerName: "localhost", MaxVersion: tls.VersionTLS12, DynamicRecordSizingDisabled: true})
		require.NoError(t, tc.Handshake())
		cork.cork = true
		_, err := io.WriteString(tc, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"+strconv.FormatInt(int64(size), 16)+"\r\n")
		require.NoError(t, err)
		_, err = io.WriteString(tc, strings.Repeat("x", size))
		require.NoError(t, err)
		require.NoError(t, tc.CloseWrite())
		require.NoError(t, cork.SetWriteDeadline(time.Now().Add(patience))) // tls has made it the past
		_, err = cork.Conn.Write(cork.kept)
		require.NoError(t, err)
		require.Equal(t, reading{size, io.ErrUnexpectedEOF}, within(t, readings))
	}
}

func TestTLSLingersToo(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, func(x *Exchange) { reply(x, 200, "unread") }, withTLS(t, p))
	c := s.dialTLS(p, "http/1.1")
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c.Conn, post("/", strings.Repeat("x", 4<<20)))
		sent <- err
	}()
	a := c.receive()
	require.True(t, a.Close)
	require.Equal(t, "unread", a.text)
	require.NoError(t, <-sent)
	c.ends()
}

func TestFailedHandshakes(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, echo, withTLS(t, p), func(o *Options) { o.HeadTimeout = soon })
	c := s.dial()
	c.send(get("/")) // no TLS
	_, _ = io.ReadAll(c)
	c = s.dial()
	c.ends() // nothing for too long
	require.Eventually(t, func() bool { return s.metric("holdfast_tls_handshake_failures_total") == 2 && s.open() == 0 }, patience, time.Millisecond)
}

func TestConnectionLimitOverTLS(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, echo, withTLS(t, p), func(o *Options) { o.Conns = 1 })
	client := http2Client(t, p)
	resp, err := client.Get("https://" + s.Addr().String())
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 2, resp.ProtoMajor)
	require.Equal(t, 1, s.open(), "it is counted while net/http has it")
	s.dial().ends()
	client.CloseIdleConnections()
	require.Eventually(t, func() bool { return s.open() == 0 }, patience, time.Millisecond)
}

func TestHTTP2(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, func(x *Exchange) {
		switch x.Request.Target {
		case "/abort":
			x.Abort()
		case "/panic":
			panic("over HTTP/2")
		case "/nothing":
		case "/end":
			_ = x.End(nil)
		case "/little":
			x.Head(200, "OK", x.Answer, 5)
			_ = x.Write([]byte("hell"))
			_ = x.End(nil)
		case "/much":
			x.Head(200, "OK", x.Answer, 5)
			_ = x.Write([]byte("hell"))
			require.ErrorIs(t, x.Write([]byte("oo")), errTooMuch)
			_ = x.Write([]byte("o"))
			_ = x.End(nil)
		case "/trailer":
			_, err := io.ReadAll(x)
			require.NoError(t, err)
			_ = x.Interim(103, "Early Hints", wire.Fields{}.Add("Link", "l"))
			x.Head(200, "OK", x.Answer, wire.Chunked)
			_ = x.Write([]byte(x.Trailer().Get("X-T")))
			_ = x.End(wire.Fields{}.Add("x-u", "v"))
		case "/tunnel":
			if !x.Tunnel("", nil, nil, nil, 0) {
				reply(x, 501, "")
			}
		case "/http":
			w, _ := x.HTTP()
			w.WriteHeader(299)
		default:
			if x.Request.Major != 2 || !x.TLS {
				x.Abort()
				return
			}
			echo(x)
		}
	}, withTLS(t, p))
	client := http2Client(t, p)
	base := "https://" + s.Addr().String()
	do := func(method, target, body string) (answer, error) {
		t.Helper()
		req, err := http.NewRequest(method, base+target, strings.NewReader(body))
		require.NoError(t, err)
		if target == "/trailer" {
			req.ContentLength = -1
			req.Trailer = http.Header{"X-T": {"told"}}
		}
		resp, err := client.Do(req)
		if err != nil {
			return answer{}, err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return answer{resp, string(text)}, err
	}
	a, err := do("POST", "/p?q", "hello")
	require.NoError(t, err)
	require.Equal(t, "/p?q hello", a.text)
	a, err = do("HEAD", "/head", "")
	require.NoError(t, err)
	require.EqualValues(t, len("/head "), a.ContentLength)
	a, err = do("POST", "/trailer", "x")
	require.NoError(t, err)
	require.Equal(t, "told", a.text)
	require.Equal(t, "v", a.Trailer.Get("X-U"))
	a, err = do("GET", "/much", "")
	require.NoError(t, err)
	require.Equal(t, "hello", a.text)
	a, err = do("GET", "/tunnel", "")
	require.NoError(t, err)
	require.Equal(t, 501, a.StatusCode)
	a, err = do("GET", "/http", "")
	require.NoError(t, err)
	require.Equal(t, 299, a.StatusCode)
	for _, target := range []string{"/abort", "/panic", "/nothing", "/end", "/little"} {
		_, err = do("GET", target, "")
		require.ErrorContains(t, err, "INTERNAL_ERROR", "%s: the stream is reset", target)
	}
	require.EqualValues(t, 1, s.metric("holdfast_panics_total"))
	require.Equal(t, 1, s.open())
}

func TestHTTP2SlowBody(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	failed := make(chan error, 1)
	s := start(t, func(x *Exchange) {
		_, err := io.ReadAll(x)
		failed <- err
		reply(x, 408, "")
	}, withTLS(t, p), func(o *Options) { o.BodyTimeout = soon })
	body, w := io.Pipe()
	defer w.Close()
	req, err := http.NewRequest("POST", "https://"+s.Addr().String(), body)
	require.NoError(t, err)
	resp, err := http2Client(t, p).Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, 408, resp.StatusCode)
	require.ErrorIs(t, <-failed, os.ErrDeadlineExceeded)
}

// Frames of HTTP/2 (RFC 9113 section 6).
const (
	frameHeaders  = 1
	frameReset    = 3
	frameSettings = 4
	endOfBoth     = 0x5 // of the headers, and of the stream
)

// frame is a frame of a stream.
func frame(kind, flags byte, stream uint32, payload []byte) []byte {
	head := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	head = binary.BigEndian.AppendUint32(append(head, flags), stream)
	return append(head, payload...)
}

// rawHTTP2 sends a request of these fields, and gives the status of its answer,
// or "reset".
func (s *server) rawHTTP2(p *pair, fields ...string) (status string) {
	s.t.Helper()
	c := s.dialTLS(p, "h2")
	defer c.Close()
	out := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(frameSettings, 0, 0, nil)...)
	c.send(string(append(out, frame(frameHeaders, endOfBoth, 1, literals(fields))...)))
	for {
		var head [9]byte
		_, err := io.ReadFull(c.r, head[:])
		require.NoError(s.t, err)
		payload := make([]byte, binary.BigEndian.Uint32(head[:])>>8)
		_, err = io.ReadFull(c.r, payload)
		require.NoError(s.t, err)
		switch {
		case head[3] == frameReset:
			return "reset"
		case head[3] != frameHeaders:
		case payload[0] == 0x88: // of the static table (RFC 7541 appendix A)
			return "200"
		case payload[0] == 0x8c:
			return "400"
		default:
			// Another status, as it is, with a name of the table.
			require.Contains(s.t, []byte{0x48, 0x49, 0x4a, 0x4b, 0x4c, 0x4d, 0x4e}, payload[0])
			require.EqualValues(s.t, 3, payload[1])
			return string(payload[2:5])
		}
	}
}

// literals codes names and values without index and table (RFC 7541 section
// 6.2.2).
func literals(fields []string) (block []byte) {
	for i, text := range fields {
		if i%2 == 0 {
			block = append(block, 0)
		}
		block = append(append(block, byte(len(text))), text...)
	}
	return block
}

// What net/http lets pass would be something else in the head of HTTP/1.1.
func TestHTTP2CannotWriteHeadsOfHTTP11(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	s := start(t, echo, withTLS(t, p))
	head := func(method, authority, path string, fields ...string) []string {
		return append([]string{":method", method, ":scheme", "https", ":authority", authority, ":path", path}, fields...)
	}
	require.Equal(t, "200", s.rawHTTP2(p, head("GET", "a:80", "/%2F//?|")...))
	require.Equal(t, "200", s.rawHTTP2(p, head("GET", "a", "/", "host", "A")...))
	require.Equal(t, "200", s.rawHTTP2(p, head("OPTIONS", "a", "*")...))
	for name, fields := range map[string][]string{
		"a method with a request line": head("GET /admin HTTP/1.1", "a", "/"),
		"a method that is no token":    head("G@T", "a", "/"),
		"a space in the authority":     head("GET", "a b", "/"),
		"a path in the authority":      head("GET", "a/b", "/"),
		"a user in the authority":      head("GET", "u@a", "/"),
		"a space in the target":        head("GET", "a", "/ HTTP/1.1"),
		"another Host":                 head("GET", "a", "/", "host", "b"),
		"two Hosts":                    head("GET", "a", "/", "host", "a", "host", "b"),
		"a Host that is none":          {":method", "GET", ":scheme", "https", ":path", "/", "host", "a b"},
		"a length that is none":        head("GET", "a", "/", "content-length", "+0"),
		"a target without slash":       head("GET", "a", "a"),
	} {
		got := s.rawHTTP2(p, fields...)
		require.Contains(t, []string{"400", "reset"}, got, name)
	}
	require.Equal(t, "417", s.rawHTTP2(p, head("GET", "a", "/", "expect", "x")...))
	many := head("GET", "a", "/")
	for range 40 {
		many = append(many, "x-a", "v")
	}
	require.Equal(t, "431", s.rawHTTP2(p, many...))
}

func TestHTTP2Watch(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	started, left := make(chan struct{}), make(chan struct{})
	s := start(t, func(x *Exchange) {
		stop := x.Watch(func() { close(left) })
		close(started)
		<-left
		stop()
		x.Abort()
	}, withTLS(t, p))
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+s.Addr().String(), nil)
	require.NoError(t, err)
	go func() { <-started; cancel() }()
	_, err = http2Client(t, p).Do(req)
	require.ErrorIs(t, err, context.Canceled)
	<-left
}

func TestCertificateChanges(t *testing.T) {
	dir := t.TempDir()
	first := newPair(t, dir, 1)
	log, reg := &logs{}, prometheus.NewRegistry()
	cert, err := LoadCertificate(first.certFile, first.keyFile, slog.New(slog.NewTextHandler(log, nil)), reg)
	require.NoError(t, err)
	cert.every = time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- cert.Run(ctx) }()
	defer func() { cancel(); require.NoError(t, <-ran) }()
	s := start(t, echo, func(o *Options) { o.TLS = cert.Config() })
	s.reg = reg
	kept := s.dialTLS(first, "http/1.1")
	serial := func() int64 { return cert.current.Load().Leaf.SerialNumber.Int64() }
	require.EqualValues(t, 1, serial())

	// The same fault is reported once, also when the files were good between.
	good, err := os.ReadFile(first.certFile)
	require.NoError(t, err)
	for n := range 2 {
		require.NoError(t, os.WriteFile(first.certFile, []byte("no certificate"), 0o600))
		require.Eventually(t, func() bool { return s.metric("holdfast_tls_certificate_reload_failures_total") == float64(n+1) }, patience, time.Millisecond)
		require.NoError(t, os.WriteFile(first.certFile, good, 0o600))
		looks := func() bool { return !cert.failing.Load() }
		require.Eventually(t, looks, patience, time.Millisecond)
	}
	require.EqualValues(t, 1, serial())

	second := newPair(t, dir, 2)
	require.Eventually(t, func() bool { return serial() == 2 }, patience, time.Millisecond)
	c := s.dialTLS(second, "http/1.1")
	c.send(get("/"))
	require.Equal(t, 200, c.receive().StatusCode)
	kept.send(get("/"))
	require.Equal(t, 200, kept.receive().StatusCode, "connections go on")
	require.Contains(t, log.String(), "certificate changed")
}

func TestCertificateThatCannotBeLoaded(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	other := newPair(t, t.TempDir(), 2)
	load := func(cert, key string) error {
		_, err := LoadCertificate(cert, key, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		return err
	}
	require.NoError(t, load(p.certFile, p.keyFile))
	require.ErrorContains(t, load(p.certFile+"x", p.keyFile), "HOLDFAST_TLS_CERT_FILE")
	require.ErrorContains(t, load(p.certFile, p.keyFile+"x"), "HOLDFAST_TLS_KEY_FILE")
	require.ErrorContains(t, load(p.certFile, other.keyFile), "HOLDFAST_TLS_KEY_FILE")
	require.True(t, errors.Is(load("", ""), os.ErrNotExist))
}
