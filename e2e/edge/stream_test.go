package edge_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tap is one exchange of an API that sends its answer in parts, when the test
// says so.
type tap struct {
	parts chan string
	read  chan string // what came of a request's body, as it came
	gone  chan error  // how the answer ended
	close func()      // ends the parts
}

// newTap makes the next exchange.
func newTap(t *testing.T, next *atomic.Pointer[tap]) *tap {
	t.Helper()
	a := &tap{parts: make(chan string, 1), read: make(chan string, 10), gone: make(chan error, 1)}
	a.close = sync.OnceFunc(func() { close(a.parts) })
	t.Cleanup(a.close)
	next.Store(a)
	return a
}

func (a *tap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	switch r.URL.Path {
	case "/upload":
		buf := make([]byte, 1<<10)
		for {
			n, err := r.Body.Read(buf)
			if n > 0 {
				a.read <- string(buf[:n])
			}
			if err != nil {
				a.read <- err.Error()
				return
			}
		}
	case "/events":
		w.Header().Set("Content-Type", "text/event-stream")
	}
	if length := r.URL.Query().Get("length"); length != "" {
		w.Header().Set("Content-Length", length)
	}
	var err error
	if r.URL.Query().Has("head") {
		err = control.Flush() // alone
	}
	for {
		select {
		case part, more := <-a.parts:
			if !more {
				a.gone <- err
				return
			}
			if _, err = io.WriteString(w, part); err == nil {
				err = control.Flush()
			}
		case <-r.Context().Done():
			a.gone <- context.Cause(r.Context())
			return
		}
	}
}

// TestStreams sends answers in parts. Each reaches the client before the API
// sends the next; so does a head that goes alone.
func TestStreams(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	var next atomic.Pointer[tap]
	url := startAPI(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { next.Load().ServeHTTP(w, r) }))
	plain := newWay(t, "HTTP/1.1", startSystem(t, url).IngressURL(), nil)
	http1, http2 := p.ways(ingressAddr(startTLS(t, p, url)))
	parts := []string{"a", "bc", "data: x\n\n", string(pseudorandom(40_000)), "z"}
	whole := 0
	for _, part := range parts {
		whole += len(part)
	}
	for _, w := range []way{plain, http1, http2} {
		for _, c := range []struct{ method, target string }{
			{"GET", "/events"}, {"POST", "/events"}, {"GET", "/events?head"}, // a captured request holds its head back: the gateway may still answer for the API
			{"GET", "/drip?length=" + strconv.Itoa(whole)},
		} {
			t.Run(w.name+" "+c.method+" "+c.target, func(t *testing.T) {
				api := newTap(t, &next)
				if c.target != "/events?head" {
					api.parts <- parts[0]
				}
				resp, err := w.client.Do(w.request(t.Context(), t, c.method, c.target, nil))
				require.NoError(t, err, "the head comes before the API sends anything else")
				defer resp.Body.Close()
				for i, part := range parts {
					if i > 0 || c.target == "/events?head" {
						api.parts <- part
					}
					got := make([]byte, len(part))
					_, err := io.ReadFull(resp.Body, got)
					require.NoError(t, err)
					require.True(t, part == string(got))
				}
				api.close()
				rest, err := io.ReadAll(resp.Body)
				require.NoError(t, err)
				require.Empty(t, rest)
				require.NoError(t, receive(t, api.gone))
			})
		}
		t.Run(w.name+" client leaves a stream", func(t *testing.T) {
			api := newTap(t, &next)
			api.parts <- "first"
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			resp, err := w.client.Do(w.request(ctx, t, http.MethodGet, "/events", nil))
			require.NoError(t, err)
			defer resp.Body.Close()
			leave()
			// It is not stored, so nobody needs the rest of the answer.
			require.ErrorIs(t, receive(t, api.gone), context.Canceled)
		})
		t.Run(w.name+" upload", func(t *testing.T) {
			api := newTap(t, &next)
			body, writer := io.Pipe()
			ended := make(chan error, 1)
			go func() {
				resp, err := w.client.Do(w.request(t.Context(), t, "SEARCH", "/upload", body))
				if err == nil {
					err = resp.Body.Close()
				}
				ended <- err
			}()
			for i := range 3 {
				part := fmt.Sprint("part ", i)
				_, err := io.WriteString(writer, part)
				require.NoError(t, err)
				got := receive(t, api.read)
				for len(got) < len(part) { // the client may have sent it in pieces
					got += receive(t, api.read)
				}
				require.Equal(t, part, got, "the API has it before the client sends the next")
			}
			require.NoError(t, writer.Close())
			require.Equal(t, "EOF", receive(t, api.read))
			require.NoError(t, receive(t, ended))
		})
	}
}

// TestHalfChunk sends chunks in two halves, both ways. A chunk is no unit that
// anybody may wait for.
func TestHalfChunk(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() }) // it is closed below
	dial := func(addr string) (net.Conn, *bufio.Reader) {
		t.Helper()
		c, err := net.Dial("tcp", addr)
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
		t.Cleanup(func() { _ = c.Close() }) // the other side may have gone
		return c, bufio.NewReader(c)
	}
	expect := func(r io.Reader, want string) {
		t.Helper()
		got := make([]byte, len(want))
		n, err := io.ReadFull(r, got)
		require.NoError(t, err, "%q", got[:n])
		require.Equal(t, want, string(got))
	}
	write := func(c net.Conn, text string) {
		t.Helper()
		_, err := io.WriteString(c, text)
		require.NoError(t, err)
	}
	client, clientReader := dial(startIngress(t, "http://"+l.Addr().String()))
	write(client, "SEARCH / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\na\r\nhello")
	api, err := l.Accept()
	require.NoError(t, err)
	defer api.Close()
	require.NoError(t, l.Close())
	require.NoError(t, api.SetDeadline(time.Now().Add(patience)))
	r, err := http.ReadRequest(bufio.NewReader(api))
	require.NoError(t, err)
	expect(r.Body, "hello")
	write(client, "world\r\n0\r\n\r\n")
	expect(r.Body, "world")
	_, err = r.Body.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)

	write(api, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\nhello")
	resp, err := http.ReadResponse(clientReader, nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	expect(resp.Body, "hello")
	write(api, "world\r\n0\r\n\r\n")
	expect(resp.Body, "world")
	_, err = resp.Body.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

// TestCutShort ends answers before they are whole. The client can tell.
func TestCutShort(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	url := startAPI(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		size, _ := strconv.Atoi(r.URL.Query().Get("size"))
		if r.URL.Query().Has("length") {
			w.Header().Set("Content-Length", strconv.Itoa(size+1))
		}
		_, _ = w.Write(bytes.Repeat([]byte{'x'}, size)) // the ingress reads it
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	plain := newWay(t, "HTTP/1.1", startSystem(t, url).IngressURL(), nil)
	http1, http2 := p.ways(ingressAddr(startTLS(t, p, url)))
	for _, w := range []way{plain, http1, http2} {
		for _, method := range []string{"GET", "POST"} {
			for _, query := range []string{"size=10", "size=10&length", "size=1000000", "size=1000000&length"} {
				t.Run(w.name+" "+method+" "+query, func(t *testing.T) {
					resp, err := w.client.Do(w.request(t.Context(), t, method, "/?"+query, nil))
					if err != nil {
						return // not even a head
					}
					defer resp.Body.Close()
					if resp.StatusCode == http.StatusBadGateway {
						return
					}
					_, err = io.Copy(io.Discard, resp.Body)
					require.Error(t, err, "it must not look whole")
				})
			}
		}
	}
}
