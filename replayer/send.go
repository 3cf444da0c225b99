package replayer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/upstream"
)

// Upstreams says where the requests of a route are sent. It is safe for
// concurrent use.
type Upstreams interface {
	// For gives the route's upstream. The error wraps [ErrNoUpstream] where there
	// is no such route, so that its requests are left alone; any other error is
	// in the way of a run.
	For(route string) (*Upstream, error)
	// Several reports whether not all upstreams are one API.
	Several() bool
}

// UpstreamOptions describe an API.
type UpstreamOptions struct {
	URL *url.URL
	// CAFile holds the certificates that the API's is checked against; empty
	// means the system's.
	CAFile string
	// Host replaces the captured Host header; empty leaves it.
	Host string
	// Health is the path that answers GET with 2xx while the API is well; empty
	// means that an API is well that accepts connections.
	Health string
	// MaxConns is how many connections there may be: as many as requests are
	// sent at a time.
	MaxConns int
	// Dial makes all connections; nil means [net.Dialer.DialContext].
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Upstream is one API, the connections to it, and what a route has changed in
// the requests that it gets. It is safe for concurrent use.
type Upstream struct {
	*api
	host   string   // replaces the captured one unless empty
	set    []header // replace captured ones
	keep   int      // bytes of answers that are kept
	health string   // path of the API's health, empty where it has none
}

// api is what the upstreams of several routes may share.
type api struct {
	pool *upstream.Pool
	base string // scheme and host
	addr string
	tls  *tls.Config // nil for http
	dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// header is one field of a request's head.
type header struct {
	name, value string
}

// idleTimeout of connections. Servers of APIs close idle ones after as little as
// 2 s; a request that meets such a close is a burnt attempt, a new connection
// costs next to nothing beside it.
const idleTimeout = time.Second

// NewUpstream reads the certificates and makes the pool. It does not connect.
func NewUpstream(o UpstreamOptions) (*Upstream, error) {
	a := &api{base: o.URL.Scheme + "://" + o.URL.Host, addr: addrOf(o.URL), dial: o.Dial}
	if a.dial == nil {
		a.dial = new(net.Dialer).DialContext
	}
	if o.URL.Scheme == "https" {
		a.tls = &tls.Config{ServerName: o.URL.Hostname(), NextProtos: []string{"http/1.1"}}
		if o.CAFile != "" {
			pem, err := os.ReadFile(o.CAFile)
			if err != nil {
				return nil, fmt.Errorf("read certificates: %w", err)
			}
			a.tls.RootCAs = x509.NewCertPool()
			if !a.tls.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("read certificates: %s holds none", o.CAFile)
			}
		}
	}
	pool, err := upstream.New(upstream.Options{
		URL: o.URL, TLS: a.tls, MaxConns: o.MaxConns, IdleTimeout: idleTimeout, Dial: o.Dial,
	})
	if err != nil {
		return nil, fmt.Errorf("make upstream: %w", err)
	}
	a.pool = pool
	return &Upstream{api: a, host: o.Host, health: o.Health}, nil
}

// addrOf gives host and port of an API.
func addrOf(u *url.URL) string {
	if u.Port() != "" {
		return u.Host
	}
	return net.JoinHostPort(u.Hostname(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
}

// For makes one upstream the upstream of every route.
func (u *Upstream) For(string) (*Upstream, error) { return u, nil }

// Several reports that there is one.
func (u *Upstream) Several() bool { return false }

// Close closes idle connections, to the API of all routes that share it.
func (u *Upstream) Close() { u.pool.Close() }

// probeTimeout bounds one probe. An API that takes longer to accept, or to say
// that it is well, is not one to send thousands of requests to.
const probeTimeout = 5 * time.Second

// Probe asks whether the API is well: by its health path, where 2xx is well, else
// by a connection.
func (u *Upstream) Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if u.health == "" {
		return u.connect(ctx)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.base+u.health, http.NoBody)
	if err != nil {
		return err
	}
	req.Host = u.host
	req.Header.Set("User-Agent", "holdfast-replayer")
	// A connection of its own: one that was kept alive may have died with the API
	// before.
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, TLSClientConfig: u.tls.Clone(), DialContext: u.dial},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		if inner := (*url.Error)(nil); errors.As(err, &inner) {
			err = inner.Err
		}
		return fmt.Errorf("GET %s: %w", u.health, err)
	}
	_ = resp.Body.Close() // the status is all that counts
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("GET %s: status %d", u.health, resp.StatusCode)
	}
	return nil
}

// connect opens a connection, TLS handshake included, and closes it. No byte of a
// request is sent.
func (a *api) connect(ctx context.Context) error {
	c, err := a.reach(ctx)
	if err != nil {
		return err
	}
	_ = c.Close() // nothing was said
	return nil
}

// reach opens a connection, TLS handshake included.
func (a *api) reach(ctx context.Context) (net.Conn, error) {
	c, err := a.dial(ctx, "tcp", a.addr)
	if err != nil || a.tls == nil {
		return c, err
	}
	secure := tls.Client(c, a.tls)
	if err := secure.HandshakeContext(ctx); err != nil {
		_ = c.Close() // the handshake is what failed
		return nil, err
	}
	return secure, nil
}

// lastBreath is how long a process that is about to end may still accept
// connections, to reset them when its listener goes.
const lastBreath = 100 * time.Millisecond

// Examine is Probe right after the API seemed to die: a connection must hold for
// a moment to be a proof of life.
func (u *Upstream) Examine(ctx context.Context) error {
	if u.health != "" {
		return u.Probe(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := u.reach(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }() // nothing was written
	if err := c.SetReadDeadline(time.Now().Add(lastBreath)); err != nil {
		return err
	}
	var one [1]byte
	if _, err = c.Read(one[:]); errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil
	}
	return err
}

// payloads reads captured requests.
type payloads interface {
	Payload(ctx context.Context, id uuid.UUID) (head []byte, body io.ReadCloser, err error)
}

// answer is what came of one send.
type answer struct {
	status     int
	whole      bool
	retryAfter string // as the API sent it
	// unconnected is true when there was no connection, or a dead one, so that the
	// API saw nothing.
	unconnected bool
	// unsent is true when the lease left no time, so that nothing was tried.
	unsent bool
	// broke is true when the connection broke after a part of the request was
	// sent, timeout when the API took too long.
	broke, timeout bool
	kept           *capture.Answer // nil where none is to be kept, or there is none
	err            error           // why there is no whole answer
}

// death says how the API died during an attempt, as it seems: the connection
// broke, or a gateway had nobody to ask. It is empty where the attempt ended in
// another way. A 503 that says when to come back is of an API that lives.
func (a *answer) death() string {
	switch {
	case a.broke:
		return a.err.Error()
	case a.status == http.StatusBadGateway, a.status == http.StatusGatewayTimeout,
		a.status == http.StatusServiceUnavailable && a.retryAfter == "":
		return fmt.Sprintf("status %d", a.status)
	}
	return ""
}

// overload reports whether the answer says, or the lack of one shows, that the
// API has too much to do.
func (a *answer) overload() bool {
	return a.timeout || a.status == http.StatusTooManyRequests || a.status == http.StatusServiceUnavailable || a.status == http.StatusGatewayTimeout
}

// errShortLease says that somebody else might send the request before the
// timeout.
var errShortLease = errors.New("not sent: the lease would end before the timeout")

// send makes one attempt, and waits for the whole answer until the timeout of
// the request's policy, and never beyond expires, when the attempt's lease ends:
// reading the payload may take long, and the process may be stopped anywhere.
// Nothing is sent twice, no redirect followed. At most keep bytes of the answer
// are kept.
func (u *Upstream) send(ctx context.Context, source payloads, c ledger.Candidate, a capture.Attempt, expires time.Time, keep int) answer {
	head, body, err := source.Payload(ctx, c.ID)
	if err != nil {
		return answer{err: fmt.Errorf("read payload: %w", err)}
	}
	defer func() { _ = body.Close() }()
	head = u.head(head, c, a)

	// A small body goes out with the head. It is read before the API sees a
	// byte, so that a ledger that fails here cannot cut the request.
	first := make([]byte, min(c.Size, firstPart))
	if _, err := io.ReadFull(body, first); err != nil {
		return answer{err: fmt.Errorf("read payload: %w", err)}
	}
	deadline := time.Now().Add(c.Policy.Timeout) // by real time, as the lease is
	if deadline.After(expires) {
		return answer{unsent: true, err: errShortLease}
	}
	x, err := u.pool.Begin(deadline, c.Method, c.Size-int64(len(first)), first, head)
	if err != nil {
		return failed(err)
	}
	defer x.Close()
	if rest := c.Size - int64(len(first)); rest > 0 {
		return exchange(x, body, rest, keep)
	}
	return receive(x, keep)
}

// firstPart is how much of a body is read before anything is sent; what is
// above it is streamed.
const firstPart = 256 << 10

// exchange sends the rest of the body, then reads the answer.
func exchange(x *upstream.Exchange, body io.Reader, rest int64, keep int) answer {
	buf := make([]byte, 64<<10)
	for rest > 0 {
		n, err := io.ReadFull(body, buf[:min(rest, int64(len(buf)))])
		if err != nil {
			// The connection is closed with the request cut, so that the API does
			// not take it for whole.
			return answer{err: fmt.Errorf("read payload: %w", err)}
		}
		if _, err := x.Write(buf[:n]); err != nil {
			return early(x, failed(err), keep)
		}
		rest -= int64(n)
	}
	return receive(x, keep)
}

// earlyGrace is how long an answer may take that was given before the whole
// request was read, and that the deadline of the write has met.
const earlyGrace = time.Second

// early reads the answer of an API that did not read the whole request, a 413
// for instance; without one it gives what the write met.
func early(x *upstream.Exchange, write answer, keep int) answer {
	if err := x.Extend(time.Now().Add(earlyGrace)); err != nil {
		return write
	}
	if got := receive(x, keep); got.whole {
		return got
	}
	return write
}

func receive(x *upstream.Exchange, keep int) answer {
	resp, err := x.Answer(nil)
	if err != nil {
		return failed(err)
	}
	got := answer{status: resp.Status, retryAfter: resp.Fields.Get("Retry-After")}
	sink := io.Discard
	if keep > 0 {
		got.kept = capture.NewAnswer(resp.Fields.Get("Content-Type"), resp.Fields.Get("Content-Encoding"))
		sink = keeper{got.kept, keep}
	}
	if _, err := io.Copy(sink, struct{ io.Reader }{x}); err != nil {
		if got.kept != nil {
			got.kept.Cut = true
		}
		got.err = fmt.Errorf("answer cut short: %w", err)
		got.broke, got.timeout = fates(err)
		return got
	}
	got.whole = true
	return got
}

// keeper keeps the beginning of what is written to it.
type keeper struct {
	answer *capture.Answer
	most   int
}

func (k keeper) Write(b []byte) (int, error) {
	k.answer.Keep(b, k.most)
	return len(b), nil
}

func failed(err error) answer {
	var failure *upstream.Error
	got := answer{err: err}
	if errors.As(err, &failure) {
		got.unconnected = !failure.Sent // also where one that was kept alive had died
		if failure.Sent {
			got.broke, got.timeout = fates(failure)
		}
		if got.timeout {
			got.err = errNoAnswer
		}
	}
	return got
}

// fates tells a connection that broke from an answer that did not come in time,
// and both from an answer that is none.
func fates(err error) (broke, timeout bool) {
	var t interface{ Timeout() bool }
	if errors.As(err, &t) && t.Timeout() {
		return false, true
	}
	for _, one := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED} {
		if errors.Is(err, one) {
			return true, false
		}
	}
	return false, false
}

var errNoAnswer = errors.New("no whole answer within the timeout")

// dropped are the header names that are not sent again: framing, which is made
// anew, and what ends at a hop. The gateway took them away already; a capture
// that came into the stream by another way may have them.
var dropped = []string{
	"Connection", "Proxy-Connection", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
	"Content-Length", "Expect",
}

// isChunked reports whether the body was captured in the chunked coding, which
// alone has a place for the trailer section that it had.
func isChunked(name string, value []byte) bool {
	return strings.EqualFold(name, "Transfer-Encoding") && strings.EqualFold(strings.Trim(string(value), ": \t"), "chunked")
}

// head gives the captured head as it is sent: the request line and the header
// fields byte for byte and in their order, but for those that the route
// replaces, then those, then what every replay adds.
func (u *Upstream) head(head []byte, c ledger.Candidate, a capture.Attempt) []byte {
	out := make([]byte, 0, len(head)+256)
	line, rest, _ := bytes.Cut(head, []byte("\r\n"))
	out = append(append(out, line...), "\r\n"...)
	framed, chunked := c.Size > 0, false
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		if len(line) == 0 {
			break
		}
		colon := max(bytes.IndexByte(line, ':'), 0)
		name := string(line[:colon])
		switch {
		case strings.EqualFold(name, "Content-Length"):
			framed = true
			continue
		case isChunked(name, line[colon:]):
			chunked = true
		case capture.IsOwnHTTPHeader(name) || isDropped(name) || u.sets(name):
			continue
		case u.host != "" && strings.EqualFold(name, "Host"):
			line = []byte("Host: " + u.host)
		}
		out = append(append(out, line...), "\r\n"...)
	}
	add := func(name, value string) {
		out = append(out, name...)
		out = append(out, ": "...)
		out = append(out, value...)
		out = append(out, "\r\n"...)
	}
	for _, h := range u.set {
		add(h.name, h.value)
	}
	if framed && !chunked {
		add("Content-Length", strconv.FormatInt(c.Size, 10))
	}
	add(capture.HTTPHeaderID, c.ID.String())
	add(capture.HTTPHeaderReplay, a.Run)
	add(capture.HTTPHeaderAttempt, strconv.Itoa(a.Number))
	add(capture.HTTPHeaderReceivedAt, c.ReceivedAt.UTC().Format(time.RFC3339Nano))
	return append(out, "\r\n"...)
}

// sets reports whether the route replaces the header.
func (u *Upstream) sets(name string) bool {
	return slices.ContainsFunc(u.set, func(h header) bool { return sameHeader(h.name, name) })
}

// sameHeader reports whether an API may take the names for one: letter case does
// not count, nor does "_" for "-" to CGI-like servers.
func sameHeader(a, b string) bool {
	return strings.EqualFold(strings.ReplaceAll(a, "_", "-"), strings.ReplaceAll(b, "_", "-"))
}

func isDropped(name string) bool {
	for _, d := range dropped {
		if strings.EqualFold(d, name) {
			return true
		}
	}
	return false
}

// waitOf reads a Retry-After header (RFC 9110 section 10.2.3): seconds or a
// date. ok is false when there is none that can be read.
func waitOf(retryAfter string, now time.Time) (time.Duration, bool) {
	if retryAfter == "" {
		return 0, false
	}
	if seconds, err := strconv.ParseInt(retryAfter, 10, 32); err == nil && seconds >= 0 {
		return time.Duration(seconds) * time.Second, true
	}
	if at, err := http.ParseTime(retryAfter); err == nil {
		return max(at.Sub(now), 0), true
	}
	return 0, false
}
